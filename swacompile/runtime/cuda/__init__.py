"""Runs CUDA kernel libraries on torch tensors."""
