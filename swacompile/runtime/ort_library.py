"""The ONNX Runtime library: compile and link the custom operator with CPU kernels into one shared object, and use it.

The sources are in ort_plugin/. At run time the result needs ONNX Runtime 1.19 or newer, and neither a TVM library nor a
compiler.
"""

import ctypes
import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from swacompile.errors import ArtifactError
from swacompile.kernels.build import KernelVariant
from swacompile.runtime.cpp import link, tvm_ffi_headers
from swacompile.target import TARGETS, Target
from swacompile.workload import DType

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("ort_plugin")
_HOST = Path(__file__).with_name("host")
_ELEMENT_TYPES = {DType.F32: "Float32", DType.F16: "Float16", DType.BF16: "BFloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryKernel:
    """One kernel of a library: its object file must define `variant.symbol(target)`."""

    variant: KernelVariant
    target: Target


def build_ort_library(objects: Sequence[Path], kernels: Iterable[LibraryKernel], output: Path) -> Path:
    """Link object files into the ONNX Runtime library `output`, replacing it in one step; gives `output`.

    A library may hold kernels for several targets; the best that a CPU runs is picked when a session is made.
    Raises ToolchainError where there is no C++ compiler or it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "kernel_list.cc")
        table.write_text(kernel_table(kernels))
        link(
            [*sorted(_HOST.glob("*.cc")), *sorted(_SOURCES.glob("*.cc")), table, *objects],
            output,
            exports=_SOURCES / "exports.map",
            includes=(_SOURCES, _HOST, tvm_ffi_headers()),
            flags=("-std=c++17", "-Wl,-z,defs", "-Wl,--strip-all", "-lm"),
        )
    log.info("linked %s from %d object files", output, len(objects))
    return output


def register(options: "ort.SessionOptions", library: Path) -> None:
    """Let sessions made with `options` run BandedAttention nodes with the library. Raises ArtifactError."""
    if not library.is_file():
        raise ArtifactError(f"{library}: expected a kernel library, found no file. Compile the model again.")
    options.register_custom_ops_library(str(library.resolve()))


def call_count(library: Path) -> int:
    """How many times a kernel of the library has run in this process, over all sessions."""
    function = ctypes.CDLL(str(library.resolve())).swacompile_call_count
    function.restype = ctypes.c_uint64
    return int(function())


def library_version(library: Path) -> str:
    """Version of swacompile that made the library."""
    function = ctypes.CDLL(str(library.resolve())).swacompile_version
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()


def kernel_table(kernels: Iterable[LibraryKernel]) -> str:
    """C++ source of the kernel list, best target first."""
    ordered = sorted(dict.fromkeys(kernels), key=lambda kernel: TARGETS.index(kernel.target))
    declarations = "\n".join(
        f"int {kernel.variant.symbol(kernel.target)}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);"
        for kernel in ordered
    )
    rows = "\n".join(f"    {_row(kernel)}," for kernel in ordered)
    return f"""#include "kernels.h"

extern "C" {{
{declarations}
}}

namespace swacompile {{

const char library_version[] = "{metadata.version("swacompile")}";
const Kernel kernel_list[] = {{
{rows}
}};
const size_t kernel_count = {len(ordered)};

}}  // namespace swacompile
"""


def _row(kernel: LibraryKernel) -> str:
    variant, target = kernel.variant, kernel.target
    element = f"ElementType::{_ELEMENT_TYPES[variant.dtype]}"
    return f'{{{element}, {variant.head_size}, {variant.value_size}, "{target.name}", {variant.symbol(target)}}}'
