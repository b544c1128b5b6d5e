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
from swacompile.tuning import runner
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
KEY, PLAIN_KEY = "test-cpu", "test-plain"
START_SECONDS = 90


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(module, *options):
    """A module as a process, without torch: importing it takes as long as all the rest."""
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, "--host", "127.0.0.1", *map(str, options)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **quiet)


def kill(process):
    """The server and the processes it serves from."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(what, done):
    deadline = time.monotonic() + START_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what} in {START_SECONDS} s"
        time.sleep(0.1)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def registered(port):
    from tvm import rpc

    return len(rpc.connect_tracker("127.0.0.1", port).summary()["server_info"])


@pytest.fixture(scope="module")
def tracker():
    """A tracker's port."""
    port = free_port()
    process = start("tvm.exec.rpc_tracker", "--port", port, "--port-end", port + 1)
    try:
        wait_for("no tracker", lambda: listens(port))  # a server that finds none tries again after five seconds only
        yield port
    finally:
        kill(process)


@pytest.fixture
def servers(tracker):
    """Two servers of KEY, and TVM's own with another key."""
    ours = ("swacompile.tuning.rpc_server", "--tracker", f"127.0.0.1:{tracker}", "--key", KEY)
    theirs = ("tvm.exec.rpc_server", "--tracker", f"127.0.0.1:{tracker}", "--key", PLAIN_KEY)
    processes = [start(*command) for command in (ours, ours, theirs)]
    try:
        wait_for("no three servers", lambda: registered(tracker) == 3)
        yield processes
    finally:
        for process in processes:
            kill(process)


def test_a_server_killed_in_mid_run_loses_nothing(bench, tracker, servers, tmp_path):
    good = [candidate(row_heads=heads, row_keys=keys) for heads in (1, 2, 4) for keys in (64, 128, 256)]
    crashing, wrong = candidate(row_heads=5, row_keys=64), candidate(row_heads=3, row_keys=64)
    found = {}
    with FleetMeasurer(bench, tracker=("127.0.0.1", tracker), key=KEY, run_seconds=20, wait_seconds=60) as measurer:
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
    assert tuned.choice.record.provenance.device == runner.device_name()
    assert tuned.records == written(database)
    with FleetMeasurer(bench, tracker=("127.0.0.1", tracker), key=PLAIN_KEY, wait_seconds=60) as measurer:
        assert measurer.provenance.device == f"unknown device with key {PLAIN_KEY}"
        outcomes = measurer.measure([good[0], wrong], Effort(rung=0, samples=3, min_ms=1))
        assert {outcome.candidate: outcome.status for outcome in outcomes} == {good[0]: Status.OK, wrong: Status.WRONG}


@pytest.mark.parametrize(("seconds", "status"), [(0.1, Status.CRASHED), (20.0, Status.HUNG)])
def test_a_kernel_that_breaks_every_session_is_at_fault(bench, seconds, status):
    class Broken:
        def ask(self, request, **_):
            asked.append(request["do"])
            if request["do"] == "open":
                return {"message": "", "device": None}
            return {"message": "gone", "status": "broken", "seconds": seconds}

    asked = []
    measurer = FleetMeasurer(bench, tracker=("127.0.0.1", 1), key=KEY, run_seconds=20)
    outcome = measurer._run(Broken(), candidate(row_heads=1, row_keys=64), Effort(rung=0, samples=3, min_ms=1))
    assert (outcome.status, outcome.message) == (status, "3 sessions: gone")
    assert asked == ["open", "run"] * 3


def test_unlike_servers_are_refused(bench):
    measurer = FleetMeasurer(bench, tracker=("127.0.0.1", 1), key=KEY)
    measurer._note_device(["NVIDIA H200", "580.1"])
    measurer._note_device(["NVIDIA H200", "580.1"])
    assert measurer.provenance.device == "NVIDIA H200" and measurer.provenance.driver == "580.1"
    with pytest.raises(TargetError, match="'test-cpu' are not alike.*H200.*H100.*Give them keys of their own"):
        measurer._note_device(["NVIDIA H100", "580.1"])


def test_no_tracker(bench):
    port = free_port()
    with (
        pytest.raises(
            TargetError, match=rf"no server with key 'test-cpu' at the tracker 127\.0\.0\.1:{port}.*rpc_server"
        ),
        FleetMeasurer(bench, tracker=("127.0.0.1", port), key=KEY, wait_seconds=4) as measurer,
    ):
        measurer.servers()
