"""Tensors made from sizes and constants."""

from collections.abc import Mapping

from swacompile.index_expr import (
    ZERO,
    Expr,
    Index,
    NotInteger,
    Op,
    Sort,
    add,
    at_least,
    const_int,
    floordiv,
    integer,
    maximum,
    mul,
    product_of,
    sub,
    to_integer,
    to_real,
    transform,
)
from swacompile.passes.index_tensor import Unreadable, kept, sort_of
from swacompile.passes.rules.rule import Meaning, Operands, Rule


def _iota(ops: Operands) -> Meaning:
    start, limit, step = (_whole(ops.tensor(i).scalar()) for i in range(3))
    step_value = const_int(step)
    if not step_value:
        raise Unreadable("a range that does not count in integers")
    extent, stride = (sub(limit, start), step_value) if step_value > 0 else (sub(start, limit), -step_value)
    if stride > 1:
        extent = floordiv(add(extent, integer(stride - 1)), integer(stride))
    extent = _exact(extent) if start.is_const else extent
    real_valued = sort_of(ops.dtype) is Sort.REAL

    def read(indices: Index) -> Expr:
        element = add(start, mul(step, indices[0]))
        return kept(to_real(element) if real_valued else element, ops.dtype)

    return Meaning(shape=(extent,), read=read)


def _whole(bound: Expr) -> Expr:
    """A range's bound, also where an integer is kept as a floating-point number."""
    try:
        return to_integer(bound)
    except NotInteger as error:
        raise Unreadable("a range of fractions") from error


def _exact(extent: Expr) -> Expr:
    """A number of elements without the rounding of a bound: where that matters, the range has another length than it is used with."""
    return transform(extent, lambda node: _exact(node.args[0]) if node.op is Op.ROUND else None)


def _full(ops: Operands) -> Meaning:
    fill = ops.tensor(1).scalar()
    return Meaning(shape=ops.tensor(0).vector(), read=lambda _: fill)


def _shape(ops: Operands) -> Meaning:
    extents = ops.tensor(0).shape
    start, end = ops.integer("start", 0), ops.node.attrs.get("end")
    assert end is None or isinstance(end, int)
    part = tuple(_not_below_zero(extent) for extent in extents[slice(start, end)])

    def read(indices: Index) -> Expr:
        position = const_int(indices[0])
        if position is None:
            raise Unreadable("a size at a position that is not constant")
        return part[position]

    return Meaning(shape=(integer(len(part)),), read=read)


def _size(ops: Operands) -> Meaning:
    total = product_of(_not_below_zero(extent) for extent in ops.tensor(0).shape)
    return Meaning(shape=(), read=lambda _: total)


def _not_below_zero(extent: Expr) -> Expr:
    """An extent as a number. Ranges and slices that end before they start have no elements, though the difference is negative."""
    return extent if at_least(extent, 0) else maximum(extent, ZERO)


def _sizes(ops: Operands) -> Meaning:
    """Integers that the frontend knows as expressions: a vector, or the one number where `scalar`."""
    values = ops.node.attrs["values"]
    assert isinstance(values, tuple)
    if ops.node.attrs.get("scalar"):
        return Meaning(shape=(), read=lambda _: values[0])

    def read(indices: Index) -> Expr:
        position = const_int(indices[0])
        if position is None:
            raise Unreadable("a size at a position that is not constant")
        value: Expr = values[position]
        return value

    return Meaning(shape=(integer(len(values)),), read=read)


RULES: Mapping[str, Rule] = {"iota": _iota, "full": _full, "shape": _shape, "size": _size, "sizes": _sizes}
