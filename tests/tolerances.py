"""Every numeric tolerance of the tests."""

MODEL_ATOL = 1e-4
"""Largest difference between a float32 model's outputs before and after rewriting."""
