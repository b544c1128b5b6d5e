"""Rewritten ONNX models against their sources in ONNX Runtime, with the portable body and with the kernel library."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from swacompile import pipeline
from swacompile.attention import BandProof
from swacompile.errors import ModelError
from tests import models
from tests.models import run, three
from tests.tolerances import HALF_MODEL_ATOL, MODEL_ATOL

pytestmark = pytest.mark.cpu
TILE = 48  # queries of one tile of the CPU kernel
LENGTH = 2 * TILE + 9


def assert_same(source: Path, out: Path, feeds: dict[str, np.ndarray], library, atol: float = MODEL_ATOL) -> None:
    expected = run(source, feeds)
    onnx.checker.check_model(str(out), full_check=True)
    assert np.abs(run(out, feeds) - expected).max() < atol
    calls = library.calls()
    assert np.abs(run(out, feeds, library.path) - expected).max() < atol
    assert library.calls() == calls + 1


def random(shape: tuple[int, ...], seed: int, dtype: type = np.float32) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def qkv(length: int = LENGTH, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {name: random((2, 2, length, 8), seed, dtype) for seed, name in enumerate(("query", "key", "value"))}


@pytest.mark.parametrize("window", [1, 2, TILE - 1, TILE, TILE + 1, LENGTH - 1, LENGTH, LENGTH + 1, 2**31 - 2])
def test_window_sizes(window, tmp_path, cpu_library):
    source = models.save(models.causal_window(window), tmp_path / "model.onnx")
    (replaced,) = pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert (replaced.left_window_size, replaced.right_window_size) == (window - 1, 0)
    assert_same(source, tmp_path / "out.onnx", qkv(), cpu_library)
    if window <= LENGTH - 2:
        wider = models.save(models.causal_window(window + 1), tmp_path / "wider.onnx")
        assert np.abs(run(wider, qkv()) - run(tmp_path / "out.onnx", qkv(), cpu_library.path)).max() > 1e-2


@pytest.mark.parametrize("opset", [13, 14, 15, 18, 23])
def test_opsets(opset, tmp_path, cpu_library):
    source = models.save(models.causal_window(7, opset=opset), tmp_path / "model.onnx")
    assert pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert_same(source, tmp_path / "out.onnx", qkv(), cpu_library)


DIMS = "batch,2,length,8"


def built(
    tmp_path: Path,
    body: str = models.PLAIN_BODY,
    *,
    inputs: str = models.three(DIMS),
    out_dims: str = DIMS,
    **words: str,
) -> Path:
    return models.save(models.windowed(body, inputs=inputs, out_dims=out_dims, **words), tmp_path / "model.onnx")


def test_half_precision(tmp_path, cpu_library):
    body = """kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  half_scale = Cast<to = 10>(scale)
  scores = Mul(product, half_scale)
  half_mask = Cast<to = 10>(mask)
  masked = Add(scores, half_mask)
  wide = Cast<to = 1>(masked)
  weights_wide = Softmax<axis = -1>(wide)
  weights = Cast<to = 10>(weights_wide)
  out = MatMul(weights, value)"""
    source = built(tmp_path, body, inputs=three("batch,2,length,8", "float16"), dtype="float16", lowest="-65504.0")
    assert pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert_same(source, tmp_path / "out.onnx", qkv(dtype=np.float16), cpu_library, HALF_MODEL_ATOL)


def test_merged_batch_and_heads(tmp_path, cpu_library):
    """The product and the softmax run on (batch * heads, queries, keys)."""
    body = """query_3d = Reshape(query, merged)
  key_3d = Reshape(key, merged)
  value_3d = Reshape(value, merged_value)
  kt = Transpose<perm = [0, 2, 1]>(key_3d)
  product = MatMul(query_3d, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  mixed = MatMul(weights, value_3d)
  out = Neg(mixed)"""
    more = ", int64[3] merged = {4, -1, 8}, int64[3] merged_value = {4, -1, 8}"
    source = built(tmp_path, body, inputs=three("2,2,length,8"), more=more, out_dims="4,length,8")
    (replaced,) = pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert replaced.site.merged_output
    assert_same(source, tmp_path / "out.onnx", qkv(), cpu_library)


def test_sequence_first_operands(tmp_path, cpu_library):
    """Key goes from (batch, sequence, heads, size) straight to its transpose: no (batch, heads, sequence, size) tensor exists."""
    body = """q4 = Transpose<perm = [0, 2, 1, 3]>(query)
  kt = Transpose<perm = [0, 2, 3, 1]>(key)
  v4 = Transpose<perm = [0, 2, 1, 3]>(value)
  product = MatMul(q4, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, v4)"""
    source = built(tmp_path, body, inputs=three("batch,length,2,8"), axis="one")
    assert pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    feeds = {name: np.ascontiguousarray(value.transpose(0, 2, 1, 3)) for name, value in qkv().items()}
    assert_same(source, tmp_path / "out.onnx", feeds, cpu_library)


def test_segments_become_an_operand(tmp_path, cpu_library):
    body = """first_axes = Constant<value_ints = [1, 2]>()
  last_axes = Constant<value_ints = [1, 3]>()
  key_label = Unsqueeze(labels, first_axes)
  query_label = Unsqueeze(labels, last_axes)
  together = Equal(query_label, key_label)
  both = And(seen, together)
  packed_mask = Where(both, shown, hidden)
  kt = Transpose<perm = [0, 1, 3, 2]>(key)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, packed_mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value)"""
    source = built(tmp_path, body, inputs=three("batch,2,length,8") + ", int64[batch,length] labels")
    (replaced,) = pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert replaced.segments is not None
    labels = np.sort(np.random.default_rng(0).integers(0, 5, (2, LENGTH)), axis=1)
    assert_same(source, tmp_path / "out.onnx", qkv() | {"labels": labels}, cpu_library)


def test_a_leaky_mask_is_kept(tmp_path):
    source = built(tmp_path, lowest="-10000.0")
    (kept,) = pipeline.rewrite(source, tmp_path / "out.onnx").outcomes
    assert kept.code == "not-hiding"
    assert not (tmp_path / "out.onnx").exists()


def test_a_classifier_is_no_attention(tmp_path):
    """A softmax after a matmul with weights, whose result is multiplied by weights again, is not attention."""
    text = """
    <ir_version: 8, opset_import: ["" : 20]>
    router (float[batch,length,8] x, float[batch,length,8] y) => (float[batch,length,8] out) <float[8,4] up = {%s}, float[4,8] down = {%s}>
    { logits = MatMul(x, up)
      weights = Softmax<axis = -1>(logits)
      out = MatMul(weights, down) }
    """ % (("0.5," * 32)[:-1], ("0.25," * 32)[:-1])
    source = models.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert pipeline.inspect(source).findings == ()


def test_proof_names_no_sizes_when_it_holds_for_all(tmp_path):
    source = models.save(models.causal_window(9), tmp_path / "model.onnx")
    (finding,) = pipeline.inspect(source).findings
    assert isinstance(finding.verdict, BandProof)
    assert (finding.verdict.method, finding.verdict.valid_for) == ("smt", ())


GQA_INPUTS = "float[batch,4,length,8] query, float[batch,2,length,8] key, float[batch,2,length,8] value"
GQA_BODY = """axis = Constant<value_ints = [2]>()
  key_shape = Shape(key)
  expanded = Constant<value_ints = [1, 1, 2, 1, 1]>()
  key_5d = Unsqueeze(key, axis)
  value_5d = Unsqueeze(value, axis)
  key_twice = Expand(key_5d, expanded)
  value_twice = Expand(value_5d, expanded)
  heads = Constant<value_ints = [0, 4, -1, 8]>()
  key_all = Reshape(key_twice, heads)
  value_all = Reshape(value_twice, heads)
  kt = Transpose<perm = [0, 1, 3, 2]>(key_all)
  product = MatMul(query, kt)
  scores = Mul(product, scale)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  out = MatMul(weights, value_all)"""


def grouped(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    source = built(tmp_path, GQA_BODY, inputs=GQA_INPUTS, out_dims="batch,4,length,8")
    feeds = {"query": random((2, 4, 50, 8), 0), "key": random((2, 2, 50, 8), 1), "value": random((2, 2, 50, 8), 2)}
    return source, feeds


@pytest.mark.parametrize(("emit", "operator"), [("onnx-attention", "Attention"), ("ort-gqa", "GroupQueryAttention")])
def test_other_operators(emit, operator, tmp_path):
    """The window in other tools' words: one key more or less would move the output far beyond the tolerance."""
    source, feeds = grouped(tmp_path)
    done = pipeline.rewrite(source, tmp_path / "out.onnx", emit=pipeline.Emit(emit))
    assert len(done.replaced) == 1
    model = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in model.graph.node if node.op_type.endswith("Attention")] == [operator]
    assert not model.functions
    assert np.abs(run(tmp_path / "out.onnx", feeds) - run(source, feeds)).max() < MODEL_ATOL
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("left_window_size", "local_window_size"):
                attribute.i += 1
    onnx.save(model, tmp_path / "wider.onnx")
    assert np.abs(run(tmp_path / "wider.onnx", feeds) - run(source, feeds)).max() > 1e-2


def test_what_group_query_attention_cannot_say(corpus, tmp_path):
    done = pipeline.rewrite(
        corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx", tmp_path / "out.onnx", emit=pipeline.Emit.ORT_GQA
    )
    assert not done.replaced
    assert all(kept.code == "emit" and "padding at the end" in kept.reason for kept in done.outcomes)
    assert not (tmp_path / "out.onnx").exists()


def test_model_too_old_for_attention(corpus, tmp_path):
    with pytest.raises(ModelError, match="opset 18 or later"):
        pipeline.rewrite(
            corpus / "mistral" / "ts-sdpa-dyn-pad.onnx", tmp_path / "out.onnx", emit=pipeline.Emit.ONNX_ATTENTION
        )
