"""CUDA kernels for the operator: which a call needs, building those that nobody built yet, and TVM's runtime under them."""

import ctypes
import importlib.util
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from swacompile.errors import ArtifactError, TargetError
from swacompile.runtime.cache import cache_folder, fingerprint
from swacompile.runtime.cuda.library import Kernel
from swacompile.runtime.cuda.table import feature_bits
from swacompile.runtime.torch_op.build import tvm_version
from swacompile.schedules.cuda.arch import CUDA_ARCHS, CudaArch
from swacompile.schedules.cuda.choose import Shape, choose
from swacompile.schedules.cuda.spec import DTYPES, KernelSpec

log = logging.getLogger(__name__)

TVM_FFI, TVM_RUNTIME = "libtvm_ffi.so", ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
_PACKAGE = Path(__file__).parents[2]


def arch_of(major: int, minor: int) -> CudaArch:
    """The architecture whose code a GPU of compute capability `major`.`minor` runs best. Raises TargetError."""
    exact = CUDA_ARCHS.get(f"sm_{major}{minor}a")
    if exact is not None:
        return exact
    plain = [arch for name, arch in CUDA_ARCHS.items() if name[3:-1] == str(major) and int(name[-1:], 36) <= minor]
    if not plain:
        known = ", ".join(CUDA_ARCHS)
        raise TargetError(f"no CUDA kernels for a GPU of sm_{major}{minor}: expected one that runs code for {known}")
    return max(plain, key=lambda arch: arch.name)


def kernels_for(spec: KernelSpec, arch: CudaArch, shape: Shape) -> tuple[Kernel, ...]:
    """The kernels that calls with these features use: for many queries, and for few, whose keys are split.

    Raises ValueError where no tiles fit.
    """
    specs = [spec]
    if not spec.features.zeroed:
        specs.append(replace(spec, features=replace(spec.features, split=True)))
    return tuple(Kernel(spec=each, config=choose(each, arch, shape)) for each in specs)


def cuda_kernel_library(spec: KernelSpec, arch: CudaArch, shape: Shape) -> Path:
    """A library with the kernels for these calls, built where the cache does not hold it.

    Raises ImportError where TVM is missing, CudaBuildError where nvcc is, ValueError where no tiles fit.
    """
    kernels = kernels_for(spec, arch, shape)
    path = cache_folder() / _file_name(spec, arch, kernels)
    if not path.is_file():
        from swacompile.kernels.build_cuda import build_kernels

        log.warning("building the CUDA kernel %s for %s, once: some 20 seconds", spec.symbol, arch.name)
        start = time.perf_counter()
        aside = path.with_name(f".{path.name}")
        build_kernels(kernels, arch, aside)
        aside.replace(path)
        log.info("built %s in %.1f s", path, time.perf_counter() - start)
    return path


def _file_name(spec: KernelSpec, arch: CudaArch, kernels: tuple[Kernel, ...]) -> str:
    sources = (
        *(_PACKAGE / "schedules" / "cuda").glob("*.py"),
        _PACKAGE / "kernels" / "build_cuda.py",
        _PACKAGE / "runtime" / "cuda" / "table.py",
        _PACKAGE / "runtime" / "kernel_library" / "cuda_library.h",
    )
    made_by = fingerprint(sources, tvm_version(), *(repr(kernel.config) for kernel in kernels))
    sizes = f"d{spec.head_size}-v{spec.value_size}"
    return f"cuda-{DTYPES[spec.dtype]}-{sizes}-{feature_bits(spec.features):x}-{arch.name}-{made_by}.so"


def runtime_folder(carried: Path | None = None) -> Path:
    """Folder of TVM's two runtime libraries: that of the installed TVM, else `carried`. Loads libtvm_ffi.so.

    Raises ArtifactError where there is neither.
    """
    # Python's own libtvm_ffi.so goes before a carried one: a process must not have two.
    ffi = _library_folder("tvm_ffi") or carried
    if ffi is not None and (ffi / TVM_FFI).is_file():
        ctypes.CDLL(str(ffi / TVM_FFI), ctypes.RTLD_GLOBAL)
    folder = next((path for path in (_library_folder("tvm"), carried) if _has_runtime(path)), None)
    if folder is None:
        raise ArtifactError(
            f"CUDA kernels need TVM's runtime: expected {' and '.join(TVM_RUNTIME)} in "
            f"{carried or 'the installed package'}, found none. Install apache-tvm or open a compiled folder."
        )
    return folder


def carry_runtime(folder: Path) -> tuple[str, ...]:
    """Copy what runs CUDA kernels without TVM into a compiled folder; gives the files' names. Raises ArtifactError."""
    source = runtime_folder()
    ffi = _library_folder("tvm_ffi")
    assert ffi is not None  # TVM needs it
    for library in (ffi / TVM_FFI, *(source / name for name in TVM_RUNTIME)):
        shutil.copy(library, folder)
    return (TVM_FFI, *TVM_RUNTIME)


def _library_folder(package: str) -> Path | None:
    """A package's folder of libraries, found without importing it."""
    spec = importlib.util.find_spec(package)
    locations = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next((path for path in (Path(location, "lib") for location in locations) if path.is_dir()), None)


def _has_runtime(folder: Path | None) -> bool:
    return folder is not None and all((folder / name).is_file() for name in TVM_RUNTIME)
