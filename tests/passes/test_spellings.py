"""Attentions in the many ways that people write them: the proven band is what the model shows when its tokens are moved one by one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from swacompile import pipeline
from swacompile.attention import BandProof, Refutation
from tests import models, oracle
from tests.tolerances import MODEL_ATOL

W, HEADS, SIZE, WIDTH = 5, 4, 8, 32
LENGTHS = (9, 2 * W + 9)
POSITIONS = """
  shape = Shape(x)
  B = Gather(shape, i0)
  T = Gather(shape, i1)
  line = Range(i0, T, i1)
  q = Unsqueeze(line, axis1)
  k = Unsqueeze(line, axis0)
  d = Sub(q, k)
  past = GreaterOrEqual(d, i0)
  near = Less(d, window)
  seen = And(past, near)
  hide = Not(seen)
  mask = Where(seen, zero, minus_inf)
  q4 = MatMul(x, wq)
  k4 = MatMul(x, wk)
  v4 = MatMul(x, wv)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
"""
# A product in the usual form up to its scaled scores, and from its weights on.
SCORES = "product = MatMul(qh, kt)\n scores = Mul(product, scale)"
RESULT = "y = MatMul(weights, vh)\n out = Transpose<perm = [0, 2, 1, 3]>(y)"
NUMBERS = f"""int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}, int64 window = {{{W}}}, int64 before = {{-1}}, int64 down = {{-1}},
  int64[1] axis0 = {{0}}, int64[1] axis1 = {{1}}, int64[1] axis2 = {{2}}, int64[1] axis3 = {{3}}, int64[1] end = {{1000000000}},
  int64[1] last = {{-1}}, float zero = {{0.0}}, float one = {{1.0}}, float minus_inf = {{-inf}}, float lowest = {{-3.4028235e38}},
  float scale = {{{SIZE**-0.5}}}, int64 four = {{{W - 1}}}"""
MERGED = "int64[1] heads = {4}, int64[1] size = {8}, int64[1] width = {32}, int64[3] flat = {0, 0, 32}"


def spelled(body: str, output: str = "out", *, more: str = "") -> onnx.ModelProto:
    """A model of x (B,T,H,D) whose attention is written by `body`, from the values of POSITIONS on. `more` are further numbers."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    attention (float[B,T,{HEADS},{SIZE}] x) => (float[] {output}) <{NUMBERS} {", " + more if more else ""}> {{ {POSITIONS} {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    generator = np.random.default_rng(0)
    for name in ("wq", "wk", "wv"):
        weight = generator.standard_normal((SIZE, SIZE)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight * 0.4, name))
    wide = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(wide * 0.2, "wide"))
    return onnx.shape_inference.infer_shapes(model)


@dataclass(frozen=True, kw_only=True)
class Written:
    body: str
    more: str = ""
    left: int = W - 1
    right: int = 0
    kv_heads: int = HEADS


SPELLINGS = {
    "einsum with heads inside": Written(
        body="""s = Einsum<equation = "bthd,bshd->bhts">(q4, k4)
        scaled = Mul(s, scale)
        z = Add(scaled, mask)
        p = Softmax<axis = -1>(z)
        out = Einsum<equation = "bhts,bshd->bthd">(p, v4)"""
    ),
    "einsum that keeps heads behind queries": Written(
        body="""qs = Mul(q4, scale)
        s = Einsum<equation = "BTNH,BSNH->BTNS">(qs, k4)
        cells = Unsqueeze(seen, axis1)
        z = Where(cells, s, minus_inf)
        p = Softmax<axis = -1>(z)
        out = Einsum<equation = "BTNS,BSNH->BTNH">(p, v4)"""
    ),
    "einsum of groups": Written(
        kv_heads=2,
        more="int64[5] groups = {0, 0, 2, 2, 8}, int64[1] two = {2}, int64[3] flat = {0, 0, -1}",
        body="""
        q5 = Reshape(q4, groups)
        k2 = Slice(k4, axis0, two, axis2)
        v2 = Slice(v4, axis0, two, axis2)
        s = Einsum<equation = "btkgh,bskh->bkgts">(q5, k2)
        scaled = Mul(s, scale)
        z = Add(scaled, mask)
        p = Softmax<axis = -1>(z)
        y = Einsum<equation = "bkgts,bskh->btkgh">(p, v2)
        out = Reshape(y, flat)""",
    ),
    "groups as an axis": Written(
        kv_heads=2,
        more="int64[5] groups = {0, 2, 2, -1, 8}, int64[1] two = {2}, int64[4] plain = {0, 4, -1, 8}",
        body="""
        q5 = Reshape(qh, groups)
        k2 = Slice(kh, axis0, two, axis1)
        v2 = Slice(vh, axis0, two, axis1)
        k2t = Transpose<perm = [0, 1, 3, 2]>(k2)
        k5 = Unsqueeze(k2t, axis2)
        v5 = Unsqueeze(v2, axis2)
        s = MatMul(q5, k5)
        scaled = Mul(s, scale)
        z = Where(seen, scaled, minus_inf)
        p = Softmax<axis = -1>(z)
        y5 = MatMul(p, v5)
        y = Reshape(y5, plain)
        out = Transpose<perm = [0, 2, 1, 3]>(y)""",
    ),
    "sequence first, batch and heads in one axis": Written(
        more=MERGED,
        body="""
        B1 = Unsqueeze(B, axis0)
        T1 = Unsqueeze(T, axis0)
        BH = Mul(B1, heads)
        merged = Concat<axis = 0>(T1, BH, size)
        xf = Reshape(x, flat)
        x3 = MatMul(xf, wide)
        qt = Transpose<perm = [1, 0, 2]>(x3)
        q3 = Reshape(qt, merged)
        qm = Transpose<perm = [1, 0, 2]>(q3)
        kx = Neg(x3)
        ks = Transpose<perm = [1, 0, 2]>(kx)
        k3 = Reshape(ks, merged)
        km = Transpose<perm = [1, 2, 0]>(k3)
        vx = Abs(x3)
        vs = Transpose<perm = [1, 0, 2]>(vx)
        v3 = Reshape(vs, merged)
        vm = Transpose<perm = [1, 0, 2]>(v3)
        s = MatMul(qm, km)
        scaled = Mul(s, scale)
        z = Add(scaled, mask)
        p = Softmax<axis = -1>(z)
        y = MatMul(p, vm)
        ym = Transpose<perm = [1, 0, 2]>(y)
        back = Concat<axis = 0>(T1, B1, width)
        yt = Reshape(ym, back)
        out = Transpose<perm = [1, 0, 2]>(yt)""",
    ),
    "softmax written out": Written(
        body=f"""{SCORES}
        z = Where(seen, scores, minus_inf)
        most = ReduceMax<keepdims = 1>(z, last)
        shifted = Sub(z, most)
        e = Exp(shifted)
        sum = ReduceSum<keepdims = 1>(e, last)
        weights = Div(e, sum)
        {RESULT}"""
    ),
    "exponentials times the mask": Written(
        body=f"""{SCORES}
        e = Exp(scores)
        m = Cast<to = 1>(seen)
        kept = Mul(e, m)
        sum = ReduceSum<keepdims = 1>(kept, last)
        inverse = Reciprocal(sum)
        weights = Mul(kept, inverse)
        {RESULT}"""
    ),
    "weights masked and divided by their sum": Written(
        body=f"""{SCORES}
        p = Softmax<axis = -1>(scores)
        kept = Where(seen, p, zero)
        sum = ReduceSum<keepdims = 1>(kept, last)
        weights = Div(kept, sum)
        {RESULT}"""
    ),
    "keys before queries": Written(
        body="""qt = Transpose<perm = [0, 2, 3, 1]>(q4)
        product = MatMul(kh, qt)
        scores = Mul(product, scale)
        turned = Transpose(seen)
        z = Where(turned, scores, minus_inf)
        p = Softmax<axis = 2>(z)
        vt = Transpose<perm = [0, 2, 3, 1]>(v4)
        y = MatMul(vt, p)
        out = Transpose<perm = [0, 3, 1, 2]>(y)"""
    ),
    "a zero logit in front": Written(
        more="int64[8] front = {0, 0, 0, 1, 0, 0, 0, 0}",
        body=f"""{SCORES}
        z = Where(seen, scores, minus_inf)
        padded = Pad(z, front, zero)
        p = Softmax<axis = -1>(padded)
        weights = Slice(p, axis1, end, axis3)
        {RESULT}""",
    ),
    "masked once more behind the softmax": Written(
        body=f"""{SCORES}
        z = Where(hide, lowest, scores)
        p = Softmax<axis = -1>(z)
        weights = Where(hide, zero, p)
        {RESULT}"""
    ),
    "logarithm of a band of ones": Written(
        more="int64 lower = {-4}",
        body=f"""{SCORES}
        T1 = Unsqueeze(T, axis0)
        square = Concat<axis = 0>(T1, T1)
        ones = Expand(one, square)
        tril = Trilu<upper = 0>(ones, i0)
        band = Trilu<upper = 1>(tril, lower)
        hidden = Log(band)
        z = Add(scores, hidden)
        weights = Softmax<axis = -1>(z)
        {RESULT}""",
    ),
    "distances that are cut off": Written(
        body=f"""{SCORES}
        beyond = Sub(d, four)
        late = Clip(beyond, i0, i1)
        ahead = Neg(d)
        early = Clip(ahead, i0, i1)
        steps = Add(late, early)
        count = Cast<to = 1>(steps)
        hidden = Mul(count, lowest)
        z = Add(scores, hidden)
        weights = Softmax<axis = -1>(z)
        {RESULT}"""
    ),
    "positions counted downwards, bits": Written(
        body=f"""{SCORES}
        top = Sub(T, i1)
        falling = Range(top, before, down)
        qf = Unsqueeze(falling, axis1)
        kf = Unsqueeze(falling, axis0)
        df = Sub(kf, qf)
        a = GreaterOrEqual(df, i0)
        b = Less(df, window)
        ai = Cast<to = 7>(a)
        bi = Cast<to = 7>(b)
        both = BitwiseAnd(ai, bi)
        cells = Cast<to = 9>(both)
        z = Where(cells, scores, minus_inf)
        weights = Softmax<axis = -1>(z)
        {RESULT}"""
    ),
}


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((length, HEADS, SIZE)).astype(np.float32)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_proven_band_is_what_the_model_shows(name: str, tmp_path: Path) -> None:
    written = SPELLINGS[name]
    source = models.save(spelled(written.body, more=written.more), tmp_path / "model.onnx")
    (finding,) = pipeline.inspect(source).findings
    assert finding.attention is not None and isinstance(finding.verdict, BandProof), finding.verdict
    assert (finding.verdict.mask.left, finding.verdict.mask.right) == (written.left, written.right)
    assert (finding.attention.heads, finding.attention.kv_heads) == (HEADS, written.kv_heads)
    assert finding.attention.scale == pytest.approx(SIZE**-0.5)
    assert len(pipeline.rewrite(source, tmp_path / "out.onnx").replaced) == 1
    for length in LENGTHS:
        shown = oracle.seen_by(lambda x: models.run(source, {"x": x}), tokens(length))
        assert np.array_equal(shown, oracle.band(written.left, written.right, length))
        x = np.stack([tokens(length), 0.5 * tokens(length)[::-1]])
        expected = models.run(source, {"x": x})
        found = models.run(tmp_path / "out.onnx", {"x": x})
        assert found.shape == expected.shape and np.abs(found - expected).max() < MODEL_ATOL


NEAR_MISSES = {
    "weights that count become 0 behind the softmax": (f"""{SCORES}
        z = Where(past, scores, minus_inf)
        p = Softmax<axis = -1>(z)
        weights = Where(hide, zero, p)
        {RESULT}""", "weights-moved", "weights that are not hidden become 0"),
    "more in the denominator than the sum": (f"""{SCORES}
        z = Where(seen, scores, minus_inf)
        p = Softmax<axis = -1>(z)
        kept = Where(seen, p, zero)
        sum = ReduceSum<keepdims = 1>(kept, last)
        more = Add(sum, one)
        weights = Div(kept, more)
        {RESULT}""", "no-product", "do not reach"),
    "weights that are returned": (f"""{SCORES}
        z = Where(seen, scores, minus_inf)
        weights = Softmax<axis = -1>(z)
        average = ReduceMean<keepdims = 1>(weights, axis1)
        y = MatMul(weights, vh)
        y1 = Transpose<perm = [0, 2, 1, 3]>(y)
        total = ReduceSum<keepdims = 1>(average, axis3)
        out = Add(y1, total)""", "weights-moved", "used by 2 operations"),
    "an operation that is not read": (f"""{SCORES}
        df = Cast<to = 1>(d)
        cosine = Cos(df)
        cells = Less(cosine, zero)
        z = Where(cells, scores, minus_inf)
        weights = Softmax<axis = -1>(z)
        {RESULT}""", "unreadable-mask", "Less"),
    "a mask that hides too little": (f"""{SCORES}
        z = Where(seen, scores, small)
        weights = Softmax<axis = -1>(z)
        {RESULT}""", "not-hiding", "-10000"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_band_is_refused_by_name(name: str, tmp_path: Path) -> None:
    body, code, words = NEAR_MISSES[name]
    source = models.save(spelled(body, more="float small = {-10000.0}"), tmp_path / "model.onnx")
    (finding,) = pipeline.inspect(source).findings
    assert isinstance(finding.verdict, Refutation)
    assert finding.verdict.code == code and words in finding.verdict.reason


FUSED = """<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>
  g (float[B,T,32] q, float[B,T,32] k, float[B,T,32] v) => (float[B,T,32] out) { out = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v) }"""
BRANCH = """<ir_version: 9, opset_import: ["" : 20]>
  g (float[B,2,T,8] q, float[B,2,T,8] k, float[B,2,T,8] v, bool c) => (float[B,2,T,8] out) {
    out = If (c) <
      then_branch = a () => (float[B,2,T,8] y) { kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v) },
      else_branch = b () => (float[B,2,T,8] z) { z = Identity(q) }> }"""


@pytest.mark.parametrize(("text", "code"), [(FUSED, "foreign-operator"), (BRANCH, "subgraph")])
def test_attentions_that_are_not_read_are_named(text: str, code: str, tmp_path: Path) -> None:
    source = models.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    (finding,) = pipeline.inspect(source).findings
    assert isinstance(finding.verdict, Refutation) and finding.verdict.code == code
