"""Runs a CPU kernel in a process of its own, without TVM: natively or under an emulator, with guarded memory and chosen tasks."""

import itertools
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swacompile.kernels.build import KernelVariant, build_cpu_object
from swacompile.kernels.reference import Array, Call
from swacompile.runtime.cpp import tvm_ffi_headers
from swacompile.target import Target

SOURCE = Path(__file__).with_name("kernel_host.c")
DTYPE_CODES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "uint8": (1, 8), "int64": (0, 64)}
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedResult:
    """`scratch_bytes` is the most workspace that was held at one time."""

    output: Array
    scratch_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedKernel:
    """A program around one kernel. `emulator` is what runs it, nothing for this machine's own code."""

    program: Path
    emulator: tuple[str, ...] = ()

    def run(
        self,
        call: Call,
        *,
        tasks: int = 2,
        place: str = "end",
        bshd: bool = False,
        claimed_queries: int | None = None,
        first_key: int = 0,
    ) -> HostedResult:
        """The output (B,H,S,V), asked for in BSHD order where `bshd`. Fails the test where the program does, by a signal too.

        `claimed_queries` lies about the number of queries in query and output. Of a single key/value head, keys and values before
        `first_key` have no memory: with place "start" they lie in unreadable pages.
        """
        shape = (*call.query.shape[:3], call.value.shape[3])
        output = _nan(shape, call.query.dtype, bshd=bshd)
        number = next(_numbers)
        source = self.program.with_name(f"call{number}")
        target = self.program.with_name(f"output{number}")
        source.write_bytes(_serialise(call, output, claimed_queries, first_key))
        command = [*self.emulator, str(self.program), str(source), str(target), str(tasks), place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"kernel host exited with {done.returncode}: {done.stderr}"
        flat = np.frombuffer(target.read_bytes(), dtype=output.dtype)
        stored = flat.reshape(output.transpose(0, 2, 1, 3).shape if bshd else shape)
        source.unlink(), target.unlink()
        return HostedResult(output=stored.transpose(0, 2, 1, 3) if bshd else stored, scratch_bytes=int(done.stdout))


def build_host(variant: KernelVariant, target: Target, folder: Path) -> HostedKernel:
    """Build kernel and program. Skips the test where this machine lacks a compiler or an emulator for the target."""
    compiler, emulator = "cc", ()
    if target.machine == "aarch64":
        compiler, emulator = "aarch64-linux-gnu-gcc", ("qemu-aarch64",)
    for program in (compiler, *emulator):
        if shutil.which(program) is None:
            pytest.skip(f"{target.name}: {program} is not installed")
    (symbol,) = build_cpu_object([variant], target, folder / "kernel.o")
    program_path = folder / "kernel_host"
    command = [
        compiler,
        "-O1",
        "-static",
        f"-DKERNEL={symbol}",
        f"-I{tvm_ffi_headers()}",
        str(SOURCE),
        str(folder / "kernel.o"),
    ]
    subprocess.run([*command, "-lm", "-o", str(program_path)], check=True)
    return HostedKernel(program=program_path, emulator=emulator)


def _nan(shape: tuple[int, ...], dtype: "np.dtype[Any]", *, bshd: bool) -> Array:
    if bshd:
        batch, heads, length, size = shape
        return np.full((batch, length, heads, size), np.nan, dtype=dtype).transpose(0, 2, 1, 3)
    return np.full(shape, np.nan, dtype=dtype)


def _serialise(call: Call, output: Array, claimed_queries: int | None, first_key: int) -> bytes:
    """See kernel_host.c."""
    element = call.query.dtype
    bias = call.bias
    if bias is not None:
        bias = np.broadcast_to(bias, (*call.query.shape[:3], call.key.shape[2]))
    operands: list[tuple[Array | None, int, np.dtype[Any]]] = [
        (call.query, 4, element),
        (call.key, 4, element),
        (call.value, 4, element),
        (call.key_padding, 2, np.dtype(np.uint8)),
        (call.segments, 2, np.dtype(np.int64)),
        (call.sinks, 1, element),
        (bias, 4, element),
        (call.alibi_slopes, 1, np.dtype(np.float32)),
        (output, 4, element),
    ]
    parts = []
    for array, rank, dtype in operands:
        claimed = claimed_queries if array is call.query or array is output else None
        missing = first_key if array is call.key or array is call.value else 0
        parts.append(_tensor(array, rank, dtype, writable=array is output, claimed_queries=claimed, missing=missing))
    parts.append(struct.pack("<5q", call.left, call.right, call.offset, call.chunk_size, int(call.zeroed)))
    parts.append(struct.pack("<2d", call.scale, call.softcap))
    return b"".join(parts)


def _tensor(
    array: Array | None,
    rank: int,
    dtype: "np.dtype[Any]",
    *,
    writable: bool,
    claimed_queries: int | None,
    missing: int,
) -> bytes:
    """See kernel_host.c. `missing` rows of the third axis are left out at the start, which is where the first element then is not."""
    if array is None:
        array = np.zeros((0,) * rank, dtype=dtype)
    array = np.asarray(array, dtype=dtype)
    code, bits = DTYPE_CODES[array.dtype.name]
    size = array.dtype.itemsize
    strides = [stride // size for stride in array.strides]
    extent = 0 if array.size == 0 else 1 + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
    memory = np.lib.stride_tricks.as_strided(array, shape=(extent,), strides=(size,)).tobytes()
    absent = missing * array.strides[2] if missing else 0
    head = struct.pack("<4i", rank, code, bits, int(writable))
    shape = list(array.shape)
    if claimed_queries is not None:
        shape[2] = claimed_queries
    sizes = struct.pack(f"<{2 * rank}q2q", *shape, *strides, -absent, len(memory) - absent)
    return head + sizes + memory[absent:]
