"""Decide, for each proven attention, what replaces it and with which operands.

A Replacement is a BandedAttention in terms of the source model's values; a frontend turns it into nodes. What the operator cannot
express is refused here, with its reason, and stays as it is.
"""

from dataclasses import dataclass

from swacompile.attention import Attention, BandProof, Finding, Kind, Refutation, Residual, ResidualKind
from swacompile.index_expr import ONE, ZERO, Expr, Op, Sort, eq, not_
from swacompile.passes.index_tensor import broadcast_index, sort_of
from swacompile.passes.read_masks import Reading

NO_BOUND = -1
_ADDED = {ResidualKind.BIAS: "a run-time bias", ResidualKind.ALIBI: "a slope a head times the distance (ALiBi)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeOperand:
    """A (batch, keys) value of the source model; `nonzero` where its elements are numbers and the operand is whether they are not 0."""

    value: str
    nonzero: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One attention to replace. Window sizes are inclusive, -1 = unbounded."""

    site: Attention
    proof: BandProof
    left_window_size: int
    right_window_size: int
    key_padding: RunTimeOperand | None
    segments: RunTimeOperand | None


def plan_rewrite(
    reading: Reading, findings: tuple[Finding, ...], *, full: bool, dtypes: tuple[str, ...] = ("float32", "float16")
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
    if "keys >= queries" in proof.valid_for:
        return _refused(
            site,
            proof,
            "guarded",
            "the proof holds only where there are at least as many keys as queries, which a rewrite cannot check",
        )
    operands: dict[ResidualKind, RunTimeOperand] = {}
    for residual in proof.residuals:
        if residual.kind in (ResidualKind.BIAS, ResidualKind.ALIBI):
            return _refused(
                site,
                proof,
                str(residual.kind),
                f"{_ADDED[residual.kind]} is added to the scores beside the band {mask}: {residual.data}",
            )
        if residual.kind is ResidualKind.OFFSET:
            return _refused(
                site, proof, "offset", f"the band {mask} counts from a position known only at run time: {residual.data}"
            )
        operand = _operand(reading, site, residual)
        if operand is None or residual.kind in operands:
            return _refused(
                site,
                proof,
                "residual",
                f"the mask's factor {residual.condition} is no value of shape (batch, keys) in the model",
            )
        operands[residual.kind] = operand
    return Replacement(
        site=site, proof=proof,
        left_window_size=NO_BOUND if mask.left is None else mask.left, right_window_size=NO_BOUND if mask.right is None else mask.right,
        key_padding=operands.get(ResidualKind.KEY_PADDING), segments=operands.get(ResidualKind.SEGMENTS),
    )  # fmt: skip


def _refused(site: Attention, proof: BandProof, code: str, reason: str) -> Refutation:
    return Refutation(code=code, reason=reason, node=site.node, kind=proof.kind, band=proof.mask)


def _operand(reading: Reading, site: Attention, residual: Residual) -> RunTimeOperand | None:
    """The model's value whose element at (batch, key) is the residual's."""
    place = (site.axes.batch, site.axes.key)
    data = residual.data
    wanted = Sort.BOOL if residual.kind is ResidualKind.KEY_PADDING else Sort.INT
    for name, tensor in reading.tensors.items():
        if tensor.rank != 2 or sort_of(tensor.dtype) is not wanted or not _fits(reading, name, site):
            continue
        here = broadcast_index(place, reading.extents(name) or tensor.shape)
        if reading.sizes.resolve(tensor.at(*here)) == data:
            return RunTimeOperand(value=name)
    source = _nonzero_of(data)
    if source is not None and _fits(reading, source.name, site):
        if source.args != broadcast_index(place, reading.extents(source.name) or ()):
            return None
        return RunTimeOperand(value=source.name, nonzero=True)
    return None


def _fits(reading: Reading, name: str, site: Attention) -> bool:
    """Whether a value has the extents (batch, keys), as far as the model says: an extent of its own counts as fitting."""
    extents = reading.extents(name)
    if extents is None or len(extents) != 2:
        return False
    return all(
        found != ONE or wanted == ONE
        for found, wanted in zip(extents, (site.axes.batch.args[0], site.axes.keys), strict=True)
    )


def _nonzero_of(data: Expr) -> Expr | None:
    """x where the data is the condition x != 0 on one element of run-time data."""
    for node in data.args:
        element = node.args[0] if node.op is Op.EQ0 else None
        for candidate in (element, *(element.args if element is not None else ())):
            if candidate is not None and candidate.op is Op.APPLY and data == not_(eq(candidate, ZERO)):
                return candidate
    return None
