"""The pass for inductor: what it replaces, with other passes beside it, at any length, with gradients and caches."""

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import fx  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import swacompile.torch as swacompile_torch  # noqa: E402
from swacompile import torch_pass  # noqa: E402
from swacompile.torch_pass import ReplaceAttention  # noqa: E402
from tests.frontends.test_fx_rewrite import LENGTH, OPERATOR, OTHER_LENGTH, Layer, inputs, targets  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
LENGTHS = (LENGTH, OTHER_LENGTH, 50)
BACKWARD = "swacompile.banded_attention_backward.default"


class Seen:
    """A pass of someone else's: it notes which operators reach it."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.targets.append(targets(graph.owning_module))


def graphs_compiled(options: dict[str, Any]) -> int:
    """How many graphs inductor compiles for a layer at several lengths; the results must be right."""
    torch._dynamo.reset()
    counters.clear()
    layer = Layer()
    compiled = torch.compile(layer, options=options)
    with torch.no_grad():
        for length in LENGTHS:
            x, padding = inputs(length)
            assert (compiled(x, padding) - layer(x, padding))[padding.bool()].abs().max() < MODEL_ATOL
    return int(counters["stats"]["unique_graphs"])


def test_composes_with_other_passes_and_compiles_no_more_often() -> None:
    seen = Seen()
    calls = swacompile_torch.call_count()
    number = graphs_compiled({"pre_grad_custom_pass": ReplaceAttention(), "post_grad_custom_pre_pass": seen})
    assert swacompile_torch.call_count() == calls + len(LENGTHS)
    assert len(seen.targets) == number and all(found.count(OPERATOR) == 1 for found in seen.targets)
    assert number == graphs_compiled({})


def test_gradients() -> None:
    def gradients(module: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        layer.zero_grad()
        x, padding = inputs(dtype=dtype)
        x.requires_grad_()
        module(x, padding)[padding.bool()].square().sum().backward()
        return [x.grad.clone(), *(parameter.grad.clone() for parameter in layer.parameters())]

    torch._dynamo.reset()
    layer = Layer()
    seen = Seen()
    options = {"pre_grad_custom_pass": ReplaceAttention(), "post_grad_custom_pre_pass": seen}
    found = gradients(torch.compile(layer, options=options), torch.float32)
    assert sorted(sum(found.count(name) for name in (OPERATOR, BACKWARD)) for found in seen.targets) == [1, 1]
    layer = copy.deepcopy(layer).double()
    for gradient, expected in zip(found, gradients(layer, torch.float64), strict=True):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


class Recorded:
    """A backend that applies the pass to what dynamo captured, and runs it as it is."""

    def __init__(self) -> None:
        self.before: list[fx.Graph] = []
        self.after: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, _: Any) -> Any:
        self.before.append(copy.deepcopy(module.graph))
        ReplaceAttention()(module.graph)
        module.recompile()
        self.after.append(module)
        return module.forward


def test_keeps_the_placeholders_and_carries_constants() -> None:
    class Shifted(Layer):
        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return super().forward(x, padding) + torch.tensor([0.5] * 32)

    torch._dynamo.reset()
    layer, backend = Shifted(), Recorded()
    x, padding = inputs()
    with torch.no_grad():
        found = torch.compile(layer, backend=backend, dynamic=True)(x, padding)
        assert (found - layer(x, padding))[padding.bool()].abs().max() < MODEL_ATOL
    names = [
        [node.name for node in graph.find_nodes(op="placeholder")]
        for graph in (backend.before[0], backend.after[0].graph)
    ]
    assert names[0] == names[1]
    assert targets(backend.after[0]).count(OPERATOR) == 1


def test_leaves_other_graphs_alone() -> None:
    torch._dynamo.reset()
    backend = Recorded()
    torch.compile(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), backend=backend)(
        torch.ones(1, 1, 4, 8)
    )
    assert [str(node) for node in backend.before[0].nodes] == [str(node) for node in backend.after[0].graph.nodes]


def test_identity_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every process of one version, another where a source that decides differs."""
    first, second = ReplaceAttention(), ReplaceAttention()
    assert first.uuid() == second.uuid() and pickle.dumps(first) == pickle.dumps(second)
    fewer = torch_pass._deciding_sources()[1:]
    monkeypatch.setattr(torch_pass, "_deciding_sources", lambda: fewer)
    assert ReplaceAttention().uuid() != first.uuid()
