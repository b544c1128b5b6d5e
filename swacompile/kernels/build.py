"""Build CPU kernels into object files that need no TVM library, only four symbols of the program that hosts them.

The symbols: TVMFFIErrorSetRaisedFromCStrParts to call, and the slots __TVMBackendParallelLaunch, __TVMBackendAllocWorkspace and
__TVMBackendFreeWorkspace to fill in before the first call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swacompile.errors import TargetError
from swacompile.schedules.cpu.tiles import Tiles, choose_tiles
from swacompile.target import CpuLimits, Target, TargetClass
from swacompile.workload import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVariant:
    """What is fixed when a kernel is built; everything else is a run-time argument."""

    dtype: DType
    head_size: int
    value_size: int

    def function_name(self, target: Target) -> str:
        """The name in a TVM module."""
        return f"swa_{self.dtype}_d{self.head_size}_v{self.value_size}_{target.name}"

    def symbol(self, target: Target) -> str:
        """The C symbol, of TVM's packed calling convention."""
        return f"__tvm_ffi_{self.function_name(target)}"


def build_cpu_object(
    variants: Iterable[KernelVariant], target: Target, path: Path, *, tiles: Mapping[KernelVariant, Tiles] | None = None
) -> tuple[str, ...]:
    """Write one object file with a function for each distinct variant, and give the functions' C symbols in order.

    `tiles` are tuned sizes; a variant that is not among them gets the analytical default.

    Raises TargetError where `target` is no CPU, ValueError where a head size is too large for the scratch memory.
    """
    distinct = tuple(dict.fromkeys(variants))
    build_cpu_module(distinct, target, tiles=tiles).write_to_file(str(path), "o")
    return tuple(variant.symbol(target) for variant in distinct)


def build_cpu_module(
    variants: Iterable[KernelVariant], target: Target, *, tiles: Mapping[KernelVariant, Tiles] | None = None
) -> Any:
    """The variants' functions as a TVM module. Calling them in this process needs a target that the machine runs."""
    import tvm

    from swacompile.schedules.cpu.banded_attention import banded_attention

    if target.target_class is not TargetClass.CPU or target.cpu is None:
        raise TargetError(f"expected a CPU target, found {target.name}: choose one with --target")
    functions = {}
    for variant in variants:
        tuned = (tiles or {}).get(variant)
        name = variant.function_name(target)
        functions[name] = banded_attention(
            name=name,
            dtype=variant.dtype,
            head_size=variant.head_size,
            value_size=variant.value_size,
            tiles=tuned or _default_tiles(variant, target.cpu),
            converts_f16=target.cpu.converts_f16,
        )
    return _compile(tvm.IRModule(functions), target)


def _default_tiles(variant: KernelVariant, limits: CpuLimits) -> Tiles:
    return choose_tiles(dtype=variant.dtype, head_size=variant.head_size, value_size=variant.value_size, limits=limits)


def _compile(module: Any, target: Target) -> Any:
    """Lower and compile with only the passes that the kernels need.

    They have no blocks, no vectorised loops, no intrinsics and no index arithmetic worth rewriting; TVM's default pipeline, which
    looks for all that, takes thirty times as long.
    """
    import tvm
    from tvm.tirx import transform

    tvm_target = tvm.target.Target(target.tvm)
    tvm_target = tvm_target.with_host(tvm_target)
    passes = [
        transform.BindTarget(tvm_target),
        transform.FlattenBuffer(),
        transform.BF16ComputeLegalize(),
        transform.MakePackedAPI(),
        transform.BF16StorageLegalize(),
        transform.LowerTVMBuiltin(),
    ]
    lowered = tvm.transform.Sequential(passes)(module)
    return tvm.get_global_func("target.build.llvm")(lowered, tvm_target)
