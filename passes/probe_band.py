"""Guess the band of a mask from single cells: cheap, and only a candidate for the proof."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from swacompile.attention import Axes
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import ONE, TRUE, Expr, Op, Sort, add, and_, const_int, ideal, integer, le, neg, sub, walk
from swacompile.passes.evaluate import NotEvaluable, Number, evaluate
from swacompile.passes.residuals import offset_of

FAR = 1 << 48  # A length beyond every window.


def claim_of(band: BandMask, axes: Axes, offset: Expr | None = None) -> Expr:
    """The band as a condition on the axes; `offset` is the place of query 0 among the keys, the alignment's where it is not given."""
    distance = sub(axes.key, add(axes.query, offset_of(band.alignment, axes) if offset is None else offset))
    left = TRUE if band.left is None else le(neg(integer(band.left)), distance)
    right = TRUE if band.right is None else le(distance, integer(band.right))
    return and_(left, right)


def candidate_bands(mask: Expr, axes: Axes) -> Iterator[BandMask]:
    """The bands that single cells speak for, likelier ones first."""
    distances = distances_of(mask)
    alone = axes.queries == ONE and axes.keys != ONE
    for alignment in (Alignment.BOTTOM_RIGHT, Alignment.TOP_LEFT) if alone else tuple(Alignment):
        probe = Probe(mask=mask, axes=axes, alignment=alignment)
        left, right = probe.reach(distances, sign=-1), probe.reach(distances, sign=1)
        if left is not None and right is not None and left + right >= 0:
            at_last = alone and alignment is Alignment.BOTTOM_RIGHT and left >= 0
            right = (
                0 if at_last and right >= FAR else right
            )  # no key lies to the right of the last query: causal says it best
            yield BandMask(left=_bound(left), right=_bound(right), alignment=alignment)
        if sub(axes.queries, axes.keys) == integer(0):
            return


def _bound(reach: int) -> int | None:
    return None if reach >= FAR else reach


def distances_of(expr: Expr) -> list[int]:
    """Distances worth probing: constants of the formula and their neighbours, both signs."""
    found = {0}
    for node in walk(expr):
        if node.op is Op.SUM:
            found.add(abs(node.value[0]))  # type: ignore[index]
        elif (value := const_int(node)) is not None:
            found.add(abs(value))
    found |= {base // 2 for base in found}
    near = {base + step for base in found for step in (-2, -1, 0, 1, 2)}
    return sorted(near | {-value for value in near})


@dataclass(slots=True, kw_only=True)
class Probe:
    """Looks at single cells of a mask at lengths far beyond the constants in it.

    Run-time data counts as 0 and false, and arithmetic does not overflow.
    """

    mask: Expr
    axes: Axes
    alignment: Alignment = Alignment.TOP_LEFT
    sizes: dict[Expr, Number] = field(init=False)
    queries: int = field(init=False)
    keys: int = field(init=False)
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        self.mask = ideal(self.mask)
        extents = (self.axes.queries, self.axes.keys, self.mask)
        sizes = {node for extent in extents for node in walk(extent) if node.op is Op.SYMBOL and not node.args}
        self.sizes = dict.fromkeys(sizes, FAR)
        self.queries = int(evaluate(self.axes.queries, self.sizes))
        self.keys = int(evaluate(self.axes.keys, self.sizes))
        self.offset = self.keys - self.queries if self.alignment is Alignment.BOTTOM_RIGHT else 0

    def value(self, expr: Expr, q_idx: int = 0, kv_idx: int = 0) -> Number | None:
        """A formula's value at a cell of batch 0 and head 0, None where it has none."""
        place = {self.axes.query: q_idx, self.axes.key: kv_idx, self.axes.batch: 0, self.axes.head: 0}
        try:
            return evaluate(expr, self.sizes | place, lambda node, _: False if node.sort is Sort.BOOL else 0)
        except (NotEvaluable, ZeroDivisionError):
            return None

    def shows(self, q_idx: int, distance: int) -> bool | None:
        """Whether the query sees the key at this distance, None outside the mask."""
        kv_idx = q_idx + self.offset + distance
        if not (0 <= q_idx < self.queries and 0 <= kv_idx < self.keys):
            return None
        shown = self.value(self.mask, q_idx, kv_idx)
        return None if shown is None else bool(shown)

    def reach(self, distances: list[int], sign: int) -> int | None:
        """The band's bound to the left (sign -1) or right (+1): FAR if the mask shows all to its edge, None if nothing is seen."""
        first, last = (self.queries - 1, 0) if sign < 0 else (0, self.queries - 1)
        for q_idx in (first, self.queries // 2, last):
            place = q_idx + self.offset
            edge = place if sign < 0 else self.keys - 1 - place
            seen = [distance for distance in distances if self.shows(q_idx, sign * distance)]
            if self.shows(q_idx, sign * edge):
                return FAR
            if seen:
                return self.last_shown(q_idx, sign, max(seen), edge)
        return None

    def last_shown(self, q_idx: int, sign: int, shown: int, hidden: int, step: int = 1) -> int:
        """A distance that is shown while the next one is not, between one that is and one that is not."""
        while hidden - shown > 1:
            middle = (shown + hidden) // 2
            if self.shows(q_idx, sign * step * middle):
                shown = middle
            else:
                hidden = middle
        return shown
