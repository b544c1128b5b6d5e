"""A tensor as a function of its indices: shape, and the formula of the element at any index."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from swacompile.graph import FLOATS
from swacompile.index_expr import (
    ONE,
    ZERO,
    Expr,
    Index,
    Op,
    Sort,
    add,
    apply,
    at_least,
    const_int,
    index,
    integer,
    ite,
    le,
    maximum,
    minimum,
    neg,
    real,
    rounded,
    sub,
    substitute_atom,
    to_real,
    transform,
    walk,
    wrap,
)

MAX_DEPTH = 200  # A mask needs a few dozen operations; past this the element is run-time data.


class Unreadable(Exception):
    """A rule met something that it has no meaning for. The value then counts as run-time data."""


# Bits and sign of the integer types.
INTEGERS = {f"{sign}int{bits}": (bits, sign == "") for bits in (4, 8, 16, 32, 64) for sign in ("", "u")}
# The magnitude up to which a floating-point type keeps every integer.
EXACT_UP_TO = {"bfloat16": 1 << 8, "float16": 1 << 11, "float32": 1 << 24, "float64": 1 << 53}


def sort_of(dtype: str) -> Sort:
    """Integers and booleans are reasoned about; all else (floats of any width, strings) counts as real numbers."""
    if dtype == "bool":
        return Sort.BOOL
    return Sort.INT if dtype in INTEGERS else Sort.REAL


def kept(element: Expr, dtype: str) -> Expr:
    """The element as its data type keeps it: integers wrap around, real numbers are rounded.

    Raises Unreadable where an integer has become a number of a type whose precision is not known.
    """
    if element.op is Op.ITE:
        condition, *branches = element.args
        return ite(condition, *(kept(branch, dtype) for branch in branches))
    if element.sort is Sort.INT and dtype in INTEGERS:
        return wrap(element, *INTEGERS[dtype])
    if element.op is Op.TO_REAL:
        if dtype not in EXACT_UP_TO:
            raise Unreadable(f"an integer as {dtype}")
        return to_real(rounded(element.args[0], EXACT_UP_TO[dtype]))
    if element.is_const and element.sort is Sort.REAL and dtype in FLOATS:
        return real(float_kept(float(element.value), dtype))  # type: ignore[arg-type]
    return element


def float_kept(value: float, dtype: str) -> float:
    """A number as a floating-point type keeps it."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return float(np.dtype(dtype).type(value))
        bits = int(np.float32(value).view(np.uint32))
    if not np.isfinite(value):
        return value
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
    return float(np.uint32(bits).view(np.float32))


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
        # Pairs of which one is known only from data, which says nothing of others.
        self.of_data: list[tuple[Expr, Expr]] = []

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
        if any(node.op is Op.APPLY for extent in (a, b) for node in walk(extent)):
            self.of_data.append((a, b))
            return b if any(node.op is Op.APPLY for node in walk(a)) else a
        gone, stays = self._order(a, b)
        self._equal = {name: substitute_sizes(to, {gone: stays}) for name, to in self._equal.items()} | {gone: stays}
        return self.resolve(a)

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

    def equalities(self, of: set[Expr], known: dict[Expr, Expr]) -> tuple[tuple[Expr, Expr], ...]:
        """The equalities that speak of these sizes; without those that follow from what is `known` of sizes."""
        told = ((gone, stays) for gone, stays in self._equal.items() if of & set(walk(gone)))
        refined = ((substitute_sizes(gone, known), substitute_sizes(stays, known)) for gone, stays in told)
        return tuple((gone, stays) for gone, stays in refined if gone != stays)


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
    value = const_int(position)
    if value is not None and value >= 2**31 - 1:
        return extent
    if value is not None and value <= -(2**31) + 1:
        return ZERO
    from_start = minimum(position, extent)
    if at_least(position, 0):
        return from_start
    from_end = maximum(add(position, extent), ZERO)
    return from_end if at_least(neg(position), 1) else ite(le(ZERO, position), from_start, from_end)


def wrapped(position: Expr, extent: Expr) -> Expr:
    """An index as gather reads it: negative ones count from the end."""
    return position if at_least(position, 0) else ite(le(ZERO, position), position, add(position, extent))
