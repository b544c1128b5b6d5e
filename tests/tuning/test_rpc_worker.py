"""How a fleet measures a GPU's candidates: files are sent, and the server runs the job as a bundle's runner does."""

import shutil
from pathlib import Path

import pytest

from swacompile.tuning.measure import Effort
from swacompile.tuning.rpc_server import MEASURE, _measure
from swacompile.tuning.rpc_worker import run_there
from tests.tuning.test_measure import candidate

tvm_ffi = pytest.importorskip("tvm_ffi")
pytestmark = pytest.mark.cpu


class Session:
    """A session whose folder is on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tvm_ffi.register_global_func("tvm.rpc.server.workpath", lambda name: str(folder / str(name)), override=True)

    def upload(self, path):
        shutil.copy(path, self.folder)

    def get_function(self, name):
        assert name == MEASURE
        return _measure


def test_a_job_runs_from_what_was_sent(bench, tmp_path):
    good, wrong = candidate(row_heads=1, row_keys=64), candidate(row_heads=3, row_keys=64)
    bench.build([good, wrong])
    session, effort = Session(tmp_path), Effort(rung=0, samples=3, min_ms=1.0)
    found = [
        run_there(session, bench.job(c, effort) | {"threads": 1, "seconds": 60}, bench.folder) for c in (good, wrong)
    ]
    assert [result["status"] for result in found] == ["ok", "wrong"]
    assert len(found[0]["samples"]) == 3
    assert not {path.suffix for path in tmp_path.iterdir()} - {".so", ".npy"}
