"""Values of the source model that hold what the operator needs beside query, key and value.

A residual of a proof is a formula. Here the model's value is found whose elements are that formula; None where there is none, since a
rewrite computes nothing anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from swacompile.attention import Attention, Residual, ResidualKind
from swacompile.index_expr import (
    ONE,
    ZERO,
    Expr,
    Index,
    Op,
    Sort,
    const_int,
    const_real,
    eq,
    not_,
    real,
    real_mul,
    size,
    substitute,
    walk,
)
from swacompile.passes.index_tensor import broadcast_index, sort_of
from swacompile.passes.read_masks import Reading

SIGNS = (1.0, -1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeOperand:
    """A (batch, keys) value of the source model, between whose two axes are `rank` - 2 of one element.

    `nonzero`: its elements are numbers, and the operand is whether they are not 0.
    """

    value: str
    nonzero: bool = False
    rank: int = 2


class Fit(Enum):
    """What an axis of a bias is beside the attention's."""

    ONE = "broadcast"
    SAME = "the same size"
    LONGER = "cut to the size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """A value that is added to the scores. `fits` are its last axes beside (batch, heads, queries, keys), the first of them left out."""

    value: str
    fits: tuple[Fit, ...]


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
    wanted = Sort.BOOL if residual.kind is ResidualKind.KEY_PADDING else Sort.INT
    fitting = [
        (name, extents)
        for name, extents in _values(reading, site, wanted, 2, 4)
        if _fits(extents, site) and _element(reading, name, _per_key_place(site, extents), extents) == residual.data
    ]
    if flat := [name for name, extents in fitting if len(extents) == 2]:
        return RunTimeOperand(value=flat[0])
    source = _nonzero_of(residual.data)
    shape = None if source is None else reading.extents(source.name)
    if source is not None and shape is not None and _is_read_at(source, shape, site):
        return RunTimeOperand(value=source.name, nonzero=True, rank=len(shape))
    return next((RunTimeOperand(value=name, rank=len(extents)) for name, extents in fitting), None)


def bias(reading: Reading, site: Attention, residual: Residual) -> Bias | None:
    """The value that broadcasts to (batch, heads, queries, keys), of the site's data type, whose elements are added to the scores.

    It may be longer than that: what the model reads of it starts at index 0 of every axis. One that need not be cut goes first.
    """
    axes = site.axes
    place = (axes.batch, axes.head, axes.query, axes.key)
    wanted = [plain(reading.sizes.resolve(axis.args[0])) for axis in place]

    def fit(extent: Expr, wanted: Expr) -> Fit:
        return Fit.ONE if extent == ONE else Fit.SAME if plain(extent) == wanted else Fit.LONGER

    longer: Bias | None = None
    for name, extents in _values(reading, site, Sort.REAL, 1, 4):
        if reading.tensors[name].dtype == site.dtype and _element(reading, name, place, extents) == residual.data:
            found = Bias(value=name, fits=tuple(map(fit, extents, wanted[4 - len(extents) :])))
            if Fit.LONGER not in found.fits:
                return found
            longer = longer or found
    return longer


def slopes(reading: Reading, site: Attention, residual: Residual) -> Slopes | None:
    """The value that has an element a head and else only axes of one element, whose elements times 1 or -1 are the slopes."""
    number = const_real(residual.data)
    if number is not None:
        return Slopes(value=None, factor=number)
    for name, extents in _values(reading, site, Sort.REAL, 1, 4):
        if [const_int(extent) for extent in extents if extent != ONE] != [site.heads] * (site.heads > 1):
            continue
        element = reading.tensors[name].at(*(ZERO if extent == ONE else site.axes.head for extent in extents))
        for sign in SIGNS:
            if real_mul(element, real(sign)) == residual.data:
                return Slopes(value=name, factor=sign)
    return None


def position(_: Reading, __: Attention, residual: Residual) -> Position | None:
    """The element of run-time data that a band counts from."""
    index = tuple(const_int(place) for place in residual.data.args)
    if residual.data.op is not Op.APPLY or any(place is None for place in index):
        return None
    return Position(value=residual.data.name, index=tuple(place for place in index if place is not None))


def plain(extent: Expr) -> Expr:
    """The same however much is known of its sizes."""
    known = {node: size(node.name) for node in walk(extent) if node.op is Op.SYMBOL and not node.args}
    return substitute(extent, known)


def _values(reading: Reading, site: Attention, sort: Sort, least: int, most: int) -> Iterator[tuple[str, Index]]:
    """Values before the attention, of this sort and of a number of axes in this range, with their extents, in execution order."""
    for name, tensor in reading.tensors.items():
        if name == site.output:
            return
        producer, extents = reading.graph.producers.get(name), reading.extents(name)
        if producer is not None and producer.attrs.get("made"):
            continue
        if extents is not None and least <= tensor.rank <= most and sort_of(tensor.dtype) is sort:
            yield name, extents


def _element(reading: Reading, name: str, place: Index, extents: Index) -> Expr:
    return reading.sizes.resolve(reading.tensors[name].at(*broadcast_index(place, extents)))


def _fits(extents: Index, site: Attention) -> bool:
    """Whether a value has the extents (1 or batch, keys) and between them ones, as far as the model says: an extent of its own fits."""
    is_per_key = 2 <= len(extents) <= 4 and all(extent == ONE for extent in extents[1:-1])
    return is_per_key and (extents[-1] != ONE or site.axes.keys == ONE)


def _is_read_at(element: Expr, extents: Index, site: Attention) -> bool:
    """Whether an element of a value of (batch, keys) is that of the attention's own batch and key."""
    return _fits(extents, site) and element.args == broadcast_index(_per_key_place(site, extents), extents)


def _per_key_place(site: Attention, extents: Index) -> Index:
    return (site.axes.batch, *(ZERO for _ in extents[1:-1]), site.axes.key)


def _nonzero_of(data: Expr) -> Expr | None:
    """x where the data is the condition x != 0 on one element of run-time data."""
    for node in data.args:
        element = node.args[0] if node.op is Op.EQ0 else None
        for candidate in (element, *(element.args if element is not None else ())):
            if candidate is not None and candidate.op is Op.APPLY and data == not_(eq(candidate, ZERO)):
                return candidate
    return None
