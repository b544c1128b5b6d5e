"""Rewritten torch programs against their sources: results at two lengths, what is removed, and what is kept."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import swacompile  # noqa: E402
import swacompile.torch as swacompile_torch  # noqa: E402
from swacompile import torch_pipeline  # noqa: E402
from swacompile.attention import Refutation  # noqa: E402
from swacompile.errors import ArgumentError, ArtifactError, ModelError, OutputError  # noqa: E402
from swacompile.frontends.fx_archive import load_program  # noqa: E402
from tests.conftest import corpus_folder  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
HEADS, KV_HEADS, SIZE, WINDOW, LENGTH, OTHER_LENGTH = 4, 2, 8, 5, 24, 37
LONG = 90  # longer than every window of the corpus
OPERATOR = "swacompile.banded_attention.default"
Program = torch.export.ExportedProgram


class Layer(torch.nn.Module):
    """A layer as Hugging Face's models have it: key heads expanded, a mask of index arithmetic and padding."""

    def __init__(self, *, eager: bool = False, sinks: bool = False, softcap: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(32, (HEADS + 2 * KV_HEADS) * SIZE)
        self.output = torch.nn.Linear(HEADS * SIZE, 32)
        self.project.weight.data *= 6  # so that the softmax is far from even
        self.output.weight.data *= 3
        self.register_buffer("unused", torch.ones(3))
        self.sinks = torch.nn.Parameter(torch.randn(HEADS)) if sinks else None
        self.eager, self.softcap = eager, softcap

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.project(x).split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        query, key, value = (part.view(batch, length, -1, SIZE).transpose(1, 2) for part in parts)
        repeat = HEADS // KV_HEADS
        shape = (batch, KV_HEADS, repeat, length, SIZE)
        key, value = (part[:, :, None].expand(shape).reshape(batch, HEADS, length, SIZE) for part in (key, value))
        line = torch.arange(length)
        near = (line[None, :] > line[:, None] - WINDOW) & (line[None, :] <= line[:, None])
        mask = near & padding.bool()[:, None, None, :]
        result = self.attend(query, key, value, mask) if self.eager else self.fused(query, key, value, mask)
        return self.output(result.transpose(1, 2).reshape(batch, length, -1))

    @staticmethod
    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(2, 3) * 0.3
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        weights = torch.nn.functional.dropout(weights[..., : key.shape[2]], 0.0, training=False)
        return weights @ value


def inputs(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two, the second padded on the right, so that every query sees itself or lies in the padding."""
    draw = torch.Generator().manual_seed(length)
    padding = torch.ones(2, length, dtype=torch.int64)
    padding[1, -3:] = 0
    return torch.randn(2, length, 32, generator=draw).to(dtype), padding


def export(
    module: torch.nn.Module, *, strict: bool = False, core: bool = False, dtype: torch.dtype = torch.float32
) -> Program:
    axes = {0: torch.export.Dim.STATIC, 1: torch.export.Dim.DYNAMIC(min=3, max=4096)}
    program = torch.export.export(module, inputs(dtype=dtype), dynamic_shapes=(axes, axes), strict=strict)
    return program.run_decompositions() if core else program


def targets(program: Any) -> list[str]:
    """Names of the operators of a program, sizes left out."""
    return [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and "sym_" not in str(node.target)
    ]


def difference(first: Any, second: Any, values: Any, valid: torch.Tensor | None = None) -> float:
    """Largest difference of two modules' results, on rows that are no padding."""
    with torch.no_grad():
        results = [torch.utils._pytree.tree_leaves(module(*copy.deepcopy(values))) for module in (first, second)]
    gaps = [(a.float() - b.float()).abs() for a, b in zip(*results, strict=True)]
    return max(float((gap[valid] if valid is not None else gap).max()) for gap in gaps)


def widened(program: Program) -> Program:
    """The program with every window one key wider."""
    wide = copy.deepcopy(program)
    for node in wide.graph.nodes:
        if str(node.target) == OPERATOR:
            node.kwargs = node.kwargs | {"left_window_size": node.kwargs["left_window_size"] + 1}
    wide.graph_module.recompile()
    return wide


FORMS: dict[str, Callable[[], Program]] = {
    "sdpa": lambda: export(Layer()),
    "sdpa strict": lambda: export(Layer(), strict=True),
    "eager": lambda: export(Layer(eager=True)),
    "eager softcap sinks": lambda: export(Layer(eager=True, sinks=True, softcap=3.0)),
    "eager core": lambda: export(Layer(eager=True, sinks=True), core=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_its_source(form: str, tmp_path: Path) -> None:
    source = FORMS[form]()
    done = swacompile.rewrite(source)
    (replaced,) = done.replaced
    assert (replaced.left_window_size, replaced.right_window_size) == (WINDOW - 1, 0)
    torch.export.save(done.program, tmp_path / "out.pt2")
    loaded = torch.export.load(tmp_path / "out.pt2")
    for length in (LENGTH, OTHER_LENGTH):
        values = inputs(length)
        valid = values[1].bool()
        calls = swacompile_torch.call_count()
        assert difference(source.module(), loaded.module(), values, valid) < MODEL_ATOL
        assert swacompile_torch.call_count() == calls + 1
        assert difference(source.module(), widened(loaded).module(), values, valid) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_removes_what_nothing_reads(form: str) -> None:
    left = targets(swacompile.rewrite(FORMS[form]()).program)
    assert left.count(OPERATOR) == 1
    dense = r"softmax|dropout|scaled_dot|arange|\.(expand|le|gt|tanh|masked_fill|bitwise_and|__and__|matmul|bmm|cat)\."
    assert [name for name in left if re.search(dense, name)] == []


def test_keeps_signature_weights_sizes_and_guards() -> None:
    source = export(Layer())
    program = swacompile.rewrite(source).program
    assert isinstance(program, Program)
    assert [str(spec) for spec in program.graph_signature.input_specs] == [
        str(spec) for spec in source.graph_signature.input_specs
    ]
    assert program.state_dict.keys() == source.state_dict.keys() and "unused" in program.state_dict
    assert all(program.state_dict[name] is tensor for name, tensor in source.state_dict.items())
    assert program.range_constraints == source.range_constraints
    assert program._guards_code == source._guards_code
    with pytest.raises(Exception, match=r"(?i)length|expected|guard"):
        program.module()(*inputs(2))


def test_source_is_not_changed() -> None:
    source = export(Layer())
    before = str(source.graph)
    swacompile.rewrite(source)
    assert str(source.graph) == before


def test_exports_again_and_keeps_the_operator() -> None:
    program = swacompile.rewrite(export(Layer())).program
    assert targets(program.run_decompositions()).count(OPERATOR) == 1
    axes = {0: torch.export.Dim.STATIC, 1: torch.export.Dim.DYNAMIC(min=3, max=4096)}
    again = torch.export.export(program.module(), inputs(), dynamic_shapes=(axes, axes))
    assert targets(again).count(OPERATOR) == 1
    assert difference(program.module(), again.module(), inputs(OTHER_LENGTH)) == 0.0


def test_attention_that_is_the_result() -> None:
    class Bare(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            line = torch.arange(x.shape[2])
            mask = (line[None] - line[:, None]).abs() <= 3
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    values = (torch.randn(1, 2, 20, SIZE) * 3,)
    source = torch.export.export(Bare(), values, dynamic_shapes=({2: torch.export.Dim("length", max=64)},))
    program = swacompile.rewrite(source).program
    (output,) = program.graph_signature.user_outputs
    assert output.startswith("banded_attention")
    assert difference(source.module(), program.module(), values) < MODEL_ATOL


@pytest.mark.parametrize("length", [LENGTH, OTHER_LENGTH])
def test_bfloat16_is_as_exact_as_its_source(length: int) -> None:
    exact = Layer()
    source = export(copy.deepcopy(exact).bfloat16(), dtype=torch.bfloat16)
    program = swacompile.rewrite(source).program
    x, padding = inputs(length, torch.bfloat16)
    with torch.no_grad():
        results = [
            module(x, padding).float()[padding.bool()]
            for module in (source.module(), program.module(), widened(program).module())
        ]
        expected = exact.bfloat16().float()(x.float(), padding)[padding.bool()]
    own, found, wide = ((result - expected).abs().max() for result in results)
    assert found <= 1.5 * own < wide


def test_graph_modules() -> None:
    values = inputs()
    aten = export(Layer()).module()
    done = torch_pipeline.rewrite(aten, args=values)
    assert isinstance(done.program, torch.fx.GraphModule) and len(done.replaced) == 1
    assert difference(aten, done.program, values, values[1].bool()) < MODEL_ATOL


def test_operand_that_is_written_is_refused() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            line = torch.arange(x.shape[2])
            mask = (line[None] - line[:, None]).abs() <= 3
            key = x.tanh()
            copied = key.clone()
            key.zero_()
            return torch.nn.functional.scaled_dot_product_attention(x, copied, copied, attn_mask=mask) + key.sum()

    values = (torch.randn(1, 2, 20, SIZE),)
    source = torch.export.export(Writes(), values)
    done = swacompile.rewrite(source)
    assert difference(source.module(), done.program.module(), values) < MODEL_ATOL
    reasons = [outcome.reason for outcome in done.outcomes if isinstance(outcome, Refutation)]
    assert len(reasons) == 1 and "zero_ writes to the operand tanh before the attention" in reasons[0]


def test_nothing_to_replace() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    source = torch.export.export(Plain(), (torch.randn(1, 2, 20, SIZE),))
    done = swacompile.rewrite(source)
    assert not done.replaced and targets(done.program) == targets(source)


def test_command_line(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    model, out = tmp_path / "layer.pt2", tmp_path / "out.pt2"
    source = export(Layer())
    torch.export.save(source, model)
    assert run_cli("rewrite", model, "-o", out).code == 0
    assert difference(source.module(), load_program(out).module(), inputs(), inputs()[1].bool()) < MODEL_ATOL
    again = run_cli("rewrite", model, "-o", out)
    assert again.code == 2 and "expected a path that does not exist yet" in again.err
    other = run_cli("rewrite", model, "-o", tmp_path / "out.onnx")
    assert other.code == 2 and "ends in .pt2" in other.err


def test_compiled_folder(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    model, out = tmp_path / "layer.pt2", tmp_path / "layer.swa"
    source = export(Layer())
    torch.export.save(source, model)
    assert run_cli("compile", model, "-o", out).code == 0
    compiled = swacompile.load(out)
    values = inputs(OTHER_LENGTH)
    assert difference(source.module(), compiled, values, values[1].bool()) < MODEL_ATOL
    assert compiled.manifest["versions"]["torch"] == torch.__version__
    with (out / "model.pt2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"model\.pt2 is not the file that was compiled"):
        swacompile.load(out)


def test_says_what_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a path, an ExportedProgram or a GraphModule, found Layer"):
        swacompile.rewrite(Layer())
    with pytest.raises(ArgumentError, match="the other forms are ONNX operators"):
        swacompile.rewrite(export(Layer()), emit=swacompile.Emit.ORT_GQA)
    with pytest.raises(OutputError, match="does not exist"):
        swacompile.rewrite(export(Layer()), tmp_path / "no" / "out.pt2")


# ---------------------------------------------------------------------------------------------------------- the corpus


def stretched(program: Program, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with every axis that may vary in length cut or repeated to `length`."""
    args, kwargs = copy.deepcopy(program.example_inputs)
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    places = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    for position, name in enumerate(names):
        for axis, extent in enumerate(places[name].shape):
            if axis > 0 and isinstance(extent, torch.SymInt):
                rows = torch.arange(length).remainder(flat[position].shape[axis]).sort().values
                flat[position] = flat[position].index_select(axis, rows)
    made: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_unflatten(flat, spec)
    return made


def decoded(program: Program, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
    """Results of decoding more tokens than a window has, one a call."""
    module = program.module()
    return torch.stack(
        [module(input_ids=input_ids + step, cache_position=cache_position * 0 + step) for step in range(12)]
    )


@pytest.mark.parametrize(
    "path", sorted(corpus_folder().glob("*/*.pt2")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_corpus(path: Path) -> None:
    source = load_program(path)
    done = swacompile.rewrite(path)
    layers = json.loads((corpus_folder() / "manifest.json").read_text())["models"][path.parent.name]["layers"]
    windows = sum(layer["kind"] == "sliding" for layer in layers)
    if path.parent.name == "modernbert" and "staticcache" in path.stem:
        windows = 0  # its fixed length is within the window, which leaves no trace
    assert len(done.replaced) == windows
    assert targets(done.program).count(OPERATOR) == len(done.replaced)
    if not done.replaced:
        assert targets(done.program) == targets(source)
        return
    dynamic = bool(source.range_constraints)
    for length in (LENGTH, LONG) if dynamic else (LENGTH,):
        args, kwargs = stretched(source, length) if dynamic else source.example_inputs
        mask = kwargs.get("attention_mask")
        valid = mask.bool() if mask is not None else None

        def call(program: Program, args: Any = args, kwargs: Any = kwargs) -> Callable[[], Any]:
            if "cache_position" in kwargs:
                return lambda: decoded(program, **kwargs)
            return lambda: program.module()(*copy.deepcopy(args), **copy.deepcopy(kwargs))

        assert difference(call(source), call(done.program), (), valid) < MODEL_ATOL
        if length > done.replaced[0].left_window_size:
            assert difference(call(source), call(widened(done.program)), (), valid) > 1e-2
