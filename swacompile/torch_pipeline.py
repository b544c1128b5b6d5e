"""pipeline.py for torch programs: the same steps, with torch.export at both ends."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from swacompile import artifact, pipeline
from swacompile.attention import ResidualKind
from swacompile.errors import ModelError, OutputError
from swacompile.frontends.fx import FxModel, read_exported_program, read_graph_module, read_pt2
from swacompile.frontends.fx_splice import Spliced, splice
from swacompile.passes.plan_rewrite import plan_rewrite
from swacompile.passes.read_masks import read_masks
from swacompile.report.findings import as_json
from swacompile.runtime.kernel_link import build_kernel_library
from swacompile.runtime.torch_op.build import operator_library
from swacompile.target import Target, host_targets
from swacompile.torch_artifact import KERNELS, PROGRAM
from swacompile.tuning.database import Database

DTYPES = ("float32", "float16", "bfloat16")
TorchModel = Path | ExportedProgram | fx.GraphModule


def is_torch(model: object) -> bool:
    """Whether a model is a torch program, an FX graph or the path of a .pt2 file."""
    return isinstance(model, ExportedProgram | fx.GraphModule) or (isinstance(model, Path) and model.suffix == ".pt2")


def rewrite(
    model: TorchModel,
    out: Path | None = None,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    full: bool = False,
    force: bool = False,
) -> pipeline.Rewrite:
    """Replace every proven sliding-window attention; `program` of the result is the new one, written to `out` where given.

    The source is not changed; its weights are shared. `args`, `kwargs` and `dynamic_shapes` are for a GraphModule that is
    not of ATen operators: it is exported with them. Raises ModelError, OutputError.
    """
    if out is not None:
        _check_output(model, out, force=force)
    source = read(model, args, kwargs, dynamic_shapes)
    spliced = _spliced(source, full=full)[0]
    path = model if isinstance(model, Path) else None
    done = pipeline.Rewrite(model=path, out=out, outcomes=spliced.outcomes, program=spliced.program)
    if not done.replaced or out is None:
        return pipeline.Rewrite(model=path, out=None, outcomes=spliced.outcomes, program=_as_given(model, spliced))
    save(spliced.program, out)
    return done


def compile(
    model: Path,
    out: Path,
    *,
    targets: Sequence[Target] = (),
    database: Database | None = None,
    full: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> pipeline.Compiled:
    """Write a folder with the rewritten program, a kernel library, the operator for this torch, and a manifest.

    Raises ModelError, OutputError, TargetError, ToolchainError.
    """
    targets = tuple(targets) or host_targets()[:1]
    with artifact.new_folder(out, force=force) as folder:
        progress(f"reading {model.name}")
        source = read(model)
        progress("proving masks")
        spliced, report = _spliced(source, full=full)
        done = pipeline.Rewrite(model=model, out=out, outcomes=spliced.outcomes)
        if not done.replaced:
            raise artifact.Abandoned
        save(spliced.program, folder / PROGRAM)
        variants = pipeline.kernel_variants(done.replaced)
        progress(f"building {len(variants)} kernels for {', '.join(target.name for target in targets)}")
        kernels = pipeline.choose_kernels(done.replaced, targets, database or Database())
        build_kernel_library(variants, targets, folder / KERNELS, kernels)
        operator = shutil.copy(operator_library(), folder)
        choices = tuple(choice for kernel in kernels for choice in kernel.choices)
        manifest = artifact.Manifest(
            source=model.name,
            replaced=tuple(replacement.site.node for replacement in done.replaced),
            targets=tuple(target.name for target in targets),
            kernels=tuple(variant.function_name(target) for target in targets for variant in variants),
            report=report,
            versions=artifact.versions() | {"torch": torch.__version__},
            tuning=tuple(map(str, choices)),
            hashes={name: artifact.file_hash(folder / name) for name in (PROGRAM, KERNELS, Path(operator).name)},
        )
        artifact.write_manifest(folder, manifest)
        return pipeline.Compiled(rewrite=done, manifest=manifest, choices=choices)
    nothing = pipeline.Rewrite(model=model, out=None, outcomes=spliced.outcomes)
    return pipeline.Compiled(rewrite=nothing, manifest=None, choices=())


def read(
    model: TorchModel, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> FxModel:
    """Read a torch model of any form. Raises ModelError."""
    if isinstance(model, Path):
        return read_pt2(model)
    if isinstance(model, ExportedProgram):
        return read_exported_program(model)
    return read_graph_module(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def save(program: ExportedProgram | fx.GraphModule, out: Path) -> None:
    """Write a program aside, then rename. Raises OutputError, and ModelError where it cannot be saved."""
    if not isinstance(program, ExportedProgram):
        raise ModelError(
            f"{out}: expected an exported program to write, found an FX graph. Export it with torch.export first."
        )
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            torch.export.save(program, Path(aside) / out.name)
            os.replace(Path(aside) / out.name, out)
    except OSError as error:
        raise OutputError(f"{out}: could not be written ({error.strerror or error}). Nothing was changed.") from error


def _spliced(source: FxModel, *, full: bool) -> tuple[Spliced, dict[str, Any]]:
    """The rewritten program, and the report on the source."""
    reading = read_masks(source.graph)
    findings = pipeline.find(reading)
    outcomes = plan_rewrite(reading, findings, full=full, dtypes=DTYPES, residuals=frozenset(ResidualKind))
    name = source.path.name if source.path else source.graph.name
    return splice(source, outcomes), as_json(name, findings)


def _as_given(model: TorchModel, spliced: Spliced) -> ExportedProgram | fx.GraphModule:
    """A GraphModule that had to be exported comes back as a GraphModule."""
    if isinstance(model, fx.GraphModule) and isinstance(spliced.program, ExportedProgram):
        module = spliced.program.module()
        assert isinstance(module, fx.GraphModule)
        return module
    return spliced.program


def _check_output(model: TorchModel, out: Path, *, force: bool) -> None:
    if out.suffix != ".pt2":
        raise OutputError(
            f"{out}: expected a path that ends in .pt2, as the rewritten program is written by torch.export.save."
        )
    if out.exists() and not force:
        raise OutputError(f"{out}: expected a path that does not exist yet. Give another, or --force to replace it.")
    if isinstance(model, Path) and out.exists() and out.samefile(model):
        raise OutputError(f"{out}: the output is the model itself. Give another path.")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist. Create it first.")
