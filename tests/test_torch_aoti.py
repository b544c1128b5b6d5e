"""AOTInductor: a rewritten program, packaged, in a fresh Python process and in a C++ program without Python."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import swacompile  # noqa: E402
from swacompile.errors import ToolchainError  # noqa: E402
from swacompile.runtime.cpp import find_compiler  # noqa: E402
from tests.frontends.test_fx_rewrite import LENGTH, OTHER_LENGTH, Layer, export, inputs, widened  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
EXAMPLE = Path(__file__).parents[1] / "examples" / "aoti_cpp"
FRESH = """
import sys, torch, swacompile, swacompile.torch
import torch._inductor.codecache  # torch 2.10 forgets it
folder, package, given, found = sys.argv[1:]
swacompile.torch.add_kernels(folder + "/libswacompile_kernels.so")
model = torch._inductor.aoti_load_package(package)
torch.save([model(*torch.load(given))], found)
print("kernel calls", swacompile.torch.call_count())
"""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A compiled folder and its program as a package, and the source for comparison."""

    source: Any
    compiled: Any
    folder: Path
    package: Path

    def check(self, command: list[object], work: Path) -> None:
        """Run `command folder package inputs outputs` at two lengths, and compare with the source and with a wider window."""
        for length in (LENGTH, OTHER_LENGTH):
            given, found = work / "inputs.pt", work / "outputs.pt"
            values = inputs(length)
            torch.save(list(values), given)
            done = subprocess.run(
                [*map(str, command), str(self.folder), str(self.package), str(given), str(found)],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "kernel calls 1" in done.stdout
            (output,) = torch.load(found)
            valid = values[1].bool()
            with torch.no_grad():
                right, wide = (program.module()(*values) for program in (self.source, widened(self.compiled.program)))
            assert (output - right)[valid].abs().max() < MODEL_ATOL
            assert (output - wide)[valid].abs().max() > 1e-2


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packaged]:
    folder = tmp_path_factory.mktemp("aoti")
    source = export(Layer())
    torch.export.save(source, folder / "layer.pt2")
    swacompile.compile(folder / "layer.pt2", folder / "layer.swa")
    compiled = swacompile.load(folder / "layer.swa")
    package = folder / "layer.aoti.pt2"
    torch._inductor.aoti_compile_and_package(compiled.program, package_path=str(package))
    yield Packaged(source, compiled, folder / "layer.swa", package)


def test_a_fresh_process_runs_the_package(packaged: Packaged, tmp_path: Path) -> None:
    packaged.check([sys.executable, "-c", FRESH], tmp_path)


def test_a_cpp_program_runs_the_package(packaged: Packaged, tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    packaged.check([build_host(compiler, tmp_path)], tmp_path)


def build_host(compiler: str, work: Path) -> Path:
    """The example's program: by CMake where it is installed, else by the compiler alone.

    CMake's package of a torch with CUDA asks for CUDA's own compiler, which these tests do not need.
    """
    torch_folder = Path(torch.__file__).parent
    if shutil.which("cmake") and torch.version.cuda is None:
        made = work / "build"
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        subprocess.run(["cmake", "-S", EXAMPLE, "-B", made, prefix], check=True, capture_output=True, timeout=120)
        subprocess.run(["cmake", "--build", made], check=True, capture_output=True, timeout=300)
        return made / "host"
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    libraries = [
        f"-L{torch_folder / 'lib'}",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        "-Wl,--no-as-needed",  # nothing in the program names these
        "-ltorch",
        *(["-ltorch_cuda"] if torch.version.cuda else []),
    ]
    source = [str(EXAMPLE / "main.cc"), "-std=c++20", "-O2", *includes, *libraries]
    subprocess.run([compiler, *source, "-o", str(work / "host")], check=True, capture_output=True, timeout=300)
    return work / "host"
