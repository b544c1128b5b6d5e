"""Decide, for each proven attention, what replaces it and with which operands.

A Replacement is a BandedAttention in terms of the source model's values; a frontend turns it into nodes. What the operator cannot
express is refused here, with its reason, and stays as it is.
"""

from dataclasses import dataclass, field, replace

from swacompile.attention import Attention, BandProof, Finding, Kind, Refutation, Residual, ResidualKind
from swacompile.passes import operands
from swacompile.passes.guards import Guards
from swacompile.passes.operands import Position, RunTimeOperand, Slopes
from swacompile.passes.read_masks import Reading

NO_BOUND = -1
PER_KEY = frozenset({ResidualKind.KEY_PADDING, ResidualKind.SEGMENTS})
_WORDS = {
    ResidualKind.KEY_PADDING: "the mask's factor {condition} is no value of shape (batch, keys) in the model",
    ResidualKind.SEGMENTS: "the mask's factor {condition} is no value of shape (batch, keys) in the model",
    ResidualKind.BIAS: "a run-time bias is added to the scores beside the band {band}: {data}",
    ResidualKind.ALIBI: "a slope a head times the distance (ALiBi) is added to the scores beside the band {band}: {data}",
    ResidualKind.OFFSET: "the band {band} counts from a position known only at run time: {data}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One attention to replace. Window sizes are inclusive, -1 = unbounded.

    `bias` names a value that broadcasts to (batch, heads, queries, keys), of the site's data type. `guards` are what guard_rewrite adds.
    """

    site: Attention
    proof: BandProof
    left_window_size: int
    right_window_size: int
    key_padding: RunTimeOperand | None = None
    segments: RunTimeOperand | None = None
    bias: str | None = None
    alibi_slopes: Slopes | None = None
    offset: Position | None = None
    guards: Guards = field(default_factory=Guards)


def plan_rewrite(
    reading: Reading,
    findings: tuple[Finding, ...],
    *,
    full: bool,
    dtypes: tuple[str, ...] = ("float32", "float16"),
    residuals: frozenset[ResidualKind] = PER_KEY,
) -> tuple[Replacement | Refutation, ...]:
    """What to do with each finding, in order. Full attention is replaced only where `full`: a band saves nothing there.

    `dtypes` are the data types that the operator has in the model's runtime, `residuals` the operands that the frontend writes.
    """
    return tuple(_plan(reading, finding, full, dtypes, residuals) for finding in findings)


def _plan(
    reading: Reading, finding: Finding, full: bool, dtypes: tuple[str, ...], residuals: frozenset[ResidualKind]
) -> Replacement | Refutation:
    site, proof = finding.attention, finding.verdict
    if isinstance(proof, Refutation):
        return proof
    assert site is not None
    if proof.kind is Kind.FULL and not full:
        return _refused(
            site,
            proof,
            "full",
            "full attention has no window: nothing to gain (use --global to replace it all the same)",
        )
    mask = proof.mask
    if any(bound is not None and bound < 0 for bound in (mask.left, mask.right)):
        return _refused(
            site,
            proof,
            "negative-bound",
            f"the band {mask} excludes the query's own position, which the operator cannot say",
        )
    if site.dtype not in dtypes:
        return _refused(site, proof, "dtype", f"expected {' or '.join(dtypes)} operands, found {site.dtype}")
    if reading.tensors[site.output].dtype != site.dtype:
        return _refused(
            site, proof, "dtype", f"the output is {reading.tensors[site.output].dtype}, its operands are {site.dtype}"
        )
    if site.head_size is None or site.value_head_size is None:
        return _refused(site, proof, "head-size", "the head size is known only at run time")
    if any(operand.flat for operand in (site.query, site.key, site.value)):
        return _refused(site, proof, "rank", "query, key and value are 3-D, expected an axis for the heads")
    plan = Replacement(
        site=site, proof=proof,
        left_window_size=NO_BOUND if mask.left is None else mask.left, right_window_size=NO_BOUND if mask.right is None else mask.right,
    )  # fmt: skip
    for residual in proof.residuals:
        grown = _with_operand(reading, plan, residual) if residual.kind in residuals else None
        if grown is None:
            words = _WORDS[residual.kind].format(condition=residual.condition, band=mask, data=residual.data)
            if residual.kind in PER_KEY:
                return _refused(site, proof, "residual", words)
            return _refused(site, proof, str(residual.kind), words)
        plan = grown
    return plan


def _with_operand(reading: Reading, plan: Replacement, residual: Residual) -> Replacement | None:
    """The plan with the residual's operand; None where the model holds no such value, or the plan has that operand already."""
    match residual.kind:
        case ResidualKind.KEY_PADDING if plan.key_padding is None:
            padding = operands.per_key(reading, plan.site, residual)
            return None if padding is None else replace(plan, key_padding=padding)
        case ResidualKind.SEGMENTS if plan.segments is None:
            segments = operands.per_key(reading, plan.site, residual)
            return None if segments is None else replace(plan, segments=segments)
        case ResidualKind.BIAS if plan.bias is None:
            bias = operands.bias(reading, plan.site, residual)
            return None if bias is None else replace(plan, bias=bias)
        case ResidualKind.ALIBI if plan.alibi_slopes is None:
            slopes = operands.slopes(reading, plan.site, residual)
            return None if slopes is None else replace(plan, alibi_slopes=slopes)
        case ResidualKind.OFFSET if plan.offset is None:
            offset = operands.position(residual)
            return None if offset is None else replace(plan, offset=offset)
    return None


def _refused(site: Attention, proof: BandProof, code: str, reason: str) -> Refutation:
    return Refutation(code=code, reason=reason, node=site.node, kind=proof.kind, band=proof.mask)
