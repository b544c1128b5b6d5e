"""Real exports of many models: the windows found are the true ones, and the rewritten models compute the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from swacompile import pipeline
from swacompile.attention import Attention, BandProof, Kind
from tests.conftest import corpus_folder
from tests.models import run
from tests.tolerances import MODEL_ATOL

CORPUS = corpus_folder()
MANIFEST: dict[str, Any] = json.loads((CORPUS / "manifest.json").read_text())
ONNX = [artifact for artifact in MANIFEST["artifacts"] if artifact["file"].endswith(".onnx")]
PLAIN = ("onnx-sdpa-dyn-pad", "onnx23-sdpa-static", "onnx-sdpa-static")
VOCABULARY, STATIC_LENGTH, BATCH = 64, 24, 2


def of_variants(*variants: str) -> Any:
    chosen = [artifact for artifact in ONNX if artifact["variant"] in variants]
    return pytest.mark.parametrize("artifact", chosen, ids=[artifact["file"] for artifact in chosen])


def truth(artifact: dict[str, Any]) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = MANIFEST["models"][artifact["model"]]["layers"]
    return layers


def bound(window: int) -> int | None:
    return None if window < 0 else window


@pytest.mark.parametrize("artifact", ONNX, ids=[artifact["file"] for artifact in ONNX])
def test_bands_are_the_true_ones(artifact):
    findings = pipeline.inspect(CORPUS / artifact["file"]).findings
    layers = truth(artifact)
    assert len(findings) == len(layers)
    for finding, layer in zip(findings, layers, strict=True):
        if layer["kind"] in ("full", "sliding"):
            assert_band(finding, layer, artifact)
        else:
            assert not isinstance(finding.verdict, BandProof)
            assert finding.verdict.reason


def assert_band(finding: Any, layer: dict[str, Any], artifact: dict[str, Any]) -> None:
    site, proof = finding.attention, finding.verdict
    assert isinstance(site, Attention) and isinstance(proof, BandProof), proof
    left = bound(layer["window_left"])
    if "static" in artifact["variant"] and left is not None and left >= STATIC_LENGTH - 1:
        left = None  # a window beyond the fixed length leaves no trace, and must not be invented
    assert (proof.mask.left, proof.mask.right) == (left, bound(layer["window_right"]))
    assert (site.heads, site.kv_heads, site.head_size) == (layer["q_heads"], layer["kv_heads"], layer["head_dim"])
    assert site.scale == pytest.approx(layer["scale"], rel=1e-5)
    assert (site.softcap or 0) == (layer["softcap"] or 0)
    assert (site.sinks is not None) == layer["sinks"]


def inputs(path: Path, length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(feeds, which positions are valid): random tokens, the second row left-padded where the model takes a mask."""
    rng = np.random.default_rng(length)
    session_inputs = onnx.load(path, load_external_data=False).graph.input
    valid = np.ones((BATCH, length), np.int64)
    feeds: dict[str, np.ndarray] = {}
    for value in session_inputs:
        if value.name == "attention_mask":
            valid[1, :3] = 0
            feeds[value.name] = valid
        elif value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            feeds[value.name] = rng.standard_normal((BATCH, length, 32)).astype(np.float32)
        else:
            feeds[value.name] = rng.integers(3, VOCABULARY, (BATCH, length))
    return feeds, valid.astype(bool)


def lengths(artifact: dict[str, Any]) -> tuple[int, ...]:
    return (STATIC_LENGTH,) if "static" in artifact["variant"] else (STATIC_LENGTH, 77)


@of_variants(*PLAIN)
def test_rewritten_models_compute_the_same(artifact, tmp_path, cpu_library):
    source, out = CORPUS / artifact["file"], tmp_path / "out.onnx"
    windowed = [layer for layer in truth(artifact) if layer["kind"] == "sliding"]
    done = pipeline.rewrite(source, out)
    if not done.replaced:
        assert not out.exists()
        assert not windowed or "static" in artifact["variant"]
        return
    onnx.checker.check_model(str(out), full_check=True)
    assert len(done.replaced) == len(windowed)
    for length in lengths(artifact):
        feeds, valid = inputs(source, length)
        expected = run(source, feeds)[valid]
        assert np.abs(run(out, feeds)[valid] - expected).max() < MODEL_ATOL
        before = cpu_library.calls()
        assert np.abs(run(out, feeds, cpu_library.path)[valid] - expected).max() < MODEL_ATOL
        assert cpu_library.calls() == before + len(done.replaced)


@of_variants("onnx-sdpa-dyn-pad")
def test_a_window_off_by_one_fails(artifact, tmp_path, cpu_library):
    """The comparison above can tell: one key more moves the output by far more than the tolerance."""
    source, out = CORPUS / artifact["file"], tmp_path / "out.onnx"
    if not pipeline.rewrite(source, out).replaced:
        return
    model = onnx.load(out)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "BandedAttention" and attribute.name == "left_window_size":
                attribute.i += 1
    onnx.save(model, out)
    length = 77 if all(layer["window_left"] < 70 for layer in truth(artifact)) else None
    if length is not None:
        feeds, valid = inputs(source, 77)
        assert np.abs(run(out, feeds, cpu_library.path)[valid] - run(source, feeds)[valid]).max() > 1e-2


@pytest.mark.parametrize("model", ["llama-global", "bert-global"])
def test_unwindowed_models_change_only_when_asked(model, tmp_path):
    source = CORPUS / model / "onnx-sdpa-dyn-pad.onnx"
    findings = pipeline.inspect(source).findings
    assert all(isinstance(f.verdict, BandProof) and f.verdict.kind is Kind.FULL for f in findings)
    assert not pipeline.rewrite(source, tmp_path / "out.onnx").replaced
    assert not (tmp_path / "out.onnx").exists()
    done = pipeline.rewrite(source, tmp_path / "out.onnx", full=True)
    assert len(done.replaced) == len(findings)
    feeds, valid = inputs(source, 77)
    assert np.abs(run(tmp_path / "out.onnx", feeds)[valid] - run(source, feeds)[valid]).max() < MODEL_ATOL
