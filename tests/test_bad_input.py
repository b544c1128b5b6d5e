"""Every way in which a user can hand over something wrong: exit code 2, a clear message, nothing lost, nothing half-written."""

import resource
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests import models


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return models.save(models.causal_window(5), tmp_path / "model.onnx")


def assert_refused(result, *expected: str) -> None:
    assert result.code == 2
    assert result.err.startswith("error: ")
    for text in expected:
        assert text in result.err


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_missing_file(run_cli, tmp_path):
    assert_refused(run_cli("inspect", tmp_path / "none.onnx"), "expected an ONNX file, found nothing")


def test_folder(run_cli, tmp_path):
    (tmp_path / "dir.onnx").mkdir()
    assert_refused(run_cli("inspect", tmp_path / "dir.onnx"), "found a folder")


def test_unknown_suffix(run_cli, good, tmp_path):
    (tmp_path / "model.txt").write_text("x")
    assert_refused(run_cli("inspect", tmp_path / "model.txt"), "'.txt'")
    assert_refused(run_cli("inspect", tmp_path / "model"), "found nothing")
    assert_refused(run_cli("inspect", tmp_path), "found a folder")
    assert_refused(run_cli("rewrite", good, "-o", tmp_path / "out.pt2"), "ends in .onnx")
    assert not (tmp_path / "out.pt2").exists()


def test_not_onnx(run_cli, tmp_path):
    (tmp_path / "text.onnx").write_text("this is no protobuf at all")
    assert_refused(run_cli("inspect", tmp_path / "text.onnx"), "do not parse")


def test_empty_file(run_cli, tmp_path):
    (tmp_path / "empty.onnx").touch()
    assert_refused(run_cli("inspect", tmp_path / "empty.onnx"), "expected an ONNX model")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_truncated(run_cli, good, tmp_path, share):
    whole = good.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(run_cli("rewrite", cut, "-o", tmp_path / "out.onnx"), "cut.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_missing_external_data(run_cli, tmp_path):
    path = models.with_external_weights(tmp_path, megabytes=8)
    (tmp_path / "weights.bin").unlink()
    assert_refused(run_cli("rewrite", path, "-o", tmp_path / "out.onnx"), "weight_0", "weights.bin", "missing")


def test_truncated_external_data(run_cli, tmp_path):
    path = models.with_external_weights(tmp_path, megabytes=8)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(1000)
    assert_refused(run_cli("inspect", path), "weight_0", "1000")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside(run_cli, tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    path = models.with_external_weights(folder, megabytes=8)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[-1].external_data:
        if entry.key == "location":
            entry.value = location
    models.save(model, path)
    (tmp_path / "weights.bin").write_bytes(b"secret")
    assert_refused(run_cli("inspect", path), "outside the model's folder")


def test_old_opset(run_cli, tmp_path):
    model = models.causal_window(5)
    model.opset_import[0].version = 12
    assert_refused(run_cli("inspect", models.save(model, tmp_path / "old.onnx")), "opset 13 or later, found 12")


def test_unknown_operator(run_cli, good, tmp_path):
    model = onnx.load(good)
    model.graph.node[-1].op_type = "MatMull"
    assert_refused(run_cli("inspect", models.save(model, tmp_path / "bad.onnx")), "MatMull")


def test_operator_of_another_domain_is_data(run_cli, good, tmp_path):
    model = onnx.load(good)
    model.graph.node.append(onnx.helper.make_node("Blur", ["out"], ["blurred"], domain="their.ops", name="blur"))
    model.opset_import.append(onnx.helper.make_opsetid("their.ops", 1))
    assert run_cli("inspect", models.save(model, tmp_path / "other.onnx")).code == 0


def test_existing_output(run_cli, good, tmp_path):
    kept = tmp_path / "out.onnx"
    kept.write_text("precious")
    assert_refused(run_cli("rewrite", good, "-o", kept), "--force")
    assert kept.read_text() == "precious"
    assert run_cli("rewrite", good, "-o", kept, "--force").code == 0
    onnx.checker.check_model(str(kept), full_check=True)


def test_output_is_source(run_cli, good):
    before = good.read_bytes()
    assert_refused(run_cli("rewrite", good, "-o", good, "--force"), "the model itself")
    assert good.read_bytes() == before


def test_missing_output_folder(run_cli, good, tmp_path):
    assert_refused(run_cli("rewrite", good, "-o", tmp_path / "no" / "out.onnx"), "does not exist")


def on_a_full_disk(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "swacompile", *map(str, arguments)],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)), check=False,
    )  # fmt: skip


def test_full_disk(good, tmp_path):
    """The system refuses to let files grow, as a full disk does."""
    before = listing(tmp_path)
    limited = on_a_full_disk("rewrite", good, "-o", tmp_path / "out.onnx")
    assert limited.returncode == 2, limited.stderr
    assert "could not be written" in limited.stderr
    assert listing(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_full_disk_while_compiling(good, tmp_path):
    """The message names what the user named. The library does not fit."""
    before = listing(tmp_path)
    limited = on_a_full_disk("compile", good, "-o", tmp_path / "out.swa")
    assert limited.returncode == 2, limited.stderr
    assert f"{tmp_path / 'out.swa' / 'model.onnx'}: could not be written" in limited.stderr
    assert listing(tmp_path) == before


def test_output_is_a_folder(run_cli, good, tmp_path):
    folder = tmp_path / "out.onnx"
    folder.mkdir()
    for force in ([], ["--force"]):
        assert_refused(run_cli("rewrite", good, "-o", folder, *force), "found a folder")


def test_target_of_another_machine(run_cli, good, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    result = run_cli("compile", good, "-o", tmp_path / "out.swa", "--target", "aarch64_neon")
    assert_refused(result, "x86_64, found aarch64_neon", "Compile the model on a machine of that kind")
    assert not (tmp_path / "out.swa").exists()


def test_foreign_folder_is_not_replaced(run_cli, good, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    assert_refused(run_cli("compile", good, "-o", folder, "--force"), "left alone")
    assert (folder / "thesis.tex").read_text() == "precious"
