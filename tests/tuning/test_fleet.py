"""The RPC route with a real tracker and two servers on the loopback interface."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from swacompile.errors import TargetError
from swacompile.tuning.database import Database
from swacompile.tuning.fleet import FleetMeasurer
from swacompile.tuning.measure import Effort
from swacompile.tuning.record import Status
from swacompile.tuning.search import Limits
from swacompile.tuning.tune import tune
from tests.tuning.conftest import WORKLOAD, written
from tests.tuning.test_measure import candidate

pytest.importorskip("tornado", reason="TVM's tracker needs tornado")
pytest.importorskip("cloudpickle", reason="TVM's tracker needs cloudpickle")
pytestmark = pytest.mark.cpu
KEY = "test-cpu"
START_SECONDS = 90


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(module, *options):
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", *map(str, options)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **quiet)


def kill(process):
    """The server and the processes it serves from."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_servers(port, count):
    from tvm import rpc

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if len(rpc.connect_tracker("127.0.0.1", port).summary()["server_info"]) == count:
                return
        except RuntimeError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{count} servers did not register in {START_SECONDS} s")


@pytest.fixture
def fleet():
    """A tracker's port and its two servers."""
    port = free_port()
    processes = [start("tvm.exec.rpc_tracker", "--port", port, "--port-end", port + 1)]
    for _ in range(2):
        processes.append(start("swacompile.tuning.rpc_server", "--tracker", f"127.0.0.1:{port}", "--key", KEY))
    try:
        wait_for_servers(port, 2)
        yield port, processes[1:]
    finally:
        for process in processes:
            kill(process)


def test_a_server_killed_in_mid_run_loses_nothing(bench, fleet, tmp_path):
    port, servers = fleet
    good = [candidate(row_heads=heads, row_keys=keys) for heads in (1, 2, 4) for keys in (64, 128, 256)]
    crashing, wrong = candidate(row_heads=5, row_keys=64), candidate(row_heads=3, row_keys=64)
    found = {}
    with FleetMeasurer(bench, tracker=("127.0.0.1", port), key=KEY, run_seconds=20, wait_seconds=60) as measurer:
        assert measurer.servers() == 2
        for outcome in measurer.measure([*good, crashing, wrong], Effort(rung=0, samples=5, min_ms=40)):
            if not found:
                kill(servers[0])
            found[outcome.candidate] = outcome
        assert {c: found[c].status for c in good} == dict.fromkeys(good, Status.OK)
        assert (found[crashing].status, found[wrong].status) == (Status.CRASHED, Status.WRONG)
        assert measurer.servers() == 1
        database = Database(folders=(tmp_path,))
        tuned = tune(WORKLOAD, measurer, database, Limits(trials=1))
    assert tuned.choice.record.provenance.device == KEY
    assert tuned.records == written(database)


def test_no_tracker(bench):
    port = free_port()
    with pytest.raises(
        TargetError, match=rf"no server with key 'test-cpu' at the tracker 127\.0\.0\.1:{port}.*rpc_server"
    ):
        FleetMeasurer(bench, tracker=("127.0.0.1", port), key=KEY, wait_seconds=10).servers()
