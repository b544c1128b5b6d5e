"""Which FX nodes share memory, and which operations write to it.

torch graphs may mutate: a static cache writes to its buffers, older models fill a slice of their mask in place. The schemas of the
operators say which result is a view of which operand and which operand is written.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx


class Share(StrEnum):
    """How a result shares memory with an operand."""

    SAME = "same"  # the operand itself
    VIEW = "view"  # certainly a view of it
    MAYBE = "maybe"  # a view or a copy, as strides decide


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A node that shares memory with `source`."""

    source: fx.Node
    share: Share


COPIES_WHERE_STRIDES_DEMAND = ("reshape", "flatten", "contiguous", "ravel", "view_as_real", "view_as_complex")
RETURNS_OPERAND = ("to", "type_as", "dropout", "detach_", "alias", "detach", "lift_fresh", "expand_as")
WRITES_NOTHING = ("detach_", "requires_grad_", "retain_grad_")


def base_name(target: object) -> str:
    """Name of an operator without namespace and overload: `slice` for aten.slice.Tensor. "" where the target is no operator."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", ""))


def view_of(node: fx.Node) -> View | None:
    """What a node shares memory with, None if its result is its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = base_name(target)
    source = next(_shared_operands(node, target), None)
    if source is None and name in ("type_as", "dropout") and node.args:
        source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if name in ("to", "type_as", "dropout") and not _unchanged(node, source):
        return None
    if name in RETURNS_OPERAND or any(written is source for written in written_operands(node)):
        return View(source=source, share=Share.SAME)
    return View(source=source, share=Share.MAYBE if name in COPIES_WHERE_STRIDES_DEMAND else Share.VIEW)


def written_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Operands whose memory the node writes."""
    target = node.target
    if base_name(target) == "triton_kernel_wrapper_mutation":
        return node.all_input_nodes  # type: ignore[return-value]
    if not isinstance(target, torch._ops.OpOverload) or base_name(target) in WRITES_NOTHING:
        return ()
    written = (
        value
        for argument, value in _bound(node, target)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return tuple(node for value in written for node in _nodes(value))


def _shared_operands(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[object]:
    returned = {name for result in target._schema.returns if result.alias_info for name in result.alias_info.before_set}
    for argument, value in _bound(node, target):
        info = argument.alias_info
        if info is not None and ("*" in info.after_set or info.before_set & returned):
            yield value


def _bound(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[tuple["torch.Argument", object]]:
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]
        elif position < len(node.args):
            yield argument, node.args[position]


def _nodes(value: object) -> Iterable[fx.Node]:
    if isinstance(value, fx.Node):
        return (value,)
    return tuple(item for item in value if isinstance(item, fx.Node)) if isinstance(value, list | tuple) else ()


def _unchanged(node: fx.Node, source: fx.Node) -> bool:
    """Whether a conversion or dropout had nothing to do and returned its operand."""
    if node.kwargs.get("copy") or (base_name(node.target) == "dropout" and (node.args + (True,))[2]):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
