"""Prove that a mask is a band, or say why it is not.

1. Factors that depend on run-time data are taken out: a condition on (batch, key) is key padding.
2. Candidate bounds come from probing the rest at single cells far from the edges, at the constants that occur in it.
3. The claim `mask <=> band and factors` is put to the solver for all sizes at once. No counterexample: proven. A counterexample is the
   witness. A mask that is a constant array without a pattern is compared cell by cell instead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from swacompile.attention import Attention, Axes, BandProof, Kind, Refutation, Residual, ResidualKind, Witness
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import FALSE, ONE, TRUE, Expr, Op, Sort, add, and_, const_int, eq, integer, le, neg, not_, sub, substitute, walk
from swacompile.passes.arrays import ArrayReader, PREFIX, band_of
from swacompile.passes.evaluate import NotEvaluable, Number, evaluate
from swacompile.passes.smt import Undecided, Untranslatable, always_equal

FAR = 1 << 40  # A length beyond every window, for probing.
MAX_GRID = 1 << 26  # Cells of a constant mask that are compared one by one.


@dataclass(slots=True, kw_only=True)
class Prover:
    """Proves masks of one model; a mask that several attentions share is proven once."""

    arrays: ArrayReader = field(default_factory=ArrayReader)
    _known: dict[tuple[Expr, Expr, Expr, Expr], "_Verdict"] = field(default_factory=dict)

    def prove(self, site: Attention) -> BandProof | Refutation:
        """A proof that holds for every size named in its `valid_for`, or the reason why there is none."""
        if site.zeroed != FALSE:
            return Refutation(code="zeroed", node=site.node, kind=Kind.ZEROED,
                              reason="scores outside the mask are multiplied by zero, not hidden: their weight is exp(0)")  # fmt: skip
        key = (site.visible, site.axes.queries, site.axes.keys, site.axes.batch)
        if key not in self._known:
            self._known[key] = self._verdict(site)
        verdict = self._known[key]
        if verdict.mask is None:
            return Refutation(code=verdict.code, reason=verdict.reason, node=site.node, kind=verdict.kind, witness=verdict.witness)
        return BandProof(
            mask=verdict.mask, residuals=verdict.residuals, method=verdict.method,
            kind=Kind.FULL if verdict.mask.is_full else Kind.SLIDING, valid_for=(*verdict.valid_for, *site.assumptions),
        )  # fmt: skip

    def _verdict(self, site: Attention) -> "_Verdict":
        residuals, rest = _factor_out(site.visible, site.axes)
        data = _data(rest)
        if any(name.startswith(PREFIX) for name in data):
            return self._compare_cells(site, residuals, rest)
        if data:
            return _Verdict(code="data-dependent", reason=f"the mask depends on run-time data that is not key padding: {', '.join(sorted(data))}")
        band = _candidate(rest, site.axes)
        claim = TRUE if band is None else _claim(band, site.axes)
        factors = and_(*(residual.condition for residual in residuals))
        try:
            witness = always_equal(site.visible, and_(claim, factors), site.axes)
        except (Undecided, Untranslatable) as error:
            return _Verdict(code="undecided", reason=f"the solver could not decide the mask: {error}")
        if witness is None and band is not None:
            return _Verdict(mask=band, residuals=residuals, method="smt", valid_for=_valid_for(site.axes))
        nearest = "no band fits" if band is None else f"the nearest band is {band}"
        return _Verdict(code="not-a-band", reason=f"the mask is not a band: {nearest}", witness=witness)

    def _compare_cells(self, site: Attention, residuals: tuple[Residual, ...], rest: Expr) -> "_Verdict":
        extents = [const_int(axis.args[0]) for axis in (site.axes.batch, site.axes.head, site.axes.query, site.axes.key)]
        if any(extent is None for extent in extents):
            return _Verdict(code="unknown-array", reason="the mask is a constant array without a pattern, of sizes known only at run time")
        shape = [extent for extent in extents if extent is not None]
        if int(np.prod(shape)) > MAX_GRID:
            return _Verdict(code="large-array", reason=f"the mask is a constant array of {shape} cells without a pattern")
        try:
            shown = self._grid(rest, site.axes, shape)
        except NotEvaluable as error:
            return _Verdict(code="unknown-array", reason=f"the mask's array cannot be evaluated: {error}")
        return _band_of_cells(shown, residuals)

    def _grid(self, rest: Expr, axes: Axes, shape: list[int]) -> np.ndarray:
        positions = [np.arange(extent).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, extent in enumerate(shape)]
        values: dict[Expr, Number] = dict(zip((axes.batch, axes.head, axes.query, axes.key), positions, strict=True))

        def lookup(node: Expr, args: list[Number]) -> Number:
            array = self.arrays.lookup(node.name)
            if array is None:
                raise NotEvaluable(str(node))
            return np.asarray(array[tuple(args)])

        return np.broadcast_to(np.asarray(evaluate(rest, values, lookup)), shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What was found of a mask, without the site: a mask, or a code and a reason."""

    mask: BandMask | None = None
    residuals: tuple[Residual, ...] = ()
    method: str = ""
    valid_for: tuple[str, ...] = ()
    code: str = ""
    reason: str = ""
    kind: Kind = Kind.UNKNOWN
    witness: Witness | None = None


# ---------------------------------------------------------------------------------------------- 1. run-time factors


def _factor_out(visible: Expr, axes: Axes) -> tuple[tuple[Residual, ...], Expr]:
    """(factors on run-time data, the mask where they all hold). Each factor hides for certain where it does not hold."""
    residuals: list[Residual] = []
    rest = visible
    for literal in _literals(visible):
        for factor, hides in ((literal, FALSE), (not_(literal), TRUE)):
            residual = _residual(factor, axes)
            if residual and substitute(rest, {literal: hides}) == FALSE:
                residuals.append(residual)
                rest = substitute(rest, {literal: not_(hides)})
                break
    return tuple(residuals), rest


def _residual(factor: Expr, axes: Axes) -> Residual | None:
    """The factor as an operand: a condition on (batch, key), or one label for query and key."""
    nodes = set(walk(factor))
    if axes.key in nodes and axes.query not in nodes and axes.head not in nodes:
        return Residual(kind=ResidualKind.KEY_PADDING, condition=factor, data=factor)
    labels = [node for node in nodes if node.op is Op.APPLY and node.sort is Sort.INT and axes.key in node.args]
    for label in labels:
        other = substitute(label, {axes.key: axes.query})
        if axes.head not in nodes and factor == eq(label, other):
            return Residual(kind=ResidualKind.SEGMENTS, condition=factor, data=label)
    return None


def _literals(expr: Expr) -> Iterator[Expr]:
    """Comparisons and conditions that read run-time data, in a stable order."""
    found = {node for node in walk(expr) if node.op in (Op.LE0, Op.EQ0) or (node.op is Op.APPLY and node.sort is Sort.BOOL)}
    yield from sorted((node for node in found if _data(node)), key=lambda node: node.digest)


def _data(expr: Expr) -> set[str]:
    return {node.name for node in walk(expr) if node.op is Op.APPLY}


# ------------------------------------------------------------------------------------------------- 2. the candidate


def _candidate(rest: Expr, axes: Axes) -> BandMask | None:
    """The band that single cells speak for, None if they speak for none."""
    constants = _constants(rest)
    alone = axes.queries == ONE and axes.keys != ONE
    for alignment in (Alignment.BOTTOM_RIGHT,) if alone else (Alignment.TOP_LEFT, Alignment.BOTTOM_RIGHT):
        probe = _Probe(rest, axes, alignment)
        left = probe.reach(constants, sign=-1)
        right = probe.reach(constants, sign=1)
        if left is not None and right is not None:
            right = 0 if alone and right == FAR else right  # no key lies to the right of the last query: causal says it best
            return BandMask(left=None if left == FAR else left, right=None if right == FAR else right, alignment=alignment)
        if sub(axes.queries, axes.keys) == integer(0):
            break
    return None


def _constants(expr: Expr) -> list[int]:
    """Distances worth probing: constants of the formula and their neighbours, both signs."""
    found = {0}
    for node in walk(expr):
        if node.op is Op.SUM:
            found.add(abs(node.value[0]))  # type: ignore[index]
        elif (value := const_int(node)) is not None:
            found.add(abs(value))
    near = {base + step for base in found for step in (-2, -1, 0, 1, 2)}
    return sorted(near | {-value for value in near})


class _Probe:
    """Looks at single cells of a mask without run-time data, at lengths far beyond the constants in it."""

    def __init__(self, mask: Expr, axes: Axes, alignment: Alignment) -> None:
        self.mask, self.axes = mask, axes
        sizes = {node for extent in (axes.queries, axes.keys, mask) for node in walk(extent) if node.op is Op.SYMBOL and not node.args}
        self.sizes: dict[Expr, Number] = dict.fromkeys(sizes, FAR)
        self.queries = int(evaluate(axes.queries, self.sizes))
        self.keys = int(evaluate(axes.keys, self.sizes))
        self.offset = self.keys - self.queries if alignment is Alignment.BOTTOM_RIGHT else 0

    def shows(self, q_idx: int, distance: int) -> bool | None:
        """Whether query sees the key at this distance, None outside the mask."""
        kv_idx = q_idx + self.offset + distance
        if not (0 <= q_idx < self.queries and 0 <= kv_idx < self.keys):
            return None
        values = self.sizes | {self.axes.query: q_idx, self.axes.key: kv_idx, self.axes.batch: 0, self.axes.head: 0}
        try:
            return bool(evaluate(self.mask, values))
        except NotEvaluable:
            return None

    def reach(self, constants: Iterable[int], sign: int) -> int | None:
        """The band's bound to the left (sign -1) or right (+1): FAR if the mask shows all to its edge, None if no bound fits."""
        q_idx = self.queries - 1 if sign < 0 else 0
        bounds = [
            bound for bound in constants if self.shows(q_idx, sign * bound) and self.shows(q_idx, sign * (bound + 1)) is False
        ]
        if bounds:
            return max(bounds)
        edge = q_idx + self.offset if sign < 0 else self.keys - 1 - self.offset
        return FAR if self.shows(q_idx, sign * edge) else None


# ----------------------------------------------------------------------------------------------------- 3. the claim


def _claim(band: BandMask, axes: Axes) -> Expr:
    """The band as a condition on the axes."""
    offset = sub(axes.keys, axes.queries) if band.alignment is Alignment.BOTTOM_RIGHT else integer(0)
    distance = sub(axes.key, add(axes.query, offset))
    left = TRUE if band.left is None else le(neg(integer(band.left)), distance)
    right = TRUE if band.right is None else le(distance, integer(band.right))
    return and_(left, right)


def _valid_for(axes: Axes) -> tuple[str, ...]:
    """Sizes that the model itself fixes; none where the proof holds for all."""
    fixed = [(name, const_int(extent)) for name, extent in (("queries", axes.queries), ("keys", axes.keys))]
    return tuple(f"{name} == {value}" for name, value in fixed if value is not None)


def _band_of_cells(shown: np.ndarray, residuals: tuple[Residual, ...]) -> _Verdict:
    batches, heads, queries, keys = shown.shape
    for batch, head in product(range(batches), range(heads)):
        if not np.array_equal(shown[batch, head], shown[0, 0]):
            query, key = (int(i[0]) for i in np.nonzero(shown[batch, head] != shown[0, 0]))
            witness = Witness(batch=batch, head=head, query=query, key=key, sizes=(), mask_shows=bool(shown[batch, head, query, key]))
            return _Verdict(code="differs", reason="the mask differs between batches or heads", witness=witness)
    sides = band_of(shown[0, 0])
    if sides is None:
        return _Verdict(code="not-a-band", reason="the constant mask is not a band", witness=_odd_cell(shown[0, 0]))
    mask = BandMask(left=sides[0], right=sides[1])
    return _Verdict(mask=mask, residuals=residuals, method="enumeration", valid_for=(f"queries == {queries}", f"keys == {keys}"))


def _odd_cell(shown: np.ndarray) -> Witness | None:
    """A cell in which the mask differs from the widest band that its outermost visible cells span."""
    distance = np.arange(shown.shape[1])[None, :] - np.arange(shown.shape[0])[:, None]
    seen = distance[shown]
    if not seen.size:
        return None
    differs = np.argwhere(shown != ((distance >= seen.min()) & (distance <= seen.max())))
    query, key = (int(i) for i in differs[0])
    return Witness(batch=0, head=0, query=query, key=key, sizes=(), mask_shows=bool(shown[query, key]))
