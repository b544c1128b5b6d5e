"""The compiler, one call a step: read, find, prove, plan, splice, build. Start reading here."""

import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from swacompile.attention import Attention, Finding, Refutation
from swacompile.errors import ModelError
from swacompile.frontends.onnx import OnnxModel
from swacompile.passes.detect_attention import detect_attention
from swacompile.passes.plan_rewrite import Replacement, plan_rewrite
from swacompile.passes.prove_band import Prover
from swacompile.passes.read_masks import Reading, read_masks

log = logging.getLogger(__name__)


class Emit(StrEnum):
    """What a rewrite puts in an attention's place."""

    BANDED = "banded"
    ONNX_ATTENTION = "onnx-attention"
    ORT_GQA = "ort-gqa"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Every attention of a model in execution order, each with its proof or refusal."""

    model: Path
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What a rewrite did with every attention; `out` is None where nothing was replaced and nothing written."""

    model: Path
    out: Path | None
    outcomes: tuple[Replacement | Refutation, ...]

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        return tuple(outcome for outcome in self.outcomes if isinstance(outcome, Replacement))


def inspect(model: Path) -> Inspection:
    """Find the attentions of an exported model and prove their windows. Nothing is changed.

    Raises ModelError.
    """
    source = read(model)
    reading = read_masks(source.graph)
    return Inspection(model=model, findings=find(reading))


def rewrite(model: Path, out: Path, *, emit: Emit = Emit.BANDED, full: bool = False, force: bool = False) -> Rewrite:
    """Write the model with every proven sliding-window attention replaced; with `full`, unwindowed attention too.

    The source is never changed; an existing output is replaced only with `force`. Raises ModelError, OutputError.
    """
    from swacompile.frontends.onnx_splice import refuse_existing, save
    from swacompile.frontends.onnx_emit import splice

    refuse_existing(out, force=force)
    source = read(model)
    reading = read_masks(source.graph)
    findings = find(reading)
    outcomes = plan_rewrite(reading, findings, full=full)
    outcomes = splice(source, outcomes, emit)
    done = Rewrite(model=model, out=out, outcomes=outcomes)
    if not done.replaced:
        return Rewrite(model=model, out=None, outcomes=outcomes)
    save(source, out, force=force)
    return done


def read(model: Path) -> OnnxModel:
    """Read a model file by its suffix. Raises ModelError."""
    from swacompile.frontends import onnx

    if model.suffix != ".onnx":
        raise ModelError(f"{model}: expected a .onnx file, found suffix {model.suffix!r}.")
    return onnx.read(model)


def find(reading: Reading) -> tuple[Finding, ...]:
    """Detect and prove: one finding an attention."""
    prover = Prover(arrays=reading.arrays)
    findings = []
    for site in detect_attention(reading):
        if isinstance(site, Attention):
            findings.append(Finding(node=site.node, attention=site, verdict=prover.prove(site)))
        else:
            findings.append(Finding(node=site.node, attention=None, verdict=site))
        log.info("%s: %s", site.node, findings[-1].verdict)
    return tuple(findings)
