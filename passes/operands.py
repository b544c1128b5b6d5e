"""Values of the source model that hold what the operator needs beside query, key and value.

A residual of a proof is a formula. Here the model's value is found whose elements are that formula; None where there is none, since a
rewrite computes nothing anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from swacompile.attention import Attention, Residual, ResidualKind
from swacompile.index_expr import ONE, ZERO, Expr, Index, Op, Sort, const_int, const_real, eq, not_, real, real_mul
from swacompile.passes.index_tensor import broadcast_index, sort_of
from swacompile.passes.read_masks import Reading

SIGNS = (1.0, -1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeOperand:
    """A (batch, keys) value of the source model; `nonzero` where its elements are numbers and the operand is whether they are not 0."""

    value: str
    nonzero: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """ALiBi's slopes: `factor` times a value that has an element a head, or `factor` for every head where `value` is None."""

    value: str | None
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One element of an integer value: the place of query 0 among the keys."""

    value: str
    index: tuple[int, ...]


def per_key(reading: Reading, site: Attention, residual: Residual) -> RunTimeOperand | None:
    """The value whose element at (batch, key) is the condition of a key padding, or the label of segments."""
    place = (site.axes.batch, site.axes.key)
    wanted = Sort.BOOL if residual.kind is ResidualKind.KEY_PADDING else Sort.INT
    for name, extents in _values(reading, wanted, 2, 2):
        if _fits(extents, site) and _element(reading, name, place, extents) == residual.data:
            return RunTimeOperand(value=name)
    source = _nonzero_of(residual.data)
    shape = None if source is None else reading.extents(source.name)
    if source is None or shape is None or not _fits(shape, site) or source.args != broadcast_index(place, shape):
        return None
    return RunTimeOperand(value=source.name, nonzero=True)


def bias(reading: Reading, site: Attention, residual: Residual) -> str | None:
    """The value that broadcasts to (batch, heads, queries, keys), of the site's data type, whose elements are added to the scores.

    It may be longer than that: what the model reads of it starts at index 0 of every axis.
    """
    axes = site.axes
    place = (axes.batch, axes.head, axes.query, axes.key)
    for name, extents in _values(reading, Sort.REAL, 1, 4):
        same_type = reading.tensors[name].dtype == site.dtype
        if same_type and _element(reading, name, place, extents) == residual.data:
            return name
    return None


def slopes(reading: Reading, site: Attention, residual: Residual) -> Slopes | None:
    """The value that has an element a head and else only axes of one element, whose elements times 1 or -1 are the slopes."""
    number = const_real(residual.data)
    if number is not None:
        return Slopes(value=None, factor=number)
    for name, extents in _values(reading, Sort.REAL, 1, 4):
        if [const_int(extent) for extent in extents if extent != ONE] != [site.heads] * (site.heads > 1):
            continue
        element = reading.tensors[name].at(*(ZERO if extent == ONE else site.axes.head for extent in extents))
        for sign in SIGNS:
            if real_mul(element, real(sign)) == residual.data:
                return Slopes(value=name, factor=sign)
    return None


def position(residual: Residual) -> Position | None:
    """The element of run-time data that a band counts from."""
    index = tuple(const_int(place) for place in residual.data.args)
    if residual.data.op is not Op.APPLY or any(place is None for place in index):
        return None
    return Position(value=residual.data.name, index=tuple(place for place in index if place is not None))


def _values(reading: Reading, sort: Sort, least: int, most: int) -> Iterator[tuple[str, Index]]:
    """Values of the source, of this sort and of a number of axes in this range, with their extents, in execution order."""
    for name, tensor in reading.tensors.items():
        producer, extents = reading.graph.producers.get(name), reading.extents(name)
        if producer is not None and producer.attrs.get("made"):
            continue
        if extents is not None and least <= tensor.rank <= most and sort_of(tensor.dtype) is sort:
            yield name, extents


def _element(reading: Reading, name: str, place: Index, extents: Index) -> Expr:
    return reading.sizes.resolve(reading.tensors[name].at(*broadcast_index(place, extents)))


def _fits(extents: Index, site: Attention) -> bool:
    """Whether a value has the extents (1 or batch, keys), as far as the model says: an extent of its own counts as fitting."""
    return len(extents) == 2 and (extents[1] != ONE or site.axes.keys == ONE)


def _nonzero_of(data: Expr) -> Expr | None:
    """x where the data is the condition x != 0 on one element of run-time data."""
    for node in data.args:
        element = node.args[0] if node.op is Op.EQ0 else None
        for candidate in (element, *(element.args if element is not None else ())):
            if candidate is not None and candidate.op is Op.APPLY and data == not_(eq(candidate, ZERO)):
                return candidate
    return None
