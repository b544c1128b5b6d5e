"""Runs CUDA kernels on the GPU at hand, if it is one that the kernels were built for."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from swacompile.kernels.build_cuda import build_kernels  # noqa: E402
from swacompile.runtime.cuda.launch import Launcher  # noqa: E402
from swacompile.runtime.cuda.library import CudaLibrary  # noqa: E402
from swacompile.schedules.cuda.arch import CUDA_ARCHS  # noqa: E402
from tests.schedules.cuda_device import check_launch, check_library  # noqa: E402
from tests.schedules.cuda_kernels import FAMILIES, benchmarked  # noqa: E402

pytestmark = pytest.mark.gpu
LIBRARIES = FAMILIES | benchmarked()


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cuda") / f"{request.param}.so"
    build_kernels(LIBRARIES[request.param], CUDA_ARCHS["sm_90a"], path)
    return path


def test_kernels_agree_with_the_reference(library: Path) -> None:
    problems = [(o.kernel, o.problem, o.error, o.case) for o in check_library(library) if o.problem]
    assert not problems


def test_launches_are_capturable_ordered_and_free_of_allocation(library: Path) -> None:
    opened = CudaLibrary(library)
    launcher = Launcher(opened)
    assert [p for kernel in opened.kernels[:2] for p in check_launch(launcher, kernel)] == []
