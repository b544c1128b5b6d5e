"""The hardware that kernels are built for: a table. A new target is a row here and, once tuned, a record file."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from swacompile.errors import TargetError

CPU_INFO = Path("/proc/cpuinfo")


class TargetClass(StrEnum):
    """Which folder of schedules a target uses."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLimits:
    """What a CPU schedule needs to know. `converts_f16`: there are instructions between float16 and float32. Cache sizes are the smallest of the machines that the row stands for."""

    vector_bits: int
    vector_registers: int
    has_fma: bool
    converts_f16: bool
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 512 * 1024

    @property
    def floats_per_vector(self) -> int:
        return self.vector_bits // 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaLimits:
    """What a CUDA schedule needs to know. `arch` is nvcc's name of the architecture; `model` the words of the device's
    name that tell it from others. Registers are 32 bits wide; shared memory is what a thread block may opt in to.
    """

    arch: str
    model: str
    multiprocessors: int
    l2_bytes: int
    shared_per_block: int
    registers_per_sm: int = 65536
    threads_per_block: int = 1024

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability: (9, 0) for sm_90a."""
        number = self.arch.removeprefix("sm_").rstrip("a")
        return int(number[:-1]), int(number[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row. `name` is an identifier: it is a part of symbol and file names.

    `tvm_json` is the TVM target; `tag` another name, as TVM tags its targets; `machine` the instruction set as
    `platform.machine()` spells it, None where that does not matter; `flags` are the features, in /proc/cpuinfo's
    words, without which its code does not run.
    """

    name: str
    target_class: TargetClass
    description: str
    tvm_json: str
    tag: str | None = None
    machine: str | None = None
    flags: frozenset[str] = frozenset()
    cpu: CpuLimits | None = None
    cuda: CudaLimits | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a target's name must be an identifier, not {self.name!r}")
        if (self.target_class is TargetClass.CPU, self.target_class is TargetClass.CUDA) != (
            self.cpu is not None,
            self.cuda is not None,
        ):
            raise ValueError(f"target {self.name}: a CPU row has CPU limits, a CUDA row has CUDA limits, none has both")

    @property
    def tvm(self) -> dict[str, Any]:
        """The TVM target as its dictionary."""
        parsed: dict[str, Any] = json.loads(self.tvm_json)
        return parsed


_V2_FLAGS = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})
_V3_FLAGS = _V2_FLAGS | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4_FLAGS = _V3_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

MIB = 1024 * 1024


def _cuda(tag: str, limits: CudaLimits) -> Target:
    document = {
        "kind": "cuda",
        "arch": limits.arch,
        "max_shared_memory_per_block": limits.shared_per_block,
        "max_threads_per_block": limits.threads_per_block,
        "registers_per_block": limits.registers_per_sm,
        "l2_cache_size_bytes": limits.l2_bytes,
    }
    return Target(
        name=tag.rpartition("/")[2].replace("-", "_"),
        tag=tag,
        target_class=TargetClass.CUDA,
        description=f"NVIDIA {limits.model}, {limits.arch}",
        tvm_json=json.dumps(document),
        cuda=limits,
    )


# Best first: host_targets keeps this order.
TARGETS: tuple[Target, ...] = (
    Target(
        name="x86_64_v4",
        target_class=TargetClass.CPU,
        description="x86-64 with AVX-512 (F, BW, CD, DQ, VL)",
        # LLVM's generic tuning halves 512-bit vectors; the schedule's are chosen for whole ones.
        tvm_json='{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4", "mattr": ["-prefer-256-bit"]}',
        machine="x86_64",
        flags=_V4_FLAGS,
        cpu=CpuLimits(vector_bits=512, vector_registers=32, has_fma=True, converts_f16=True, l2_bytes=1024 * 1024),
    ),
    Target(
        name="x86_64_v3",
        target_class=TargetClass.CPU,
        description="x86-64 with AVX2 and FMA",
        tvm_json='{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}',
        machine="x86_64",
        flags=_V3_FLAGS,
        cpu=CpuLimits(vector_bits=256, vector_registers=16, has_fma=True, converts_f16=True, l2_bytes=256 * 1024),
    ),
    Target(
        name="x86_64_v2",
        target_class=TargetClass.CPU,
        description="x86-64 baseline with SSE4.2",
        tvm_json='{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"}',
        machine="x86_64",
        flags=_V2_FLAGS,
        cpu=CpuLimits(vector_bits=128, vector_registers=16, has_fma=False, converts_f16=False, l2_bytes=256 * 1024),
    ),
    Target(
        name="aarch64_neon",
        target_class=TargetClass.CPU,
        description="64-bit Arm with NEON",
        tvm_json='{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon"]}',
        machine="aarch64",
        cpu=CpuLimits(vector_bits=128, vector_registers=32, has_fma=True, converts_f16=True),
    ),
    # Tags are TVM's, or as TVM would spell them (h200, l40s, b200, rtx-5090). Shared memory: CUDA C++ programming guide,
    # table of compute capabilities. Multiprocessors and L2 caches: NVIDIA's white papers of the Ampere, Ada, Hopper
    # (SXM5) and RTX Blackwell architectures and Blackwell's tuning guide; H200: as its driver says.
    _cuda(
        "nvidia/nvidia-h100",
        CudaLimits(arch="sm_90a", model="H100", multiprocessors=132, l2_bytes=50 * MIB, shared_per_block=227 * 1024),
    ),
    _cuda(
        "nvidia/nvidia-h200",
        CudaLimits(arch="sm_90a", model="H200", multiprocessors=132, l2_bytes=60 * MIB, shared_per_block=227 * 1024),
    ),
    _cuda(
        "nvidia/nvidia-b200",
        CudaLimits(arch="sm_100a", model="B200", multiprocessors=148, l2_bytes=126 * MIB, shared_per_block=227 * 1024),
    ),
    _cuda(
        "nvidia/nvidia-a100",
        CudaLimits(arch="sm_80", model="A100", multiprocessors=108, l2_bytes=40 * MIB, shared_per_block=163 * 1024),
    ),
    _cuda(
        "nvidia/nvidia-l40s",
        CudaLimits(arch="sm_89", model="L40S", multiprocessors=142, l2_bytes=96 * MIB, shared_per_block=99 * 1024),
    ),
    _cuda(
        "nvidia/geforce-rtx-5090",
        CudaLimits(arch="sm_120", model="RTX 5090", multiprocessors=170, l2_bytes=96 * MIB, shared_per_block=99 * 1024),
    ),
    _cuda(
        "nvidia/geforce-rtx-4090",
        CudaLimits(arch="sm_89", model="RTX 4090", multiprocessors=128, l2_bytes=72 * MIB, shared_per_block=99 * 1024),
    ),
    _cuda(
        "nvidia/geforce-rtx-3090",
        CudaLimits(arch="sm_86", model="RTX 3090", multiprocessors=82, l2_bytes=6 * MIB, shared_per_block=99 * 1024),
    ),
)


def target_named(name: str) -> Target:
    """The row called `name`: by its name, or by its tag with or without the vendor. Raises TargetError."""
    for target in TARGETS:
        tag = target.tag or target.name
        if name in (target.name, tag, tag.rpartition("/")[2]):
            return target
    known = ", ".join(target.tag or target.name for target in TARGETS)
    raise TargetError(f"unknown target {name!r}: expected one of {known}")


def cuda_target(device: str, capability: tuple[int, int]) -> Target:
    """The row of a GPU: by its name, as the driver gives it, else the first row of its architecture, whose kernels run
    there too. Raises TargetError where there is none.
    """
    rows = [target for target in TARGETS if target.cuda is not None and target.cuda.capability == capability]
    named = (target for target in rows if target.cuda is not None and target.cuda.model in device)
    found = next(named, rows[0] if rows else None)
    if found is None:
        known = ", ".join(sorted({target.cuda.arch for target in TARGETS if target.cuda is not None}))
        raise TargetError(f"no kernels for {device} (sm_{capability[0]}{capability[1]}): expected one of {known}")
    return found


def host_targets() -> tuple[Target, ...]:
    """CPU rows that this machine runs, best first. Raises TargetError where there is none."""
    found = matching_targets(platform.machine(), cpu_flags())
    if not found:
        raise TargetError(f"no CPU target runs on this machine ({platform.machine()}): name one with --target")
    return found


def refuse_other_machines(targets: Iterable[Target]) -> None:
    """Raises TargetError where a CPU row is for another instruction set than this machine's, whose C++ compiler links the kernels."""
    here = _spelled(platform.machine())
    for target in targets:
        if target.machine not in (None, here):
            raise TargetError(
                f"expected a target of this machine's instruction set, {here}, found {target.name} ({target.machine}): kernels are linked by "
                "this machine's C++ compiler. Compile the model on a machine of that kind, or name another target."
            )


def matching_targets(machine: str, flags: Iterable[str]) -> tuple[Target, ...]:
    """CPU rows for an instruction set and its features, best first."""
    present = frozenset(flags)
    spelled = _spelled(machine)
    return tuple(
        target
        for target in TARGETS
        if target.target_class is TargetClass.CPU and target.machine == spelled and target.flags <= present
    )


def _spelled(machine: str) -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cpu_flags(info: Path = CPU_INFO) -> frozenset[str]:
    """Feature names of the first processor in Linux's /proc/cpuinfo; empty where that is missing."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()
