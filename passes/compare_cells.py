"""Masks that are constant arrays without a pattern: every cell is computed and compared."""

from itertools import product

import numpy as np

from swacompile.attention import Axes, Kind, Residual, Witness
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import Expr, const_int, walk
from swacompile.passes.arrays import ArrayReader, band_of
from swacompile.passes.classify_cells import classify_cells
from swacompile.passes.evaluate import NotEvaluable, Number, evaluate
from swacompile.passes.verdict import Verdict

MAX_GRID = 1 << 26  # Cells of a constant mask that are compared one by one.


class NoGrid(Exception):
    """The cells cannot be computed; `verdict` says why."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = Verdict(code=code, reason=reason)


def compare_cells(mask: Expr, axes: Axes, residuals: tuple[Residual, ...], arrays: ArrayReader) -> Verdict:
    """The verdict on a mask that reads constant arrays, and no other data."""
    try:
        shown = cells_of(mask, axes, arrays)
    except NoGrid as error:
        return error.verdict
    odd = _differing_head(shown)
    if odd is not None:
        return Verdict(
            code="differs", reason="the mask differs between batches or heads: expected one band for all", witness=odd
        )
    return _verdict(shown, residuals)


def cells_of(mask: Expr, axes: Axes, arrays: ArrayReader) -> np.ndarray:
    """Booleans (batch, head, query, key); a batch or head axis that the mask does not depend on has extent 1. Raises NoGrid."""
    order = (axes.batch, axes.head, axes.query, axes.key)
    used = set(walk(mask))
    free = [axis not in used and axis in (axes.batch, axes.head) for axis in order]
    extents = [1 if without else const_int(axis.args[0]) for axis, without in zip(order, free, strict=True)]
    shape = [extent for extent in extents if extent is not None]
    if len(shape) < len(extents):
        raise NoGrid(
            "unknown-array", "the mask is a constant array without a pattern, read at sizes known only at run time"
        )
    if int(np.prod(shape)) > MAX_GRID:
        raise NoGrid(
            "large-array",
            f"the mask is a constant array of {shape} cells without a pattern, expected {MAX_GRID} cells at most",
        )
    try:
        return _grid(mask, order, shape, arrays)
    except NotEvaluable as error:
        raise NoGrid(
            "unknown-array", f"the mask is a constant array mixed with what is known only at run time: {error}"
        ) from error


def _grid(mask: Expr, order: tuple[Expr, ...], shape: list[int], arrays: ArrayReader) -> np.ndarray:
    positions = [
        np.arange(extent).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, extent in enumerate(shape)
    ]
    values: dict[Expr, Number] = dict(zip(order, positions, strict=True))

    def lookup(node: Expr, args: list[Number]) -> Number:
        array = arrays.lookup(node.name)
        if array is None:
            raise NotEvaluable(str(node))
        # Out of range only in branches that are not taken: the model itself would fail there.
        inside = (np.clip(arg, 0, extent - 1) for arg, extent in zip(args, array.shape, strict=True))
        return np.asarray(array[tuple(inside)])

    return np.broadcast_to(np.asarray(evaluate(mask, values, lookup), dtype=bool), shape)


def _differing_head(shown: np.ndarray) -> Witness | None:
    batches, heads, _, _ = shown.shape
    for batch, head in product(range(batches), range(heads)):
        if not np.array_equal(shown[batch, head], shown[0, 0]):
            return _witness(shown[batch, head], shown[0, 0], batch, head)
    return None


def _verdict(shown: np.ndarray, residuals: tuple[Residual, ...]) -> Verdict:
    matrix = shown[0, 0]
    queries, keys = matrix.shape
    band = _band(matrix)
    if band is not None:
        sizes = (f"queries == {queries}", f"keys == {keys}")
        kind = Kind.FULL if band.is_full else Kind.SLIDING
        return Verdict(mask=band, residuals=residuals, method="enumeration", valid_for=sizes, kind=kind)
    found = classify_cells(matrix)
    if found is None:
        return Verdict(code="not-a-band", reason="the constant mask is not a band", witness=_odd_cell(matrix))
    reason = f"expected a band, found {found.words}: the mask differs from the band {found.band}"
    witness = _witness(matrix, cells_of_band(found.band, queries, keys), 0, 0)
    return Verdict(code=found.kind.replace("_", "-"), kind=found.kind, mask=found.band, reason=reason, witness=witness)


def _band(matrix: np.ndarray) -> BandMask | None:
    """The band of a matrix (queries, keys); a lone query is the last of all, as in decoding."""
    queries, keys = matrix.shape
    sides = band_of(matrix)
    if sides is None:
        return None
    if queries > 1 or keys == 1:
        return BandMask(left=sides[0], right=sides[1])
    left, right = (None if side is None else side for side in sides)
    return BandMask(
        left=None if left is None else left + keys - 1,
        right=0 if right is None else right - (keys - 1),
        alignment=Alignment.BOTTOM_RIGHT,
    )


def cells_of_band(band: BandMask, queries: int, keys: int) -> np.ndarray:
    """The band as booleans (queries, keys)."""
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None] - band.offset(queries, keys)
    left = np.ones_like(distance, dtype=bool) if band.left is None else distance >= -band.left
    right = np.ones_like(distance, dtype=bool) if band.right is None else distance <= band.right
    return np.asarray(left & right)


def _witness(matrix: np.ndarray, claimed: np.ndarray, batch: int, head: int) -> Witness | None:
    differs = np.argwhere(matrix != claimed)
    if not differs.size:
        return None
    query, key = (int(i) for i in differs[0])
    return Witness(batch=batch, head=head, query=query, key=key, sizes=(), mask_shows=bool(matrix[query, key]))


def _odd_cell(matrix: np.ndarray) -> Witness | None:
    """A cell in which the mask differs from the narrowest band around its visible cells."""
    distance = np.arange(matrix.shape[1])[None, :] - np.arange(matrix.shape[0])[:, None]
    seen = distance[matrix]
    return _witness(matrix, (distance >= seen.min()) & (distance <= seen.max()), 0, 0) if seen.size else None
