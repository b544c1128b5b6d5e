"""torch.compile with backend="swacompile": what is replaced, recompilation, gradients, and what is left to inductor."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402

import swacompile.torch as swacompile_torch  # noqa: E402
from swacompile import torch_backend  # noqa: E402
from tests.frontends.test_fx_rewrite import LENGTH, OPERATOR, OTHER_LENGTH, Layer, inputs, targets  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that would go to inductor; they run as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, *_: object) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch_backend, "_inductor", keep)
    torch._dynamo.reset()
    return graphs


def test_compiles_with_inductor_at_any_length() -> None:
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, backend="swacompile", dynamic=True, fullgraph=True)
    calls = swacompile_torch.call_count()
    with torch.no_grad():
        for length in (LENGTH, OTHER_LENGTH):
            x, padding = inputs(length)
            assert (compiled(x, padding) - layer(x, padding))[padding.bool()].abs().max() < MODEL_ATOL
    assert swacompile_torch.call_count() == calls + 2


@pytest.mark.parametrize("eager", [False, True])
def test_replaces_and_compiles_no_more_often(eager: bool, handed: list[torch.fx.GraphModule]) -> None:
    layer = Layer(eager=eager)

    def graphs(backend: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(layer, backend=backend)
        with torch.no_grad():
            for length in (LENGTH, OTHER_LENGTH, 50, 61):
                x, padding = inputs(length)
                assert (compiled(x, padding) - layer(x, padding))[padding.bool()].abs().max() < MODEL_ATOL
        return int(counters["stats"]["unique_graphs"])

    assert graphs("swacompile") == graphs("eager")
    assert all(targets(graph).count(OPERATOR) == 1 for graph in handed)


def test_gradients(handed: list[torch.fx.GraphModule]) -> None:
    def gradients(module: Any, double: bool = False) -> list[torch.Tensor]:
        layer.zero_grad()
        x, padding = inputs()
        x = (x.double() if double else x).requires_grad_()
        module(x, padding)[padding.bool()].square().sum().backward()
        return [x.grad.clone(), *(parameter.grad.clone() for parameter in layer.parameters())]

    layer = Layer()
    found = gradients(torch.compile(layer, backend="swacompile"))
    layer = layer.double()
    for gradient, expected in zip(found, gradients(layer, double=True), strict=True):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
    assert targets(handed[0]).count(OPERATOR) == 1


def test_leaves_the_rest_as_it_was_captured(handed: list[torch.fx.GraphModule]) -> None:
    def masked_by_input(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(1, 2, 9, 8), torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    compiled = torch.compile(masked_by_input, backend="swacompile")
    assert torch.equal(compiled(x, mask), masked_by_input(x, mask))
    assert [node.target for node in handed[0].graph.nodes if node.op == "call_function"] == [
        torch._C._nn.scaled_dot_product_attention
    ]


UNINSTALLED = """
from importlib import metadata
installed = metadata.entry_points
def others(**given):
    found = installed(**given)
    return metadata.EntryPoints(e for e in found if e.name != "swacompile") if given else found
metadata.entry_points = others
import torch, swacompile.torch
found = torch.compile(lambda x: x + 1, backend="swacompile")(torch.ones(2))
print(found.tolist(), torch._dynamo.list_backends().count("swacompile"))
"""


def test_its_name_is_known_after_the_import_alone() -> None:
    """Where the package is not installed, so that torch finds no entry point."""
    command = [sys.executable, "-c", UNINSTALLED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["[2.0,", "2.0]", "1"]
