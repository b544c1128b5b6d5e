"""A shared library that holds CPU kernels and nothing of a runtime: C++ sources that it is linked with."""
