"""Builds CUDA kernel libraries: TIRx to CUDA text to a cubin inside a shared library. Needs nvcc and a C compiler, no
GPU and no driver.
"""

import ctypes
import importlib.resources
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swacompile.runtime.cpp import tvm_ffi_headers
from swacompile.runtime.cuda.library import Kernel, write_manifest
from swacompile.runtime.cuda.table import INCLUDE, kernel_table
from swacompile.schedules.cuda.arch import CudaArch
from swacompile.schedules.cuda.spec import WgmmaConfig

DRIVER = "libcuda.so.1"
CUDA_RUNTIME = "libcudart.so.13"
_NVCC_FLAGS = ("-cubin", "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "-diag-suppress=177")


class CudaBuildError(Exception):
    """A CUDA kernel library could not be built; the message says what is missing or what the compiler said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """What ptxas said about one kernel."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    barriers: int
    shared_bytes: int
    """Static shared memory of a thread block."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLibrary:
    path: Path
    arch: CudaArch
    reports: tuple[KernelReport, ...]
    cubin: bytes
    source: str


def build_library(
    functions: Mapping[str, Any], arch: CudaArch, path: Path, *, table: str | None = None
) -> BuiltLibrary:
    """Compile TIRx functions, as a family's `trace` returns them, into one shared library with a cubin for `arch`.

    `table` is C++ source to link in: runtime/cuda/table.py.
    Raises CudaBuildError where nvcc is missing or refuses, or where the result holds CUDA text instead of a cubin.
    """
    import tvm

    load_cuda_runtime()
    compiler = _Compiler(arch)
    target = tvm.target.Target({"kind": "cuda", "arch": arch.name}, host="llvm")
    with compiler.installed():
        module = tvm.compile(tvm.IRModule(dict(functions)), target=target, tir_pipeline="tirx")
    if not compiler.cubin:
        raise CudaBuildError(
            f"{path.name}: TVM did not ask for a cubin, so the library would hold CUDA text; is {CUDA_RUNTIME} loaded?"
        )
    with tempfile.TemporaryDirectory(prefix="swacompile-") as folder:
        source = Path(folder, "cuda_kernel_list.cc")
        source.write_text(table or "")
        includes = [f"-I{INCLUDE}", f"-I{tvm_ffi_headers()}", "-std=c++17"]
        module.export_library(str(path), addons=[str(source)] if table else None, options=includes if table else None)
    reports = parse_ptxas(compiler.log)
    return BuiltLibrary(path=path, arch=arch, reports=reports, cubin=compiler.cubin, source=compiler.source)


def build_kernels(kernels: Sequence[Kernel], arch: CudaArch, path: Path) -> BuiltLibrary:
    """Build attention kernels, the small kernels that theirs need, and the manifest beside the library."""
    from swacompile.schedules.cuda import combine, mma, wgmma

    functions: dict[str, Any] = {}
    for kernel in kernels:
        spec, config, features = kernel.spec, kernel.config, kernel.spec.features
        functions |= wgmma.trace(spec, config) if isinstance(config, WgmmaConfig) else mma.trace(spec, config)
        if features.split:
            functions |= [combine.trace_combine(spec.dtype, spec.value_size, sinks=features.sinks, lse=features.lse)]
        if features.zeroed:
            functions |= [combine.trace_value_sum(spec.dtype, spec.value_size, key_padding=features.key_padding)]
    built = build_library(functions, arch, path, table=kernel_table(kernels, arch))
    write_manifest(path, arch.name, tuple(kernels))
    return built


class _Compiler:
    """TVM's hook for compiling CUDA text: nvcc, with ptxas' report kept."""

    def __init__(self, arch: CudaArch) -> None:
        self._arch = arch
        self.cubin = b""
        self.log = ""
        self.source = ""

    @contextmanager
    def installed(self) -> Iterator[None]:
        import tvm_ffi

        earlier: Callable[..., Any] | None = tvm_ffi.get_global_func("tvm_callback_cuda_compile", allow_missing=True)
        tvm_ffi.register_global_func("tvm_callback_cuda_compile", self._compile, override=True)
        try:
            yield
        finally:
            if earlier is None:
                tvm_ffi.registry.remove_global_func("tvm_callback_cuda_compile")
            else:
                tvm_ffi.register_global_func("tvm_callback_cuda_compile", earlier, override=True)

    def _compile(self, source: Any, *_options: Any) -> bytearray:
        self.source = str(source)
        with tempfile.TemporaryDirectory(prefix="swacompile-") as folder:
            text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
            text.write_text(self.source)
            command = [find_nvcc(), *_NVCC_FLAGS, *self._arch.nvcc_flags, "-Xptxas", "-v", "-o", str(cubin), str(text)]
            done = subprocess.run(command, capture_output=True, text=True)
            self.log = done.stdout + done.stderr
            if done.returncode:
                raise CudaBuildError(f"nvcc for {self._arch.name} failed:\n{self.log[-4000:]}")
            self.cubin = cubin.read_bytes()
        return bytearray(self.cubin)


def find_nvcc() -> str:
    """Path of nvcc: on PATH, or under $CUDA_HOME or /usr/local/cuda."""
    for candidate in (shutil.which("nvcc"), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return candidate
    raise CudaBuildError("building CUDA kernels needs nvcc 12.8 or newer on PATH or under CUDA_HOME; none was found")


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas(log: str) -> tuple[KernelReport, ...]:
    """Read `ptxas -v`. Dynamic shared memory is not in it: see a config's `shared_bytes`."""
    reports = []
    warnings = tuple(line.strip() for line in log.splitlines() if "(C75" in line or "setmaxnreg" in line)
    for part in _ENTRY.split(log)[1:]:
        if re.fullmatch(r"\w+", part):
            name = part
            continue
        stack, used, shared = _STACK.search(part), _USED.search(part), _SHARED.search(part)
        if stack is None or used is None:
            raise CudaBuildError(f"ptxas said nothing on {name}'s registers:\n{part[:400]}")
        reports.append(
            KernelReport(
                kernel=name,
                registers=int(used[1]),
                stack_bytes=int(stack[1]),
                spill_bytes=int(stack[2]) + int(stack[3]),
                barriers=int(used[2] or 0),
                shared_bytes=int(shared[1]) if shared else 0,
                warnings=warnings,
            )
        )
    return tuple(reports)


def load_cuda_runtime() -> None:
    """Load TVM's CUDA runtime, which compiles and embeds device code, also where no driver is installed.

    Without a driver a stub of libcuda.so.1 takes its place in this process: every call in it fails, and building
    makes none.
    """
    import tvm

    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    for name in (CUDA_RUNTIME, f"/usr/local/cuda/lib64/{CUDA_RUNTIME}"):
        if _load(name):
            break
    else:
        raise CudaBuildError(f"{CUDA_RUNTIME} was not found: install CUDA 13's runtime (pip: nvidia-cuda-runtime)")
    if not _load(DRIVER):
        _load_stub(library)
    if not _load(str(library)):
        raise CudaBuildError(f"{library} does not load: is it from the CUDA build of apache-tvm?")


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_stub(library: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CudaBuildError(
            f"without {DRIVER} building needs a C compiler (cc, gcc or clang) for a stub of it; none was found"
        )
    source = importlib.resources.files("swacompile.kernels") / "driver_stub.c"
    with tempfile.TemporaryDirectory(prefix="swacompile-") as folder:
        stub = Path(folder, DRIVER)
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-xc", "-", "-o", str(stub)],
            input=source.read_text(),
            text=True,
            check=True,
        )
        ctypes.CDLL(str(stub), ctypes.RTLD_GLOBAL)
