"""One FX node as its operator's rule sees it, and what a rule answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from swacompile.frontends.fx_alias import signature_of
from swacompile.graph import TensorType
from swacompile.index_expr import Expr

if TYPE_CHECKING:
    from swacompile.frontends.fx_translate import Translation


class Untranslated(Exception):
    """An operation, or a form of it, that has no counterpart in the neutral vocabulary. Its result then counts as run-time data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A value of the neutral graph; the axes of the vmap `levels` lead its own, outermost level first."""

    name: str
    levels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The operation whose first output is what the translated node computes."""

    op: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, object] = field(default_factory=dict)
    levels: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class Call:
    """One FX node as its operator's rule sees it."""

    node: fx.Node
    name: str
    graph: "Translation"
    _arguments: dict[str, object] = field(default_factory=dict)
    _parts: int = 0

    def __post_init__(self) -> None:
        node = self.node
        if isinstance(node.target, torch._ops.OpOverload):
            self._arguments = {**signature_of(node.target).defaults}
            self._arguments.update(zip(self._arguments, node.args, strict=False))
        else:
            self._arguments.update((str(i), value) for i, value in enumerate(node.args))
        self._arguments.update(node.kwargs)

    # arguments

    def __getitem__(self, position: int) -> Any:
        return list(self._arguments.values())[position]

    def get(self, name: str) -> Any:
        """An argument by its name in the schema, None where it is absent."""
        return self._arguments.get(name)

    def tensor(self, argument: object) -> str:
        """A tensor operand's value. Raises Untranslated where it is none, or has axes that vmap hides."""
        if not isinstance(argument, fx.Node):
            raise Untranslated(f"expected a tensor, found {argument!r}")
        value = self.graph.read(argument)
        if value.levels:
            raise Untranslated("an operation on hidden axes")
        return value.name

    def operand(self, argument: object) -> str:
        """A tensor or a number."""
        return self.graph.number(self.number(argument)) if self.is_number(argument) else self.tensor(argument)

    @staticmethod
    def is_number(argument: object) -> bool:
        found = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        return isinstance(found, bool | int | float | torch.SymInt)

    @staticmethod
    def number(argument: object) -> Any:
        """A number, or the SymInt that a node stands for."""
        found = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        if not isinstance(found, bool | int | float | torch.SymInt):
            raise Untranslated(f"expected a number, found {argument!r}")
        return found

    def integer(self, argument: object) -> int:
        """A number that is known now."""
        found = self.number(argument)
        if not isinstance(found, int):
            raise Untranslated(f"expected a known integer, found {found}")
        return found

    # shapes and types

    @staticmethod
    def meta(argument: object) -> torch.Tensor:
        """The fake tensor that the export keeps of a node."""
        found = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        if not isinstance(found, torch.Tensor):
            raise Untranslated("a node without metadata")
        return found

    def axis(self, argument: object, dim: object, *, extra: int = 0) -> int:
        """A dimension counted from the front; `extra` dimensions are being added."""
        rank = self.meta(argument).dim() + extra
        axis = self.integer(dim)
        return axis + rank if axis < 0 else axis

    def extent(self, argument: object, axis: int) -> Expr:
        return self.graph.sizes.of(self.meta(argument).shape[axis])

    def dtype(self, argument: object) -> str:
        return dtype_name(self.meta(argument).dtype)

    def shape(self) -> str:
        """The result's shape as a value."""
        return self.graph.vector(self.meta(self.node).shape)

    def type_like(self, dtype: str) -> TensorType:
        """The result's sizes with another data type."""
        return TensorType(dtype=dtype, dims=self.graph.sizes.shape(self.meta(self.node)))

    # operations

    def emit(self, op: str, *inputs: str, known: TensorType | None = None, **attrs: object) -> str:
        """An operation on the way to the result."""
        self._parts += 1
        return self.graph.emit(f"{self.name}/{self._parts}", op, *inputs, known=known, made=True, **attrs)


def op(name: str, *inputs: str, levels: tuple[int, ...] = (), **attrs: object) -> Result:
    """The last operation of a translation."""
    return Result(op=name, inputs=inputs, attrs=attrs, levels=levels)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operand_node(argument: object) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise Untranslated(f"expected a tensor, found {argument!r}")
    return argument


def aligned(call: Call, name: str, operands: Sequence[object], **attrs: object) -> Result:
    """An operation under broadcasting, also over axes that vmap hides: each level gets its axis in every operand."""
    values = [None if call.is_number(operand) else call.graph.read(operand_node(operand)) for operand in operands]
    levels = tuple(sorted({level for value in values if value for level in value.levels}))
    if not levels:
        return Result(op=name, inputs=tuple(call.operand(operand) for operand in operands), attrs=attrs)
    rank = max(call.meta(operand).dim() for operand, value in zip(operands, values, strict=True) if value)
    names = []
    for operand, value in zip(operands, values, strict=True):
        if value is None:
            names.append(call.operand(operand))
            continue
        own = call.meta(operand).dim()
        missing = [i for i, level in enumerate(levels) if level not in value.levels]
        missing += [len(levels) + i for i in range(rank - own)]
        names.append(call.emit("unsqueeze", value.name, axes=missing) if missing else value.name)
    return Result(op=name, inputs=tuple(names), attrs=attrs, levels=levels)
