"""The GPU's side of the runner, with a stand-in for CUDA: operands, launches, checks and the order of timing."""

import json

import numpy as np
import pytest

from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cuda.spec import MmaConfig
from swacompile.target import TargetClass
from swacompile.tuning import gpu, problem, runner
from swacompile.tuning.cuda_rule import spec_of
from swacompile.tuning.problem import problems, write_expected
from swacompile.workload import Workload
from tests.tuning.fake_cuda import FakeCuda, FakeLibrary

PLAIN = "bf16-d16-v24-g3-w64-n128"
FEATURES = "bf16-d16-v16-g2-w32-n128-two_sided-key_padding-segments-sinks-bias-alibi-softcap"


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """A bench on the stand-in, for a workload and a kernel that sees `widened` keys too many."""

    def open_bench(text, *, widened=0):
        workload = Workload.parse(text)
        library = FakeLibrary(Kernel(spec=spec_of(workload), config=MmaConfig(keys_per_tile=64)), widened=widened)
        monkeypatch.setattr(problem, "GPU_QUERIES", 256)
        monkeypatch.setattr(problem, "GPU_HEADS", 6)
        monkeypatch.setattr(gpu, "Cuda", FakeCuda)
        monkeypatch.setattr(gpu, "CudaLibrary", lambda path, runtime: library)
        job = {"library": "kernel.so", "lock": str(tmp_path / "lock")}
        return gpu.GpuBench(job, tmp_path, runtime=tmp_path, inputs=runner.inputs), workload, library

    return open_bench


@pytest.mark.parametrize("text", [PLAIN, FEATURES])
@pytest.mark.parametrize("widened", [0, 1, -1])
def test_a_window_off_by_one_is_wrong(opened, tmp_path, text, widened):
    bench, workload, _ = opened(text, widened=widened)
    documents = write_expected(workload, TargetClass.CUDA, tmp_path)
    found = [
        runner.wrong_rows(document, bench.prepare(document).run(), np.load(tmp_path / document["expected"]))
        for document in documents
    ]
    assert [wrong is None for wrong in found] == [not widened] * 3


def test_an_output_left_unwritten_is_wrong(opened, tmp_path):
    bench, workload, library = opened(PLAIN)
    library._launch = lambda *_: None
    document = write_expected(workload, TargetClass.CUDA, tmp_path)[0]
    wrong = runner.wrong_rows(document, bench.prepare(document).run(), np.load(tmp_path / document["expected"]))
    assert wrong == "edges77: some outputs are not written, or not a number"


def test_timed_launches_take_turns_over_copies(opened):
    bench, workload, library = opened(PLAIN)
    document = problems(workload, TargetClass.CUDA)[-1].document()
    call = bench.prepare(document)
    copies = call._copies()
    times = call.time(4, 6.0)
    # A graph's replay takes 2 ms here: three launches 0.67 ms each, so nine launches for 6 ms.
    count = max(copies, 9 // copies * copies)
    assert times == [pytest.approx(2000 / count)] * 4
    assert 1 < copies <= gpu.MOST_COPIES and len(set(library.launched[3:])) == copies
    assert len(library.launched) == 3 + count
    assert bench.cuda.calls.count("cudaGraphInstantiate") == 2


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="no NVIDIA GPU answers here"):
        runner.device_of("cuda")


def test_documents_are_data():
    for made in problems(Workload.parse(FEATURES), TargetClass.CUDA):
        document = made.document()
        assert json.loads(json.dumps(document)) == document
