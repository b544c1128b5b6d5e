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
class Target:
    """One row. `name` is an identifier: it is a part of symbol and file names.

    `tvm_json` is the TVM target; `machine` the instruction set as `platform.machine()` spells it, None where that does
    not matter; `flags` are the features, in /proc/cpuinfo's words, without which its code does not run.
    """

    name: str
    target_class: TargetClass
    description: str
    tvm_json: str
    machine: str | None = None
    flags: frozenset[str] = frozenset()
    cpu: CpuLimits | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a target's name must be an identifier, not {self.name!r}")
        if (self.target_class is TargetClass.CPU) != (self.cpu is not None):
            raise ValueError(f"target {self.name}: CPU rows, and only they, have CPU limits")

    @property
    def tvm(self) -> dict[str, Any]:
        """The TVM target as its dictionary."""
        parsed: dict[str, Any] = json.loads(self.tvm_json)
        return parsed


_V2_FLAGS = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})
_V3_FLAGS = _V2_FLAGS | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4_FLAGS = _V3_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

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
)


def target_named(name: str) -> Target:
    """The row called `name`. Raises TargetError."""
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise TargetError(f"unknown target {name!r}: expected one of {known}")


def host_targets() -> tuple[Target, ...]:
    """CPU rows that this machine runs, best first. Raises TargetError where there is none."""
    found = matching_targets(platform.machine(), cpu_flags())
    if not found:
        raise TargetError(f"no CPU target runs on this machine ({platform.machine()}): name one with --target")
    return found


def matching_targets(machine: str, flags: Iterable[str]) -> tuple[Target, ...]:
    """CPU rows for an instruction set and its features, best first."""
    present = frozenset(flags)
    spelled = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return tuple(
        target
        for target in TARGETS
        if target.target_class is TargetClass.CPU and target.machine == spelled and target.flags <= present
    )


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
