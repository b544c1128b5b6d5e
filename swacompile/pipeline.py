"""The compiler, one call a step: read, find, prove, plan, splice, build. Start reading here."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from swacompile.artifact import Manifest
from swacompile.attention import Attention, Finding, Refutation
from swacompile.errors import ArgumentError, ModelError, TargetError
from swacompile.frontends.onnx import OnnxModel
from swacompile.kernels.build import KernelVariant
from swacompile.passes.detect_attention import detect_attention
from swacompile.passes.guard_rewrite import guard_rewrite
from swacompile.passes.plan_rewrite import Replacement, plan_rewrite
from swacompile.passes.prove_band import Prover
from swacompile.passes.read_masks import Reading, read_masks
from swacompile.report.findings import as_json
from swacompile.target import Target, TargetClass, host_targets, refuse_other_machines
from swacompile.tuning.database import Choice, Database
from swacompile.tuning.kernel_choice import KernelChoice, choose_cpu_kernels
from swacompile.tuning.shapes import workloads_of
from swacompile.workload import DType

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from swacompile.frontends.fx import FxModel

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
    """What a rewrite did with every attention; `out` is None where nothing was replaced and nothing written.

    `model` is None where it was given as an object; `program` is the rewritten torch program.
    """

    model: Path | None
    out: Path | None
    outcomes: tuple[Replacement | Refutation, ...]
    program: "ExportedProgram | GraphModule | None" = None

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        return tuple(outcome for outcome in self.outcomes if isinstance(outcome, Replacement))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a compile did; `manifest` is None where nothing was replaced and nothing written.

    `choices` say which tuning record, or that the analytical default, each kernel was built with.
    """

    rewrite: Rewrite
    manifest: Manifest | None
    choices: tuple[Choice, ...]


def inspect(model: str | Path) -> Inspection:
    """Find the attentions of an exported model and prove their windows. Nothing is changed.

    Raises ModelError.
    """
    model = Path(model)
    source = read(model)
    reading = read_masks(source.graph)
    return Inspection(model=model, findings=find(reading))


def rewrite(
    model: "str | Path | ExportedProgram | GraphModule",
    out: str | Path | None = None,
    *,
    emit: Emit = Emit.BANDED,
    full: bool = False,
    force: bool = False,
) -> Rewrite:
    """Write the model with every proven sliding-window attention replaced; with `full`, unwindowed attention too.

    A torch program may be given as an object: the new one is the result's `program`, and `out` may be left out.
    The source is never changed; an existing output is replaced only with `force`. Raises ModelError, OutputError, ArgumentError.
    """
    model = Path(model) if isinstance(model, str) else model
    out = Path(out) if isinstance(out, str) else out
    if not isinstance(model, Path) or model.suffix == ".pt2":
        if emit is not Emit.BANDED:
            raise ArgumentError(
                f"expected --emit banded for a torch program, found {emit}: the other forms are ONNX operators."
            )
        require_torch(model)
        from swacompile import torch_pipeline

        return torch_pipeline.rewrite(model, out, full=full, force=force)
    from swacompile.frontends.onnx_splice import check_output, save

    if out is None:
        raise ArgumentError("expected a path to write the ONNX model to, found none: give `out`.")
    check_output(out, force=force)
    source, _, outcomes = _spliced(model, emit, full=full)
    done = Rewrite(model=model, out=out, outcomes=outcomes)
    if not done.replaced:
        return Rewrite(model=model, out=None, outcomes=outcomes)
    save(source, out, force=force)
    return done


def compile(
    model: str | Path, out: str | Path, *, targets: Sequence[Target] = (), database: Database | None = None, full: bool = False, force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:  # fmt: skip
    """Write a folder with the rewritten model, a kernel library and a manifest; nothing where no attention is replaced.

    `targets` are the instruction sets that the library holds, the best of this machine by default; `database` has the tuning records,
    those shipped with swacompile by default; `progress` hears of each step.
    Raises ModelError, OutputError, TargetError, ToolchainError.
    """
    model, out = Path(model), Path(out)
    refuse_other_machines(targets)
    if model.suffix == ".pt2":
        require_torch(model)
        from swacompile import torch_pipeline

        return torch_pipeline.compile(
            model, out, targets=targets, database=database, full=full, force=force, progress=progress
        )
    from swacompile import artifact
    from swacompile.frontends.onnx_splice import save

    targets = cpu_only(model, targets) or host_targets()[:1]
    with artifact.new_folder(out, force=force) as folder:
        source, findings, outcomes = _spliced(model, Emit.BANDED, full=full, progress=progress)
        done = Rewrite(model=model, out=out, outcomes=outcomes)
        if not done.replaced:
            raise artifact.Abandoned
        save(source, folder / artifact.MODEL, force=False)
        variants = kernel_variants(done.replaced)
        progress(f"building {len(variants)} kernels for {', '.join(target.name for target in targets)}")
        kernels = choose_kernels(done.replaced, targets, database or Database())
        build_library(variants, targets, folder / artifact.LIBRARY, kernels)
        return seal(
            folder, done, targets=targets, report=as_json(model.name, findings), files=(artifact.MODEL, artifact.LIBRARY),
            kernels=tuple(variant.function_name(target) for target in targets for variant in variants),
            choices=tuple(choice for kernel in kernels for choice in kernel.choices),
        )  # fmt: skip
    return Compiled(rewrite=Rewrite(model=model, out=None, outcomes=outcomes), manifest=None, choices=())


def seal(
    folder: Path, done: Rewrite, *, targets: Sequence[Target], report: Mapping[str, Any], files: Sequence[str], kernels: Sequence[str],
    choices: Sequence[Choice], versions: Mapping[str, str] = MappingProxyType({}),
) -> Compiled:  # fmt: skip
    """Write the manifest of a folder that has everything else; `versions` come to those of the packages."""
    from swacompile import artifact

    assert done.model is not None
    manifest = artifact.Manifest(
        source=done.model.name, replaced=tuple(replacement.site.node for replacement in done.replaced),
        targets=tuple(target.name for target in targets), kernels=tuple(kernels), report=report,
        versions=artifact.versions() | dict(versions), tuning=tuple(map(str, choices)),
        hashes={name: artifact.file_hash(folder / name) for name in files},
    )  # fmt: skip
    artifact.write_manifest(folder, manifest)
    return Compiled(rewrite=done, manifest=manifest, choices=tuple(choices))


def cpu_only(model: Path, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Targets on which ONNX Runtime calls our kernels. Raises TargetError where there is another."""
    for target in targets:
        if target.target_class is not TargetClass.CPU:
            raise TargetError(
                f"{model}: expected a CPU target, found {target.name}: our library for ONNX Runtime holds CPU kernels only. "
                "Export the model with torch.export (.pt2) for a GPU, or leave --target out."
            )
    return tuple(targets)


def _spliced(
    model: Path, emit: Emit, *, full: bool, progress: Callable[[str], None] = lambda _: None
) -> tuple[OnnxModel, tuple[Finding, ...], tuple[Replacement | Refutation, ...]]:
    """The model rewritten in memory, what was found in it, and what was done with each finding."""
    progress(f"reading {model.name}")
    source = read_onnx(model)
    reading = read_masks(source.graph)
    progress("proving masks")
    findings = find(reading)
    return source, findings, splice(source, plan(reading, findings, full=full), emit)


def plan(
    reading: Reading,
    findings: tuple[Finding, ...],
    *,
    full: bool,
    dtypes: tuple[str, ...] = ("float32", "float16"),
    trusted: bool = True,
) -> tuple[Replacement | Refutation, ...]:
    """What replaces each finding, and under which conditions on sizes. `trusted`: the runtime checks sizes that the model declares."""

    def planned(reading: Reading, findings: tuple[Finding, ...]) -> tuple[Replacement | Refutation, ...]:
        return plan_rewrite(reading, findings, full=full, dtypes=dtypes)

    outcomes = planned(reading, findings)
    return guard_rewrite(reading, outcomes, trusted=trusted, plan_again=lambda other: planned(other, find(other)))


def splice(
    source: OnnxModel, outcomes: tuple[Replacement | Refutation, ...], emit: Emit
) -> tuple[Replacement | Refutation, ...]:
    """Edit the model in memory. What this form of output cannot express turns from a replacement into a refusal."""
    from swacompile.frontends import onnx_emit, onnx_lower

    put = {
        Emit.BANDED: onnx_emit.splice_banded,
        Emit.ONNX_ATTENTION: onnx_lower.splice_onnx_attention,
        Emit.ORT_GQA: onnx_lower.splice_ort_gqa,
    }[emit]
    return put(source, outcomes)


def kernel_variants(replaced: Sequence[Replacement]) -> tuple[KernelVariant, ...]:
    """The kernels that these attentions need, in a stable order."""
    short = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
    needed = {(r.site.dtype, r.site.head_size or 0, r.site.value_head_size or 0) for r in replaced}
    return tuple(
        KernelVariant(dtype=short[dtype], head_size=size, value_size=value) for dtype, size, value in sorted(needed)
    )


def choose_kernels(
    replaced: Sequence[Replacement], targets: Sequence[Target], database: Database
) -> tuple[KernelChoice, ...]:
    """Sizes of the kernels that these attentions need on every target, from the tuning records."""
    from swacompile.tuning.runner import device_name

    workloads, device = workloads_of(replaced), device_name()
    return tuple(
        choice for target in targets for choice in choose_cpu_kernels(workloads, target, database, device=device)
    )


def build_library(
    variants: Sequence[KernelVariant], targets: Sequence[Target], out: Path, kernels: Sequence[KernelChoice] = ()
) -> None:
    """Build the kernels for every target and link them into an ONNX Runtime library. Raises TargetError, ToolchainError.

    Sizes are those of `kernels`, and analytical defaults for a variant that is not among them.
    """
    from swacompile.runtime.kernel_link import build_objects
    from swacompile.runtime.ort_library import LibraryKernel, build_ort_library

    with tempfile.TemporaryDirectory() as folder:
        objects = build_objects(variants, targets, Path(folder), kernels)
        rows = [LibraryKernel(variant=variant, target=target) for target in targets for variant in variants]
        build_ort_library(objects, rows, out)


def read(model: Path) -> "OnnxModel | FxModel":
    """Read a model file by its suffix: .onnx, or .pt2 with torch. Raises ModelError."""
    if model.suffix == ".pt2":
        require_torch(model)
        from swacompile.frontends import fx

        return fx.read_pt2(model)
    return read_onnx(model)


def read_onnx(model: Path) -> OnnxModel:
    """Read a model of ONNX. Raises ModelError."""
    from swacompile.frontends import onnx

    if model.suffix != ".onnx":
        found = f"suffix {model.suffix!r}" if model.is_file() else "a folder" if model.is_dir() else "nothing"
        raise ModelError(
            f"{model}: expected a .onnx or a .pt2 file, found {found}. Give the path of an exported model."
        )
    return onnx.read(model)


def require_torch(model: object) -> None:
    """Raises ModelError where torch is missing, or the model is no torch program, FX graph or path of a .pt2 file."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{model}: a torch program needs torch, which is not installed. Install swacompile[torch]."
        ) from error
    from swacompile import torch_pipeline

    if not torch_pipeline.is_torch(model):
        raise ModelError(f"expected a path, an ExportedProgram or a GraphModule, found {type(model).__name__}.")


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
