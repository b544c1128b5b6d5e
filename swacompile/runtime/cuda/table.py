"""The table of a CUDA kernel library that C++ hosts read (runtime/kernel_library/cuda_library.h), as C++ source."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cuda.arch import CudaArch
from swacompile.schedules.cuda.combine_symbols import combine_symbol, value_sum_symbol
from swacompile.schedules.cuda.spec import Features

INCLUDE = Path(__file__).parents[1] / "kernel_library"
_TYPES = {"float32": "{kDLFloat, 32, 1}", "float16": "{kDLFloat, 16, 1}", "bfloat16": "{kDLBfloat, 16, 1}"}


def feature_bits(features: Features) -> int:
    """Features as one number, a bit for each field in its order."""
    return sum(1 << place for place, field in enumerate(fields(features)) if getattr(features, field.name))


def features_of(bits: int) -> Features:
    """The inverse of feature_bits. Raises ValueError where they do not go together."""
    return Features(**{field.name: bool(bits >> place & 1) for place, field in enumerate(fields(Features))})


def kernel_table(kernels: Sequence[Kernel], arch: CudaArch) -> str:
    """C++ source of the table of `kernels`, in their order. Those that round float32 to tf32 are for who names them: a host
    that asks for float32 must not get one.
    """
    kernels = [kernel for kernel in kernels if not kernel.spec.tf32]
    functions = dict.fromkeys(name for kernel in kernels for name in _functions(kernel) if name is not None)
    declarations = "\n".join(
        f"int {_exported(name)}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);" for name in functions
    )
    rows = "\n".join(f"    {_row(kernel)}," for kernel in kernels)
    number = arch.name.removeprefix("sm_")
    version = number.rstrip("a")
    exact = "true" if number.endswith("a") else "false"
    return f"""#include "cuda_library.h"

#include <array>

extern "C" {{
{declarations}
}}

namespace {{

const std::array<swacompile::CudaKernel, {len(kernels)}> kernels = {{{{
{rows}
}}}};
const swacompile::CudaLibrary library = {{swacompile::cuda_library_version, {version[:-1]}, {version[-1]}, {exact}, kernels.data(), kernels.size()}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const swacompile::CudaLibrary* swacompile_cuda_library() {{ return &library; }}
"""


def _functions(kernel: Kernel) -> tuple[str, str | None, str | None, str | None]:
    """Names of a kernel's launch, describe, combine and sum_values; None where it has none."""
    spec, features = kernel.spec, kernel.spec.features
    return (
        spec.symbol,
        f"{spec.symbol}_describe" if kernel.family == "wgmma" else None,
        combine_symbol(spec.dtype, spec.value_size, sinks=features.sinks, lse=features.lse) if features.split else None,
        value_sum_symbol(spec.dtype, spec.value_size, key_padding=features.key_padding) if features.zeroed else None,
    )


def _row(kernel: Kernel) -> str:
    spec, config = kernel.spec, kernel.config
    tile = (config.positions, config.keys_per_tile, config.pack, config.blocks_per_sm)
    functions = ("nullptr" if name is None else _exported(name) for name in _functions(kernel))
    numbers = (_TYPES[spec.dtype], spec.head_size, spec.value_size, feature_bits(spec.features), *tile)
    return "{" + ", ".join(map(str, (*numbers, *functions))) + "}"


def _exported(name: str) -> str:
    """The symbol under which TVM exports a function."""
    return f"__tvm_ffi_{name}"
