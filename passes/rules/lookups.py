"""Operations that look elements up by computed indices, or cut triangles."""

from collections.abc import Mapping

from swacompile.index_expr import (
    ONE,
    Expr,
    Index,
    add,
    const_int,
    eq,
    index,
    integer,
    ite,
    le,
    mul,
    sub,
    to_integer,
)
from swacompile.passes.index_tensor import Unreadable, broadcast_index, kept, normal_axis, wrapped
from swacompile.passes.rules.rule import Meaning, Operands, Rule
from swacompile.passes.rules.views import constants, zero_of
from swacompile.passes.smt import is_valid


def _gather(ops: Operands) -> Meaning:
    data, positions = ops.tensor(0), ops.tensor(1)
    axis = normal_axis(ops.integer("axis", 0), data.rank)
    shape = data.shape[:axis] + positions.shape + data.shape[axis + 1 :]

    def read(indices: Index) -> Expr:
        position = positions.at(*indices[axis : axis + positions.rank])
        here = wrapped(position, data.shape[axis])
        return data.at(*indices[:axis], here, *indices[axis + positions.rank :])

    return Meaning(shape=shape, read=read)


def _gather_nd(ops: Operands) -> Meaning:
    data, positions = ops.tensor(0), ops.tensor(1)
    batch = ops.integer("batch_dims", 0)
    depth = const_int(positions.shape[-1])
    if depth is None:
        raise Unreadable("gather_nd with an index of unknown depth")
    shape = positions.shape[:-1] + data.shape[batch + depth :]
    lead = positions.rank - 1

    def read(indices: Index) -> Expr:
        looked_up = tuple(
            wrapped(positions.at(*indices[:lead], integer(i)), data.shape[batch + i]) for i in range(depth)
        )
        return data.at(*indices[:batch], *looked_up, *indices[lead:])

    return Meaning(shape=shape, read=read)


def _index(ops: Operands) -> Meaning:
    """Several axes looked up together, as NumPy does: the indices broadcast, and their axes take the place of the looked-up ones.

    Where those are not side by side, the indices' axes come first.
    """
    data, axes = ops.tensor(0), ops.integers("axes")
    positions = [ops.tensor(i) for i in range(1, len(ops.node.inputs))]
    looked_up = ops.sizes.broadcast(*(position.shape for position in positions))
    others = [axis for axis in range(data.rank) if axis not in axes]
    lead = axes[0] if axes == tuple(range(axes[0], axes[-1] + 1)) else 0
    extents = [data.shape[axis] for axis in others]

    def read(indices: Index) -> Expr:
        place = indices[lead : lead + len(looked_up)]
        by_axis = dict(zip(others, indices[:lead] + indices[lead + len(looked_up) :], strict=True))
        for axis, position in zip(axes, positions, strict=True):
            by_axis[axis] = wrapped(position.at(*broadcast_index(place, position.shape)), data.shape[axis])
        return data.at(*(by_axis[axis] for axis in range(data.rank)))

    return Meaning(shape=(*extents[:lead], *looked_up, *extents[lead:]), read=read)


def _trilu(ops: Operands) -> Meaning:
    data = ops.tensor(0)
    diagonal = ops.tensor(1).scalar() if ops.node.input(1) else integer(ops.integer("diagonal", 0))
    upper = ops.integer("upper", 1)

    def read(indices: Index) -> Expr:
        element = data.at(*indices)
        distance = sub(indices[-1], indices[-2])
        kept = le(diagonal, distance) if upper else le(distance, diagonal)
        return ite(kept, element, zero_of(element.sort))

    return Meaning(shape=data.shape, read=read)


def _cumsum(ops: Operands) -> Meaning:
    """The running sum of a tensor whose elements are all provably one number."""
    data = ops.tensor(0)
    axis = normal_axis(constants(ops.tensor(1))[0], data.rank)
    exclusive, backwards = ops.integer("exclusive", 0), ops.integer("reverse", 0)

    def summed(position: Expr) -> Expr:
        """How many elements the sum up to here has."""
        before = sub(data.shape[axis], add(position, ONE)) if backwards else position
        return before if exclusive else add(before, ONE)

    def read(indices: Index) -> Expr:
        anywhere = index("i", data.shape[axis])
        element = to_integer(data.at(*indices[:axis], anywhere, *indices[axis + 1 :]))
        for number in (0, 1):
            if is_valid(eq(element, integer(number))):
                return kept(mul(integer(number), summed(indices[axis])), ops.dtype)
        raise Unreadable("a running sum of elements that differ")

    return Meaning(shape=data.shape, read=read)


RULES: Mapping[str, Rule] = {
    "gather": _gather,
    "gather_nd": _gather_nd,
    "index": _index,
    "trilu": _trilu,
    "cumsum": _cumsum,
}
