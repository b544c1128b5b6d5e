"""What scripts and people see."""

import json

import pytest

import swacompile
from tests import models

DOCUMENT_KEYS = {
    "node", "kind", "left", "right", "alignment", "heads", "kv_heads", "head_size", "scale", "softcap", "sinks", "mask_form", "masked_rows",
    "residuals", "dialects", "proof", "refusal",
}  # fmt: skip


def test_inspect_document(run_cli, corpus):
    result = run_cli("inspect", corpus / "gpt_oss" / "onnx-sdpa-dyn-pad.onnx", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert document["format_version"] == 1
    sliding, full = document["attentions"]
    assert set(sliding) == DOCUMENT_KEYS
    assert (sliding["kind"], sliding["left"], sliding["right"], sliding["sinks"]) == ("sliding", 5, 0, True)
    assert sliding["dialects"]["hf"] == "sliding_window=6"
    assert sliding["residuals"] == ["key_padding"]
    assert sliding["proof"] == {"method": "smt", "valid_for": []}
    assert (full["kind"], full["left"], full["right"], full["refusal"]) == ("full", None, 0, None)


def test_inspect_refusal(run_cli, corpus):
    result = run_cli("inspect", corpus / "longformer" / "ts-sdpa-dyn-pad.onnx", "--json")
    assert result.code == 1
    for attention in json.loads(result.out)["attentions"]:
        assert attention["proof"] is None
        assert attention["refusal"]["code"] == "no-product"


def test_inspect_table(run_cli, corpus):
    result = run_cli("inspect", corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx")
    assert result.code == 0
    for text in (
        "sliding",
        "(4, 0)",
        "smt, all sizes",
        "sliding_window=5",
        "window_size=(4, 0)",
        "local_window_size=5",
        "left_window_size=4",
    ):
        assert text in result.out


def test_rewrite_document(run_cli, tmp_path):
    source = models.save(models.causal_window(3), tmp_path / "model.onnx")
    result = run_cli("rewrite", source, "-o", tmp_path / "out.onnx", "--json")
    document = json.loads(result.out)
    assert (result.code, document["kept"], len(document["replaced"])) == (0, [], 1)


def test_rewrite_says_what_it_keeps(run_cli, corpus, tmp_path):
    result = run_cli("rewrite", corpus / "gemma2" / "onnx-sdpa-dyn-pad.onnx", "-o", tmp_path / "out.onnx")
    assert result.code == 0
    assert result.out.count("replaced  ") == 1
    assert "full attention has no window" in result.out


@pytest.mark.parametrize("command", ["inspect", "rewrite", "compile"])
def test_help_has_an_example(run_cli, command):
    result = run_cli(command, "--help")
    assert result.code == 0
    assert f"swacompile {command} " in result.out and "Example" in result.out


def test_functions_take_paths_as_text(tmp_path):
    source, out = models.save(models.causal_window(3), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    assert len(swacompile.inspect(str(source)).findings) == 1
    assert swacompile.rewrite(str(source), str(out)).out == out and out.is_file()


def test_source_is_untouched(run_cli, tmp_path):
    source = models.save(models.causal_window(3), tmp_path / "model.onnx")
    before = source.read_bytes()
    run_cli("rewrite", source, "-o", tmp_path / "out.onnx")
    assert source.read_bytes() == before
