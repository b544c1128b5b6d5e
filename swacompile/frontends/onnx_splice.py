"""Put BandedAttention nodes into an ONNX model, and write the result without touching weights."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from swacompile.attention import Attention, Layout, Operand
from swacompile.errors import OutputError
from swacompile.frontends.onnx import OnnxModel, external_tensors
from swacompile.passes.plan_rewrite import Replacement

log = logging.getLogger(__name__)

FICLONE = 0x40049409  # Linux: share a file's blocks with another
SWAP_HEADS_AND_SEQUENCE = (0, 2, 1, 3)


class Splicer:
    """Edits one model in memory: adds nodes before an old one, then moves its uses over."""

    def __init__(self, source: OnnxModel) -> None:
        self.source = source
        self.graph = source.model.graph
        self.values = {str(value.name): value for value in self.graph.inputs} | {
            str(value.name): value for node in self.graph for value in node.outputs
        } | {str(name): value for name, value in self.graph.initializers.items()}  # fmt: skip
        self._made = 0
        self._once: dict[tuple[str, str], ir.Value] = {}

    def in_graph_order(self, replaced: Sequence[Replacement]) -> list[Replacement]:
        """Attentions in the order in which their outputs are computed, so that a node for the first is there for all."""
        places = {id(node): place for place, node in enumerate(self.graph)}

        def place(replacement: Replacement) -> int:
            return places[id(self.values[replacement.site.output].producer())]

        return sorted(replaced, key=place)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """All uses of `old`, its name and its type go to `new`."""
        name = old.name
        new.type, new.shape = old.type, old.shape
        old.name = f"{name}_replaced"
        new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def add(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, object] | None = None,
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        """One more node with one output, before an existing one."""
        self._made += 1
        name = name or f"swacompile_{op}_{self._made}"
        node = ir.node(op, inputs, attributes=attributes or {}, domain=domain, name=name)  # type: ignore[arg-type]
        self.graph.insert_before(before, node)
        (output,) = node.outputs
        output.name = f"swacompile_{op}_{self._made}_output"
        return output

    def once(
        self,
        before: ir.Node,
        name: str,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, object] | None = None,
    ) -> ir.Value:
        """The node that was added with this op and name; else one more. Whoever asks later stands later in the graph."""
        if (op, name) not in self._once:
            self._once[op, name] = self.add(before, op, inputs, attributes)
        return self._once[op, name]

    def shape_of(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """The value's shape, asked for once."""
        return self.once(before, str(value.name), "Shape", [value])

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer, shared by all who ask for this name."""
        known = self.graph.initializers.get(f"swacompile_{name}")
        if known is not None:
            return known
        value = ir.val(f"swacompile_{name}", const_value=ir.tensor(array, name=f"swacompile_{name}"))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def operand(self, before: ir.Node, operand: Operand) -> ir.Value:
        """A value of the source in (batch, heads, sequence, size) order."""
        value = self.values[operand.value]
        if operand.merged:
            heads_first = value if operand.layout is Layout.BHSD else self._moved(before, value, (1, 0, 2))
            return self._split_heads(before, heads_first, operand.merged_heads)
        return value if operand.layout is Layout.BHSD else self._swapped(before, value)

    def result(self, before: ir.Node, output: ir.Value, site: Attention) -> ir.Value:
        """The operator's (batch, heads, sequence, size) result in the order of the value that it replaces."""
        if site.merged_output:
            return self._merge_heads(before, output)
        if site.output_layout is Layout.BHSD:
            return output
        swapped = self._swapped(before, output)
        if not site.flat_output:
            return swapped
        return self.add(before, "Reshape", [swapped, self.constant(np.asarray([0, 0, -1]), "flat_heads")])

    def _swapped(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Heads and sequence change places."""
        return self._moved(before, value, SWAP_HEADS_AND_SEQUENCE)

    def _moved(self, before: ir.Node, value: ir.Value, order: tuple[int, ...]) -> ir.Value:
        moved = self.add(before, "Transpose", [value], {"perm": list(order)})
        moved.type = value.type
        if value.shape is not None:
            moved.shape = ir.Shape([value.shape[axis] for axis in order])
        return moved

    def _split_heads(self, before: ir.Node, value: ir.Value, heads: int) -> ir.Value:
        """(B*H,S,D) as (B,H,S,D)."""
        shape = self.add(before, "Shape", [value])
        tail = self.add(
            before, "Slice", [shape, self.constant(np.asarray([1]), "one"), self.constant(np.asarray([3]), "three")]
        )
        lead = self.constant(np.asarray([-1, heads]), f"batch_and_{heads}_heads")
        wide = self.add(before, "Reshape", [value, self.add(before, "Concat", [lead, tail], {"axis": 0})])
        wide.type = value.type
        if value.shape is not None:
            wide.shape = ir.Shape([None, heads, *value.shape[1:]])
        return wide

    def _merge_heads(self, before: ir.Node, output: ir.Value) -> ir.Value:
        """(B,H,S,V) as (B*H,S,V), for models that keep batch and heads in one axis."""
        shape = self.add(before, "Shape", [output])
        tail = self.add(
            before, "Slice", [shape, self.constant(np.asarray([2]), "two"), self.constant(np.asarray([4]), "four")]
        )
        target = self.add(before, "Concat", [self.constant(np.asarray([-1]), "flat"), tail], {"axis": 0})
        return self.add(before, "Reshape", [output, target])

    def finish(self, functions: Iterable[ir.Function], opsets: dict[str, int]) -> None:
        for function in functions:
            self.source.model.functions[function.identifier()] = function
        self.graph.opset_imports.update(opsets)
        RemoveUnusedNodesPass()(self.source.model)
        RemoveUnusedOpsetsPass()(self.source.model)


def save(source: OnnxModel, out: Path, *, force: bool) -> None:
    """Write the model aside, then rename. External data is linked or copied beside the output where it is not there already.

    Raises OutputError where the output exists and not `force`, or cannot be written; nothing is left half-written.
    """
    check_output(out, force=force)
    if out.exists() and out.samefile(source.path):
        raise OutputError(f"{out}: the output is the model itself. Give another path.")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            _carry_data(source, out.parent, Path(aside), force=force)
            ir.save(source.model, Path(aside) / out.name)
            os.replace(Path(aside) / out.name, out)
    except OSError as error:
        raise OutputError(
            f"{out}: could not be written ({error.strerror or error}). Nothing was changed; free space or choose another path."
        ) from error


def check_output(out: Path, *, force: bool) -> None:
    """Raises OutputError where an ONNX model cannot or must not be written to this path."""
    if out.suffix != ".onnx":
        raise OutputError(f"{out}: expected a path that ends in .onnx, as the rewritten model is an ONNX file.")
    if out.is_dir():
        raise OutputError(f"{out}: expected the path of a file to write, found a folder. Give another path.")
    refuse_existing(out, force=force)
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist. Create it first.")


def refuse_existing(out: Path, *, force: bool) -> None:
    if out.exists() and not force:
        raise OutputError(f"{out}: expected a path that does not exist yet. Give another, or --force to replace it.")


def _carry_data(source: OnnxModel, folder: Path, aside: Path, *, force: bool) -> None:
    """Copies of the data files that the model names, in the output's folder.

    Copies, not hard links: ONNX's checker takes a data file with several links for an attack, in the source's folder too.
    """
    for location in sorted({str(tensor.location) for tensor in external_tensors(source.model)}):
        data, target = source.path.parent / location, folder / location
        if target.exists() and target.samefile(data):
            continue
        refuse_existing(target, force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = aside / f"data{len(list(aside.iterdir()))}"
        _copy(data, copy)
        os.replace(copy, target)


def _copy(data: Path, copy: Path) -> None:
    """A copy that shares the blocks on disk where the file system can do that."""
    with data.open("rb") as read, copy.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
            return
        except OSError:  # another file system, or one without shared blocks
            log.info("copying %.1f GB of weights beside the output", data.stat().st_size / 1e9)
    shutil.copyfile(data, copy)
