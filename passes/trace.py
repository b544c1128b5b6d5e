"""Follow a tensor upwards through operations that only move or scale its elements."""

from collections.abc import Iterator
from dataclasses import dataclass

from swacompile.index_expr import Index, const_real
from swacompile.passes.index_tensor import IndexTensor, Unreadable, broadcast_index
from swacompile.passes.read_masks import Reading
from swacompile.passes.rules.views import INDEX_MAPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """`scale` times the element of `value` at `indices` is the element that was asked for."""

    value: str
    indices: Index
    scale: float


WIDENED = {"float16": "float32", "bfloat16": "float32"}
"""Casts that keep every number."""


def trace(reading: Reading, value: str, indices: Index, *, narrow: str | None = None) -> Iterator[Source]:
    """The value itself, then the tensors that it is a view or a constant multiple of, nearest first.

    `narrow`: a data type whose numbers may have been widened on the way.
    """
    source = Source(value=value, indices=indices, scale=1.0)
    while source.value in reading.tensors:
        yield source
        above = _step(reading, source, narrow)
        if above is None:
            return
        source = above


def _step(reading: Reading, source: Source, narrow: str | None) -> Source | None:
    node = reading.graph.producers.get(source.value)
    if node is None:
        return None
    ops = reading.operands(node)
    try:
        if node.op in INDEX_MAPS:
            _, index_map = INDEX_MAPS[node.op](ops)
            above = tuple(reading.sizes.resolve(i) for i in index_map(source.indices))
            return Source(value=node.inputs[0], indices=above, scale=source.scale)
        if node.op == "cast" and _keeps(ops.tensor(0).dtype, ops.dtype, narrow):
            return Source(value=node.inputs[0], indices=source.indices, scale=source.scale)
        if node.op in ("mul", "div"):
            return _scaled(source, node.op, ops.tensor(0), ops.tensor(1))
    except Unreadable:
        return None
    return None


def _keeps(before: str, after: str | None, narrow: str | None) -> bool:
    return before == after or (before == narrow and WIDENED.get(before) == after)


def _scaled(source: Source, op: str, left: IndexTensor, right: IndexTensor) -> Source | None:
    for factor, other in ((right, left), (left, right)) if op == "mul" else ((right, left),):
        if factor.opaque or any(str(extent) != "1" for extent in factor.shape):
            continue
        number = const_real(factor.scalar())
        if number is not None and number != 0:
            scale = source.scale * number if op == "mul" else source.scale / number
            return Source(value=other.name, indices=broadcast_index(source.indices, other.shape), scale=scale)
    return None
