"""Conditions on sizes in the words that people read, and that a rewritten model checks."""

import pytest

from swacompile.attention import BandProof
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import ZERO, Expr, eq, integer, ite, le, maximum, minimum, size, sub
from swacompile.passes.size_conditions import simplest
from tests.passes.masks import MaskModel, band_cells, verdict_on

S, T = size("S"), size("T")


def cut_from_the_end(length: Expr, stored: int) -> Expr:
    """The extent of `array[max(0, stored - length):]`."""
    start = maximum(ZERO, sub(integer(stored), length))
    return sub(integer(stored), ite(le(integer(stored), start), integer(stored), start))


@pytest.mark.parametrize(
    ("gone", "stays", "condition", "words"),
    [
        (minimum(S, integer(64)), S, le(S, integer(64)), "S <= 64"),
        (cut_from_the_end(S, 64), S, le(S, integer(64)), "S <= 64"),
        (maximum(S, integer(9)), S, le(integer(9), S), "S >= 9"),
        (maximum(minimum(S, integer(9)), integer(9)), S, eq(S, integer(9)), "S == 9"),
        (T, S, eq(T, S), "T == S"),
        (integer(1), S, eq(S, integer(1)), "S == 1"),
        (minimum(S, T), S, le(S, T), "S <= T"),
    ],
)
def test_simplest(gone: Expr, stays: Expr, condition: Expr, words: str) -> None:
    assert simplest(gone, stays) == (condition, words)


def test_what_is_no_bound_is_kept() -> None:
    """Within 5 and 9: neither bound says it."""
    gone = maximum(minimum(S, integer(9)), integer(5))
    condition, words = simplest(gone, S)
    assert condition == eq(gone, S) and words == f"{gone} == S"


def test_a_buffer_that_is_cut_from_its_end() -> None:
    """The last S rows and T columns of 64, as max(0, 64 - length) says where they start."""
    cells = band_cells(BandMask(left=5, right=0), 64, 64)
    body = (
        "s0 = Sub(most, S) s1 = Max(s0, i0) s2 = Unsqueeze(s1, axis0) t0 = Sub(most, T) t1 = Max(t0, i0) t2 = Unsqueeze(t1, axis0) "
        "m1 = Unsqueeze(most, axis0) rows = Slice(array, s2, m1, axis0) seen = Slice(rows, t2, m1, axis1)"
    )
    proof = verdict_on(MaskModel(body=body, arrays={"array": cells}, constants={"int64 most": "64"}))
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=5, right=0, alignment=Alignment.BOTTOM_RIGHT)
    assert proof.valid_for == ("S <= 64", "T <= 64")
