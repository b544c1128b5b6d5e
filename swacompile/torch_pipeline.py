"""pipeline.py for torch programs: the same steps, with torch.export at both ends."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from swacompile import artifact, pipeline
from swacompile.errors import ModelError, OutputError
from swacompile.frontends.fx import FxModel, read_exported_program, read_graph_module, read_pt2
from swacompile.frontends.fx_splice import Spliced, splice
from swacompile.passes.read_masks import read_masks
from swacompile.report.findings import as_json
from swacompile.runtime.cuda.library import Kernel, manifest_path
from swacompile.runtime.kernel_link import build_kernel_library
from swacompile.runtime.torch_op.build import operator_library
from swacompile.runtime.torch_op.cuda_build import carry_runtime
from swacompile.runtime.torch_op.cuda_program import LIBRARY_PREFIX, build_libraries, is_on_cuda, without_kernel
from swacompile.target import Target, TargetClass, host_targets
from swacompile.torch_artifact import KERNELS, OPERATOR, OPERATOR_VERSION, PROGRAM
from swacompile.tuning.database import Choice, Database
from swacompile.tuning.kernel_choice import CudaKernelChoice, choose_cuda_kernels
from swacompile.tuning.shapes import workloads_of

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
    sizes_checked: bool = False,
) -> pipeline.Rewrite:
    """Replace every proven sliding-window attention; `program` of the result is the new one, written to `out` where given.

    The source is not changed; its weights are shared. `args`, `kwargs` and `dynamic_shapes` are for a GraphModule that is
    not of ATen operators: it is exported with them. `sizes_checked`: whoever runs a GraphModule sees to it that it gets the sizes
    that it was traced for, so that the graph need not. Raises ModelError, OutputError.
    """
    if out is not None:
        _check_output(model, out, force=force)
    source = read(model, args, kwargs, dynamic_shapes)
    spliced = _spliced(source, full=full, sizes_checked=sizes_checked)[0]
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
        spliced, report = _spliced(source, full=full, targets=targets)
        done = pipeline.Rewrite(model=model, out=out, outcomes=spliced.outcomes)
        if not done.replaced:
            raise artifact.Abandoned
        save(spliced.program, folder / PROGRAM)
        built = _build_cpu(done, _of_class(targets, TargetClass.CPU), database or Database(), folder, progress)
        gpus = _of_class(targets, TargetClass.CUDA)
        built += _build_cuda(spliced.program, done, gpus, database or Database(), folder, progress)
        operator = operator_library()
        shutil.copy(operator, folder / OPERATOR)
        return pipeline.seal(
            folder,
            done,
            targets=targets,
            report=report,
            files=(PROGRAM, OPERATOR, *(name for part in built for name in part.files)),
            kernels=[kernel for part in built for kernel in part.kernels],
            choices=[choice for part in built for choice in part.choices],
            versions={"torch": torch.__version__, OPERATOR_VERSION: operator.name},
        )
    nothing = pipeline.Rewrite(model=model, out=None, outcomes=spliced.outcomes)
    return pipeline.Compiled(rewrite=nothing, manifest=None, choices=())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """Kernel libraries in the folder: names of files and of kernels, and where their sizes come from."""

    files: tuple[str, ...]
    kernels: tuple[str, ...]
    choices: tuple[Choice, ...] = ()


def _of_class(targets: Sequence[Target], wanted: TargetClass) -> tuple[Target, ...]:
    return tuple(target for target in targets if target.target_class is wanted)


def _build_cpu(
    done: pipeline.Rewrite,
    targets: Sequence[Target],
    database: Database,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[_Built, ...]:
    if not targets:
        return ()
    variants = pipeline.kernel_variants(done.replaced)
    progress(f"building {len(variants)} kernels for {', '.join(target.name for target in targets)}")
    kernels = pipeline.choose_kernels(done.replaced, targets, database)
    build_kernel_library(variants, targets, folder / KERNELS, kernels)
    names = tuple(variant.function_name(target) for target in targets for variant in variants)
    return (
        _Built(
            files=(KERNELS,), kernels=names, choices=tuple(choice for kernel in kernels for choice in kernel.choices)
        ),
    )


def _build_cuda(
    program: ExportedProgram | fx.GraphModule,
    done: pipeline.Rewrite,
    targets: Sequence[Target],
    database: Database,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[_Built, ...]:
    """Libraries, their manifests, and TVM's runtime, without which they do not run."""
    if not targets:
        return ()
    progress(f"building CUDA kernels for {', '.join(target.name for target in targets)}")
    workloads = workloads_of(done.replaced)

    def choose(kernels: Sequence[Kernel], target: Target) -> tuple[CudaKernelChoice, ...]:
        return choose_cuda_kernels(kernels, workloads, target, database)

    libraries = build_libraries(program, targets, folder, choose)
    files = tuple(path.name for library in libraries for path in (library, manifest_path(library)))
    return (
        _Built(
            files=(*files, *carry_runtime(folder)),
            kernels=tuple(
                f"{made.kernel.spec.symbol}_{library.stem.removeprefix(LIBRARY_PREFIX)}"
                for library, built in libraries.items()
                for made in built
            ),
            choices=tuple(made.choice for built in libraries.values() for made in built if made.choice is not None),
        ),
    )


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


def _spliced(
    source: FxModel, *, full: bool, targets: Sequence[Target] = (), sizes_checked: bool = False
) -> tuple[Spliced, dict[str, Any]]:
    """The rewritten program, and the report on the source. What has no CUDA kernel stays as it is where a GPU is to run it."""
    reading = read_masks(source.graph)
    findings = pipeline.find(reading)
    outcomes = pipeline.plan(reading, findings, full=full, dtypes=DTYPES, trusted=False)
    if is_on_cuda(source.module) or _of_class(targets, TargetClass.CUDA):
        outcomes = tuple(map(without_kernel, outcomes))
    name = source.path.name if source.path else source.graph.name
    return splice(source, outcomes, sizes_checked=sizes_checked), as_json(name, findings)


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
