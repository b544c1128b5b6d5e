"""When a masked score is hidden: the weight must be exactly zero beside any visible score."""

import numpy as np
import pytest

from swacompile.passes.logits import Logit

SCORES = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_minus_infinity_hides(dtype: str) -> None:
    assert Logit(constant=float("-inf")).hides(dtype, dtype)
    assert not Logit(constant=float("inf")).hides(dtype, dtype)
    assert not Logit(constant=0.0).hides(dtype, dtype)


@pytest.mark.parametrize("dtype", SCORES)
def test_the_lowest_number_hides_in_its_own_type_only(dtype: str) -> None:
    lowest = float(np.finfo(SCORES[dtype]).min)
    assert Logit(constant=lowest).hides(dtype, "float64")
    assert Logit(constant=2 * lowest).hides(dtype, "float64")
    wider = [name for name in SCORES if np.finfo(SCORES[name]).max > np.finfo(SCORES[dtype]).max]
    assert not any(Logit(constant=lowest).hides(name, name) for name in wider)


@pytest.mark.parametrize("constant", [-1e4, -1e9, -1e30])
def test_other_large_numbers_may_leak(constant: float) -> None:
    assert not Logit(inner=1.0, constant=constant).hides("float32", "float32")


@pytest.mark.parametrize(("constant", "hides"), [(-203.0, False), (-205.0, True), (-1e4, True)])
def test_a_softcap_bounds_the_scores(constant: float, hides: bool) -> None:
    """Capped at 50, scores differ by 100 at most, and exp(-104) is 0 in float32: -205 hides for certain, -203 does not."""
    capped = Logit(inner=0.02, outer=50.0, constant=constant)
    assert capped.hides("float32", "float32") is hides
    assert (np.exp(np.float32(constant + 100)) == 0) is np.bool_(hides)


def test_a_bias_beside_a_softcap_is_no_bound() -> None:
    from swacompile.index_expr import Sort, apply

    assert not Logit(inner=0.02, outer=50.0, constant=-1e4, terms=(apply("bias", (), Sort.REAL),)).hides(
        "float32", "float32"
    )
