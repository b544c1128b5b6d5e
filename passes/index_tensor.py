"""A tensor as a function of its indices: shape, and the formula of the element at any index."""

from collections.abc import Callable
from dataclasses import dataclass, field

from swacompile.graph import FLOATS
from swacompile.index_expr import ONE, ZERO, Expr, Index, Op, Sort, add, apply, at_least, const_int, index, integer, ite, le, maximum, minimum
from swacompile.index_expr import neg, sub, substitute_atom, transform, walk

MAX_DEPTH = 200  # A mask needs a few dozen operations; past this the element is run-time data.


class Unreadable(Exception):
    """A rule met something that it has no meaning for. The value then counts as run-time data."""


def sort_of(dtype: str) -> Sort:
    if dtype == "bool":
        return Sort.BOOL
    return Sort.REAL if dtype in FLOATS else Sort.INT


@dataclass(slots=True, eq=False, kw_only=True)
class Depth:
    """How many tensors are being read inside one another."""

    level: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class IndexTensor:
    """The value `name` with this shape; `read` gives the formula of an element, `at` is `read` remembered.

    `opaque` is true where `read` has nothing to say but "element of run-time data".
    """

    name: str
    dtype: str
    shape: Index
    read: Callable[[Index], Expr]
    opaque: bool = False
    depth: Depth = field(default_factory=Depth)
    _known: dict[Index, Expr] = field(default_factory=dict)

    def at(self, *indices: Expr) -> Expr:
        """The element at these indices, one an axis."""
        if (known := self._known.get(indices)) is not None:
            return known
        if self.depth.level >= MAX_DEPTH:
            return self.data(indices)
        self.depth.level += 1
        try:
            element = self.read(indices)
        except Unreadable:
            element = self.data(indices)
        finally:
            self.depth.level -= 1
        self._known[indices] = element
        return element

    def data(self, indices: Index) -> Expr:
        """The element as plain run-time data."""
        return apply(self.name, indices, sort_of(self.dtype))

    @property
    def rank(self) -> int:
        return len(self.shape)

    def scalar(self) -> Expr:
        """The only element of a tensor with one element."""
        if any(extent != ONE for extent in self.shape):
            raise Unreadable(f"{self.name} has more than one element")
        return self.at(*[ZERO] * self.rank)

    def vector(self) -> Index:
        """The elements of a scalar or of a 1-D tensor of known length."""
        if self.rank == 0:
            return (self.at(),)
        length = const_int(self.shape[0]) if self.rank == 1 else None
        if length is None or length > 64:
            raise Unreadable(f"{self.name} is not a short vector of known length")
        return tuple(self.at(integer(i)) for i in range(length))


class Sizes:
    """Sizes that must be equal for the model to run: where two axes meet in one operation, one symbol takes the other's place."""

    def __init__(self) -> None:
        self._equal: dict[Expr, Expr] = {}

    def resolve(self, expr: Expr) -> Expr:
        return substitute_sizes(expr, self._equal) if self._equal else expr

    def unify(self, a: Expr, b: Expr) -> Expr:
        """The common extent of two axes under broadcasting."""
        a, b = self.resolve(a), self.resolve(b)
        if a == b or b == ONE:
            return a
        if a == ONE:
            return b
        if (const_int(a) is not None) and (const_int(b) is not None):
            raise Unreadable(f"axes of extent {a} and {b} do not broadcast")
        gone, stays = self._order(a, b)
        self._equal = {name: substitute_sizes(to, {gone: stays}) for name, to in self._equal.items()} | {gone: stays}
        return stays

    @staticmethod
    def _order(a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """(what goes, what stays in its place): a == b solved for a symbol, or for the whole of one side where that is not possible."""
        difference = sub(a, b)
        for symbol in walk(difference):
            if symbol.op is Op.SYMBOL and not symbol.args:
                rest = substitute_atom(difference, symbol, ZERO)
                coefficient = sub(difference, rest)
                if symbol not in walk(rest) and coefficient in (symbol, neg(symbol)):
                    return symbol, (neg(rest) if coefficient == symbol else rest)
        return (b, a) if a.op is Op.SYMBOL else (a, b)

    def broadcast(self, *shapes: Index) -> Index:
        rank = max(len(shape) for shape in shapes)
        padded = [(ONE,) * (rank - len(shape)) + shape for shape in shapes]
        result = padded[0]
        for shape in padded[1:]:
            result = tuple(self.unify(a, b) for a, b in zip(result, shape, strict=True))
        return result

    def assumed(self, expr: Expr) -> tuple[str, ...]:
        """The equalities that `resolve` would use on this expression, as text."""
        used = {node for node in walk(expr) if node in self._equal}
        return tuple(sorted(f"{symbol} == {self._equal[symbol]}" for symbol in used))


def substitute_sizes(expr: Expr, sizes: dict[Expr, Expr]) -> Expr:
    """Replace sizes everywhere, also in the extents that bound indices."""
    def replace(node: Expr) -> Expr | None:
        if node in sizes:
            return sizes[node]
        if node.op is Op.SYMBOL and node.args:
            extent = transform(node.args[0], replace)
            return node if extent == node.args[0] else index(node.name, extent)
        return None

    return transform(expr, replace)


def broadcast_index(indices: Index, shape: Index) -> Index:
    """Indices into an operand of this shape, from indices into the broadcast result."""
    inner = indices[len(indices) - len(shape) :]
    return tuple(ZERO if extent == ONE else i for i, extent in zip(inner, shape, strict=True))


def normal_axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def clamp(position: Expr, extent: Expr) -> Expr:
    """A slice bound brought into [0, extent]; negative positions count from the end."""
    if (value := const_int(position)) is not None:
        if value >= 2**31 - 1:
            return extent
        if value <= -(2**31) + 1:
            return ZERO
        if value < 0:
            return maximum(add(position, extent), ZERO)
        return minimum(position, extent)
    return minimum(position, extent) if not _negative_size(position) else maximum(add(position, extent), ZERO)


def _negative_size(position: Expr) -> bool:
    return at_least(neg(position), 1)


def wrapped(position: Expr, extent: Expr) -> Expr:
    """An index as gather reads it: negative ones count from the end."""
    return position if at_least(position, 0) else ite(le(ZERO, position), position, add(position, extent))

