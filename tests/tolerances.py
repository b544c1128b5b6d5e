"""Every numeric tolerance of the tests."""

MODEL_ATOL = 1e-4
"""Largest difference between a float32 model's outputs before and after rewriting."""
HALF_MODEL_ATOL = 2e-2
"""The same for a float16 model, whose own rounding is of this size at outputs near 8."""
KERNEL_ATOL = {"f32": 2e-5, "f16": 4e-3, "bf16": 3e-2}
"""Largest difference between a kernel's output and the float64 reference, by element type: outputs near 4 rounded to that type."""
WINDOW_OFF_BY_ONE = {"f32": 1e-2, "f16": 2e-2, "bf16": 8e-2}
"""What a window one key narrower moves at least: well above the tolerance."""
