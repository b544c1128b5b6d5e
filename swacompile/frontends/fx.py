"""torch models: an ExportedProgram, a .pt2 file or an FX graph, read into the neutral graph.

Every dialect of torch.export is read: strict or not, with or without decompositions, with mutated buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from swacompile.errors import ModelError
from swacompile.frontends.fx_archive import load_program
from swacompile.frontends.fx_ops import OPERATORS, PARTS, WRITE_BACK
from swacompile.frontends.fx_sizes import Sizes, lowest_values
from swacompile.frontends.fx_translate import Translation, tensor_constant
from swacompile.graph import Constant, Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class FxModel:
    """A torch model that was read: the neutral graph, and what it came from for splicing.

    `path` is None where the model was given as an object; `program` is None where it is a GraphModule of ATen operators.
    """

    path: Path | None
    graph: Graph
    module: fx.GraphModule
    program: ExportedProgram | None


def read_pt2(path: Path) -> FxModel:
    """Read a file that torch.export.save wrote.

    Raises ModelError where the file is none, or needs operators that are not registered in this process.
    """
    return read_exported_program(load_program(path), name=path.name, path=path)


def read_exported_program(program: ExportedProgram, *, name: str = "program", path: Path | None = None) -> FxModel:
    """Read an exported program. It is not changed."""
    sizes = Sizes(lowest=lowest_values(program.range_constraints))
    translation = Translation(sizes=sizes, operators=OPERATORS, write_back=WRITE_BACK, parts=PARTS)
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs: list[str] = []
    for node, spec in zip(places, program.graph_signature.input_specs, strict=True):
        value = translation.bind(node)
        stored = None if spec.kind is InputKind.USER_INPUT or spec.target is None else _stored(program, spec.target)
        if stored is None:
            inputs.append(value)
        else:
            translation.stored[value] = stored
    mutated = {spec.target for spec in program.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    names = {
        spec.target: translation.name_of(node)
        for node, spec in zip(places, program.graph_signature.input_specs, strict=True)
    }
    translation.state.update(names[target] for target in mutated if target in names)
    results = translation.run(program.graph, program.graph_module)
    graph = _graph(name, translation, inputs, results)
    return FxModel(path=path, graph=graph, module=program.graph_module, program=program)


def read_graph_module(
    module: fx.GraphModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    name: str = "graph module",
) -> FxModel:
    """Read an FX graph: as it is where it consists of ATen operators with metadata, else by exporting it with these example inputs.

    Raises ModelError where it needs example inputs and has none, or cannot be exported with them.
    """
    if _is_aten(module):
        return _read_aten(module, name)
    if not args and not kwargs:
        raise ModelError(
            f"{name}: expected ATen operators with metadata, found an FX graph without. Give example inputs, so that it can be exported."
        )
    try:
        program = torch.export.export(module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise ModelError(f"{name}: the FX graph cannot be exported with these example inputs ({_first_line(error)}). "
                         "Check their shapes, or export the original module.") from error  # fmt: skip
    return read_exported_program(program, name=name)


def _read_aten(module: fx.GraphModule, name: str) -> FxModel:
    translation = Translation(sizes=Sizes(lowest={}), operators=OPERATORS, write_back=WRITE_BACK, parts=PARTS)
    inputs = [translation.bind(node) for node in module.graph.nodes if node.op == "placeholder"]
    results = translation.run(module.graph, module)
    return FxModel(path=None, graph=_graph(name, translation, inputs, results), module=module, program=None)


def _is_aten(module: fx.GraphModule) -> bool:
    nodes = module.graph.nodes
    calls = [node for node in nodes if node.op == "call_function"]
    known = all("val" in node.meta for node in nodes if node.op == "placeholder")
    return (
        known
        and all(node.op not in ("call_module", "call_method") for node in nodes)
        and any(isinstance(node.target, torch._ops.OpOverload) for node in calls)
    )


def _stored(program: ExportedProgram, target: str) -> Constant | None:
    """The parameter, buffer or constant of this name; None where the program holds no data for it."""
    found = program.state_dict.get(target, program.constants.get(target))
    if not isinstance(found, torch.Tensor) or found.is_meta or isinstance(found, torch._subclasses.FakeTensor):
        return None
    return tensor_constant(found)


def _graph(name: str, translation: Translation, inputs: Sequence[str], results: Sequence[object]) -> Graph:
    """State counts as input: its value is the last call's."""
    state = [value for value in translation.stored if value in translation.state]
    constants = {value: constant for value, constant in translation.stored.items() if value not in translation.state}
    outputs = [
        translation.read(result).name for result in results if isinstance(result, fx.Node) and translation.has(result)
    ]
    return Graph(
        name=name, nodes=tuple(translation.nodes), inputs=(*inputs, *state), outputs=tuple(dict.fromkeys(outputs)),
        constants=constants | translation.constants, types=translation.types,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
