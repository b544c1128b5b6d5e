"""Meanings that are easy to get wrong: each of these masks was, or could be, taken for a band that it is not.

Where a proof is given, the cells are compared with onnx's reference evaluator; where none may be given, the code of the refusal is checked.
"""

from collections.abc import Mapping

import numpy as np
import pytest

from swacompile.attention import BandProof, Refutation
from swacompile.band import BandMask
from tests.passes.grammar import Case
from tests.passes.judge import agrees
from tests.passes.masks import MaskModel, verdict_on

W4 = {"int64 w": "4"}
CAUSAL_BAND = "edge = Sub(q, w) near = Greater(k, edge) past = LessOrEqual(k, q) seen = And(near, past)"
LARGEST = "3.4028235e38"


def model(body: str, **options: object) -> MaskModel:
    return MaskModel(body=body, **options)  # type: ignore[arg-type]


PROVEN: Mapping[str, tuple[MaskModel, BandMask]] = {
    "remainders have the divisor's sign": (
        model("d = Sub(q, k) x = Mod(d, w) seen = GreaterOrEqual(x, i0)", constants=W4),
        BandMask(left=None, right=None),
    ),
    "division rounds toward zero": (
        model("d = Sub(q, k) x = Div(d, w) seen = GreaterOrEqual(x, i0)", constants=W4),
        BandMask(left=None, right=3),
    ),
    "an exclusive sum starts at 0": (
        model(
            "n = Shape(k_line) o = Expand(i1, n) c = CumSum<exclusive = 1>(o, i0) up = Unsqueeze(c, axis0) seen = LessOrEqual(up, q)"
        ),
        BandMask(left=None, right=0),
    ),
    "where with its branches the other way round": (
        model("past = LessOrEqual(k, q) m = Where(past, lowest, zero)", result="m", form="added"),
        BandMask(left=-1, right=None),
    ),
    "a range that ends before it starts is empty": (
        model("r = Range(w, i0, i1) n = Size(r) d = Sub(q, k) seen = GreaterOrEqual(d, n)", constants=W4),
        BandMask(left=None, right=0),
    ),
    "a slice that ends before it starts is empty": (
        model(
            "e = Slice(k_line, five, two, axis0) n = Size(e) d = Sub(q, k) seen = GreaterOrEqual(d, n)",
            constants={"int64[1] five": "5", "int64[1] two": "2"},
        ),
        BandMask(left=None, right=0),
    ),
    "exclusive or of two triangles": (
        model("a = LessOrEqual(k, q) b = Less(k, q) seen = Xor(a, b)"),
        BandMask(left=0, right=0),
    ),
    "a reshape there and back": (
        model(
            "a = LessOrEqual(k, q) s = Shape(a) flat = Reshape(a, all) seen = Reshape(flat, s)",
            constants={"int64[1] all": "-1"},
        ),
        BandMask(left=None, right=0),
    ),
    "axes that are named like the indices of the proof": (
        model(CAUSAL_BAND, constants=W4, batch="b", queries="q", keys="k"),
        BandMask(left=3, right=0),
    ),
}


@pytest.mark.parametrize("name", PROVEN)
def test_proven_as_what_it_is(name: str) -> None:
    written, band = PROVEN[name]
    proof = verdict_on(written)
    assert isinstance(proof, BandProof), proof
    assert proof.mask == band
    assert agrees(Case(model=written, band=band), proof)


REFUSED: Mapping[str, tuple[MaskModel, str]] = {
    "remainders with the dividend's sign": (
        model("d = Sub(q, k) x = Mod<fmod = 1>(d, w) seen = GreaterOrEqual(x, i0)", constants=W4),
        "not-a-band",
    ),
    "a divisor that is 0 for some key": (
        model(
            "e = Sub(k, w) x = Div(q, e) y = GreaterOrEqual(x, i0) past = LessOrEqual(k, q) seen = And(past, y)",
            constants=W4,
        ),
        "unreadable-mask",
    ),
    "a negative divisor": (
        model("d = Sub(q, k) x = Div(d, w) seen = Equal(x, i0)", constants={"int64 w": "-4"}),
        "unreadable-mask",
    ),
    "an index of -1 reads the last element": (
        model(
            "p = Sub(q_line, i1) x = Gather(k_line, p) place = Unsqueeze(x, axis1) seen = LessOrEqual(k, place)",
            queries="T",
        ),
        "global-plus-band",
    ),
    "a slice from a negative start counts from the end": (
        model(
            "n = Sub(S, w) start = Unsqueeze(n, axis0) last = Slice(q_line, start, far, axis0) first = Gather(last, i0) "
            "edge = Sub(k, first) past = LessOrEqual(k, q) near = LessOrEqual(edge, i0) seen = And(past, near)",
            constants=W4 | {"int64[1] far": "9223372036854775807"},
        ),
        "not-a-band",
    ),
    "-1e4 may leak": (
        model(
            "past = LessOrEqual(k, q) m = Where(past, zero, x)",
            result="m",
            form="added",
            constants={"float x": "-10000.0"},
        ),
        "not-hiding",
    ),
    "the lowest float16 beside float32 scores": (
        model(
            "past = LessOrEqual(k, q) m = Where(past, zero, x)",
            result="m",
            form="added",
            constants={"float x": "-65504.0"},
        ),
        "not-hiding",
    ),
    "+inf is not -inf": (
        model(
            "past = LessOrEqual(k, q) m = Where(past, zero, x)", result="m", form="added", constants={"float x": "inf"}
        ),
        "not-hiding",
    ),
    "NaN hides nothing": (
        model(
            "past = LessOrEqual(k, q) m = Where(past, zero, x)", result="m", form="added", constants={"float x": "nan"}
        ),
        "unreadable-mask",
    ),
    "0 times -inf is NaN": (
        model(
            "past = LessOrEqual(k, q) n = Not(past) c = Cast<to = 1>(n) m = Mul(c, minus_inf)", result="m", form="added"
        ),
        "unreadable-mask",
    ),
    "nothing is visible": (model("m = Where(no, zero, lowest)", result="m", form="added"), "all-hidden"),
    "large float32 numbers lose their last digits": (
        model(
            "qf = Cast<to = 1>(q) kf = Cast<to = 1>(k) a = Add(qf, x) b = Add(kf, x) seen = LessOrEqual(b, a)",
            constants={"float x": "16777216.0"},
        ),
        "overflow",
    ),
    "a distance as uint64": (
        model("d = Sub(q, k) u = Cast<to = 13>(d) v = Cast<to = 13>(w) seen = LessOrEqual(u, v)", constants=W4),
        "overflow",
    ),
    "a reshape to the other order of axes": (
        model(
            "a = LessOrEqual(k, q) s1 = Unsqueeze(S, axis0) t1 = Unsqueeze(T, axis0) s = Concat<axis = 0>(t1, s1) r = Reshape(a, s) "
            "seen = Transpose<perm = [1, 0]>(r)"
        ),
        "not-a-band",
    ),
    "a condition on the smallest of three": (
        model("m = Min(q, k, w) seen = GreaterOrEqual(m, q)", constants=W4),
        "not-a-band",
    ),
    "scores that are multiplied by run-time data": (
        model("z = Mul(scores, x)", result="z", form="scores", inputs="float[1,1,S,T] x"),
        "unreadable-mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_not_taken_for_a_band(name: str) -> None:
    written, code = REFUSED[name]
    refusal = verdict_on(written)
    assert isinstance(refusal, Refutation), refusal
    assert refusal.code == code, refusal


@pytest.mark.parametrize("operation", ["Reciprocal(zero)", "Exp(x)", "Sqrt(y)", "Pow(y, z)", "Pow(i2, m)"])
def test_numbers_without_a_value_are_run_time_data(operation: str) -> None:
    """1/0, exp(1000), the root of -1, a fractional power of -1, 2 to the power -1: no error, and no number."""
    constants = {"float x": "1000.0", "float y": "-1.0", "float z": "0.5", "int64 m": "-1"}
    verdict = verdict_on(
        model(f"r = {operation} n = Cast<to = 1>(r) f = Cast<to = 1>(k) seen = LessOrEqual(f, n)", constants=constants)
    )
    assert isinstance(verdict, BandProof)
    (padding,) = verdict.residuals
    assert any(name in str(padding.condition) for name in ("r[]", "seen[0, k]"))


def test_an_axis_of_extent_1_is_broadcast() -> None:
    """A mask of one row shows every query the same keys."""
    cells = np.array([[True, True, False, False]])
    refusal = verdict_on(model("seen = Identity(array)", arrays={"array": cells}, queries="4", keys="4"))
    assert isinstance(refusal, Refutation) and refusal.code == "not-a-band"


def test_sizes_that_only_broadcasting_makes_equal_are_named() -> None:
    proof = verdict_on(
        model(CAUSAL_BAND + " p1 = Unsqueeze(pad, axis1) p2 = Unsqueeze(p1, axis1) s = And(seen, p2)", result="s", constants=W4,
              inputs="bool[B,P] pad")
    )  # fmt: skip
    assert isinstance(proof, BandProof)
    assert any("P" in condition and "T" in condition for condition in proof.valid_for)


def test_a_slice_that_is_longer_than_its_axis_is_cut() -> None:
    """1000 positions at most: beyond, the slice is shorter than the axis, and the model does not run."""
    body = "line = Range(i0, w, i1) cut = Slice(line, axis0, far, axis0) row = Unsqueeze(cut, axis0) seen = LessOrEqual(row, q)"
    proof = verdict_on(model(body, constants={"int64 w": "1000", "int64[1] far": "2000"}))
    assert isinstance(proof, BandProof)
    assert any("1000" in condition for condition in proof.valid_for)
