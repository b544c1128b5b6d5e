"""Torch programs on the GPU at hand: torch.compile, compiled folders, AOTInductor. Kernels are built, so TVM and nvcc must be there."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch._dynamo.utils import counters  # noqa: E402  after the check for torch

import swacompile  # noqa: E402
import swacompile.torch as swacompile_torch  # noqa: E402
from swacompile.runtime.cpp import find_compiler  # noqa: E402
from swacompile.target import cuda_target  # noqa: E402
from tests.runtime.test_torch_op_cuda_program import Layers  # noqa: E402
from tests.test_torch_aoti import build_host  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

WINDOW, LENGTHS = 20, (64, 100, 333)
DTYPE, TOLERANCE = torch.float16, 2e-3  # of results up to 2.3
CUDA = torch.device("cuda")
FRESH = """
import sys
sys.modules.update(dict.fromkeys(("tvm", "tvm_ffi")))  # as if they were not installed
import torch, swacompile, swacompile.torch
import torch._inductor.codecache  # torch 2.10 forgets it
folder, package, given, found = sys.argv[1:]
model = swacompile.load(folder)
if package:
    model = torch._inductor.aoti_load_package(package)
torch.save([model(torch.load(given).cuda()).cpu()], found)
print("kernel calls", swacompile.torch.call_count())
"""


def layers(window: int = WINDOW) -> "torch.nn.Module":
    torch.manual_seed(0)
    made = Layers(window, window, size=64)
    made.inside.weight.data *= 2  # so that the softmax is far from even
    return made.to(DTYPE).eval()


def inputs(length: int) -> "torch.Tensor":
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length)).to(DTYPE)


def check(output: "torch.Tensor", x: "torch.Tensor") -> None:
    """Against float64 on the CPU, and against a window that is one key wider."""
    with torch.no_grad():
        right, wide = (layers(window).double()(x.cpu().double()) for window in (WINDOW, WINDOW + 1))
    assert (output.detach().cpu().double() - right).abs().max() < TOLERANCE
    assert (output.detach().cpu().double() - wide).abs().max() > 10 * TOLERANCE


def graphs_compiled(backend: str, mode: str | None = None) -> int:
    """How many graphs are compiled for a model at several lengths; results must be right, also the second time."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layers().to(CUDA), backend=backend, fullgraph=True, mode=mode)
    with torch.no_grad():
        for length in (*LENGTHS, *LENGTHS):
            x = inputs(length).to(CUDA)
            check(compiled(x), x)
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_compile_by_name_compiles_no_more_often(mode: str | None) -> None:
    calls = swacompile_torch.call_count()
    number = graphs_compiled("swacompile", mode)
    assert swacompile_torch.call_count() > calls
    calls = swacompile_torch.call_count()
    assert number == graphs_compiled("inductor", mode)
    assert swacompile_torch.call_count() == calls


def test_gradients_through_torch_compile() -> None:
    def gradients(run: Any, model: "torch.nn.Module", x: "torch.Tensor") -> list["torch.Tensor"]:
        x = x.clone().requires_grad_()
        run(x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters())]

    torch._dynamo.reset()
    model, x = layers().to(CUDA, torch.float32), inputs(LENGTHS[0]).to(CUDA, torch.float32)
    calls = swacompile_torch.call_count()
    found = gradients(torch.compile(model, backend="swacompile", fullgraph=True), model, x)
    assert swacompile_torch.call_count() > calls
    exact = copy.deepcopy(model).cpu().double()
    exact.zero_grad()
    for gradient, expected in zip(found, gradients(exact, exact, x.cpu().double()), strict=True):
        assert (gradient.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that was exported on the CPU, compiled for this GPU only."""
    folder = tmp_path_factory.mktemp("gpu")
    length = torch.export.Dim.DYNAMIC(min=2)
    program = torch.export.export(layers(), (inputs(LENGTHS[0]),), dynamic_shapes=({1: length},))
    torch.export.save(program, folder / "layers.pt2")
    target = cuda_target(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    swacompile.compile(folder / "layers.pt2", folder / "layers.swa", targets=[target])
    yield folder / "layers.swa"


def check_process(command: list[object], folder: Path, package: Path | str, work: Path) -> None:
    for length in LENGTHS[:2]:
        x, given, found = inputs(length), work / "inputs.pt", work / "outputs.pt"
        torch.save([x] if "-c" not in command else x, given)
        done = subprocess.run(
            [*map(str, command), str(folder), str(package), str(given), str(found)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "kernel calls 2" in done.stdout
        check(torch.load(found)[0], x)


def test_a_fresh_process_runs_the_folder_without_tvm(compiled: Path, tmp_path: Path) -> None:
    check_process([sys.executable, "-c", FRESH], compiled, "", tmp_path)


def test_fresh_processes_run_the_package(compiled: Path, tmp_path: Path) -> None:
    """AOTInductor's, in Python and in C++ without Python."""
    package = tmp_path / "layers.aoti.pt2"
    torch._inductor.aoti_compile_and_package(swacompile.load(compiled).program, package_path=str(package))
    check_process([sys.executable, "-c", FRESH], compiled, package, tmp_path)
    if shutil.which("g++") or shutil.which("c++"):
        check_process([build_host(find_compiler(), tmp_path)], compiled, package, tmp_path)
