"""Shapes of operations whose results are run-time data."""

from collections.abc import Mapping

from swacompile.index_expr import ONE
from swacompile.passes.index_tensor import Unreadable, normal_axis
from swacompile.passes.rules.rule import Meaning, Operands, Rule


def _matmul(ops: Operands) -> Meaning:
    left, right = ops.tensor(0), ops.tensor(1)
    if min(left.rank, right.rank) < 2:
        raise Unreadable("a matmul of vectors")
    ops.sizes.unify(left.shape[-1], right.shape[-2])
    batch = ops.sizes.broadcast(left.shape[:-2], right.shape[:-2])
    return Meaning(shape=(*batch, left.shape[-2], right.shape[-1]), read=None)


def _like_first(ops: Operands) -> Meaning:
    return Meaning(shape=ops.tensor(0).shape, read=None)


def _reduce(ops: Operands) -> Meaning:
    operand = ops.tensor(0)
    axes = ops.integers("axes") if "axes" in ops.node.attrs else tuple(range(operand.rank))
    gone = {normal_axis(axis, operand.rank) for axis in axes}
    if ops.integer("keepdims", 1):
        shape = tuple(ONE if axis in gone else extent for axis, extent in enumerate(operand.shape))
    else:
        shape = tuple(extent for axis, extent in enumerate(operand.shape) if axis not in gone)
    return Meaning(shape=shape, read=None)


def _attention(ops: Operands) -> Meaning:
    query, value = ops.tensor(0), ops.tensor(2)
    if query.rank != 4 or value.rank != 4:
        raise Unreadable("an attention on tensors that are not 4-D")
    return Meaning(shape=(*query.shape[:3], value.shape[3]), read=None)


RULES: Mapping[str, Rule] = {
    "matmul": _matmul,
    "softmax": _like_first,
    "normalize": _like_first,
    "activation": _like_first,
    "reduce_max": _reduce,
    "reduce": _reduce,
    "attention": _attention,
}
