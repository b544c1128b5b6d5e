"""A compiled folder of a torch program, opened: torch tensors in, torch tensors out."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from swacompile.errors import ArtifactError
from swacompile.runtime.cache import cache_folder
from swacompile.runtime.torch_op.build import operator_name

PROGRAM, KERNELS = "model.pt2", "libswacompile_kernels.so"


class CompiledProgram:
    """A compiled torch program. Call it as the original module; `program` is the exported program itself."""

    def __init__(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> None:
        self.folder, self.program, self.manifest = folder, program, manifest
        self.module: torch.nn.Module = program.module()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's result, without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)


def open_program(folder: Path, manifest: Mapping[str, Any]) -> CompiledProgram:
    """Load kernels and program of a folder whose files were checked. TVM is not needed, and no C++ compiler where torch is the same.

    Raises ArtifactError where no kernel runs on this machine, ToolchainError where the operator must be compiled and cannot.
    """
    _adopt_operator(folder)
    import swacompile.torch as swacompile_torch
    from swacompile.frontends.fx_archive import load_program

    kernels = folder / KERNELS
    if not kernels.is_file():
        raise ArtifactError(f"{folder}: {KERNELS} is missing. Compile the model again.")
    swacompile_torch.add_kernels(kernels)
    return CompiledProgram(folder, load_program(folder / PROGRAM), manifest)


def _adopt_operator(folder: Path) -> None:
    """Put the folder's operator into the cache where it was made for this torch and the cache has none."""
    offered, wanted = folder / operator_name(), cache_folder() / operator_name()
    if offered.is_file() and not wanted.is_file():
        aside = wanted.with_suffix(".new")
        shutil.copyfile(offered, aside)
        aside.replace(wanted)
