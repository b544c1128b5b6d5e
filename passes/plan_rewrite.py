"""Decide, for each proven attention, what replaces it and with which operands.

A Replacement is a BandedAttention in terms of the source model's values; a frontend turns it into nodes. What the operator cannot
express is refused here, with its reason, and stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swacompile.attention import Attention, BandProof, Finding, Kind, Refutation, Residual, ResidualKind
from swacompile.index_expr import and_
from swacompile.passes import operands
from swacompile.passes.guards import Guards
from swacompile.passes.operands import Bias, Position, RunTimeOperand, Slopes
from swacompile.passes.read_masks import Reading

NO_BOUND = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operand:
    """How a residual becomes an operand: the field of a Replacement, what finds the model's value, and the refusal where there is none."""

    field: str
    find: Callable[[Reading, Attention, Residual], object | None]
    code: str
    words: str


_NO_VALUE = "the mask's factor {condition} is no value of shape (batch, keys) in the model"
_OPERANDS: Mapping[ResidualKind, _Operand] = {
    ResidualKind.KEY_PADDING: _Operand(field="key_padding", find=operands.per_key, code="residual", words=_NO_VALUE),
    ResidualKind.SEGMENTS: _Operand(field="segments", find=operands.per_key, code="residual", words=_NO_VALUE),
    ResidualKind.BIAS: _Operand(
        field="bias", find=operands.bias, code="bias",
        words="what is added to the scores beside the band {band} is no single {dtype} value in the model: {data}",
    ),
    ResidualKind.ALIBI: _Operand(
        field="alibi_slopes", find=operands.slopes, code="alibi",
        words="a slope a head times the distance (ALiBi) is added to the scores beside the band {band}, and the slopes are no value of "
        "{heads} elements in the model: {data}",
    ),
    ResidualKind.OFFSET: _Operand(
        field="offset", find=operands.position, code="offset",
        words="the band {band} counts from a position known only at run time, which is no element of a value of the model: {data}",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One attention to replace. Window sizes are inclusive, -1 = unbounded.

    `guards` are what guard_rewrite adds.
    """

    site: Attention
    proof: BandProof
    left_window_size: int
    right_window_size: int
    key_padding: RunTimeOperand | None = None
    segments: RunTimeOperand | None = None
    bias: Bias | None = None
    alibi_slopes: Slopes | None = None
    offset: Position | None = None
    guards: Guards = field(default_factory=Guards)


def plan_rewrite(
    reading: Reading,
    findings: tuple[Finding, ...],
    *,
    full: bool,
    dtypes: tuple[str, ...] = ("float32", "float16"),
) -> tuple[Replacement | Refutation, ...]:
    """What to do with each finding, in order. Full attention is replaced only where `full`: a band saves nothing there.

    `dtypes` are the data types that the operator has in the model's runtime.
    """
    return tuple(_plan(reading, finding, full, dtypes) for finding in findings)


def _plan(reading: Reading, finding: Finding, full: bool, dtypes: tuple[str, ...]) -> Replacement | Refutation:
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
    found: dict[str, Any] = {}
    for residual in _one_padding(proof.residuals):
        wanted = _OPERANDS[residual.kind]
        operand = None if wanted.field in found else wanted.find(reading, site, residual)
        if operand is None:
            words = wanted.words.format(
                condition=residual.condition, data=residual.data, band=mask, dtype=site.dtype, heads=site.heads
            )
            return _refused(site, proof, wanted.code, words)
        found[wanted.field] = operand
    return Replacement(
        site=site, proof=proof, left_window_size=NO_BOUND if mask.left is None else mask.left,
        right_window_size=NO_BOUND if mask.right is None else mask.right, **found,
    )  # fmt: skip


def _one_padding(residuals: tuple[Residual, ...]) -> tuple[Residual, ...]:
    """The residuals with all conditions on (batch, key) as one: the operator takes one."""
    paddings = [residual for residual in residuals if residual.kind is ResidualKind.KEY_PADDING]
    if len(paddings) < 2:
        return residuals
    together = and_(*(residual.condition for residual in paddings))
    others = (residual for residual in residuals if residual.kind is not ResidualKind.KEY_PADDING)
    return (Residual(kind=ResidualKind.KEY_PADDING, condition=together, data=together), *others)


def _refused(site: Attention, proof: BandProof, code: str, reason: str) -> Refutation:
    return Refutation(code=code, reason=reason, node=site.node, kind=proof.kind, band=proof.mask)
