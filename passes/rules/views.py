"""Operations that move elements without changing them.

`index_maps` gives, for each of them that reads a single operand, the index in that operand of an element of the result: the same
map serves the formulas and the search for the tensors that an attention really reads.
"""

from collections.abc import Callable, Mapping

from swacompile.index_expr import (
    FALSE,
    ONE,
    ZERO,
    Expr,
    Index,
    Sort,
    add,
    and_,
    const_int,
    exact_div,
    floordiv,
    integer,
    ite,
    le,
    lt,
    mod,
    mul,
    product_of,
    real,
    size,
    sub,
    to_integer,
    to_real,
)
from swacompile.passes.index_tensor import IndexTensor, Unreadable, broadcast_index, clamp, normal_axis, sort_of
from swacompile.passes.rules.rule import Meaning, Operands, Rule

IndexMap = Callable[[Index], Index]


def _permute(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    perm = tuple(normal_axis(axis, operand.rank) for axis in ops.integers("perm")) if "perm" in ops.node.attrs else None
    perm = perm or tuple(reversed(range(operand.rank)))
    if ops.integer("last_two", 0):
        perm = (*range(operand.rank - 2), operand.rank - 1, operand.rank - 2)
    inverse = [perm.index(axis) for axis in range(operand.rank)]
    return tuple(operand.shape[axis] for axis in perm), lambda indices: tuple(indices[i] for i in inverse)


def _unsqueeze(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    axes = _axes(ops)
    rank = operand.rank + len(axes)
    new = {normal_axis(axis, rank) for axis in axes}
    extents = iter(operand.shape)
    shape = tuple(ONE if axis in new else next(extents) for axis in range(rank))
    return shape, lambda indices: tuple(i for axis, i in enumerate(indices) if axis not in new)


def _squeeze(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    axes = _axes(ops, default=_unit_axes(ops) if not _has_axes(ops) else None)
    gone = {normal_axis(axis, operand.rank) for axis in axes}
    kept = [axis for axis in range(operand.rank) if axis not in gone]

    def index_map(indices: Index) -> Index:
        by_axis = dict(zip(kept, indices, strict=True))
        return tuple(by_axis.get(axis, ZERO) for axis in range(operand.rank))

    return tuple(operand.shape[axis] for axis in kept), index_map


def _has_axes(ops: Operands) -> bool:
    return "axes" in ops.node.attrs or bool(ops.node.input(1))


def _unit_axes(ops: Operands) -> tuple[int, ...]:
    """The axes that a squeeze without axes drops. Raises Unreadable where that depends on sizes known only at run time."""
    shape = ops.tensor(0).shape
    if any(const_int(extent) is None for extent in shape):
        raise Unreadable("a squeeze whose rank depends on run-time sizes")
    return tuple(axis for axis, extent in enumerate(shape) if extent == ONE)


def _axes(ops: Operands, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Axes given as an attribute (old opsets, FX) or as an operand."""
    if "axes" in ops.node.attrs:
        return ops.integers("axes")
    if not ops.node.input(1) and default is not None:
        return default
    return constants(ops.tensor(1))


def constants(tensor: IndexTensor) -> tuple[int, ...]:
    values = tuple(const_int(value) for value in tensor.vector())
    if any(value is None for value in values):
        raise Unreadable(f"{tensor.name} is not constant")
    return tuple(value for value in values if value is not None)


def _expand(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    target = ops.tensor(1).vector()
    padded = (ONE,) * (len(target) - operand.rank) + operand.shape
    wanted = tuple(
        extent if const_int(to) == -1 else to for to, extent in zip(target[-len(padded) :], padded, strict=False)
    )
    lead = padded[: len(padded) - len(wanted)]
    shape = lead + tuple(ops.sizes.unify(to, extent) for to, extent in zip(wanted, padded[len(lead) :], strict=True))
    return shape, lambda indices: broadcast_index(indices, operand.shape)


def _slice(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    starts, ends = ops.tensor(1).vector(), ops.tensor(2).vector()
    axes_operand, steps_operand = ops.optional(3), ops.optional(4)
    axes = constants(axes_operand) if axes_operand else tuple(range(len(starts)))
    steps = constants(steps_operand) if steps_operand else (1,) * len(starts)
    shape = list(operand.shape)
    origin: dict[int, tuple[Expr, int]] = {}
    for axis_given, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = normal_axis(axis_given, operand.rank)
        extent = operand.shape[axis]
        if step == -1 and _is_last(start) and _is_before_first(end):
            origin[axis] = (sub(extent, ONE), step)
            continue
        if step < 1:
            raise Unreadable("a slice with a step below 1 that is no reversal")
        first, last = (start, end) if ops.integer("exact", 0) else (clamp(start, extent), clamp(end, extent))
        length = sub(last, first)
        shape[axis] = length if step == 1 else floordiv(add(length, integer(step - 1)), integer(step))
        origin[axis] = (first, step)

    def index_map(indices: Index) -> Index:
        def source(axis: int, i: Expr) -> Expr:
            first, step = origin.get(axis, (ZERO, 1))
            return add(first, mul(integer(step), i))

        return tuple(source(axis, i) for axis, i in enumerate(indices))

    return tuple(shape), index_map


def _is_last(position: Expr) -> bool:
    value = const_int(position)
    return value is not None and (value == -1 or value >= 2**31 - 1)


def _is_before_first(position: Expr) -> bool:
    value = const_int(position)
    return value is not None and value <= -(2**31) + 1


def _flip(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    axes = {normal_axis(axis, operand.rank) for axis in ops.integers("axes")}

    def index_map(indices: Index) -> Index:
        return tuple(sub(sub(operand.shape[axis], ONE), i) if axis in axes else i for axis, i in enumerate(indices))

    return operand.shape, index_map


def _reshape(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    target = list(ops.tensor(1).vector())
    if not ops.integer("allowzero", 0):
        target = [operand.shape[i] if const_int(extent) == 0 else extent for i, extent in enumerate(target)]
    return _regroup(operand.shape, _fill_unknown(operand.shape, target))


def _fill_unknown(shape: Index, target: list[Expr]) -> Index:
    """The target with its -1 worked out."""
    unknown = [i for i, extent in enumerate(target) if const_int(extent) == -1]
    if len(unknown) > 1:
        raise Unreadable("a reshape with two unknown sizes")
    if unknown:
        known = product_of(extent for i, extent in enumerate(target) if i != unknown[0])
        rest = exact_div(product_of(shape), known)
        if rest is None:
            raise Unreadable("a reshape whose unknown size is not a product of the operand's")
        target[unknown[0]] = rest
    return tuple(target)


def _flatten(ops: Operands) -> tuple[Index, IndexMap]:
    operand = ops.tensor(0)
    axis = normal_axis(ops.integer("axis", 1), operand.rank)
    return _regroup(operand.shape, (product_of(operand.shape[:axis]), product_of(operand.shape[axis:])))


def _regroup(source: Index, target: Index) -> tuple[Index, IndexMap]:
    """Row-major reshape, cut into the smallest groups of axes with equal products."""
    groups = _groups(source, target)

    def index_map(indices: Index) -> Index:
        result: list[Expr] = []
        for source_axes, target_axes in groups:
            position = ZERO
            for axis in target_axes:
                position = add(mul(position, target[axis]), indices[axis])
            result.extend(_unravel(position, tuple(source[axis] for axis in source_axes)))
        return tuple(result)

    return target, index_map


def _groups(source: Index, target: Index) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    s = t = 0
    while s < len(source) or t < len(target):
        source_axes, target_axes = list(range(s, min(s + 1, len(source)))), list(range(t, min(t + 1, len(target))))
        while (size_s := _volume(source, source_axes)) != (size_t := _volume(target, target_axes)):
            more_source, more_target = s + len(source_axes) < len(source), t + len(target_axes) < len(target)
            if more_target and (exact_div(size_s, size_t) is not None or not more_source):
                target_axes.append(t + len(target_axes))
            elif more_source:
                source_axes.append(s + len(source_axes))
            else:
                raise Unreadable(f"a reshape from {size_s} to {size_t} elements")
        groups.append((source_axes, target_axes))
        s, t = s + len(source_axes), t + len(target_axes)
    return groups


def _volume(extents: Index, axes: list[int]) -> Expr:
    return product_of(extents[axis] for axis in axes)


def _unravel(position: Expr, extents: Index) -> list[Expr]:
    result: list[Expr] = []
    for extent in reversed(extents[1:]):
        result.append(mod(position, extent))
        position = floordiv(position, extent)
    return [*([position] if extents else []), *reversed(result)]


def _same(ops: Operands) -> tuple[Index, IndexMap]:
    return ops.tensor(0).shape, lambda indices: indices


INDEX_MAPS: Mapping[str, Callable[[Operands], tuple[Index, IndexMap]]] = {
    "transpose": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "reshape": _reshape,
    "flatten": _flatten,
    "flip": _flip,
    "identity": _same,
}


def _viewing(view: Callable[[Operands], tuple[Index, IndexMap]]) -> Rule:
    def rule(ops: Operands) -> Meaning:
        shape, index_map = view(ops)
        operand = ops.tensor(0)
        return Meaning(shape=shape, read=lambda indices: operand.at(*index_map(indices)))

    return rule


def _concat(ops: Operands) -> Meaning:
    parts = [ops.tensor(i) for i in range(len(ops.node.inputs))]
    axis = normal_axis(ops.integer("axis", 0), parts[0].rank)
    shape = list(parts[0].shape)
    shape[axis] = add(*(part.shape[axis] for part in parts))

    def read(indices: Index) -> Expr:
        def pick(remaining: list[IndexTensor], position: Expr) -> Expr:
            part = remaining[0]
            here = (*indices[:axis], position, *indices[axis + 1 :])
            if len(remaining) == 1:
                return part.at(*here)
            inside = lt(position, part.shape[axis])
            if inside.is_const:
                return part.at(*here) if inside.value else pick(remaining[1:], sub(position, part.shape[axis]))
            a, b = part.at(*here), pick(remaining[1:], sub(position, part.shape[axis]))
            return ite(inside, a, b) if a.sort is b.sort else ite(inside, _alike(a, b), _alike(b, a))

        return pick(parts, indices[axis])

    return Meaning(shape=tuple(shape), read=read)


def _pad(ops: Operands) -> Meaning:
    """Elements put before and behind along axes, all of one number; the amounts are negative where elements are cut off."""
    operand, amounts, axes_operand = ops.tensor(0), ops.tensor(1).vector(), ops.optional(3)
    if ops.node.attrs.get("mode", "constant") != "constant":
        raise Unreadable("padding that repeats elements")
    axes = [
        normal_axis(axis, operand.rank) for axis in (constants(axes_operand) if axes_operand else range(operand.rank))
    ]
    before = dict(zip(axes, amounts[: len(axes)], strict=True))
    behind = dict(zip(axes, amounts[len(axes) :], strict=True))
    fill = ops.optional(2)
    shape = tuple(add(before.get(a, ZERO), extent, behind.get(a, ZERO)) for a, extent in enumerate(operand.shape))

    def read(indices: Index) -> Expr:
        here = tuple(sub(i, before.get(axis, ZERO)) for axis, i in enumerate(indices))
        inside = and_(*(and_(le(ZERO, here[axis]), lt(here[axis], operand.shape[axis])) for axis in axes))
        outside = fill.scalar() if fill else zero_of(sort_of(operand.dtype))
        if inside.is_const:
            return operand.at(*here) if inside.value else outside
        element = operand.at(*here)
        return (
            ite(inside, element, outside)
            if element.sort is outside.sort
            else ite(inside, _alike(element, outside), _alike(outside, element))
        )

    return Meaning(shape=shape, read=read)


def zero_of(sort: Sort) -> Expr:
    return {Sort.BOOL: FALSE, Sort.INT: ZERO, Sort.REAL: real(0.0)}[sort]


def _alike(a: Expr, b: Expr) -> Expr:
    return to_real(a) if Sort.REAL in (a.sort, b.sort) else to_integer(a)


def _reshaping(ops: Operands) -> Meaning:
    """A reshape whose groups cannot be told still has the shape that it asks for."""
    try:
        return _viewing(_reshape)(ops)
    except Unreadable:
        target = list(ops.tensor(1).vector())
        if not ops.integer("allowzero", 0):
            target = [ops.tensor(0).shape[i] if const_int(extent) == 0 else extent for i, extent in enumerate(target)]
        name = ops.node.outputs[0]
        shape = tuple(
            size(f"{name}.{axis}") if const_int(extent) == -1 else extent for axis, extent in enumerate(target)
        )
        return Meaning(shape=shape, read=None)


RULES: Mapping[str, Rule] = {name: _viewing(view) for name, view in INDEX_MAPS.items()} | {
    "concat": _concat,
    "pad": _pad,
    "reshape": _reshaping,
}
