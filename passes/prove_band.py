"""Prove that a mask is a band, or say what it is instead.

1. Factors that depend on run-time data are taken out (residuals.py): key padding, segments.
2. Candidate bands come from probing the rest at single cells (probe_band.py).
3. The claim `mask <=> band and factors` is put to the solver for all sizes at once. No counterexample: proven. Where it holds only with at
   least as many keys as queries, or only up to a size at which arithmetic overflows, the proof says so in `valid_for`.
4. Zeroed scores: the condition under which a score is kept is proven like a band; and together with the zeroed ones, that all count.
5. Otherwise the mask may be of another kind (classify_mask.py): each guess is proven, too, before it is named. A counterexample to the
   nearest band is the witness.
6. A mask that is a constant array without a pattern is compared cell by cell instead (compare_cells.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from swacompile.attention import Attention, Axes, BandProof, Kind, Limits, Refutation, Residual, ResidualKind, Witness
from swacompile.band import BandMask
from swacompile.index_expr import (
    FALSE,
    MAX_SIZE,
    TRUE,
    Expr,
    Op,
    and_,
    const_int,
    ideal,
    integer,
    le,
    or_,
    sub,
    substitute,
    walk,
)
from swacompile.passes.alibi import slope_of
from swacompile.passes.arrays import PREFIX, ArrayReader
from swacompile.passes.binary_padding import binary_data, binary_padding
from swacompile.passes.classify_mask import Pattern, patterns
from swacompile.passes.compare_cells import NoGrid, cells_of, compare_cells
from swacompile.passes.moved_band import at_every_position, moved_band
from swacompile.passes.probe_band import candidate_bands, claim_of
from swacompile.passes.residuals import factor_out, run_time_data
from swacompile.passes.smt import Undecided, Untranslatable, always_equal, is_possible, uses_machine_numbers
from swacompile.passes.verdict import Verdict

# Sizes up to which a proof may be limited: no attention of more keys than that has been run densely.
LIMITS = (MAX_SIZE, 1 << 30, 1 << 24)


SMALL = (1 << 9, 1 << 12, 1 << 16)  # Sizes at which a witness is looked for first, so that people can look it up.
MAX_HEADS = 256  # Heads that are proven one by one where the mask depends on the head.


@dataclass(slots=True, kw_only=True)
class Prover:
    """Proves masks of one model; a mask that several attentions share is proven once."""

    arrays: ArrayReader = field(default_factory=ArrayReader)
    _known: dict[tuple[object, ...], Verdict] = field(default_factory=dict)

    def prove(self, site: Attention) -> BandProof | Refutation:
        """A proof that holds for every size named in its `valid_for`, or the reason why there is none."""
        axes = site.axes
        key = (
            site.visible,
            site.zeroed,
            site.bias,
            site.sinks is None,
            axes.batch,
            axes.head,
            axes.query,
            axes.key,
            axes.given,
        )
        if key not in self._known:
            self._known[key] = self._verdict(site)
        verdict = self._known[key]
        if verdict.mask is None or verdict.code:
            return Refutation(
                code=verdict.code,
                reason=verdict.reason,
                node=site.node,
                kind=verdict.kind,
                band=verdict.mask,
                witness=verdict.witness,
            )
        return BandProof(
            mask=verdict.mask, residuals=verdict.residuals, method=verdict.method, kind=verdict.kind,
            valid_for=(*verdict.valid_for, *verdict.limits.words, *site.assumptions), limits=verdict.limits,
        )  # fmt: skip

    def _verdict(self, site: Attention) -> Verdict:
        if not is_possible(site.axes.given):
            return Verdict(
                code="sizes", reason=f"the sizes of the model's axes contradict one another: {site.axes.given}"
            )
        added = () if site.bias is None else (_added(site.bias, site),)
        if site.zeroed != FALSE:
            return self._zeroed(site, added)
        if (moved := moved_band(site.visible, site.axes)) is not None:
            return _placed(moved, added, site.axes)
        if (other := _other_kind_at_a_position(site)) is not None:
            return other
        residuals, rest = factor_out(site.visible, site.axes)
        if self._reads_arrays(rest):
            return _placed(compare_cells(rest, site.axes, residuals, self.arrays), added, site.axes)
        return _prove_formula(site.visible, rest, residuals, added, site.axes)

    def _all_shown(self, mask: Expr, axes: Axes) -> bool:
        try:
            return bool(cells_of(mask, axes, self.arrays).all())
        except NoGrid:
            return False

    def _reads_arrays(self, mask: Expr) -> bool:
        return any(name.startswith(PREFIX) for name in run_time_data(mask))

    # 4. Zeroed scores
    def _zeroed(self, site: Attention, added: tuple[Residual, ...]) -> Verdict:
        counted, others = factor_out(or_(site.visible, site.zeroed), site.axes)
        if added or any(residual.kind is not ResidualKind.KEY_PADDING for residual in counted):
            return Verdict(code="zeroed", kind=Kind.ZEROED, reason="scores outside the mask are multiplied by zero, and there are other run-time "
                            "terms than key padding, which the operator cannot express beside it")  # fmt: skip
        _, rest = factor_out(site.visible, site.axes)
        if self._reads_arrays(rest) or self._reads_arrays(others):
            verdict = compare_cells(rest, site.axes, counted, self.arrays)
            counts = self._all_shown(others, site.axes)
        else:
            verdict = _prove_formula(site.visible, rest, counted, (), site.axes)
            counts = _always(
                or_(site.visible, site.zeroed), and_(*(residual.condition for residual in counted)), site.axes
            )
        if verdict.code:
            return Verdict(code=verdict.code, kind=Kind.ZEROED, mask=verdict.mask, witness=verdict.witness,
                            reason=f"scores are multiplied by zero where they are masked, and {verdict.reason}")  # fmt: skip
        if not counts:
            return Verdict(code="zeroed", kind=Kind.ZEROED, mask=verdict.mask, reason=f"scores outside the band {verdict.mask} are multiplied "
                            "by zero, and others are hidden for their position: the operator can do only one of the two")  # fmt: skip
        return Verdict(
            mask=verdict.mask, residuals=counted, method=verdict.method, valid_for=verdict.valid_for, limits=verdict.limits,
            kind=Kind.ZEROED,
        )  # fmt: skip


def _added(bias: Expr, site: Attention) -> Residual:
    """The additive term by its name: padding of numbers that are 0 and 1, a slope a head times the distance, or any bias.

    Beside a sink a number that is the same for the whole row is no matter of indifference, and what slopes leave open is.
    """
    if (padding := binary_padding(bias, site)) is not None:
        return padding
    slope = slope_of(bias, site.visible, site.axes) if site.sinks is None else None
    return Residual(
        kind=ResidualKind.BIAS if slope is None else ResidualKind.ALIBI,
        condition=TRUE,
        data=bias if slope is None else slope,
    )


def _other_kind_at_a_position(site: Attention) -> Verdict | None:
    """What a mask of one query at a run-time position is, where that is a known kind other than a band: it looks like padding then."""
    everywhere = at_every_position(site.visible, site.axes)
    if everywhere is None:
        return None
    mask, axes = everywhere
    residuals, rest = factor_out(mask, axes)
    verdict = _prove_formula(mask, rest, residuals, (), axes)
    return verdict if verdict.code and verdict.kind is not Kind.UNKNOWN else None


# ------------------------------------------------------------------------------------------------------- 3. the claim


def _prove_formula(
    visible: Expr, rest: Expr, residuals: tuple[Residual, ...], added: tuple[Residual, ...], axes: Axes
) -> Verdict:
    """The verdict on `visible`, which is `rest` and the residuals; `added` are terms that come to visible scores."""
    data = run_time_data(rest)
    bands = [] if data else [_with_labels(band, residuals) for band in candidate_bands(rest, axes)]
    factors = and_(*(residual.condition for residual in residuals))
    try:
        for band in bands or [BandMask(left=None, right=None)]:  # a bound may lie beyond all lengths
            held = _holds(visible, and_(claim_of(band, axes), factors), axes)
            if held is not None:
                kind = Kind.FULL if band.is_full else Kind.SLIDING
                proven = Verdict(
                    mask=band, residuals=residuals, method="smt", valid_for=_fixed_sizes(axes), limits=held, kind=kind
                )
                return _placed(proven, added, axes)
        return _refuted(visible, rest, factors, data, bands, axes)
    except (Undecided, Untranslatable) as error:
        return Verdict(code="undecided", reason=f"the solver could not decide the mask: {error}")


def _with_labels(band: BandMask, residuals: tuple[Residual, ...]) -> BandMask:
    """An unwindowed band stands where the segments' labels say; a window's own place is for the proof to decide."""
    places = [residual.alignment for residual in residuals if residual.alignment is not None]
    unbounded = band.left is None and band.right is None
    return BandMask(left=None, right=None, alignment=places[0]) if places and unbounded else band


def _placed(verdict: Verdict, added: tuple[Residual, ...], axes: Axes) -> Verdict:
    """A proven verdict with the additive terms, refused where labels of queries are read at another place than the band stands."""
    band = verdict.mask
    if verdict.code or band is None:
        return verdict
    apart = [residual for residual in verdict.residuals if residual.alignment not in (None, band.alignment)]
    if apart and axes.queries != axes.keys:
        return Verdict(code="segments-place", mask=band, reason=f"the segments of queries are read at another place than the band {band} stands: "
                       f"{apart[0].condition}")  # fmt: skip
    assumed = tuple(binary_data(residual) for residual in added if residual.kind is ResidualKind.KEY_PADDING)
    limits = replace(verdict.limits, zero_or_one=assumed)
    return replace(verdict, residuals=(*verdict.residuals, *added), limits=limits)


def _holds(visible: Expr, claim: Expr, axes: Axes) -> Limits | None:
    """The limits under which visible <=> claim is proven, weakest first; None where there is none."""
    limits = _limits(visible)
    for largest in limits:
        if always_equal(visible, claim, axes, largest=largest) is None:
            return Limits(largest=None if largest == MAX_SIZE else largest)
    apart = const_int(sub(axes.keys, axes.queries)) is None
    if apart and None in limits and always_equal(visible, claim, axes, given=le(axes.queries, axes.keys)) is None:
        return Limits(needs_keys_for_queries=True)
    return None


def _limits(mask: Expr) -> tuple[int | None, ...]:
    """Sizes up to which a proof is tried: those at which positions keep all their digits."""
    exact = [int(str(node.value)) for node in walk(mask) if node.op is Op.ROUND]
    limits = tuple(limit for limit in LIMITS if limit <= min(exact, default=MAX_SIZE))
    return limits if uses_machine_numbers(mask) else (None,)


def _always(condition: Expr, claim: Expr, axes: Axes) -> bool:
    try:
        return _holds(condition, claim, axes) == Limits()
    except (Undecided, Untranslatable):
        return False


def _fixed_sizes(axes: Axes) -> tuple[str, ...]:
    """Sizes that the model itself fixes."""
    fixed = [(name, const_int(extent)) for name, extent in (("queries", axes.queries), ("keys", axes.keys))]
    return tuple(f"{name} == {value}" for name, value in fixed if value is not None)


# ------------------------------------------------------------------------------------------------- 5. other kinds


def _refuted(visible: Expr, rest: Expr, factors: Expr, data: set[str], bands: list[BandMask], axes: Axes) -> Verdict:
    for pattern in _proven_patterns(rest, axes):
        witness, differs = _witness(visible, and_(claim_of(pattern.band, axes), factors), axes)
        if differs:
            reason = f"expected a band, found {pattern.words}: the mask differs from the band {pattern.band}"
            return Verdict(
                code=pattern.kind.replace("_", "-"),
                kind=pattern.kind,
                mask=pattern.band,
                witness=witness,
                reason=reason,
            )
    if data:
        names = ", ".join(sorted(data))
        return Verdict(
            code="data-dependent",
            reason=f"the mask depends on run-time data that is neither key padding nor a segment: {names}",
        )
    if (apart := _bands_of_heads(rest, axes)) is not None:
        return apart
    if (overflow := _overflow(visible, factors, bands, axes)) is not None:
        return overflow
    nearest = "no band fits" if not bands else f"the nearest band is {bands[0].aligned_text}"
    claim = TRUE if not bands else claim_of(bands[0], axes)
    witness, _ = _witness(visible, and_(claim, factors), axes)
    return Verdict(code="not-a-band", reason=f"the mask is not a band: {nearest}", witness=witness)


def _proven_patterns(rest: Expr, axes: Axes) -> Iterator[Pattern]:
    for pattern in patterns(rest, axes):
        try:
            if _holds(rest, pattern.claim, axes) is not None:
                yield pattern
        except (Undecided, Untranslatable):
            continue


def _bands_of_heads(rest: Expr, axes: Axes) -> Verdict | None:
    """Whether the mask is a band for each head, but not one for all."""
    heads = const_int(axes.head.args[0])
    if axes.head not in walk(rest) or heads is None or heads > MAX_HEADS:
        return None
    found: dict[BandMask, int] = {}
    for head in range(heads):
        of_head = substitute(rest, {axes.head: integer(head)})
        bands = (
            band for band in candidate_bands(of_head, axes) if _holds(of_head, claim_of(band, axes), axes) is not None
        )
        band = next(bands, None)
        if band is None:
            return None
        found.setdefault(band, head)
    first, *_ = found
    listed = ", ".join(f"{band} from head {head}" for band, head in found.items())
    witness, _ = _witness(rest, claim_of(first, axes), axes)
    return Verdict(code="differs", mask=first, witness=witness,
                   reason=f"the band differs between heads, expected one for all: {listed}")  # fmt: skip


def _witness(visible: Expr, claim: Expr, axes: Axes) -> tuple[Witness | None, bool]:
    """(a cell where mask and claim differ, at sizes as small as can be found; whether they may differ at all)."""
    for largest in (*SMALL, LIMITS[-1] if uses_machine_numbers(visible) else None):
        try:
            witness = always_equal(visible, claim, axes, largest=largest)
        except Undecided:
            return None, True
        if witness is not None:
            return witness, True
    return None, False


def _overflow(visible: Expr, factors: Expr, bands: list[BandMask], axes: Axes) -> Verdict | None:
    """Whether the mask is a band but for overflow: the witness is a cell where arithmetic goes wrong."""
    if not uses_machine_numbers(visible):
        return None
    for band in bands:
        claim = and_(claim_of(band, axes), factors)
        if always_equal(ideal(visible), claim, axes) is None:
            reason = (f"the mask is the band {band} only while positions fit their data type: expected that for sizes up to {LIMITS[-1]}, "
                      "found arithmetic that overflows or loses digits below that")  # fmt: skip
            witness, _ = _witness(visible, claim, axes)
            return Verdict(code="overflow", mask=band, reason=reason, witness=witness)
    return None
