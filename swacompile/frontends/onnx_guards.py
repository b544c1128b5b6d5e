"""Conditions on sizes as ONNX nodes: a model that stops with their words where one fails.

ONNX has no assertion. The one here is a Gather from a table of one element, whose name is the conditions: its index is 0 where they hold,
and outside of the table where they do not. Its result, 0, and the index are added to a size that query, key and value of every replaced
attention are reshaped to, so that no attention is computed without it, and a runtime whose Gather forgives an index fails there. A Reshape
moves nothing; and it fails itself where an attention has another size than the first one under the same conditions.
"""

from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import onnx_ir as ir

from swacompile.frontends.onnx_splice import Splicer
from swacompile.index_expr import Expr, Op, sum_parts
from swacompile.passes.guards import BATCH, SEQUENCE, Extent, Guards, Role
from swacompile.passes.plan_rewrite import Replacement

ALLOWS_ZERO = 14  # first opset whose Reshape can be told that 0 is a size


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Sizes of an attention that keeps its conditions, int64 of shape (1,)."""

    batch: ir.Value
    queries: ir.Value
    keys: ir.Value


@dataclass(slots=True, kw_only=True)
class OnnxGuards:
    """Writes the conditions of one model, each set of them once."""

    splicer: Splicer
    _written: dict[Guards, Checked] = field(default_factory=dict)
    _shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def operands(self, before: ir.Node, replacement: Replacement, values: list[ir.Value]) -> list[ir.Value]:
        """Query, key and value (batch, heads, sequence, size), behind the conditions of their attention."""
        if not replacement.guards.words:
            return values
        checked, site = self._checked(before, replacement, values), replacement.site
        sizes = (site.head_size, site.head_size, site.value_head_size)
        return [
            self._reshaped(before, value, (checked.batch, heads, length, size or 0))
            for value, heads, length, size in zip(
                values, (site.heads, site.kv_heads, site.kv_heads), (checked.queries, checked.keys, checked.keys), sizes, strict=True
            )
        ]  # fmt: skip

    def per_key(self, before: ir.Node, replacement: Replacement, values: list[ir.Value], operand: ir.Value) -> ir.Value:
        """An operand as (batch, keys) that has a batch of 1, or more than that of one; `values` are query, key and value."""
        if not replacement.guards.expands:
            return operand
        checked = self._checked(before, replacement, values)
        name, shape = f"{operand.name}_{checked.batch.name}", self._shape(before, (checked.batch, checked.keys))
        if replacement.guards.cuts:
            first = self.splicer.constant(np.asarray([0, 0]), "first_of_two")
            operand = self.splicer.once(before, name, "Slice", [operand, first, shape])
        return self.splicer.once(before, name, "Expand", [operand, shape])

    def _checked(self, before: ir.Node, replacement: Replacement, values: list[ir.Value]) -> Checked:
        if replacement.guards not in self._written:
            writer = _Writer(splicer=self.splicer, before=before, operands=dict(zip(Role, values, strict=True)))
            self._written[replacement.guards] = writer.checked(replacement.guards)
        return self._written[replacement.guards]

    def _reshaped(self, before: ir.Node, value: ir.Value, shape: tuple[ir.Value | int, ...]) -> ir.Value:
        zero_is_a_size: dict[str, object] = {"allowzero": 1} if self.splicer.source.opset >= ALLOWS_ZERO else {}
        reshaped = self.splicer.add(before, "Reshape", [value, self._shape(before, shape)], zero_is_a_size)
        reshaped.type, reshaped.shape = value.type, value.shape
        return reshaped

    def _shape(self, before: ir.Node, sizes: tuple[ir.Value | int, ...]) -> ir.Value:
        parts = [
            self.splicer.constant(np.asarray([size]), f"size_{size}") if isinstance(size, int) else size
            for size in sizes
        ]
        name = "_".join(str(part.name) for part in parts)
        return self.splicer.once(before, name, "Concat", parts, {"axis": 0})


@dataclass(slots=True, kw_only=True)
class _Writer:
    """The nodes of one set of conditions. Every value is int64 of shape (1,)."""

    splicer: Splicer
    before: ir.Node
    operands: dict[Role, ir.Value]
    _sizes: dict[Expr, ir.Value] = field(default_factory=dict)

    def checked(self, guards: Guards) -> Checked:
        self._sizes = {extent.symbol: self._size(extent) for extent in guards.extents}
        batch, queries, keys = (
            self._size(Extent(value=role, axis=axis))
            for role, axis in ((Role.QUERY, BATCH), (Role.QUERY, SEQUENCE), (Role.KEY, SEQUENCE))
        )
        parts = [
            *(self._broken(guard.condition) for guard in guards.conditions),
            *map(self._others, guards.zero_or_one),
        ]
        if parts:
            broken = reduce(self._sum, parts)
            words = "expects " + ", ".join(guards.words)
            zero = self.splicer.add(self.before, "Gather", [self._number(0), broken], name=words)
            batch = self._sum(batch, self._sum(zero, broken))
        return Checked(batch=batch, queries=queries, keys=keys)

    def _size(self, extent: Extent) -> ir.Value:
        value = self.operands[extent.value] if isinstance(extent.value, Role) else self.splicer.values[extent.value]
        shape = self.splicer.shape_of(self.before, value)
        return self._add("Gather", shape, self._number(extent.axis))

    def _others(self, value: str) -> ir.Value:
        """How many elements are neither 0 nor 1."""
        elements = self.splicer.values[value]
        assert elements.dtype is not None
        flags = self.splicer.add(self.before, "Cast", [elements], {"to": int(ir.DataType.BOOL)})
        back = self.splicer.add(self.before, "Cast", [flags], {"to": int(elements.dtype)})
        other = self._add("Not", self._add("Equal", elements, back))
        ones = self.splicer.add(self.before, "Cast", [other], {"to": int(ir.DataType.INT64)})
        return self._add("Reshape", self._add("ReduceSum", ones), self._number(1))

    def _broken(self, condition: Expr) -> ir.Value:
        """0 where the condition holds, a number above 0 where it does not."""
        match condition.op:
            case Op.EQ0:
                difference = self._value(condition.args[0])
                return self._add("Mul", difference, difference)
            case Op.LE0:
                return self._add("Max", self._value(condition.args[0]), self._number(0))
            case Op.OR:
                return reduce(self._product, map(self._broken, condition.args))
            case Op.AND:
                return reduce(self._sum, map(self._broken, condition.args))
            case Op.CONST:
                return self._number(0 if condition.value else 1)
        raise AssertionError(f"no condition on sizes: {condition}")

    def _value(self, expr: Expr) -> ir.Value:
        args = [] if expr.op in (Op.SYMBOL, Op.ITE) else [self._value(arg) for arg in expr.args]
        match expr.op:
            case Op.SYMBOL:
                return self._sizes[expr]
            case Op.CONST:
                assert isinstance(expr.value, int)
                return self._number(expr.value)
            case Op.SUM:
                constant, coefficients = sum_parts(expr)
                terms = [
                    arg if c == 1 else self._product(arg, self._number(c))
                    for c, arg in zip(coefficients, args, strict=True)
                ]
                return reduce(self._sum, [*terms, self._number(constant)] if constant else terms)
            case Op.PRODUCT:
                return reduce(self._product, args)
            case Op.MOD:
                return self._add("Mod", *args)
            case Op.FLOORDIV:
                rest = self._add("Mod", *args)
                return self._add("Div", self._add("Sub", args[0], rest), args[1])
            case Op.ITE:
                condition, then, otherwise = expr.args
                holds = self._add("Equal", self._broken(condition), self._number(0))
                return self._add("Where", holds, self._value(then), self._value(otherwise))
        raise AssertionError(f"no size: {expr}")

    def _add(self, op: str, *inputs: ir.Value) -> ir.Value:
        return self.splicer.add(self.before, op, inputs)

    def _sum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._add("Add", a, b)

    def _product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._add("Mul", a, b)

    def _number(self, number: int) -> ir.Value:
        return self.splicer.constant(np.asarray([number]), f"size_{number}")
