"""Build, into the cache, the operator for the torch that is installed, and kernels that nobody built yet."""

import logging
import time
from importlib import metadata
from pathlib import Path

import torch

from swacompile.runtime.cache import cache_folder, fingerprint
from swacompile.runtime.cpp import link
from swacompile.target import Target, host_targets
from swacompile.workload import DType

log = logging.getLogger(__name__)

_RUNTIME = Path(__file__).parents[1]
_SOURCES = (*sorted(Path(__file__).parent.glob("*.cc")), _RUNTIME / "host" / "instruction_sets.cc")
_HEADERS = tuple(path for folder in ("torch_op", "kernel_library", "host") for path in (_RUNTIME / folder).glob("*.h"))
OPERATOR_ABI = f"torch-{torch.__version__}"
"""The operator's C++ is bound to one version of torch."""


def operator_name() -> str:
    """File name of the operator's library: it changes with the sources and with torch."""
    return f"libswacompile_torch-{torch.__version__}-{fingerprint((*_SOURCES, *_HEADERS))}.so"


def operator_library() -> Path:
    """The operator's library, compiled where the cache does not hold it. Raises ToolchainError, OutputError."""
    path = cache_folder() / operator_name()
    if not path.is_file():
        log.warning("compiling the operator for torch %s, once: some 20 seconds", torch.__version__)
        start = time.perf_counter()
        build_operator(path)
        log.info("compiled %s in %.1f s", path, time.perf_counter() - start)
    return path


def build_operator(output: Path) -> Path:
    """Compile the operator for the torch that is installed. Raises ToolchainError."""
    from swacompile.runtime.cpp import tvm_ffi_headers

    installed = Path(torch.__file__).parent
    includes = (
        *(_RUNTIME / folder for folder in ("torch_op", "kernel_library", "host")),
        tvm_ffi_headers(),
        installed / "include",
        installed / "include" / "torch" / "csrc" / "api" / "include",
    )
    string_abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = (f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl")
    exports = Path(__file__).with_name("exports.map")
    return link(_SOURCES, output, exports=exports, includes=includes, flags=("-std=c++20", string_abi, *libraries))


def kernel_library(dtype: DType, head_size: int, value_size: int) -> Path:
    """A library with the kernel for this machine, built where the cache does not hold it.

    Raises ImportError where TVM is missing, ToolchainError, TargetError or ValueError where it cannot be built.
    """
    target = host_targets()[0]
    path = cache_folder() / _kernel_file(dtype, head_size, value_size, target)
    if not path.is_file():
        from swacompile.kernels.build import KernelVariant
        from swacompile.runtime.kernel_link import build_kernel_library

        variant = KernelVariant(dtype=dtype, head_size=head_size, value_size=value_size)
        log.warning("building the kernel %s, once: some 10 seconds", variant.function_name(target))
        start = time.perf_counter()
        build_kernel_library((variant,), (target,), path)
        log.info("built %s in %.1f s", path, time.perf_counter() - start)
    return path


def _kernel_file(dtype: DType, head_size: int, value_size: int, target: Target) -> str:
    package = _RUNTIME.parent
    sources = [
        *(package / "schedules" / "cpu").glob("*.py"),
        package / "kernels" / "build.py",
        package / "target.py",
        *(_RUNTIME / "kernel_library").glob("*.*"),
        *(_RUNTIME / "host").glob("*.*"),
    ]
    made_by = fingerprint((path for path in sources if path.is_file()), tvm_version())
    return f"kernels-{dtype}-d{head_size}-v{value_size}-{target.name}-{made_by}.so"


def tvm_version() -> str:
    """Version of the compiler; "" without one, which finds no kernel that one has built. Raises ImportError."""
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            "TVM is not installed, so no kernel can be built: install apache-tvm, or compile the model on a machine "
            "that has it and open the folder here with swacompile.load"
        ) from error
