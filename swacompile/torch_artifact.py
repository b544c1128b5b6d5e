"""A compiled folder of a torch program, opened: torch tensors in, torch tensors out."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch.export import ExportedProgram

from swacompile.errors import ArtifactError
from swacompile.runtime.cache import cache_folder
from swacompile.runtime.torch_op.build import operator_name
from swacompile.runtime.torch_op.cuda_program import LIBRARY_PREFIX
from swacompile.target import TargetClass, target_named

PROGRAM, KERNELS, OPERATOR = "model.pt2", "libswacompile_kernels.so", "libswacompile_torch.so"
OPERATOR_VERSION = "torch operator"
"""Entry of the manifest's versions: the name that the operator's library has in the cache."""


class CompiledProgram:
    """A compiled torch program. Call it as the original module; `program` is the exported program itself."""

    def __init__(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> None:
        self.folder, self.program, self.manifest = folder, program, manifest
        self.module: torch.nn.Module = program.module()

    def to(self, device: torch.device | str) -> Self:
        """Move the program to a device; gives itself, as torch's modules do."""
        from torch.export.passes import move_to_device_pass

        self.program = move_to_device_pass(self.program, str(device))
        self.module = self.program.module()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's result, without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)


def open_program(folder: Path, manifest: Mapping[str, Any]) -> CompiledProgram:
    """Load kernels and program of a folder whose files were checked. TVM is not needed, and no C++ compiler where torch is the same.

    A folder compiled for GPUs only opens on the current GPU; CompiledProgram.to moves one that is for both.
    Raises ArtifactError where no kernel runs on this machine, ToolchainError where the operator must be compiled and cannot.
    """
    _adopt_operator(folder, manifest)
    import swacompile.torch as swacompile_torch
    from swacompile.frontends.fx_archive import load_program

    targets = [target_named(name) for name in manifest["targets"]]
    on_cpu = any(target.target_class is TargetClass.CPU for target in targets)
    if on_cpu:
        swacompile_torch.add_kernels(folder / KERNELS)
    gpu = _add_cuda_kernels(folder, needed=not on_cpu)
    opened = CompiledProgram(folder, load_program(folder / PROGRAM), manifest)
    return opened.to("cuda") if gpu and not on_cpu else opened


def _add_cuda_kernels(folder: Path, *, needed: bool) -> bool:
    """Load the folder's CUDA kernels where there is a GPU. Raises ArtifactError where there is none and one is `needed`."""
    import swacompile.torch as swacompile_torch

    libraries = sorted(folder.glob(f"{LIBRARY_PREFIX}*.so"))
    if not torch.cuda.is_available():
        if needed:
            raise ArtifactError(
                f"{folder}: it was compiled for {', '.join(path.stem.removeprefix(LIBRARY_PREFIX) for path in libraries)}, expected "
                "a GPU and a torch built with CUDA, found none. Compile it for this machine's CPU, too."
            )
        return False
    for library in libraries:
        swacompile_torch.add_cuda_kernels(library, folder)
    return bool(libraries)


def _adopt_operator(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put the folder's operator into the cache where it was made for this torch and the cache has none."""
    offered, wanted = folder / OPERATOR, cache_folder() / operator_name()
    if manifest["versions"].get(OPERATOR_VERSION) == wanted.name and not wanted.is_file():
        aside = wanted.with_suffix(".new")
        shutil.copyfile(offered, aside)
        aside.replace(wanted)
