"""Shapes of operations whose results are run-time data."""

from collections.abc import Mapping

from swacompile.index_expr import ONE, mul
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


def _gather_elements(ops: Operands) -> Meaning:
    return Meaning(shape=ops.tensor(1).shape, read=None)


def _gemm(ops: Operands) -> Meaning:
    left, right = ops.tensor(0), ops.tensor(1)
    rows = left.shape[1 if ops.integer("transA", 0) else 0]
    return Meaning(shape=(rows, right.shape[0 if ops.integer("transB", 0) else 1]), read=None)


def _top_k(ops: Operands) -> Meaning:
    """Both outputs have this shape."""
    operand = ops.tensor(0)
    axis = normal_axis(ops.integer("axis", -1), operand.rank)
    (count,) = ops.tensor(1).vector()
    return Meaning(shape=(*operand.shape[:axis], count, *operand.shape[axis + 1 :]), read=None)


def _one_hot(ops: Operands) -> Meaning:
    positions = ops.tensor(0)
    axis = normal_axis(ops.integer("axis", -1), positions.rank + 1)
    (depth,) = ops.tensor(1).vector()
    return Meaning(shape=(*positions.shape[:axis], depth, *positions.shape[axis:]), read=None)


def _tile(ops: Operands) -> Meaning:
    operand, repeats = ops.tensor(0), ops.tensor(1).vector()
    return Meaning(
        shape=tuple(mul(extent, repeat) for extent, repeat in zip(operand.shape, repeats, strict=True)), read=None
    )


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
    "reduce_sum": _reduce,
    "any": _reduce,
    "attention": _attention,
    "gather_elements": _gather_elements,
    "gemm": _gemm,
    "top_k": _top_k,
    "one_hot": _one_hot,
    "tile": _tile,
    "scatter_nd": _like_first,
}
