"""Bands that count from a position known only at run time: a query decoded into a static cache stands at the cache's length.

The position is one number of the model's data, the same for all batches and heads. For one query, such a band is also a condition on
the key alone, like padding; read as a band it keeps its window.
"""

from dataclasses import replace

from swacompile.attention import Axes, Kind, Residual, ResidualKind
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import ONE, TRUE, ZERO, Expr, Op, Sort, and_, const_int, index, size, sub, substitute, walk
from swacompile.passes.arrays import PREFIX
from swacompile.passes.probe_band import FAR, Probe, claim_of, distances_of
from swacompile.passes.residuals import factor_out, run_time_data
from swacompile.passes.smt import Undecided, Untranslatable, always_equal
from swacompile.passes.verdict import Verdict


def moved_band(visible: Expr, axes: Axes) -> Verdict | None:
    """The proof that a mask is a window around a position of the model's data, None where it is not."""
    positions = _positions(visible, axes)
    if len(positions) != 1:
        return None
    (position,) = positions
    stand_in = size("position of the first query")
    residuals, rest = factor_out(substitute(visible, {position: stand_in}), axes)
    if run_time_data(rest):
        return None
    band = _candidate(rest, stand_in, axes)
    if band is None:
        return None
    back = {stand_in: position}
    residuals = tuple(
        replace(r, condition=substitute(r.condition, back), data=substitute(r.data, back)) for r in residuals
    )
    try:
        witness = always_equal(
            visible, and_(claim_of(band, axes, position), *(residual.condition for residual in residuals)), axes
        )
    except (Undecided, Untranslatable):
        return None
    if witness is not None or any(residual.kind is ResidualKind.SEGMENTS for residual in residuals):
        return None
    offset = Residual(kind=ResidualKind.OFFSET, condition=TRUE, data=position)
    fixed = [(name, const_int(extent)) for name, extent in (("queries", axes.queries), ("keys", axes.keys))]
    valid_for = tuple(f"{name} == {value}" for name, value in fixed if value is not None)
    return Verdict(mask=band, residuals=(offset, *residuals), method="smt", valid_for=valid_for, kind=Kind.SLIDING)


def at_every_position(visible: Expr, axes: Axes) -> tuple[Expr, Axes] | None:
    """The mask of one query at a position of the model's data, as that of a query at each place among the keys. None for other masks."""
    positions = _positions(visible, axes)
    if axes.queries != ONE or len(positions) != 1:
        return None
    query = index(axes.query.name, axes.keys)
    return substitute(visible, {positions[0]: query}), replace(axes, query=query)


def _positions(visible: Expr, axes: Axes) -> list[Expr]:
    """Single integers of run-time data in the mask."""
    indices = {axes.batch, axes.head, axes.query, axes.key}
    data = (
        node
        for node in walk(visible)
        if node.op is Op.APPLY and node.sort is Sort.INT and not node.name.startswith(PREFIX)
    )
    return [node for node in data if not indices & set(walk(node))]


def _candidate(rest: Expr, position: Expr, axes: Axes) -> BandMask | None:
    """The window that single cells speak for: to the left seen from the last place among the keys, to the right from the first.

    A mask without a left bound is no window; read as padding it needs no offset.
    """
    distances = distances_of(rest)
    last = substitute(rest, {position: sub(axes.keys, axes.queries)})
    first = substitute(rest, {position: ZERO})
    left = Probe(mask=last, axes=axes, alignment=Alignment.BOTTOM_RIGHT).reach(distances, sign=-1)
    right = Probe(mask=first, axes=axes).reach(distances, sign=1)
    if left is None or right is None or left >= FAR or left < 0 or right < 0:
        return None
    return BandMask(left=left, right=None if right >= FAR else right)
