"""Constant arrays as formulas: an exporter often folds a mask or an iota into an array of numbers.

An array is replaced by a formula only where the two agree in every cell, so the formula is exact on the array's whole domain.
"""

from dataclasses import dataclass, field

import numpy as np

from swacompile.graph import Constant
from swacompile.index_expr import (
    TRUE,
    ZERO,
    Expr,
    Index,
    Sort,
    add,
    and_,
    apply,
    boolean,
    const_int,
    integer,
    ite,
    le,
    mul,
    neg,
    real,
    sub,
)
from swacompile.passes.index_tensor import sort_of

MAX_ELEMENTS = 1 << 28  # A constant mask of 16384 x 16384; larger arrays are weights.
MAX_NUMBERS = 4  # Distinct numbers of a constant mask: shown, hidden, and their sums.
PREFIX = "constant:"


@dataclass(slots=True, kw_only=True)
class ArrayReader:
    """Loads constant arrays once, and gives the formula of their elements."""

    loaded: dict[str, np.ndarray] = field(default_factory=dict)
    _patterns: dict[str, "_Pattern | None"] = field(default_factory=dict)
    _varying: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    _numbers: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def element(self, name: str, constant: Constant, indices: Index) -> Expr:
        """The element at these indices: a number, a formula, or the array itself as a function."""
        sort = sort_of(constant.dtype)
        if int(np.prod(constant.shape)) > MAX_ELEMENTS:
            return apply(name, indices, sort)
        array = self._load(name, constant)
        positions = [const_int(i) for i in indices]
        if all(p is not None and -n <= p < n for p, n in zip(positions, array.shape, strict=True)):
            return _number(array[tuple(p for p in positions if p is not None)], sort)
        if name not in self._patterns:
            self._patterns[name] = _pattern(array, sort)
        pattern = self._patterns[name]
        if pattern:
            return pattern.at(indices)
        mask_like = sort is Sort.REAL and array.ndim >= 2 and array.shape[-1] > 1
        return self._choice(name, array, indices) if mask_like else self._looked_up(name, array, indices, sort)

    def _choice(self, name: str, array: np.ndarray, indices: Index) -> Expr:
        """The element of a mask of a few numbers: which of them it is, by boolean arrays."""
        if name not in self._numbers:
            self._numbers[name] = _few_numbers(array)
        if len(self._numbers[name]) < 2:
            return self._looked_up(name, array, indices, Sort.REAL)
        first, *others = self._numbers[name]
        element = real(first)
        for number in others:
            part = f"{name} == {number!r}"
            if part not in self.loaded:
                self.loaded[part] = array == number
            element = ite(self._looked_up(part, self.loaded[part], indices, Sort.BOOL), real(number), element)
        return element

    def _looked_up(self, name: str, array: np.ndarray, indices: Index, sort: Sort) -> Expr:
        """The array as a function of those axes along which it changes."""
        if name not in self._varying:
            self._varying[name] = _varying_axes(array)
        return apply(
            PREFIX + name, tuple(i if v else ZERO for i, v in zip(indices, self._varying[name], strict=True)), sort
        )

    def lookup(self, function: str) -> np.ndarray | None:
        """The array behind a function name in a formula, None for run-time data."""
        return self.loaded.get(function.removeprefix(PREFIX)) if function.startswith(PREFIX) else None

    def _load(self, name: str, constant: Constant) -> np.ndarray:
        if name not in self.loaded:
            self.loaded[name] = constant.load()
        return self.loaded[name]


class _Pattern:
    """A formula that equals an array in every cell."""

    def at(self, indices: Index) -> Expr:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Uniform(_Pattern):
    value: Expr

    def at(self, indices: Index) -> Expr:
        return self.value


@dataclass(frozen=True, slots=True)
class _Affine(_Pattern):
    """constant + sum of step * index."""

    constant: int
    steps: tuple[int, ...]

    def at(self, indices: Index) -> Expr:
        return add(
            integer(self.constant), *(mul(integer(step), i) for step, i in zip(self.steps, indices, strict=True))
        )


@dataclass(frozen=True, slots=True)
class _Band(_Pattern):
    """One value inside a band of the last two axes, another outside."""

    left: int | None
    right: int | None
    inside: Expr
    outside: Expr

    def at(self, indices: Index) -> Expr:
        distance = sub(indices[-1], indices[-2])
        lower = TRUE if self.left is None else le(neg(integer(self.left)), distance)
        upper = TRUE if self.right is None else le(distance, integer(self.right))
        return ite(and_(lower, upper), self.inside, self.outside)


def _number(value: np.generic, sort: Sort) -> Expr:
    if sort is Sort.BOOL:
        return boolean(bool(value))
    return integer(int(value)) if sort is Sort.INT else real(float(value))


def _few_numbers(array: np.ndarray) -> tuple[float, ...]:
    """The distinct numbers of an array, () where there are more than a mask has, or NaN among them."""
    numbers = np.unique(array[:1].reshape(-1)[:4096])  # most arrays are seen to have many without a look at all of them
    if len(numbers) > MAX_NUMBERS or len(numbers := np.unique(array)) > MAX_NUMBERS or np.isnan(numbers).any():
        return ()
    return tuple(float(number) for number in numbers)


def _varying_axes(array: np.ndarray) -> tuple[bool, ...]:
    """Which axes matter: along the others all slices are equal."""
    return tuple(bool((array != array.take([0], axis=axis)).any()) for axis in range(array.ndim))


def _pattern(array: np.ndarray, sort: Sort) -> _Pattern | None:
    if array.size == 0:
        return None
    first = array.reshape(-1)[0]
    if (array == first).all():
        return _Uniform(_number(first, sort))
    if sort is Sort.INT and (affine := _affine(array)):
        return affine
    return _band(array, sort) if array.ndim >= 2 else None


def _affine(array: np.ndarray) -> _Affine | None:
    origin = int(array.reshape(-1)[0])
    steps = []
    expected = np.full(array.shape, origin, dtype=np.int64)
    for axis, extent in enumerate(array.shape):
        unit = [0] * array.ndim
        unit[axis] = min(1, extent - 1)
        step = int(array[tuple(unit)]) - origin
        steps.append(step)
        along = np.arange(extent, dtype=np.int64).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
        expected = expected + step * along
    return _Affine(origin, tuple(steps)) if (expected == array).all() else None


def _band(array: np.ndarray, sort: Sort) -> _Band | None:
    matrix = array.reshape(-1, *array.shape[-2:])
    if (matrix != matrix[:1]).any():
        return None
    matrix = matrix[0]
    values = np.unique(matrix)
    if len(values) != 2:
        return None
    for inside, outside in ((values[1], values[0]), (values[0], values[1])):
        sides = band_of(matrix == inside)
        if sides is not None:
            return _Band(*sides, inside=_number(inside, sort), outside=_number(outside, sort))
    return None


def band_of(shown: np.ndarray) -> tuple[int | None, int | None] | None:
    """(left, right) of the band that a boolean matrix (queries, keys) is, None if it is none.

    A side is None where the matrix is too small to show an end of it.
    """
    queries, keys = shown.shape
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    seen = distance[shown]
    if seen.size == 0:
        return None
    left, right = -int(seen.min()), int(seen.max())
    if not np.array_equal(shown, (distance >= -left) & (distance <= right)):
        return None
    return (None if left >= queries - 1 else left), (None if right >= keys - 1 else right)
