"""What sizes must be at run time for a replacement to give what its source gives.

A proof takes sizes that meet in one operation for equal. A runtime is more generous: a size of 1 is broadcast, and no runtime compares
the axes of several inputs that a model file calls by one name. So the mask could be made for other sizes than the attention has. Here
every size that the mask is made of is bound to an axis that a frontend can look at:

1. The batch, the number of queries and of keys are those of the attention's own operands, which must agree with one another.
2. Every value that the mask's elements or sizes come from must have the extents that the proof gives it.
3. What the proof itself was limited to: as many keys as queries, sizes up to a number, equalities that no symbol could be solved for.

Where all of that holds, each value of the source has the shape that the proof was made for. A frontend writes the conditions into the
model, so that it stops where one fails.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from swacompile.attention import Attention, BandProof, Layout, Operand
from swacompile.graph import Graph, Node
from swacompile.index_expr import (
    ONE,
    Expr,
    Op,
    const_int,
    eq,
    floordiv,
    index,
    integer,
    le,
    or_,
    size,
    substitute,
    walk,
)
from swacompile.passes.index_tensor import IndexTensor
from swacompile.passes.read_masks import Reading
from swacompile.passes.size_conditions import simplest
from swacompile.passes.smt import is_valid


class Role(Enum):
    """An operand of the attention that is replaced, in the order (batch, heads, sequence, size)."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"


BATCH, SEQUENCE = 0, 2
_ROLE_WORDS = {
    (Role.QUERY, BATCH): "the batch",
    (Role.QUERY, SEQUENCE): "the number of queries",
    (Role.KEY, BATCH): "the batch of keys",
    (Role.KEY, SEQUENCE): "the number of keys",
    (Role.VALUE, BATCH): "the batch of values",
    (Role.VALUE, SEQUENCE): "the number of values",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Size of one axis of a value at run time. The value is a name in the source model, or an operand of the attention."""

    value: str | Role
    axis: int

    def __str__(self) -> str:
        return (
            f"axis {self.axis} of {self.value}" if isinstance(self.value, str) else _ROLE_WORDS[self.value, self.axis]
        )

    @property
    def symbol(self) -> Expr:
        return size(str(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A condition on the symbols of extents, and the same for people."""

    condition: Expr
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """Conditions under which a replacement is right; `extents` holds what their symbols stand for.

    `zero_or_one` names values of the model that must hold no other numbers. `expands`: operands of (batch, keys) may have a batch of 1, and are expanded to the attention's. `cuts`: they may have more.
    """

    conditions: tuple[Guard, ...] = ()
    extents: tuple[Extent, ...] = ()
    zero_or_one: tuple[str, ...] = ()
    expands: bool = False
    cuts: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """All conditions for people."""
        return (*(guard.words for guard in self.conditions), *(f"{value} in {{0, 1}}" for value in self.zero_or_one))


class Unguardable(Exception):
    """A size that the proof speaks of cannot be looked at where the model runs."""


def guards_of(
    reading: Reading, site: Attention, proof: BandProof, *, trusted: bool, one: frozenset[Extent] = frozenset()
) -> Guards:
    """What must hold for this replacement. Raises Unguardable.

    `trusted`: the runtime itself checks extents that the model declares as numbers. Extents in `one` may be 1 as well.
    """
    _refuse_sizes_of_data(reading, site)
    places = [*_operand_places(reading, site), *_sources(reading, site)]
    operands = {Role.QUERY: site.query, Role.KEY: site.key, Role.VALUE: site.value}
    sizes = _Bound(reading=reading, operands=operands)
    for extent, expected in places:
        sizes.bind(extent, expected)
    guards = [
        *(guard for extent, expected in places if (guard := sizes.guard(extent, expected, trusted, extent in one))),
        *(guard for guard in sizes.unsolved() if not is_valid(guard.condition)),
        *_limits(sizes, proof),
    ]
    by_condition = {guard.condition: guard for guard in guards}
    return Guards(
        conditions=tuple(by_condition.values()),
        extents=tuple(extent for extent in sizes.extents.values() if _speaks_of(by_condition, extent)),
        zero_or_one=proof.limits.zero_or_one,
        expands=bool(one),
    )


def _refuse_sizes_of_data(reading: Reading, site: Attention) -> None:
    sources = {value for value, _ in _Walk(reading=reading, site=site).found()}
    for pair in reading.sizes.of_data:
        if sources & {node.name for extent in pair for node in walk(extent) if node.op is Op.APPLY}:
            raise Unguardable(f"{pair[0]} and {pair[1]} must be the same size, and one of them is known only from data")


def batches_of_sources(reading: Reading, site: Attention) -> frozenset[Extent]:
    """The batch axes of the model's inputs whose elements the mask is made of, where they are not a number."""
    batch = next(expected for _, expected in _operand_places(reading, site))
    return frozenset(
        extent
        for extent, expected in _sources(reading, site, elements=True)
        if expected == batch
        and const_int(batch) is None
        and extent.axis == BATCH
        and extent.value in reading.graph.inputs
    )


def _speaks_of(conditions: Iterable[Expr], extent: Extent) -> bool:
    return any(extent.symbol in walk(condition) for condition in conditions)


@dataclass(slots=True, kw_only=True)
class _Bound:
    """The sizes of a proof, each bound to the first extent that is this size and nothing else."""

    reading: Reading
    operands: dict[Role, Operand]
    actual: dict[Expr, Expr] = field(default_factory=dict)
    extents: dict[Expr, Extent] = field(default_factory=dict)

    def bind(self, extent: Extent, expected: Expr) -> None:
        self.extents[extent.symbol] = extent
        if expected.op is Op.SYMBOL:
            self.actual.setdefault(expected, extent.symbol)

    def guard(self, extent: Extent, expected: Expr, trusted: bool, or_one: bool) -> Guard | None:
        """That the extent is what the proof expects; None where it is so by the choice of symbols, or the runtime sees to it."""
        if trusted and self._is_stated(extent):
            return None
        wanted = self.in_extents(expected)
        if wanted == extent.symbol:
            return None
        words = f"{extent} == {wanted}"
        same = eq(extent.symbol, wanted)
        if or_one:
            return Guard(condition=or_(same, eq(extent.symbol, ONE)), words=f"{words} or 1")
        return Guard(condition=same, words=words)

    def _is_stated(self, extent: Extent) -> bool:
        """Whether the model says itself, without any other size, which number this is. A value that no rule reads may lie."""
        operand = self.operands.get(extent.value) if isinstance(extent.value, Role) else None
        value, axis = (extent.value, extent.axis) if operand is None else (operand.value, axis_in(operand, extent.axis))
        tensor = self.reading.tensors[str(value)]
        read = operand is not None or value in self.reading.graph.inputs
        return read and const_int(tensor.shape[axis]) is not None

    def in_extents(self, expected: Expr) -> Expr:
        """A size in terms of extents. Raises Unguardable."""
        for node in walk(expected):
            if node.op is Op.APPLY:
                raise Unguardable(f"the size {expected} depends on data")
            if node.op is Op.SYMBOL and node not in self.actual:
                self._bind_to_input(node)
        return substitute(expected, self.actual)

    def _bind_to_input(self, symbol: Expr) -> None:
        for name in self.reading.graph.inputs:
            extents = self.reading.extents(name) or ()
            if symbol in extents:
                return self.bind(Extent(value=name, axis=extents.index(symbol)), symbol)
        raise Unguardable(f"no value has an axis of the size {symbol}")

    def unsolved(self) -> Iterator[Guard]:
        """Equalities of sizes that could not be solved for a symbol, where they speak of the mask's sizes alone."""
        for gone, stays in self.reading.assumptions({}):
            if gone.op is Op.SYMBOL:
                continue  # the extents themselves are compared
            symbols = {node for side in (gone, stays) for node in walk(side) if node.op is Op.SYMBOL}
            solved = {symbol: self.reading.sizes.resolve(symbol) for symbol in symbols}
            if all(node in self.actual for end in solved.values() for node in walk(end) if node.op is Op.SYMBOL):
                here = {symbol: substitute(end, self.actual) for symbol, end in solved.items()}
                condition, words = simplest(substitute(gone, here), substitute(stays, here))
                yield Guard(condition=condition, words=words)


def _limits(sizes: _Bound, proof: BandProof) -> Iterator[Guard]:
    queries, keys = (Extent(value=role, axis=SEQUENCE).symbol for role in (Role.QUERY, Role.KEY))
    if proof.limits.needs_keys_for_queries:
        yield Guard(condition=le(queries, keys), words=f"{keys} >= {queries}")
    largest = proof.limits.largest
    if largest is not None:
        for symbol in dict.fromkeys((queries, keys, *sizes.actual.values())):
            yield Guard(condition=le(symbol, integer(largest)), words=f"{symbol} <= {largest}")


# ----------------------------------------------------------------------------------------------- 1. the operands' own


def _operand_places(reading: Reading, site: Attention) -> Iterator[tuple[Extent, Expr]]:
    for role, operand, axes in (
        (Role.QUERY, site.query, (BATCH, SEQUENCE)),
        (Role.KEY, site.key, (SEQUENCE, BATCH)),
        (Role.VALUE, site.value, (SEQUENCE, BATCH)),
    ):
        for axis in axes:
            extent = _extents(reading, operand.value)[axis_in(operand, axis)]
            merged = operand.merged and axis == BATCH
            yield Extent(value=role, axis=axis), floordiv(extent, integer(operand.merged_heads)) if merged else extent


def axis_in(operand: Operand, axis: int) -> int:
    """Where the operand's value has this axis of (batch, heads, sequence, size)."""
    if operand.merged and operand.layout is Layout.BSHD:
        return 1 - min(axis, 1)
    return 1 if axis == SEQUENCE and (operand.merged or operand.layout is Layout.BSHD) else axis


def _extents(reading: Reading, value: str) -> tuple[Expr, ...]:
    extents = reading.extents(value)
    assert extents is not None, value
    return extents


# ---------------------------------------------------------------------------------------- 2. what the mask is made of


def _sources(reading: Reading, site: Attention, *, elements: bool = False) -> Iterator[tuple[Extent, Expr]]:
    """The extents of run-time values that the mask's elements or sizes come from; only the elements' where `elements`."""
    roles = {
        Extent(value=operand.value, axis=axis_in(operand, axis)): Extent(value=role, axis=axis)
        for role, operand in ((Role.VALUE, site.value), (Role.KEY, site.key), (Role.QUERY, site.query))
        for axis in ((SEQUENCE,) if operand.merged else (BATCH, SEQUENCE))
    }
    for value, wanted in _Walk(reading=reading, site=site).found():
        for axis, expected in enumerate(_extents(reading, value)):
            extent = Extent(value=value, axis=axis)
            if wanted is None or (not elements and wanted & set(walk(expected))):
                yield roles.get(extent, extent), expected


_Symbols = frozenset[Expr]


@dataclass(slots=True, kw_only=True)
class _Walk:
    """Upwards from the mask. `_found` holds run-time values, and which sizes of them matter: None for all, since elements are read."""

    reading: Reading
    site: Attention
    _found: dict[tuple[str, _Symbols | None], None] = field(default_factory=dict)

    def found(self) -> Iterator[tuple[str, _Symbols | None]]:
        start, stops = self._start()
        frontier: list[tuple[str, _Symbols | None]] = [(start, None)] if start else []
        seen = set[tuple[str, _Symbols | None]]()
        while frontier:
            place = frontier.pop()
            if place not in seen and place[0] not in stops:
                seen.add(place)
                frontier += self._above(*place)
        yield from self._found

    def _start(self) -> tuple[str, set[str]]:
        """(the mask, where the way ends): the attention's own operands and scores are compared apart from it."""
        graph = self.reading.graph
        node = node_of(graph, self.site)
        if node.op == "attention":
            return node.input(3), set()
        logits = self.reading.tensors[node.inputs[0]]
        return node.inputs[0], {
            self.site.query.value,
            self.site.key.value,
            self.site.value.value,
            *_made_of(graph, _products(graph, logits)),
        }

    def _above(self, value: str, wanted: _Symbols | None) -> list[tuple[str, _Symbols | None]]:
        tensor, node = self.reading.tensors.get(value), self.reading.graph.producers.get(value)
        if value in self.reading.graph.constants or tensor is None:
            return []
        if tensor.opaque or node is None:
            self._found[value, wanted] = None
            return []
        if node.op == "sizes":
            return [(name, symbols) for name, symbols in self._inputs_of_sizes(node)]
        if node.op in ("shape", "size"):
            return [(node.inputs[0], self._sizes_read(node))] if node.inputs[0] in self.reading.tensors else []
        return [(name, wanted) for name in node.inputs if name]

    def _sizes_read(self, node: Node) -> _Symbols:
        """The sizes that are read of a shape: those of the positions that its users take, all where that is not known."""
        extents = _extents(self.reading, node.inputs[0])
        users = self.reading.graph.users.get(node.outputs[0], ())
        taken = {self._position(user) for user in users}
        start, end = node.attrs.get("start", 0), node.attrs.get("end")
        assert isinstance(start, int) and isinstance(end, int | None)
        part = extents[start:end]
        read = part if None in taken or node.op == "size" else tuple(part[axis] for axis in taken if axis is not None)
        return frozenset(node for extent in read for node in walk(extent) if node.op is Op.SYMBOL)

    def _position(self, user: Node) -> int | None:
        """Which element of its operand a gather takes, None where that is not one constant."""
        positions = self.reading.tensors.get(user.input(1)) if user.op == "gather" else None
        if positions is None or any(extent != ONE for extent in positions.shape):
            return None
        return const_int(positions.scalar())

    def _inputs_of_sizes(self, node: Node) -> Iterator[tuple[str, _Symbols]]:
        """A frontend that knows sizes as expressions does not say of which value: of every input that has one of them."""
        values = node.attrs["values"]
        assert isinstance(values, tuple)
        symbols = frozenset(part for value in values for part in walk(value) if part.op is Op.SYMBOL)
        for name in self.reading.graph.inputs:
            if any(symbols & set(walk(extent)) for extent in self.reading.extents(name) or ()):
                yield name, symbols


def _made_of(graph: Graph, products: set[str]) -> Iterator[str]:
    """The products, and what is computed of them on the way to the softmax without a formula: the largest score of a row."""
    frontier, seen = list(products), set(products)
    while frontier:
        value = frontier.pop()
        for user in graph.users.get(value, ()):
            if user.op != "softmax" and user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                frontier.append(user.outputs[0])
            if user.op == "reduce_max":
                yield user.outputs[0]
    yield from products


def node_of(graph: Graph, site: Attention) -> Node:
    """The softmax or attention operator of a site."""
    return next(node for node in graph.nodes if node.name == site.node and node.op in ("softmax", "attention"))


def _products(graph: Graph, logits: IndexTensor) -> set[str]:
    """The query-key product that the logits are made of."""
    anywhere = tuple(index(f"i{axis}", extent) for axis, extent in enumerate(logits.shape))
    names = {node.name for node in walk(logits.at(*anywhere)) if node.op is Op.APPLY}
    return {name for name in names if name in graph.producers and graph.producers[name].op == "matmul"}
