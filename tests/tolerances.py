"""Every numeric tolerance of the tests."""

MODEL_ATOL = 1e-4
"""Largest difference between a float32 model's outputs before and after rewriting."""
HALF_MODEL_ATOL = 2e-2
"""The same for a float16 model, whose own rounding is of this size at outputs near 8."""
