"""swacompile: find sliding-window attention in exported models, prove it, and run it with banded kernels."""
