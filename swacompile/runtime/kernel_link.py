"""Link CPU kernels into a library that needs no other: what the torch op loads."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swacompile.kernels.build import KernelVariant, build_cpu_object
from swacompile.runtime.cpp import link, tvm_ffi_headers
from swacompile.target import TARGETS, Target
from swacompile.tuning.kernel_choice import KernelChoice
from swacompile.workload import DType

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("kernel_library")
_HOST = Path(__file__).with_name("host")
_TYPES = {DType.F32: "{kDLFloat, 32, 1}", DType.F16: "{kDLFloat, 16, 1}", DType.BF16: "{kDLBfloat, 16, 1}"}


def build_kernel_library(
    variants: Sequence[KernelVariant], targets: Sequence[Target], output: Path, kernels: Sequence[KernelChoice] = ()
) -> Path:
    """Build every variant for every target and link them into `output`. Raises TargetError, ToolchainError.

    Sizes are those of `kernels`, and analytical defaults for a variant that is not among them.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects = build_objects(variants, targets, Path(folder), kernels)
        return link_kernel_library(objects, variants, targets, output)


def build_objects(
    variants: Sequence[KernelVariant], targets: Sequence[Target], folder: Path, kernels: Sequence[KernelChoice] = ()
) -> list[Path]:
    """One object file a target in `folder`, with every variant. Raises TargetError."""
    objects = [folder / f"{target.name}.o" for target in targets]
    for target, path in zip(targets, objects, strict=True):
        tiles = {kernel.variant: kernel.tiles for kernel in kernels if kernel.target == target}
        build_cpu_object(variants, target, path, tiles=tiles)
    return objects


def link_kernel_library(
    objects: Sequence[Path], variants: Sequence[KernelVariant], targets: Sequence[Target], output: Path
) -> Path:
    """Link object files that define the symbols of all variants for all targets."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "kernel_list.cc")
        table.write_text(kernel_list(variants, targets))
        sources = [*sorted(_SOURCES.glob("*.cc")), _HOST / "tvm_host.cc", table, *objects]
        includes = (_SOURCES, _HOST, tvm_ffi_headers())
        link(
            sources,
            output,
            exports=_SOURCES / "exports.map",
            includes=includes,
            flags=("-std=c++17", "-Wl,-z,defs", "-lm"),
        )
    log.info("linked %s: %d kernels", output, len(variants) * len(targets))
    return output


def kernel_list(variants: Sequence[KernelVariant], targets: Sequence[Target]) -> str:
    """C++ source of the table of kernels, best target first."""
    pairs = [(variant, target) for target in sorted(targets, key=TARGETS.index) for variant in dict.fromkeys(variants)]
    declarations = "\n".join(
        f"int {variant.symbol(target)}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);" for variant, target in pairs
    )
    rows = "\n".join(f"    {_row(variant, target)}," for variant, target in pairs)
    return f"""#include "kernel_library.h"

extern "C" {{
{declarations}
}}

namespace swacompile {{

extern const Kernel kernel_list[] = {{
{rows}
}};
extern const size_t kernel_count = {len(pairs)};

}}  // namespace swacompile
"""


def _row(variant: KernelVariant, target: Target) -> str:
    fields = (_TYPES[variant.dtype], variant.head_size, variant.value_size, f'"{target.name}"', variant.symbol(target))
    return "{" + ", ".join(map(str, fields)) + "}"
