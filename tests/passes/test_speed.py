"""Reading is linear in the nodes, and a mask that all layers share is proven once."""

import gc
import time

import onnx
import pytest
from onnx import TensorProto, helper

from swacompile.attention import Attention, BandProof
from swacompile.band import BandMask
from swacompile.graph import Graph
from swacompile.passes import prove_band
from swacompile.passes.detect_attention import detect_attention
from swacompile.passes.prove_band import Prover
from swacompile.passes.read_masks import read_masks
from tests.passes.masks import graph_of

NODES = 60_000
LAYERS = 100


def stack(layers: int, others: int, *, shared: bool) -> onnx.ModelProto:
    """So many windowed attentions one behind the other, `others` nodes between two of them, with one mask or one a layer."""
    names = ("batch", 2, "length", 8)
    nodes = [] if not shared else mask_nodes("shared")
    value = "query"
    for layer in range(layers):
        for step in range(others):
            nodes.append(helper.make_node("Add", [value, "one"], [f"h{layer}_{step}"], name=f"add_{layer}_{step}"))
            value = f"h{layer}_{step}"
        name = "shared" if shared else f"own{layer}"
        nodes += [] if shared else mask_nodes(name)
        nodes += attention_nodes(layer, value, f"{name}_mask")
        value = f"out{layer}"
    graph = helper.make_graph(
        nodes, "stack",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, names) for name in ("query", "key", "value")],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, names)],
        [helper.make_tensor(name, sort, (), [number]) for name, sort, number in (
            ("one", TensorProto.FLOAT, 1.0), ("zero", TensorProto.FLOAT, 0.0), ("lowest", TensorProto.FLOAT, -3.4028235e38),
            ("i0", TensorProto.INT64, 0), ("i1", TensorProto.INT64, 1), ("i2", TensorProto.INT64, 2), ("window", TensorProto.INT64, 64))],
    )  # fmt: skip
    graph.initializer.extend([helper.make_tensor(f"axis{i}", TensorProto.INT64, (1,), [i]) for i in (0, 1)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def mask_nodes(name: str) -> list[onnx.NodeProto]:
    lines = [
        ("Shape", ["query"], "shape"), ("Gather", ["shape", "i2"], "length"), ("Range", ["i0", "length", "i1"], "line"),
        ("Unsqueeze", ["line", "axis1"], "q"), ("Unsqueeze", ["line", "axis0"], "k"), ("Sub", ["q", "window"], "edge"),
        ("Greater", ["k", "edge"], "near"), ("LessOrEqual", ["k", "q"], "past"), ("And", ["near", "past"], "seen"),
        ("Where", ["seen", "zero", "lowest"], "mask"),
    ]  # fmt: skip
    given = ("query", "i0", "i1", "i2", "axis0", "axis1", "window", "zero", "lowest")
    return [
        helper.make_node(
            op, [i if i in given else f"{name}_{i}" for i in inputs], [f"{name}_{output}"], name=f"{name}_{output}"
        )
        for op, inputs, output in lines
    ]


def attention_nodes(layer: int, query: str, mask: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", ["key"], [f"kt{layer}"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [query, f"kt{layer}"], [f"scores{layer}"]),
        helper.make_node("Add", [f"scores{layer}", mask], [f"masked{layer}"]),
        helper.make_node("Softmax", [f"masked{layer}"], [f"weights{layer}"], axis=-1, name=f"softmax_{layer}"),
        helper.make_node("MatMul", [f"weights{layer}", "value"], [f"out{layer}"]),
    ]


def inspect(graph: Graph) -> list[BandProof]:
    reading = read_masks(graph)
    prover = Prover(arrays=reading.arrays)
    sites = [site for site in detect_attention(reading) if isinstance(site, Attention)]
    return [proof for site in sites if isinstance(proof := prover.prove(site), BandProof)]


@pytest.mark.parametrize("shared", [True, False])
def test_sixty_thousand_nodes_in_ten_seconds(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = prove_band.always_equal
    monkeypatch.setattr(
        prove_band, "always_equal", lambda *args, **options: asked.append(args) or ask(*args, **options)
    )
    model = stack(LAYERS, NODES // LAYERS - (5 if shared else 15), shared=shared)
    assert 0.99 * NODES <= len(model.graph.node) <= NODES + 100
    graph = graph_of(model)
    start = time.process_time()  # of this process alone: whoever else runs does not count
    proofs = inspect(graph)
    assert time.process_time() - start < 10
    assert [proof.mask for proof in proofs] == [BandMask(left=63, right=0)] * LAYERS
    assert len(asked) == 1  # the formulas are equal, however often the model computes them


def test_cost_is_linear() -> None:
    """Four times the nodes take less than eight times as long (quadratic would be sixteen).

    Processor time, the sizes in turn, and no garbage collector, whose passes grow with all that lives in the process: what else the
    machine and the tests do must not decide.
    """
    small, large = (graph_of(stack(layers, 100, shared=False)) for layers in (40, 160))

    def seconds(graph: Graph) -> float:
        start = time.process_time()
        assert len(inspect(graph)) == len([node for node in graph.nodes if node.op == "softmax"])
        return time.process_time() - start

    gc.disable()
    try:
        rounds = [(seconds(small), seconds(large)) for _ in range(3)]
    finally:
        gc.enable()
    assert min(of_large for _, of_large in rounds) < 8 * min(of_small for of_small, _ in rounds)
