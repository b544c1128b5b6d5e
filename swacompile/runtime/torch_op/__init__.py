"""The torch operator: C++ sources, how they are built and loaded, and the gradient."""
