"""Operands of rewritten ONNX attentions beside query, key and value: the library and the portable body against the source model."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from swacompile import pipeline
from swacompile.attention import Refutation
from swacompile.passes.plan_rewrite import Replacement
from tests import models
from tests.frontends.test_onnx_rewrite import LENGTH, TILE, qkv, random
from tests.models import run, three
from tests.tolerances import HALF_MODEL_ATOL, MODEL_ATOL

pytestmark = pytest.mark.cpu
WINDOWS = (1, TILE - 1, TILE, TILE + 1, LENGTH - 1, LENGTH, LENGTH + 1)
SOME_WINDOWS = (1, TILE, LENGTH + 1)
LONGEST = 2 * LENGTH
DIMS = "batch,2,length,8"

ADD = """kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  with_mask = Add(scores, mask)
  masked = Add(with_mask, added)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""
CUT = """length_1 = Unsqueeze(length, first)
  two_lengths = Concat<axis = 0>(length_1, length_1)
  starts = Constant<value_ints = [0, 0]>()
  places = Constant<value_ints = [2, 3]>()
  added = Slice(table, starts, two_lengths, places)
  """
DISTANCE = """distance = Sub(k, q)
  distance_float = Cast<to = 1>(distance)
  """
BIASES = {
    "of everything": ("", "float[batch,2,length,length] added", (2, 2, LENGTH, LENGTH)),
    "of samples": ("", "float[batch,1,length,length] added", (2, 1, LENGTH, LENGTH)),
    "of samples, given once": ("", "float[batch,1,length,length] added", (1, 1, LENGTH, LENGTH)),
    "of heads": ("", "float[2,length,length] added", (2, LENGTH, LENGTH)),
    "of pairs": ("", "float[length,length] added", (LENGTH, LENGTH)),
    "of keys": ("", "float[batch,1,1,length] added", (2, 1, 1, LENGTH)),
    "of keys and heads": ("", "float[1,2,1,length] added", (1, 2, 1, LENGTH)),
    "cut": (CUT, f"float[1,2,{LONGEST},{LONGEST}] table", (1, 2, LONGEST, LONGEST)),
    "computed": ("added = Erf(given)\n  ", "float[batch,2,length,length] given", (2, 2, LENGTH, LENGTH)),
    "transposed": ("added = Transpose<perm = [1, 0]>(given)\n  ", "float[length,length] given", (LENGTH, LENGTH)),
}
ALIBI = {
    "stored": (DISTANCE + "added = Mul(slopes, distance_float)\n  ", "float[2,1,1] slopes = {0.5, 0.03}", ""),
    "times the absolute distance": (
        DISTANCE + "far = Abs(distance_float)\n  back = Neg(slopes)\n  added = Mul(back, far)\n  ",
        "float[1,2,1,1] slopes = {0.5, 0.03}",
        "",
    ),
    "of key positions": (
        "place = Cast<to = 1>(k)\n  added = Mul(slopes, place)\n  ",
        "float[2,1,1] slopes = {0.5, 0.03}",
        "",
    ),
    "one for all heads": (DISTANCE + "added = Mul(slope, distance_float)\n  ", "float slope = {0.07}", ""),
    "an input": (DISTANCE + "added = Mul(slopes, distance_float)\n  ", "", "float[2,1,1] slopes"),
}


def save(tmp_path: Path, window: int, before: str, inputs: str = "", more: str = "") -> Path:
    """A windowed attention to whose scores the value `added` comes, that `before` makes."""
    model = models.windowed(
        before + ADD,
        inputs=", ".join(part for part in (three(DIMS), inputs) if part),
        out_dims=DIMS,
        window=window,
        more=f", {more}" if more else "",
    )
    return models.save(model, tmp_path / f"window{window}.onnx")


def rewritten(source: Path) -> tuple[Path, Replacement]:
    out = source.with_suffix(".out.onnx")
    (replaced,) = pipeline.rewrite(source, out).replaced
    onnx.checker.check_model(str(out), full_check=True)
    return out, replaced


def assert_same(source: Path, out: Path, feeds: dict[str, np.ndarray], library, atol: float = MODEL_ATOL) -> None:
    expected, calls = run(source, feeds), library.calls()
    assert np.abs(run(out, feeds) - expected).max() < atol
    assert library.calls() == calls
    assert np.abs(run(out, feeds, library.path) - expected).max() < atol
    assert library.calls() == calls + 1


def assert_another_window_differs(source: Path, out: Path, feeds: dict[str, np.ndarray], library) -> None:
    """One key more moves both forms far beyond the tolerance."""
    model, expected = onnx.load(out), run(source, feeds)
    (node,) = (node for node in model.graph.node if node.op_type == "BandedAttention")
    for attribute in node.attribute:
        if attribute.name == "left_window_size":
            attribute.i += 1
    onnx.save(model, out)
    for form in (None, library.path):
        assert np.abs(run(out, feeds, form) - expected).max() > 1e-2


def spellings(names: Iterable[str], whole: Collection[str]) -> Any:
    """Each spelling, those of `whole` with all windows."""
    cases = [(name, window) for name in names for window in (WINDOWS if name in whole else SOME_WINDOWS)]
    return pytest.mark.parametrize(("spelling", "window"), cases)


@spellings(BIASES, ("of everything", "of keys"))
def test_bias(spelling: str, window: int, tmp_path, cpu_library):
    before, inputs, shape = BIASES[spelling]
    source = save(tmp_path, window, before, inputs)
    out, replaced = rewritten(source)
    assert replaced.bias is not None and replaced.left_window_size == window - 1
    name = inputs.split()[-1]
    feeds = qkv() | {name: random(shape, 7)}
    assert_same(source, out, feeds, cpu_library)
    if window > 1:
        other = feeds | {name: random(shape, 8)}
        assert np.abs(run(out, other, cpu_library.path) - run(source, feeds)).max() > 1e-2
    if window <= LENGTH - 2:
        assert_another_window_differs(source, out, feeds, cpu_library)


@spellings(ALIBI, ("stored",))
def test_alibi(spelling: str, window: int, tmp_path, cpu_library):
    before, stored, inputs = ALIBI[spelling]
    source = save(tmp_path, window, before, inputs, stored)
    out, replaced = rewritten(source)
    assert replaced.alibi_slopes is not None
    feeds = qkv() | ({"slopes": np.asarray([0.4, 0.02], np.float32).reshape(2, 1, 1)} if inputs else {})
    assert_same(source, out, feeds, cpu_library)
    if window <= LENGTH - 2:
        assert_another_window_differs(source, out, feeds, cpu_library)


def test_distances_that_wrap_around_are_no_slopes(tmp_path):
    """In int8, from 128 keys on. The product as it is remains a bias."""
    before = "distance = Sub(k, q)\n  narrow = Cast<to = 3>(distance)\n  distance_float = Cast<to = 1>(narrow)\n  added = Mul(slopes, distance_float)\n  "
    _, replaced = rewritten(save(tmp_path, 200, before, "", ALIBI["stored"][1]))
    assert replaced.alibi_slopes is None and replaced.bias is not None and replaced.bias.value == "added"


def test_a_stored_bias(tmp_path, cpu_library):
    """A table of weights, longer than the sequence."""
    model = models.windowed(CUT + ADD, inputs=three(DIMS), out_dims=DIMS, window=9)
    model.graph.initializer.append(models.array("table", random((1, 2, LONGEST, LONGEST), 3)))
    source = models.save(model, tmp_path / "model.onnx")
    out, replaced = rewritten(source)
    assert replaced.bias is not None
    assert_same(source, out, qkv(), cpu_library)
    assert_another_window_differs(source, out, qkv(), cpu_library)


def test_half_precision(tmp_path, cpu_library):
    body = """half_scale = Cast<to = 10>(scale)
  half_mask = Cast<to = 10>(mask)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, half_scale)
  with_mask = Add(scores, half_mask)
  masked = Add(with_mask, added)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""
    inputs = three(DIMS, "float16") + ", float16[batch,1,length,length] added"
    model = models.windowed(body, inputs=inputs, out_dims=DIMS, dtype="float16", lowest="-65504.0")
    source = models.save(model, tmp_path / "model.onnx")
    out, _ = rewritten(source)
    feeds = qkv(dtype=np.float16) | {"added": random((2, 1, LENGTH, LENGTH), 7, np.float16)}
    assert_same(source, out, feeds, cpu_library, HALF_MODEL_ATOL)
    assert_another_window_differs(source, out, feeds, cpu_library)


def test_a_bias_may_hide(tmp_path, cpu_library):
    """A float mask of keys that is an input. The last queries of the second sample see no key, which the source takes for many."""
    source = save(tmp_path, 9, "", "float[batch,1,1,length] added")
    out, _ = rewritten(source)
    added = np.zeros((2, 1, 1, LENGTH), np.float32)
    added[1, ..., -12:] = -np.inf
    feeds = qkv() | {"added": added}
    expected = run(source, feeds)
    for form in (None, cpu_library.path):
        found = run(out, feeds, form)
        assert np.abs(found[0] - expected[0]).max() < MODEL_ATOL
        assert np.abs(found[1, :, :-4] - expected[1, :, :-4]).max() < MODEL_ATOL
        assert expected[1, :, -4:].any() and not found[1, :, -4:].any()


CHOSEN = """full_shape = Concat<axis = 0>(batch_1, one_1, length_1, length_1)
  wide = Expand(added, full_shape)
  both = Where(seen, wide, hidden)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, both)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""


@pytest.mark.parametrize("window", WINDOWS)
def test_a_mask_of_keys_is_chosen_within_the_window(window: int, tmp_path, cpu_library):
    """As encoders do it: the finished mask of keys, expanded, and the lowest number outside of the window. 0 and the lowest number in it."""
    before = "batch = Gather(shape, zero)\n  batch_1 = Unsqueeze(batch, first)\n  one_1 = Unsqueeze(one, first)\n  length_1 = Unsqueeze(length, first)\n  "
    model = models.windowed(
        before + CHOSEN, inputs=three(DIMS) + ", float[batch,1,1,length] added", out_dims=DIMS, window=window
    )
    source = models.save(model, tmp_path / "model.onnx")
    out, replaced = rewritten(source)
    assert replaced.bias is not None and replaced.bias.value == "added"
    added = np.where(random((2, 1, 1, LENGTH), 5) < 1, 0, np.finfo(np.float32).min).astype(np.float32)
    added[..., :: max(window, 1)] = 0  # so that a query of every window sees a key
    feeds = qkv() | {"added": added}
    assert_same(source, out, feeds, cpu_library)
    if window <= LENGTH - 2:
        assert_another_window_differs(source, out, feeds, cpu_library)


def test_a_bias_of_another_length_stops(tmp_path, cpu_library):
    """Where the source would broadcast a row, the rewritten model says what it expects."""
    source = save(tmp_path, 9, "", "float[batch,2,length,length] added")
    out, _ = rewritten(source)
    feeds = qkv() | {"added": random((2, 2, 1, LENGTH), 7)}
    run(source, feeds)
    for form in (None, cpu_library.path):
        with pytest.raises(Exception, match="axis 2 of added == the number of queries"):
            run(out, feeds, form)


def test_a_bias_of_another_data_type_is_kept(tmp_path):
    body = """kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  wide_scores = Cast<to = 11>(scores)
  wide_mask = Cast<to = 11>(mask)
  with_mask = Add(wide_scores, wide_mask)
  masked = Add(with_mask, added)
  wide_weights = Softmax<axis = -1>(masked)
  weights = Cast<to = 1>(wide_weights)
  out = MatMul(weights, value)"""
    model = models.windowed(body, inputs=three(DIMS) + ", double[length,length] added", out_dims=DIMS)
    source = models.save(model, tmp_path / "model.onnx")
    (outcome,) = pipeline.rewrite(source, tmp_path / "out.onnx").outcomes
    assert isinstance(outcome, Refutation)
    assert outcome.code == "bias" and "no single float32 value" in outcome.reason


def test_two_biases_are_kept(tmp_path):
    """Their sum is no value of the model."""
    source = save(tmp_path, 9, "", "float[length,length] added, float[batch,1,1,length] more")
    model = onnx.load(source)
    place = next(place for place, node in enumerate(model.graph.node) if node.op_type == "Softmax")
    nodes = list(model.graph.node)
    nodes.insert(place, onnx.helper.make_node("Add", ["masked", "more"], ["masked_twice"]))
    nodes[place + 1].input[0] = "masked_twice"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    source.write_bytes(model.SerializeToString())
    (outcome,) = pipeline.rewrite(source, tmp_path / "out.onnx").outcomes
    assert isinstance(outcome, Refutation) and outcome.code == "bias"


PADDED = """both = And(seen, padding)
  padded_mask = Where(both, shown, hidden)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, padded_mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""
OUTER = "after = Constant<value_ints = [1, 2]>()\n  padding = Unsqueeze(conditions, after)\n  "
PADDINGS = {
    "four axes": ("", "bool[batch,1,1,length] padding", (1, 1)),
    "three axes": (OUTER.replace("1, 2", "1"), "bool[batch,1,length] conditions", (1,)),
    "two axes": (OUTER, "bool[batch,length] conditions", ()),
    "four axes of integers": ("padding = Cast<to = 9>(given)\n  ", "int64[batch,1,1,length] given", (1, 1)),
    "two conditions": (
        "other = Not(others)\n  padding = And(given, other)\n  ",
        "bool[batch,1,1,length] given, bool[batch,1,1,length] others",
        (1, 1),
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@spellings(PADDINGS, ("four axes",))
def test_padding(spelling: str, window: int, batch: int, tmp_path, cpu_library):
    """Padding as encoders get it. A batch of 1 of it goes to all of the queries."""
    before, inputs, between = PADDINGS[spelling]
    model = models.windowed(before + PADDED, inputs=f"{three(DIMS)}, {inputs}", out_dims=DIMS, window=window)
    source = models.save(model, tmp_path / "model.onnx")
    out, replaced = rewritten(source)
    assert replaced.key_padding is not None and replaced.bias is None
    feeds = qkv()
    for declared in inputs.split(", "):
        kind, name = declared.split("] ")
        shown = random((batch, *between, LENGTH), 5) < (1 if name != "others" else -3)
        shown[..., :: max(window, 1)] = name != "others"  # so that a query of every window sees a key
        feeds[name] = shown.astype(np.int64) * 3 if kind.startswith("int64") else shown
    assert_same(source, out, feeds, cpu_library)
    if window <= LENGTH - 2:
        assert_another_window_differs(source, out, feeds, cpu_library)


DECODE = """
<ir_version: 8, opset_import: ["" : 20]>
decode (float[batch,2,1,8] query, float[batch,2,keys,8] key, float[batch,2,keys,8] value, {position}) => (float[batch,2,1,8] out)
<int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64 window = {{{window}}}, float hidden = {{-3.4028235e38}}, float shown = {{0.0}},
 float scale = {{0.35}}>
{{
  shape = Shape(key)
  length = Gather(shape, two)
  k = Range(zero, length, one)
  {place}
  edge = Sub(q, window)
  near = Greater(k, edge)
  past = LessOrEqual(k, q)
  seen = And(near, past)
  mask = Where(seen, shown, hidden)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)
}}
"""
POSITIONS = {
    "one number": ("int64 position", "q = Identity(position)", np.asarray),
    "one of an axis": ("int64[1] position", "q = Identity(position)", lambda at: np.asarray([at])),
    "int32": ("int32[1] position", "q = Cast<to = 7>(position)", lambda at: np.asarray([at], np.int32)),
    "first of three": (
        "int64[1,3] position",
        "all = Squeeze(position)\n  q = Gather(all, zero)",
        lambda at: np.asarray([[at, 7, 7]]),
    ),
}


@spellings(POSITIONS, ("one of an axis",))
def test_offset(spelling: str, window: int, tmp_path, cpu_library):
    """Decoding into a static cache."""
    declared, place, given = POSITIONS[spelling]
    text = DECODE.format(position=declared, place=place, window=window)
    source = models.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    out, replaced = rewritten(source)
    assert replaced.offset is not None and replaced.left_window_size == window - 1
    feeds = {"query": random((2, 2, 1, 8), 0)} | {
        name: random((2, 2, LENGTH, 8), seed) for seed, name in enumerate(("key", "value"), 1)
    }
    for at in (0, 3, window, LENGTH - 1):
        if at < LENGTH:
            assert_same(source, out, feeds | {"position": given(at)}, cpu_library)
    if window <= LENGTH - 2:
        assert_another_window_differs(source, out, feeds | {"position": given(LENGTH - 1)}, cpu_library)


@pytest.mark.parametrize(("emit", "operator"), [("onnx-attention", "Attention"), ("ort-gqa", "GroupQueryAttention")])
@pytest.mark.parametrize("bias", ["of everything", "of keys", "of pairs"])
def test_other_operators_take_a_bias(bias: str, emit: str, operator: str, tmp_path):
    before, inputs, shape = BIASES[bias]
    source, out = save(tmp_path, 9, before, inputs), tmp_path / "out.onnx"
    assert len(pipeline.rewrite(source, out, emit=pipeline.Emit(emit)).replaced) == 1
    model = onnx.load(out)
    assert [node.op_type for node in model.graph.node if node.op_type.endswith("Attention")] == [operator]
    feeds = qkv() | {inputs.split()[-1]: random(shape, 7)}
    assert np.abs(run(out, feeds) - run(source, feeds)).max() < MODEL_ATOL


@pytest.mark.parametrize("emit", ["onnx-attention", "ort-gqa"])
def test_other_operators_have_no_slopes(emit: str, tmp_path):
    before, stored, _ = ALIBI["stored"]
    (outcome,) = pipeline.rewrite(
        save(tmp_path, 9, before, "", stored), tmp_path / "out.onnx", emit=pipeline.Emit(emit)
    ).outcomes
    assert isinstance(outcome, Refutation) and outcome.code == "emit" and "ALiBi" in outcome.reason


def test_nodes_with_different_operands_share_a_function(tmp_path, cpu_library):
    """A layer with a bias, one with slopes, one without either, one that stands at the last key."""
    body = (
        DISTANCE
        + """slope_bias = Mul(slopes, distance_float)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  with_bias = Add(masked, added)
  with_slopes = Add(masked, slope_bias)
  plain_weights = Softmax<axis = -1>(masked)
  bias_weights = Softmax<axis = -1>(with_bias)
  slope_weights = Softmax<axis = -1>(with_slopes)
  more_keys = Concat<axis = 2>(past_key, key)
  more_values = Concat<axis = 2>(past_value, value)
  more_shape = Shape(more_keys)
  more_length = Gather(more_shape, two)
  more_positions = Range(zero, more_length, one)
  before = Sub(more_length, length)
  late_q = Add(q, before)
  more_k = Unsqueeze(more_positions, first)
  late_edge = Sub(late_q, window)
  late_near = Greater(more_k, late_edge)
  late_past = LessOrEqual(more_k, late_q)
  late_seen = And(late_near, late_past)
  late_mask = Where(late_seen, shown, hidden)
  more_kt = Transpose<perm = [0, 1, 3, 2]>(more_keys)
  late_product = MatMul(query, more_kt)
  late_masked = Add(late_product, late_mask)
  late_weights = Softmax<axis = -1>(late_masked)
  plain = MatMul(plain_weights, value)
  biased = MatMul(bias_weights, value)
  sloped = MatMul(slope_weights, value)
  late = MatMul(late_weights, more_values)
  out = Concat<axis = 3>(plain, biased, sloped, late)"""
    )
    inputs = (
        three(DIMS)
        + ", float[batch,1,length,length] added, float[batch,2,past,8] past_key, float[batch,2,past,8] past_value"
    )
    model = models.windowed(
        body, inputs=inputs, out_dims="batch,2,length,32", more=", float[2,1,1] slopes = {0.5, 0.03}"
    )
    source, out = models.save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    assert len(pipeline.rewrite(source, out).replaced) == 4
    onnx.checker.check_model(str(out), full_check=True)
    feeds = qkv() | {"added": random((2, 1, LENGTH, LENGTH), 7)}
    feeds |= {name: random((2, 2, 11, 8), seed) for seed, name in enumerate(("past_key", "past_value"), 20)}
    expected, calls = run(source, feeds), cpu_library.calls()
    assert np.abs(run(out, feeds) - expected).max() < MODEL_ATOL
    assert np.abs(run(out, feeds, cpu_library.path) - expected).max() < MODEL_ATOL
    assert cpu_library.calls() == calls + 4
