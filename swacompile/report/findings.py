"""What `inspect` and `rewrite` say of a model: a versioned JSON document for scripts, a table for people."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from swacompile.attention import Attention, BandProof, Finding, Kind, Refutation, Witness
from swacompile.band import Alignment, BandMask, spellings
from swacompile.passes.plan_rewrite import Replacement

FORMAT_VERSION = 1
REASONS_PAGE = "docs/reasons.md"
COLUMNS = ("#", "node", "heads", "size", "scale", "mask", "kind", "band", "proof")


def as_json(model: str, findings: Sequence[Finding]) -> dict[str, object]:
    """The document described in docs/inspect_format.md."""
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "attentions": [_attention(finding) for finding in findings],
    }


def _attention(finding: Finding) -> dict[str, object]:
    site, verdict = finding.attention, finding.verdict
    proven = isinstance(verdict, BandProof)
    band = verdict.mask if isinstance(verdict, BandProof) else verdict.band
    return {
        "node": finding.node,
        "kind": str(verdict.kind),
        "left": band.left if band else None,
        "right": band.right if band else None,
        "alignment": str(band.alignment) if band else None,
        "heads": site.heads if site else None,
        "kv_heads": site.kv_heads if site else None,
        "head_size": site.head_size if site else None,
        "scale": site.scale if site else None,
        "softcap": site.softcap if site else None,
        "sinks": bool(site and site.sinks is not None),
        "mask_form": site.mask_form if site else None,
        "masked_rows": str(site.masked_rows) if site else None,
        "residuals": [str(residual.kind) for residual in verdict.residuals] if isinstance(verdict, BandProof) else [],
        "dialects": spellings(band) if band and proven else None,
        "proof": {"method": verdict.method, "valid_for": list(verdict.valid_for)}
        if isinstance(verdict, BandProof)
        else None,
        "refusal": _refusal(verdict) if isinstance(verdict, Refutation) else None,
    }


def _refusal(refutation: Refutation) -> dict[str, object]:
    return {
        "code": refutation.code,
        "reason": refutation.reason,
        "node": refutation.node,
        "witness": _witness(refutation.witness) if refutation.witness else None,
        "help": f"{REASONS_PAGE}#{refutation.code}",
    }


def _witness(witness: Witness) -> dict[str, object]:
    return {
        "batch": witness.batch, "head": witness.head, "query": witness.query, "key": witness.key, "sizes": dict(witness.sizes),
        "mask_shows": witness.mask_shows,
    }  # fmt: skip


def print_findings(console: Console, model: str, findings: Sequence[Finding]) -> None:
    """A row an attention; below, each band in other tools' words and each refusal in full."""
    table = Table(
        title=f"{model}: {len(findings)} attention{'s' * (len(findings) != 1)}", title_justify="left", box=SIMPLE
    )
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for number, finding in enumerate(findings):
        table.add_row(str(number), *_row(finding))
    console.print(table)
    for band in dict.fromkeys(
        f.verdict.mask for f in findings if isinstance(f.verdict, BandProof) and f.verdict.kind is not Kind.FULL
    ):
        words = "; ".join(f"{name}: {text}" for name, text in spellings(band).items() if text)
        console.print(f"band {_band(band)} is {words}", markup=False, highlight=False, soft_wrap=True)
    for number, finding in enumerate(findings):
        if isinstance(finding.verdict, Refutation):
            console.print(f"#{number} {explain(finding.verdict)}", markup=False, highlight=False, soft_wrap=True)


def _row(finding: Finding) -> tuple[str, ...]:
    site, verdict = finding.attention, finding.verdict
    band = verdict.mask if isinstance(verdict, BandProof) else verdict.band
    return (
        finding.node,
        f"{site.heads}/{site.kv_heads}" if site else "?",
        _size(site) if site else "?",
        f"{site.scale:.4g}" if site else "?",
        _mask(site, verdict) if site else "?",
        str(verdict.kind),
        _band(band) if band else "-",
        _proof(verdict) if isinstance(verdict, BandProof) else f"none: {verdict.code}",
    )


def _band(band: BandMask) -> str:
    return str(band) + (" bottom-right" if band.alignment is Alignment.BOTTOM_RIGHT else "")


def _size(site: Attention) -> str:
    sizes = {site.head_size, site.value_head_size}
    return str(site.head_size) if len(sizes) == 1 else f"{site.head_size}/{site.value_head_size}"


def _mask(site: Attention, verdict: BandProof | Refutation) -> str:
    extras = [str(residual.kind) for residual in verdict.residuals] if isinstance(verdict, BandProof) else []
    capped = [f"softcap {site.softcap:g}"] if site.softcap else []
    return " + ".join([site.mask_form, *extras, *capped, *(["sinks"] if site.sinks is not None else [])])


def _proof(proof: BandProof) -> str:
    return f"{proof.method}, {'all sizes' if not proof.valid_for else ', '.join(proof.valid_for)}"


def explain(refutation: Refutation) -> str:
    """A refusal in one line: node, reason, witness cell, and where to read more."""
    witness = f" Witness: {refutation.witness}." if refutation.witness else ""
    return f"{refutation.node}: {refutation.reason}.{witness} See {REASONS_PAGE}#{refutation.code}."


def print_outcomes(console: Console, outcomes: Sequence[Replacement | Refutation]) -> None:
    """One line for each attention that was replaced, one for each that stays as it is."""
    for outcome in outcomes:
        if isinstance(outcome, Refutation):
            console.print(f"kept      {explain(outcome)}", markup=False, soft_wrap=True)
        else:
            band = outcome.proof.mask
            console.print(
                f"replaced  {outcome.site.node}: band {band}, {_proof(outcome.proof)}", markup=False, soft_wrap=True
            )
