"""What each op of the neutral graph means, as a formula: one function an op, one file a family."""
