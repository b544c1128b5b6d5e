"""The operator's CUDA kernel without a GPU: what it launches, and with which arguments, on stand-ins that compute on the CPU."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from swacompile.errors import TargetError  # noqa: E402  after the check for torch
from swacompile.runtime.cpp import find_compiler, link, tvm_ffi_headers  # noqa: E402
from swacompile.runtime.torch_op import build  # noqa: E402
from swacompile.runtime.torch_op.cuda_build import TVM_FFI, arch_of, kernels_for  # noqa: E402
from swacompile.schedules.cuda.arch import CUDA_ARCHS  # noqa: E402
from swacompile.schedules.cuda.choose import Shape  # noqa: E402
from swacompile.schedules.cuda.spec import Features, KernelSpec  # noqa: E402
from tests.runtime.cases import TOLERANCE  # noqa: E402
from tests.runtime.cuda_host import RUN  # noqa: E402
from tests.runtime.test_torch_op import NO_LEFT_EDGE  # noqa: E402

pytestmark = pytest.mark.torch

HERE = Path(__file__).parent
STAND_INS = {
    "libcuda.so.1": """
        int cuDeviceGet(int* device, int index) { *device = index; return 0; }
        int cuDeviceGetAttribute(int* value, int attribute, int device) {
          *value = attribute == 16 ? 132 : attribute == 38 ? 52428800 : attribute == 75 ? 9 : 0;
          return device;
        }""",
    "libtorch_cuda.so": """
        int aoti_torch_get_current_cuda_stream(int index, void** stream) { *stream = (void*)0x77; return index; }""",
    "libcudart.so.13": "int cudart;",
    "libtvm_runtime.so": "int runtime;",
    "libtvm_runtime_cuda.so": "int runtime_cuda;",
}


def compile_c(text: str, output: Path, *flags: str) -> None:
    command = [find_compiler(), "-x", "c", "-O1", "-fPIC", *flags, "-o", str(output), "-"]
    subprocess.run(command, input=text, text=True, check=True, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA has streams of its own, for which nothing can stand in")
    folder = tmp_path_factory.mktemp("cuda_host")
    for name, text in STAND_INS.items():
        compile_c(text, folder / name, "-shared", f"-Wl,-soname,{name}")
    (folder / TVM_FFI).symlink_to(tvm_ffi_headers().parent / "lib" / TVM_FFI)
    headers = f"-I{tvm_ffi_headers()}"
    compile_c(
        (HERE / "stand_in_kernel.c").read_text(),
        folder / "kernel.o",
        "-c",
        headers,
        "-DSYMBOL=stand_in",
        "-DELEMENT_BITS=32",
    )
    package = Path(build.__file__).parents[1]
    subprocess.run(
        [find_compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", headers, f"-I{package / 'kernel_library'}",
         str(HERE / "stand_in_cuda.cc"), str(folder / "kernel.o"), "-o", str(folder / "kernels.so")],
        check=True, timeout=300,
    )  # fmt: skip
    installed = Path(torch.__file__).parent
    link(
        [
            HERE / "cuda_host.cc",
            *(package / "torch_op" / f"{name}.cc" for name in ("cuda_kernels", "cuda_runtime", "op")),
        ],
        folder / "operator.so",
        exports=package / "torch_op" / "exports.map",
        includes=(
            package / "torch_op",
            package / "kernel_library",
            tvm_ffi_headers(),
            installed / "include",
            installed / "include" / "torch" / "csrc" / "api" / "include",
        ),
        flags=("-std=c++20", "-O0", f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"),
    )
    command = [sys.executable, "-m", "tests.runtime.cuda_host", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [case.name for case in RUN])
def test_launches_compute_the_reference(name: str, report: dict[str, Any]) -> None:
    error, off_by_one = report["errors"][name]
    assert error < TOLERANCE["float32"]
    if name not in NO_LEFT_EDGE:
        assert off_by_one > 10 * TOLERANCE["float32"]


def test_what_a_kernel_cannot_read_is_copied(report: dict[str, Any]) -> None:
    error, off_by_one = report["scattered"]
    assert error < TOLERANCE["float32"] < off_by_one


def test_descriptors_of_recurring_tensors_are_kept(report: dict[str, Any]) -> None:
    calls = report["described"]
    known = [{place for _, place in calls[:number]} for number in range(len(calls))]
    recurring = [
        (before, now) for number, (before, now) in enumerate(itertools.pairwise(calls), 1) if now[1] in known[number]
    ]
    assert recurring, "the allocator gave no memory twice: the test tells nothing"
    assert all(before[0] == now[0] > 0 for before, now in recurring)


def test_says_what_is_missing(report: dict[str, Any]) -> None:
    messages = report["messages"]
    missing = "no CUDA kernel for float32, head sizes D={0}, V={0} on sm_90 is loaded: load this library from"
    assert missing.format(16) in messages["early"]
    assert missing.format(12) in messages["head size"]
    assert "scale: expected more than 0 on CUDA, found -1" in messages["scale"]
    assert messages["offset"].endswith("where the window is open to that side, found an offset of 536870912")
    assert messages["closed"] == "no error", "no query of these sees a key"


def test_architectures_of_gpus() -> None:
    found = {(major, minor): arch_of(major, minor).name for major, minor in ((9, 0), (8, 0), (8, 7), (8, 9), (12, 1))}
    assert found == {(9, 0): "sm_90a", (8, 0): "sm_80", (8, 7): "sm_86", (8, 9): "sm_89", (12, 1): "sm_120"}
    with pytest.raises(TargetError, match="no CUDA kernels for a GPU of sm_75: expected one that runs code for sm_80"):
        arch_of(7, 5)


def test_kernels_for_few_queries_go_along() -> None:
    spec = KernelSpec(dtype="bfloat16", head_size=64, value_size=64, features=Features(sinks=True))
    names = [kernel.spec.symbol for kernel in kernels_for(spec, CUDA_ARCHS["sm_90a"], Shape(group=8, band=128))]
    assert names == ["swa_bf16_d64_v64_sinks", "swa_bf16_d64_v64_sinks_split"]
    zeroed = KernelSpec(dtype="bfloat16", head_size=64, value_size=64, features=Features(zeroed=True))
    assert len(kernels_for(zeroed, CUDA_ARCHS["sm_90a"], Shape())) == 1
