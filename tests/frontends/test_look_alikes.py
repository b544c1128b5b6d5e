"""Attentions that are nearly a plain window: each is refused with its reason, or computes the same after the rewrite."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from swacompile import pipeline
from swacompile.attention import Refutation
from tests import models
from tests.tolerances import MODEL_ATOL

LENGTH, DIMS = 11, "batch,2,length,8"
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(key) product = MatMul(query, kt) scores = Mul(product, scale) "
USUAL = "masked = Add(scores, mask) weights = Softmax<axis = -1>(masked) "
OUT = "out = MatMul(weights, value)"
ROW = ", int64[1] keys = {-1}, int64[1] queries = {-2}, float half = {0.5}, float small = {-10.0}, int64[2] swapped = {1, 0}"


def of_logits(text: str) -> str:
    """`logits` made of scores and mask by this text."""
    return SCORES + text + " weights = Softmax<axis = -1>(logits) " + OUT


SAME: Mapping[str, str] = {
    "scaled twice": of_logits("less = Mul(scores, half) lesser = Mul(less, half) logits = Add(lesser, mask)"),
    "scores taken negative": of_logits("less = Neg(scores) logits = Add(less, mask)"),
    "the mask added twice: -inf": of_logits("once = Add(scores, mask) logits = Add(once, mask)"),
    "the mask through float16: -inf": of_logits("short = Cast<to = 10>(mask) long = Cast<to = 1>(short) logits = Add(scores, long)"),
    "scores transposed, the query's place is the key's": of_logits("other = Transpose<perm = [0, 1, 3, 2]>(scores) logits = Add(other, mask)"),
    "the row's maximum taken off": of_logits("once = Add(scores, mask) top = ReduceMax<keepdims = 1>(once, keys) logits = Sub(once, top)"),
    "both scales": SCORES.replace("query, kt", "less, kt").replace("product =", "less = Mul(query, half) product =", 1) + USUAL + OUT,
}  # fmt: skip
REFUSED: Mapping[str, tuple[str, str]] = {
    "masked after the softmax": (SCORES + "all = Softmax<axis = -1>(scores) shown_1 = Cast<to = 1>(seen) weights = Mul(all, shown_1) " + OUT,
                                 "weights-moved"),
    "the maximum of the columns taken off": (
        of_logits("once = Add(scores, mask) top = ReduceMax<keepdims = 1>(scores, queries) logits = Sub(once, top)"), "bias"),
    "the row's mean taken off": (
        of_logits("once = Add(scores, mask) top = ReduceMean<keepdims = 1>(scores, keys) logits = Sub(once, top)"), "bias"),
    "other heads' scores": (of_logits("one_h = Slice(scores, first, one_1, one_1) two_h = Slice(scores, one_1, two_1, one_1) "
                                      "other = Concat<axis = 1>(two_h, one_h) logits = Add(other, mask)"), "score-place"),
    "tanh of what is masked": (of_logits("once = Add(scores, mask) bent = Tanh(once) logits = Mul(bent, half)"), "unreadable-mask"),
    "scores squared": (of_logits("more = Mul(scores, scores) logits = Add(more, mask)"), "unreadable-mask"),
    "what is hidden turned into the largest": (of_logits("once = Add(scores, mask) logits = Neg(once)"), "not-hiding"),
    "scores multiplied by 0, and a number added to all": (
        of_logits("factor = Where(seen, half, shown) more = Mul(scores, factor) logits = Add(more, small)"), "not-hiding"),
}  # fmt: skip


def saved(folder: Path, body: str) -> Path:
    more = ROW + ", int64[1] one_1 = {1}, int64[1] two_1 = {2}"
    return models.save(
        models.windowed(body, inputs=models.three(DIMS), out_dims=DIMS, window=4, more=more), folder / "m.onnx"
    )


@pytest.mark.parametrize("name", SAME)
def test_computes_the_same(name: str, tmp_path: Path) -> None:
    source, out = saved(tmp_path, SAME[name]), tmp_path / "out.onnx"
    (replaced,) = pipeline.rewrite(source, out).replaced
    assert (replaced.left_window_size, replaced.right_window_size) == (3, 0)
    rng = np.random.default_rng(0)
    feeds = {role: rng.standard_normal((2, 2, LENGTH, 8)).astype(np.float32) for role in ("query", "key", "value")}
    expected = models.run(source, feeds)
    assert np.abs(models.run(out, feeds) - expected).max() < MODEL_ATOL
    wider = models.save(
        models.windowed(SAME[name], inputs=models.three(DIMS), out_dims=DIMS, window=5,
                        more=ROW + ", int64[1] one_1 = {1}, int64[1] two_1 = {2}"), tmp_path / "wider.onnx")  # fmt: skip
    assert np.abs(models.run(wider, feeds) - expected).max() > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str, tmp_path: Path) -> None:
    body, code = REFUSED[name]
    (outcome,) = pipeline.rewrite(saved(tmp_path, body), tmp_path / "out.onnx").outcomes
    assert isinstance(outcome, Refutation) and outcome.code == code, outcome


def test_a_softmax_over_the_queries_is_no_attention_with_this_mask(tmp_path: Path) -> None:
    body = SCORES + "masked = Add(scores, mask) weights = Softmax<axis = -2>(masked) " + OUT
    assert not pipeline.rewrite(saved(tmp_path, body), tmp_path / "out.onnx").replaced
