"""The library with the stand-in kernel, built once for all tests that ask for it."""

import subprocess
from pathlib import Path

import pytest

from swacompile.kernels.build import KernelVariant
from swacompile.runtime.cpp import find_compiler, tvm_ffi_headers
from swacompile.runtime.ort_library import LibraryKernel, build_ort_library
from swacompile.target import Target, host_targets
from swacompile.workload import DType

SOURCE = Path(__file__).with_name("stand_in_kernel.c")
SIZES = {DType.F32: ((16, 16), (24, 8), (16, 8)), DType.F16: ((16, 16),), DType.BF16: ((16, 16),)}


def stand_in_object(variant: KernelVariant, target: Target, folder: Path) -> Path:
    """Compile the stand-in kernel under the symbol of a real one."""
    made = folder / f"{variant.symbol(target)}.o"
    bits = (
        ["-DELEMENT_BITS=16", "-DBRAIN"]
        if variant.dtype is DType.BF16
        else [f"-DELEMENT_BITS={variant.dtype.bytes * 8}"]
    )
    flags = ["-x", "c", "-O2", "-fPIC", "-c", f"-I{tvm_ffi_headers()}", f"-DSYMBOL={variant.symbol(target)}", *bits]
    subprocess.run([find_compiler(), *flags, str(SOURCE), "-o", str(made)], check=True, timeout=60)
    return made


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for every dtype and the head sizes of the cases, for all CPU targets of this kind of machine."""
    folder = tmp_path_factory.mktemp("stand_in")
    host = host_targets()[0]
    kernels, objects = [], []
    for dtype, sizes in SIZES.items():
        for head_size, value_size in sizes:
            variant = KernelVariant(dtype=dtype, head_size=head_size, value_size=value_size)
            kernels.append(LibraryKernel(variant=variant, target=host))
            objects.append(stand_in_object(variant, host, folder))
    return build_ort_library(objects, kernels, folder / "libstand_in.so")
