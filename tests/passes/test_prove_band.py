"""Each form of docs/masks.md: proven, with exactly its band, or named as what it is instead; and never more than that."""

from dataclasses import replace

import numpy as np
import pytest

from swacompile.attention import BandProof, Kind, Refutation, ResidualKind
from swacompile.band import Alignment, BandMask
from swacompile.passes import smt
from swacompile.passes.prove_band import Prover
from tests.passes.masks import MaskModel, band_cells, site_of, verdict_on

W4 = {"int64 w": "4"}
CAUSAL_BAND = """edge = Sub(q, w)
  near = Greater(k, edge)
  past = LessOrEqual(k, q)
  band = And(near, past)
"""
ONES = """s1 = Unsqueeze(S, axis0)
  t1 = Unsqueeze(T, axis0)
  shape = Concat<axis = 0>(s1, t1)
  ones = Expand(i1, shape)
"""
PADDING = """p1 = Unsqueeze(pad, axis1)
  p2 = Unsqueeze(p1, axis1)
"""
LABELS = """lq0 = Unsqueeze(label, axis2)
  lq = Unsqueeze(lq0, axis1)
  lk0 = Unsqueeze(label, axis1)
  lk = Unsqueeze(lk0, axis1)
"""
PACKED = (
    """first = Slice(pos, axis0, axis1, axis1)
  before = Sub(first, i1)
  padded = Concat<axis = 1>(before, pos)
  later = Slice(padded, axis1, far, axis1)
  earlier = Slice(padded, axis0, last, axis1)
  step = Sub(later, earlier)
  joined = Equal(step, i1)
  apart = Not(joined)
  counted = Cast<to = 7>(apart)
  label = CumSum(counted, i1)
"""
    + LABELS
    + """pq0 = Unsqueeze(pos, axis2)
  pq = Unsqueeze(pq0, axis1)
  pk0 = Unsqueeze(pos, axis1)
  pk = Unsqueeze(pk0, axis1)
  same = Equal(lq, lk)
  edge = Sub(pq, w)
  near = Greater(pk, edge)
  past = LessOrEqual(pk, pq)
  band = And(near, past)
  seen = And(same, band)
"""
)
PACKED_NUMBERS = W4 | {"int64[1] far": "9223372036854775807", "int64[1] last": "-1"}
IOTA_POSITIONS = """line = Unsqueeze(q_line, axis0)
  bs = Unsqueeze(B, axis0)
  ss = Unsqueeze(S, axis0)
  many = Concat<axis = 0>(bs, ss)
  pos = Expand(line, many)
"""


def model(body: str, **options: object) -> MaskModel:
    return MaskModel(body=body, **options)  # type: ignore[arg-type]


def causal(ending: str, **options: object) -> MaskModel:
    return model(CAUSAL_BAND + ending, constants=W4, **options)


BANDS = {
    "M1 and of halves": (causal("a = And(yes, band) seen = And(yes, a)"), (3, 0)),
    "M3 symmetric": (
        model(
            "d = Sub(q, k) a = Abs(d) near = LessOrEqual(a, w) all = GreaterOrEqual(q, i0) seen = And(near, all)",
            constants=W4,
        ),
        (4, 4),
    ),
    "M4 two half bands": (
        model(
            "d = Sub(q, k) a = GreaterOrEqual(d, i0) b = Less(d, w) l = And(a, b) c = Less(d, i0) n = Neg(d) e = Less(n, v) r = And(c, e) "
            "seen = Or(l, r)",
            constants=W4 | {"int64 v": "3"},
        ),
        (3, 2),
    ),
    "M5 union": (
        causal("d = Sub(q, k) a = Abs(d) both = Less(a, i2) some = Or(no, band) seen = Or(some, both)"),
        (3, 1),
    ),
    "M9 difference of triangles": (
        model(
            ONES
            + "l = Trilu<upper = 0>(ones, i0) f = Trilu<upper = 0>(ones, w) lb = Cast<to = 9>(l) fb = Cast<to = 9>(f) seen = Xor(lb, fb)",
            constants={"int64 w": "-4"},
        ),
        (3, 0),
    ),
    "upper triangle of fills": (
        model(ONES + "full = Expand(lowest, shape) m = Trilu<upper = 1>(full, i1)", result="m", form="added"),
        (None, 0),
    ),
    "O4 multiplied": (causal("n = Not(band) c = Cast<to = 1>(n) m = Mul(c, lowest)", result="m", form="added"), (3, 0)),
    "two masks summed": (
        causal(
            "a = Where(near, zero, minus_inf) b = Where(past, zero, lowest) m = Add(a, b)", result="m", form="added"
        ),
        (3, 0),
    ),
    "the lower of two masks": (
        causal("a = Where(near, zero, lowest) b = Where(past, zero, lowest) m = Min(a, b)", result="m", form="added"),
        (3, 0),
    ),
    "running sum of ones": (
        model(
            "n = Shape(k_line) o = Expand(i1, n) c = CumSum(o, i0) up = Unsqueeze(c, axis0) seen = LessOrEqual(up, q)"
        ),
        (None, -1),
    ),
    "running sum from the end": (
        model(
            "n = Shape(k_line) o = Expand(i1, n) c = CumSum<reverse = 1>(o, i0) up = Unsqueeze(c, axis0) t = Sub(T, up) "
            "seen = LessOrEqual(t, q)"
        ),
        (None, 0),
    ),
    "division toward zero": (model("d = Sub(q, k) x = Div(d, w) seen = Equal(x, i0)", constants=W4), (3, 3)),
    "a square of a constant": (model("d = Sub(q, k) a = Abs(d) s = Pow(i2, i2) seen = LessOrEqual(a, s)"), (4, 4)),
    "one key": (model("d = Sub(q, k) e = Cast<to = 9>(d) seen = Not(e)"), (0, 0)),
    "fraction": (
        model("d = Sub(q, k) f = Cast<to = 1>(d) a = Abs(f) seen = Less(a, x)", constants={"float x": "2.5"}),
        (2, 2),
    ),
    "behind the query only": (
        model("d = Sub(q, k) a = GreaterOrEqual(d, i2) b = LessOrEqual(d, w) seen = And(a, b)", constants=W4),
        (4, -2),
    ),
    "a window of 2^31 keys": (
        model(CAUSAL_BAND + "seen = Identity(band)", constants={"int64 w": str(2**31)}),
        (2**31 - 1, 0),
    ),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str) -> None:
    written, (left, right) = BANDS[name]
    proof = verdict_on(written)
    assert isinstance(proof, BandProof), proof
    assert (proof.mask, proof.residuals) == (BandMask(left=left, right=right), ())
    for sizes in ((9, 9), (4, 11), (11, 4)):
        assert np.array_equal(written.cells(*sizes), np.broadcast_to(band_cells(proof.mask, *sizes), (1, 2, *sizes)))
    wider = BandMask(left=left, right=None if right is None else right + 1)
    if right is not None:
        assert not np.array_equal(written.cells(9, 9)[0, 0], band_cells(wider, 9, 9))


def test_seen_from_the_last_query() -> None:
    """M7: decoding with a cache of any length."""
    written = model(
        "past_len = Sub(T, S) place = Add(q, past_len) edge = Sub(place, w) near = Greater(k, edge) past = LessOrEqual(k, place) "
        "seen = And(near, past)",
        constants=W4,
    )
    proof = verdict_on(written)
    assert isinstance(proof, BandProof)
    assert (proof.mask, proof.valid_for) == (BandMask(left=3, right=0, alignment=Alignment.BOTTOM_RIGHT), ())


def test_a_bound_beyond_all_lengths_is_none() -> None:
    """Within the sizes at which float32 counts exactly."""
    body = """ends = Add(S, T) place = Add(q, ends) back = Sub(place, k) back_float = Cast<to = 1>(back)
      seen = LessOrEqual(back_float, far)"""
    proof = verdict_on(model(body, constants={"float far": "2147483648.0"}))
    assert isinstance(proof, BandProof)
    assert (proof.kind, proof.mask.left, proof.mask.right) == (Kind.FULL, None, None)
    assert proof.valid_for == ("sizes <= 16777216",)
    bounded = verdict_on(model(body, constants={"float far": "20000.0"}))
    assert isinstance(bounded, Refutation) and bounded.witness is not None


def test_an_empty_cache_counts() -> None:
    """A size that is no axis of the attention may be 0: what differs only there is seen."""
    body = (
        "shape = Shape(cache) past_len = Gather(shape, i2) some = Min(past_len, i1) edge = Sub(q, w) wider = Sub(edge, some) near = Greater(k, wider) "
        "past = LessOrEqual(k, q) seen = And(near, past)"
    )
    refusal = verdict_on(model(body, constants=W4, inputs="float[B,2,P,8] cache"))
    assert isinstance(refusal, Refutation) and refusal.code == "not-a-band"


# --------------------------------------------------------------------------------------------------- run-time factors


@pytest.mark.parametrize("pad", ["bool[B,T] pad", "int64[B,T] pad"])
def test_padding_becomes_an_operand(pad: str) -> None:
    proof = verdict_on(causal(PADDING + "p3 = Cast<to = 9>(p2) seen = And(band, p3)", inputs=pad))
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=3, right=0)
    assert [residual.kind for residual in proof.residuals] == [ResidualKind.KEY_PADDING]


def test_lengths_are_padding() -> None:
    body = "n1 = Unsqueeze(lens, axis1) n2 = Unsqueeze(n1, axis1) n3 = Unsqueeze(n2, axis1) ok = Less(k, n3) seen = And(band, ok)"
    proof = verdict_on(causal(body, inputs="int64[B] lens"))
    assert isinstance(proof, BandProof)
    assert [str(residual.condition) for residual in proof.residuals] == ["k <= lens[b] - 1"]


def test_padding_of_queries_is_refused() -> None:
    refusal = verdict_on(
        causal("p1 = Unsqueeze(pad, axis2) p2 = Unsqueeze(p1, axis1) seen = And(band, p2)", inputs="bool[B,S] pad")
    )
    assert isinstance(refusal, Refutation)
    assert refusal.code == "data-dependent" and "pad" in refusal.reason


def test_segments_become_an_operand() -> None:
    proof = verdict_on(
        causal(LABELS + "same = Equal(lq, lk) seen = And(band, same)", inputs="int64[B,S] label", keys="S")
    )
    assert isinstance(proof, BandProof)
    assert [(residual.kind, str(residual.data)) for residual in proof.residuals] == [
        (ResidualKind.SEGMENTS, "label[b, k]")
    ]


def test_segments_of_queries_must_stand_where_the_band_does() -> None:
    """The band counts from the last query, the labels of queries from the first."""
    body = (
        "past_len = Sub(T, S) place = Add(q, past_len) edge = Sub(place, w) near = Greater(k, edge) past = LessOrEqual(k, place) "
        "band = And(near, past) start = Unsqueeze(i0, axis0) s1 = Unsqueeze(S, axis0) own = Slice(label, start, s1, axis1) "
        "lq0 = Unsqueeze(own, axis2) lq = Unsqueeze(lq0, axis1) lk0 = Unsqueeze(label, axis1) lk = Unsqueeze(lk0, axis1) "
        "same = Equal(lq, lk) seen = And(band, same)"
    )
    refusal = verdict_on(model(body, constants=W4, inputs="int64[B,T] label"))
    assert isinstance(refusal, Refutation)
    assert refusal.code == "segments-place"


def test_packed_positions_that_are_counted_are_a_band_alone() -> None:
    """M2: the factor of equal segments is true everywhere, because the positions are 0, 1, 2..."""
    proof = verdict_on(model(IOTA_POSITIONS + PACKED, constants=PACKED_NUMBERS, keys="S"))
    assert isinstance(proof, BandProof)
    assert (proof.mask, proof.residuals, proof.valid_for) == (BandMask(left=3, right=0), (), ())


def test_packed_positions_that_are_an_input_leave_segments() -> None:
    written = model(PACKED, constants=PACKED_NUMBERS, keys="S", inputs="int64[B,S] pos")
    proof = verdict_on(written)
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=3, right=0)
    assert [str(residual.data) for residual in proof.residuals] == ["label[b, k]"]
    pos = np.array([[5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 9, 9]])
    cells = written.cells(13, 13, pos=pos)[0, 0]
    label = np.cumsum(np.diff(pos, prepend=pos[:, :1] - 1) != 1)
    assert np.array_equal(cells, band_cells(proof.mask, 13, 13) & (label[:, None] == label[None, :]))


def test_packed_positions_with_other_labels_are_refused() -> None:
    """Labels that stay the same where positions jump say nothing of the distance."""
    refusal = verdict_on(
        model(
            PACKED.replace("Equal(step, i1)", "LessOrEqual(step, i2)"),
            constants=PACKED_NUMBERS,
            keys="S",
            inputs="int64[B,S] pos",
        )
    )
    assert isinstance(refusal, Refutation)
    assert refusal.code == "data-dependent" and "pos" in refusal.reason


def test_a_bias_is_named_beside_its_band() -> None:
    proof = verdict_on(
        causal("m0 = Where(band, zero, lowest) m = Add(m0, rel)", result="m", form="added", inputs="float[1,2,S,T] rel")
    )
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=3, right=0)
    assert [(residual.kind, str(residual.data)) for residual in proof.residuals] == [
        (ResidualKind.BIAS, "rel[0, h, q, k]")
    ]


@pytest.mark.parametrize("distance", ["Identity(d)", "Neg(a)", "Sub(k, i2)"])
def test_alibi_is_named(distance: str) -> None:
    """A slope a head times the distance, or times anything that differs from it by the same number in a whole row."""
    body = f"d = Sub(k, q) a = Abs(d) e = {distance} f = Cast<to = 1>(e) g = Mul(f, slopes) m0 = Where(past, zero, lowest) m = Add(m0, g)"
    slopes = np.array([0.5, 0.25], np.float32).reshape(2, 1, 1)
    proof = verdict_on(causal(body, result="m", form="added", arrays={"slopes": slopes}))
    assert isinstance(proof, BandProof)
    assert (proof.mask, [residual.kind for residual in proof.residuals]) == (
        BandMask(left=None, right=0),
        [ResidualKind.ALIBI],
    )


def test_slopes_beside_a_sink_are_a_bias() -> None:
    """Slopes leave open what is added to the whole row, which weighs against a sink."""
    body = "f = Cast<to = 1>(k) g = Mul(f, slopes) m0 = Where(past, zero, lowest) m = Add(m0, g)"
    slopes = np.array([0.5, 0.25], np.float32).reshape(2, 1, 1)
    site = site_of(causal(body, result="m", form="added", arrays={"slopes": slopes}))
    prover = Prover()
    for sinks, kind in ((None, ResidualKind.ALIBI), (0.0, ResidualKind.BIAS)):
        proof = prover.prove(replace(site, sinks=sinks))
        assert isinstance(proof, BandProof)
        assert [residual.kind for residual in proof.residuals] == [kind]


def test_a_slope_on_both_sides_is_a_bias() -> None:
    body = "d = Sub(k, q) a = Abs(d) n = Neg(a) f = Cast<to = 1>(n) g = Mul(f, slopes) m = Add(g, zero)"
    slopes = np.array([0.5, 0.25], np.float32).reshape(2, 1, 1)
    proof = verdict_on(causal(body, result="m", form="added", arrays={"slopes": slopes}))
    assert isinstance(proof, BandProof)
    assert [residual.kind for residual in proof.residuals] == [ResidualKind.BIAS]


# ------------------------------------------------------------------------------------------------------- other kinds

CHUNKS = "a = Div(q, w) b = Div(k, w) same = Equal(a, b) past = LessOrEqual(k, q) "
SHIFTED = "q2 = Sub(q, s) k2 = Sub(k, s) a = Div(q2, w) b = Div(k2, w) same = Equal(a, b) past = LessOrEqual(k, q) seen = And(same, past)"
GIVEN = "g1 = Unsqueeze(marked, axis1) g = Unsqueeze(g1, axis1) h1 = Unsqueeze(marked, axis2) h = Unsqueeze(h1, axis1) "
KINDS = {
    "chunks": (model(CHUNKS + "seen = And(same, past)", constants=W4), Kind.CHUNKED, "chunk size 4, causal", (3, 0)),
    "chunks both ways": (model(CHUNKS + "seen = Identity(same)", constants=W4), Kind.CHUNKED, "chunk size 4", (3, 3)),
    "chunks by their start": (
        model("a = Div(q, w) start = Mul(a, w) same = GreaterOrEqual(k, start) past = LessOrEqual(k, q) seen = And(same, past)", constants=W4),
        Kind.CHUNKED, "chunk size 4, causal", (3, 0),
    ),
    "chunks by remainders": (
        model("a = Mod(q, w) start = Sub(q, a) same = GreaterOrEqual(k, start) past = LessOrEqual(k, q) seen = And(same, past)", constants=W4),
        Kind.CHUNKED, "chunk size 4, causal", (3, 0),
    ),
    "chunks in a band": (
        model("a = Div(q, w) b = Div(k, w) same = Equal(a, b) d = Sub(q, k) e = Abs(d) near = LessOrEqual(e, i1) seen = And(same, near)", constants=W4),
        Kind.CHUNKED, "within the band (1, 1)", (1, 1),
    ),
    "chunks shifted": (model(SHIFTED, constants=W4 | {"int64 s": "2"}), Kind.CHUNKED, "shifted by 2", (6, 0)),
    "chunks shifted by data": (
        model("s1 = Unsqueeze(n, axis1) s2 = Unsqueeze(s1, axis1) s = Unsqueeze(s2, axis1) " + SHIFTED, constants=W4, inputs="int64[B] n"),
        Kind.CHUNKED, "shifted by n[b]", (6, 0),
    ),
    "dilated": (
        model("d = Sub(q, k) r = Mod(d, s) e = Equal(r, i0) a = Less(d, w) b = GreaterOrEqual(d, i0) n = And(a, b) seen = And(n, e)",
              constants={"int64 w": "12", "int64 s": "3"}),
        Kind.DILATED, "dilation 3", (9, 0),
    ),
    "prefix": (causal("g = Less(k, i2) seen = Or(band, g)"), Kind.PREFIX, "k <= 1", (3, 0)),
    "prefix of run-time length": (
        causal("n1 = Unsqueeze(n, axis1) n2 = Unsqueeze(n1, axis1) n3 = Unsqueeze(n2, axis1) g = Less(k, n3) seen = Or(band, g)", inputs="int64[B] n"),
        Kind.PREFIX, "k <= n[b] - 1", (3, 0),
    ),
    "bidirectional prefix": (causal("g = Less(k, w) h = Less(q, w) both = And(g, h) seen = Or(band, both)"), Kind.PREFIX, "see one another", (3, 0)),
    "first keys under a causal bound": (causal("g = Less(k, i2) n = Or(near, g) seen = And(n, past)"), Kind.GLOBAL_PLUS_BAND, "causal", (3, 0)),
    "global keys and queries": (
        model("d = Sub(q, k) a = Abs(d) near = LessOrEqual(a, w) g = Less(k, i2) h = Less(q, i2) n = Or(near, g) seen = Or(n, h)", constants=W4),
        Kind.GLOBAL_PLUS_BAND, "q <= 1", (4, 4),
    ),
    "marked global tokens": (
        model(GIVEN + "d = Sub(q, k) a = Abs(d) near = LessOrEqual(a, w) n = Or(near, g) seen = Or(n, h)",
              constants=W4, inputs="bool[B,T] marked", queries="T"),
        Kind.GLOBAL_PLUS_BAND, "marked[b, k]", (4, 4),
    ),
    "tokens of an image": (
        causal(GIVEN + "both = And(g, h) seen = Or(band, both)", inputs="bool[B,T] marked", queries="T"),
        Kind.GLOBAL_PLUS_BAND, "see one another", (3, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_named(name: str) -> None:
    written, kind, words, (left, right) = KINDS[name]
    refusal = verdict_on(written)
    assert isinstance(refusal, Refutation)
    assert (refusal.kind, refusal.code) == (kind, kind.replace("_", "-"))
    assert words in refusal.reason
    assert refusal.band == BandMask(left=left, right=right)
    assert refusal.witness is not None
    if not written.inputs:
        assert_witness(written, refusal)


def assert_witness(written: MaskModel, refusal: Refutation) -> None:
    """The mask really has at the witness what it says, and the band has not."""
    witness, band = refusal.witness, refusal.band
    assert witness is not None and band is not None
    sizes = dict(witness.sizes)
    queries, keys = (int(name) if name.isdigit() else sizes[name] for name in (written.queries, written.keys))
    shown = bool(written.cells(queries, keys)[0, witness.head, witness.query, witness.key])
    assert shown == witness.mask_shows != band.shows(witness.query, witness.key, queries=queries, keys=keys)


def test_a_chunk_is_told_from_the_band_that_has_its_extremes() -> None:
    """The largest distance in chunks of 4 is 3, as in the band (3, 0): looking at extremes is not enough."""
    refusal = verdict_on(KINDS["chunks"][0])
    assert isinstance(refusal, Refutation) and refusal.witness is not None
    assert not refusal.witness.mask_shows


def test_heads_with_bands_of_their_own() -> None:
    windows = np.array([3, 5], np.int64).reshape(2, 1, 1)
    body = "d = Sub(q, k) a = Less(d, windows) b = GreaterOrEqual(d, i0) seen = And(a, b)"
    refusal = verdict_on(model(body, arrays={"windows": windows}))
    assert isinstance(refusal, Refutation)
    assert refusal.code == "differs" and "(2, 0) from head 0, (4, 0) from head 1" in refusal.reason
    same = verdict_on(model(body, arrays={"windows": np.full((2, 1, 1), 3)}))
    assert isinstance(same, BandProof) and same.mask == BandMask(left=2, right=0)


# ------------------------------------------------------------------------------------------------------ zeroed scores


def test_zeroed_scores_are_their_own_kind() -> None:
    """softmax(B (.) scores): a zeroed score has the weight exp(0)."""
    proof = verdict_on(causal("b = Cast<to = 1>(band) z = Mul(scores, b)", result="z", form="scores"))
    assert isinstance(proof, BandProof)
    assert (proof.kind, proof.mask, proof.residuals) == (Kind.ZEROED, BandMask(left=3, right=0), ())


def test_zeroed_scores_with_padding() -> None:
    body = PADDING + "b = Cast<to = 1>(band) z0 = Mul(scores, b) z = Where(p2, z0, minus_inf)"
    proof = verdict_on(causal(body, result="z", form="scores", inputs="bool[B,T] pad"))
    assert isinstance(proof, BandProof)
    assert (proof.kind, [residual.kind for residual in proof.residuals]) == (Kind.ZEROED, [ResidualKind.KEY_PADDING])


def test_zeroed_by_an_array() -> None:
    cells = band_cells(BandMask(left=2, right=2), 12, 12).astype(np.float32)
    body = "z = Mul(scores, array)"
    proof = verdict_on(model(body, result="z", form="scores", arrays={"array": cells}, queries="12", keys="12"))
    assert isinstance(proof, BandProof) and (proof.kind, proof.mask) == (Kind.ZEROED, BandMask(left=2, right=2))
    cells[5, 5] = 0
    refusal = verdict_on(model(body, result="z", form="scores", arrays={"array": cells}, queries="12", keys="12"))
    assert isinstance(refusal, Refutation) and (refusal.kind, refusal.code) == (Kind.ZEROED, "not-a-band")


def test_zeroed_and_hidden_at_once_is_refused() -> None:
    refusal = verdict_on(
        causal("b = Cast<to = 1>(near) z0 = Mul(scores, b) z = Where(past, z0, lowest)", result="z", form="scores")
    )
    assert isinstance(refusal, Refutation)
    assert (refusal.kind, refusal.code) == (Kind.ZEROED, "zeroed")


# ---------------------------------------------------------------------------------------------------- constant arrays


def chunked(n: int, chunk: int, shift: int = 0) -> np.ndarray:
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return ((q - shift) // chunk == (k - shift) // chunk) & (k <= q)


def with_global(n: int) -> np.ndarray:
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return (abs(q - k) <= 2) | np.isin(k, (0, 5)) | np.isin(q, (0, 5))


def with_first_keys(n: int) -> np.ndarray:
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return (k <= q) & ((q - k <= 3) | (k < 2))


def with_prefix(n: int) -> np.ndarray:
    return band_cells(BandMask(left=3, right=0), n, n) | (np.arange(n) < 4)[None, :]


def dilated(n: int) -> np.ndarray:
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    return (distance % 3 == 0) & (distance >= 0) & (distance <= 9)


ARRAYS = {
    "chunks": (chunked(20, 6), Kind.CHUNKED, "chunk size 6, causal"),
    "shifted chunks": (chunked(20, 6, 2), Kind.CHUNKED, "chunk size 6, shifted by 2"),
    "two chunks": (chunked(10, 6), Kind.CHUNKED, "chunk size 6"),
    "dilated": (dilated(20), Kind.DILATED, "dilation 3"),
    "global": (with_global(20), Kind.GLOBAL_PLUS_BAND, "keys that every query sees: 0, 5"),
    "first keys": (with_first_keys(20), Kind.GLOBAL_PLUS_BAND, "keys that every query sees: 0, 1,"),
    "prefix": (with_prefix(20), Kind.PREFIX, "prefix of 4 keys"),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("added", [False, True])
def test_constant_arrays_are_named(name: str, added: bool) -> None:
    cells, kind, words = ARRAYS[name]
    array = np.where(cells, np.float32(0), np.finfo(np.float32).min)[None, None] if added else cells
    n = str(cells.shape[0])
    written = model(
        "m = Identity(array)", result="m", form="added" if added else "seen", arrays={"array": array}, queries=n, keys=n
    )
    refusal = verdict_on(written)
    assert isinstance(refusal, Refutation)
    assert refusal.kind is kind and words in refusal.reason
    assert_witness(written, refusal)


def test_a_window_beyond_the_array_is_not_invented() -> None:
    cells = band_cells(BandMask(left=9, right=0), 8, 8)
    proof = verdict_on(model("seen = Identity(array)", arrays={"array": cells}, queries="8", keys="8"))
    assert isinstance(proof, BandProof)
    assert (proof.kind, proof.mask, proof.valid_for) == (
        Kind.FULL,
        BandMask(left=None, right=0),
        ("queries == 8", "keys == 8"),
    )


def test_a_sliced_array_is_a_band_within_its_size() -> None:
    """O5: a buffer of 64 positions, of which the lengths at hand are cut out."""
    cells = band_cells(BandMask(left=5, right=0), 64, 64)
    body = "s1 = Unsqueeze(S, axis0) t1 = Unsqueeze(T, axis0) rows = Slice(array, axis0, s1, axis0) seen = Slice(rows, axis0, t1, axis1)"
    proof = verdict_on(model(body, arrays={"array": cells}))
    assert isinstance(proof, BandProof)
    assert (proof.mask, proof.valid_for) == (BandMask(left=5, right=0), ("S <= 64", "T <= 64"))
    cells[40, 38] = False
    assert isinstance(verdict_on(model(body, arrays={"array": cells})), Refutation)


def test_rows_of_an_array_for_the_last_queries() -> None:
    cells = band_cells(BandMask(left=5, right=0), 64, 64)
    body = (
        "past_len = Sub(T, S) p1 = Unsqueeze(past_len, axis0) t1 = Unsqueeze(T, axis0) rows = Slice(array, p1, t1, axis0) "
        "seen = Slice(rows, axis0, t1, axis1)"
    )
    proof = verdict_on(model(body, arrays={"array": cells}))
    assert isinstance(proof, BandProof)
    assert proof.mask == BandMask(left=5, right=0, alignment=Alignment.BOTTOM_RIGHT)
    assert "T <= 64" in proof.valid_for


def test_a_solver_that_may_not_work_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smt, "WORK", 1)
    refusal = verdict_on(model(CAUSAL_BAND + "seen = Identity(band)", constants=W4))
    assert isinstance(refusal, Refutation)
    assert refusal.code == "undecided" and "resource limit" in refusal.reason


# ---------------------------------------------------------------------------------------------------------- valid_for


def test_a_guard_is_named() -> None:
    """max(T - S, 0) is the place of query 0 only where there are at least as many keys as queries."""
    body = (
        "d = Sub(T, S) o = Max(d, i0) place = Add(q, o) edge = Sub(place, w) near = Greater(k, edge) past = LessOrEqual(k, place) "
        "seen = And(near, past)"
    )
    proof = verdict_on(model(body, constants=W4))
    assert isinstance(proof, BandProof)
    assert (proof.mask.alignment, proof.valid_for) == (Alignment.BOTTOM_RIGHT, ("keys >= queries",))


AS = "qi = Cast<to = {0}>(q) ki = Cast<to = {0}>(k) wi = Cast<to = {0}>(w) "
BELOW = "edge = Sub(qi, wi) near = Greater(ki, edge) past = LessOrEqual(ki, qi) seen = And(near, past)"


@pytest.mark.parametrize(("dtype", "valid_for"), [(6, ()), (1, ("sizes <= 16777216",)), (11, ())])
def test_positions_in_another_type_are_proven_up_to_its_limit(dtype: int, valid_for: tuple[str, ...]) -> None:
    """int32, float32, float64."""
    proof = verdict_on(model(AS.format(dtype) + BELOW, constants=W4))
    assert isinstance(proof, BandProof)
    assert (proof.mask, proof.valid_for) == (BandMask(left=3, right=0), valid_for)


@pytest.mark.parametrize("dtype", [2, 3, 5, 10, 16])
def test_positions_in_a_narrow_type_are_refused(dtype: int) -> None:
    """uint8, int8, int16, float16, bfloat16: the mask is another one from some length on."""
    written = model(AS.format(dtype) + BELOW, constants=W4)
    refusal = verdict_on(written)
    assert isinstance(refusal, Refutation)
    assert refusal.code == "overflow" and "(3, 0)" in refusal.reason
    if dtype in (2, 3, 10):
        assert_witness(written, refusal)


def test_a_product_that_overflows_is_refused() -> None:
    body = "qi = Cast<to = 6>(q) ki = Cast<to = 6>(k) f = Cast<to = 6>(w) qf = Mul(qi, f) kf = Mul(ki, f) seen = LessOrEqual(kf, qf)"
    refusal = verdict_on(model(body, constants={"int64 w": "1000"}))
    assert isinstance(refusal, Refutation)
    assert refusal.code == "overflow"
    wide = verdict_on(model(body.replace("to = 6", "to = 7"), constants={"int64 w": "1000"}))
    assert isinstance(wide, BandProof) and (wide.mask, wide.valid_for) == (BandMask(left=None, right=0), ())
