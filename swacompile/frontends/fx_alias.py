"""Which FX nodes share memory, and which operations write to it.

torch graphs may mutate: a static cache writes to its buffers, older models fill a slice of their mask in place. The schemas of the
operators say which result is a view of which operand and which operand is written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

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
RETURNS_OPERAND = ("to", "type_as", "dropout", "detach_", "alias", "detach", "lift_fresh")
# Operators that update running statistics while this argument is true, although their schema does not say so.
UPDATES_STATISTICS = {
    "batch_norm": "training",
    "native_batch_norm": "training",
    "cudnn_batch_norm": "training",
    "instance_norm": "use_input_stats",
}
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
    viewed = signature_of(target).viewed
    source = argument(node, viewed[0]) if viewed else None
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
    if not isinstance(target, torch._ops.OpOverload):
        return tuple(node.all_input_nodes) if base_name(target) == "triton_kernel_wrapper_mutation" else ()
    written = signature_of(target).written
    if (flag := UPDATES_STATISTICS.get(base_name(target))) and argument(node, flag):
        written = (*written, "running_mean", "running_var")
    if not written or base_name(target) in WRITES_NOTHING:
        return ()
    return tuple(found for name in written for found in _nodes(argument(node, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What an operator's schema says of its arguments: names with defaults, in order; which are written, which the result is a view of."""

    defaults: Mapping[str, object]
    written: tuple[str, ...]
    viewed: tuple[str, ...]


@cache
def signature_of(target: torch._ops.OpOverload) -> Signature:
    schema = target._schema
    returned = {name for result in schema.returns if result.alias_info for name in result.alias_info.before_set}
    aliases = [(argument.name, argument.alias_info) for argument in schema.arguments if argument.alias_info is not None]
    return Signature(
        defaults={a.name: a.default_value if a.has_default_value() else None for a in schema.arguments},
        written=tuple(name for name, info in aliases if info.is_write),
        viewed=tuple(name for name, info in aliases if "*" in info.after_set or info.before_set & returned),
    )


def argument(node: fx.Node, name: str) -> object:
    """An argument of an operator by its name in the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if name in node.kwargs:
        return node.kwargs[name]
    defaults = signature_of(node.target).defaults
    position = list(defaults).index(name)
    return node.args[position] if position < len(node.args) else defaults[name]


def _nodes(value: object) -> Iterable[fx.Node]:
    if isinstance(value, fx.Node):
        return (value,)
    return tuple(item for item in value if isinstance(item, fx.Node)) if isinstance(value, list | tuple) else ()


def _unchanged(node: fx.Node, source: fx.Node) -> bool:
    """Whether a conversion or dropout had nothing to do and returned its operand."""
    if node.kwargs.get("copy") or (base_name(node.target) == "dropout" and argument(node, "train")):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
