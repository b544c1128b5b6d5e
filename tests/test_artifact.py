"""A compiled folder: complete, checked on opening, and computing what the source computes."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest

import swacompile
from swacompile.errors import ArtifactError
from swacompile.runtime.ort_library import call_count
from tests import models
from tests.tolerances import MODEL_ATOL

pytestmark = pytest.mark.cpu
WINDOW = 5


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    source = models.save(models.causal_window(WINDOW), folder / "model.onnx")
    done = swacompile.compile(source, folder / "model.swa")
    assert done.manifest is not None
    return source, folder / "model.swa"


def feeds(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    return {name: rng.standard_normal((1, 2, length, 8)).astype(np.float32) for name in ("query", "key", "value")}


@pytest.mark.parametrize("length", [1, 4, 5, 6, 100])
def test_same_numbers(compiled, length):
    source, folder = compiled
    expected = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]).run(None, feeds(length))[0]
    model = swacompile.load(folder)
    before = call_count(folder / "libswacompile_ort.so")
    assert np.abs(model.run(feeds(length))["out"] - expected).max() < MODEL_ATOL
    assert call_count(folder / "libswacompile_ort.so") == before + 1


def test_manifest(compiled):
    _, folder = compiled
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    (attention,) = manifest["report"]["attentions"]
    assert (attention["kind"], attention["left"], attention["right"]) == ("sliding", WINDOW - 1, 0)
    assert manifest["kernels"] == [f"swa_f32_d8_v8_{manifest['targets'][0]}"]


def test_damaged_file_is_refused(compiled, tmp_path):
    copy = tmp_path / "copy.swa"
    shutil.copytree(compiled[1], copy)
    with (copy / "libswacompile_ort.so").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="not the file that was compiled"):
        swacompile.load(copy)
    (copy / "libswacompile_ort.so").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        swacompile.load(copy)


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="expected a folder written by"):
        swacompile.load(tmp_path)


def test_newer_format_is_refused(compiled, tmp_path):
    copy = tmp_path / "copy.swa"
    shutil.copytree(compiled[1], copy)
    manifest = json.loads((copy / "manifest.json").read_text()) | {"format_version": 99}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="found 99"):
        swacompile.load(copy)


def test_nothing_to_compile_writes_nothing(run_cli, corpus, tmp_path):
    result = run_cli("compile", corpus / "llama-global" / "onnx-sdpa-dyn-pad.onnx", "-o", tmp_path / "out.swa")
    assert result.code == 1
    assert list(tmp_path.iterdir()) == []
