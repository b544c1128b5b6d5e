"""The README's Python does what the README says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import swacompile
from tests.models import run
from tests.tolerances import MODEL_ATOL

pytestmark = pytest.mark.cpu
README = Path(__file__).parent.parent / "README.md"


def block(holding: str) -> str:
    """The one Python block that holds this text."""
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if holding in text)
    return found


def test_a_compiled_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx"
    swacompile.compile(source, "mistral.swa")
    ids = np.arange(2 * 30).reshape(2, 30) % 60 + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    names: dict[str, Any] = {"ids": ids, "mask": feeds["attention_mask"], "onnxruntime": onnxruntime}
    exec(block("swacompile.load") + block("register_custom_ops_library"), names)
    (output,) = names["outputs"].values()
    for found in (output, names["session"].run(None, feeds)[0]):
        assert np.abs(found - run(source, feeds)).max() < MODEL_ATOL


@pytest.mark.torch
def test_a_torch_program():
    torch = pytest.importorskip("torch")

    class Attention(torch.nn.Module):
        def forward(self, x):
            line = torch.arange(x.shape[2])
            near = (line[None] - line[:, None]).abs() <= 3
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=near)

    names: dict[str, Any] = {"model": Attention(), "inputs": (torch.randn(1, 2, 20, 8),)}
    exec("import torch, swacompile\n" + block("torch.export"), names)
    assert isinstance(names["banded"], torch.export.ExportedProgram)
    (x,) = names["inputs"]
    for module in (names["banded"].module(), names["fast"]):
        assert (module(x) - names["model"](x)).abs().max() < MODEL_ATOL
    assert "banded_attention" in str(names["banded"].graph)
