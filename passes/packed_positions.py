"""Packed sequences: masks that compare positions which are a run-time input, within segments that are counted from the same positions.

An exporter writes labels C = cumsum(position[i] - position[i - 1] != 1) and shows key k to query q where C[q] == C[k] and the positions are
in a window. Where the labels of q and k are equal, every step between them is 1, so that position[k] - position[q] = k - q: the window is one
of the indices, and the labels are what remains at run time.
"""

from collections.abc import Iterator

from swacompile.attention import Axes, Residual, ResidualKind
from swacompile.band import Alignment
from swacompile.index_expr import (
    ONE,
    ZERO,
    Expr,
    NotInteger,
    Op,
    Sort,
    add,
    and_,
    eq,
    index,
    le,
    not_,
    or_,
    sub,
    substitute,
    to_integer,
    walk,
)
from swacompile.passes.index_tensor import Unreadable, substitute_sizes
from swacompile.passes.read_masks import Reading
from swacompile.passes.residuals import factor_out, offset_of
from swacompile.passes.rules.views import constants
from swacompile.passes.smt import is_valid


def with_indices_for_positions(visible: Expr, axes: Axes, reading: Reading, known: dict[Expr, Expr]) -> Expr:
    """The same mask, with indices in place of run-time positions where labels counted from them are equal."""
    if sum(1 for _ in run_time_integers(visible)) < 3:
        return visible
    residuals, _ = factor_out(visible, axes)
    for residual in residuals:
        if residual.kind is ResidualKind.SEGMENTS:
            visible = and_(residual.condition, _replaced(visible, residual, axes, reading, known))
    return visible


def run_time_integers(expr: Expr) -> Iterator[Expr]:
    return (node for node in walk(expr) if node.op is Op.APPLY and node.sort is Sort.INT)


def _replaced(visible: Expr, segments: Residual, axes: Axes, reading: Reading, known: dict[Expr, Expr]) -> Expr:
    place = add(axes.query, offset_of(segments.alignment or Alignment.TOP_LEFT, axes))
    for of_key in list(run_time_integers(visible)):
        if of_key.args.count(axes.key) != 1 or of_key.name == segments.data.name:
            continue
        of_query = substitute(of_key, {axes.key: place})
        if of_query in walk(visible) and _counts_steps(segments.data, of_key, axes, reading, known):
            same_segment = substitute(visible, {segments.condition: eq(ZERO, ZERO)})
            visible = substitute(same_segment, {of_query: add(of_key, sub(place, axes.key))})
    return visible


def _counts_steps(label: Expr, position: Expr, axes: Axes, reading: Reading, known: dict[Expr, Expr]) -> bool:
    """Whether the label is a running sum that stays the same only from one position to the next."""
    node = reading.graph.producers.get(label.name)
    if node is None or node.op != "cumsum" or node.attrs.get("reverse") or node.attrs.get("exclusive"):
        return False
    ops = reading.operands(node)
    try:
        (axis,) = constants(ops.tensor(1))
        summand = to_integer(substitute_sizes(reading.sizes.resolve(ops.tensor(0).at(*label.args)), known))
        return label.args[axis] == axes.key and _steps_are_one(summand, position, axes)
    except (Unreadable, NotInteger):
        return False


def _steps_are_one(summand: Expr, position: Expr, axes: Axes) -> bool:
    """Whether a summand is never negative, and 0 only (after the first) where the position is one more than the one before."""
    here = index("i", axes.keys)
    summand = substitute(summand, {axes.key: here})
    now, before = (substitute(position, {axes.key: at}) for at in (here, sub(here, ONE)))
    one_step = or_(not_(eq(summand, ZERO)), eq(sub(now, before), ONE), le(here, ZERO))
    return is_valid(le(ZERO, summand)) and is_valid(one_step)
