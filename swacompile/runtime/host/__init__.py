"""C++ that every runtime's library is linked with: which instruction sets the CPU has, and what a kernel asks of its host."""
