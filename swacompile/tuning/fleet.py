"""Measure on other machines through TVM's RPC tracker: built here, timed there, on all servers of a key at once.

TVM's RPC protocol runs whatever it is sent, for anyone who reaches the port: trackers and servers belong on a loopback
interface or on a trusted, closed network.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from swacompile.errors import TargetError
from swacompile.target import Target
from swacompile.tuning.measure import Candidate, Effort, Outcome, Workbench, outcome_of, provenance_here
from swacompile.tuning.record import Provenance, Status
from swacompile.tuning.worker import Worker, WorkerFailed, python_module

RPC_COMMAND = python_module("swacompile.tuning.rpc_worker")
RUN_SECONDS = 60.0
WAIT_SECONDS = 120.0
"""How long to wait for a free server."""
RETURN_SECONDS = 3.0
"""How long a server may be away from the tracker: it registers again when a kernel has crashed its session."""
ATTEMPTS = 3
"""Failed sessions, each on a server that the tracker picks anew, before a candidate and not its server is blamed."""


class FleetMeasurer(AbstractContextManager["FleetMeasurer"]):
    """Every server that a tracker has under one key: all of one device. Leaving the context ends the connections."""

    def __init__(
        self, bench: Workbench, *, tracker: tuple[str, int], key: str, threads: int = 1, run_seconds: float = RUN_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:  # fmt: skip
        self._bench = bench
        self._tracker, self._key = tracker, key
        self._device: tuple[str, str | None] | None = None
        self._threads = threads
        self._run_seconds, self._wait_seconds = run_seconds, wait_seconds
        self._first = Worker(RPC_COMMAND)
        self._workers: list[Worker] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in (self._first, *self._workers):
            worker.close()

    @property
    def target(self) -> Target:
        return self._bench.target

    @property
    def provenance(self) -> Provenance:
        """Name and driver are those that a server gives. Raises TargetError where none comes free."""
        if self._device is None:
            worker = self._connected()[0]
            self._open_session(worker)
            worker.ask({"do": "close"}, seconds=self._wait_seconds)
        assert self._device is not None
        name, driver = self._device
        return provenance_here(self.target, device=name, threads=self._threads, driver=driver)

    def measure(self, candidates: Sequence[Candidate], effort: Effort) -> Iterator[Outcome]:
        """As many candidates at once as the key has servers. Raises TargetError where no server comes free."""
        built = self._bench.build(candidates)
        yield from (failure for failure in built.values() if failure is not None)
        todo: queue.SimpleQueue[Candidate] = queue.SimpleQueue()
        runnable = [candidate for candidate, failure in built.items() if failure is None]
        for candidate in runnable:
            todo.put(candidate)
        results: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        workers = self._connected()[: len(runnable)]
        threads = [threading.Thread(target=self._serve, args=(w, todo, effort, results), daemon=True) for w in workers]
        for thread in threads:
            thread.start()
        try:
            for _ in runnable:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            while not todo.empty():
                todo.get()
            for thread in threads:
                thread.join(timeout=self._run_seconds + self._wait_seconds)

    def _connected(self) -> list[Worker]:
        """One process a server, kept between calls: each takes seconds to start."""
        if not self._workers:
            self._workers = [self._first, *(Worker(RPC_COMMAND) for _ in range(self.servers() - 1))]
        return self._workers

    def servers(self) -> int:
        """How many servers the tracker has under the key, free or busy. Raises TargetError where there is none."""
        deadline = time.monotonic() + RETURN_SECONDS
        while True:
            try:
                answer = self._first.ask(self._request("count"), seconds=self._wait_seconds)
            except WorkerFailed as error:
                answer = {"count": 0, "message": str(error)}
            if answer["count"]:
                return int(answer["count"])
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        host, port = self._tracker
        raise TargetError(
            f"no server with key {self._key!r} at the tracker {host}:{port} ({answer['message'] or 'it answers'}): "
            f"start one with `python -m swacompile.tuning.rpc_server --tracker {host}:{port} --key {self._key}`"
        )

    def _serve(
        self,
        worker: Worker,
        todo: "queue.SimpleQueue[Candidate]",
        effort: Effort,
        results: "queue.SimpleQueue[Outcome | BaseException]",
    ) -> None:
        """One worker's thread: candidates until none is left."""
        while True:
            try:
                candidate = todo.get_nowait()
            except queue.Empty:
                return
            try:
                results.put(self._run(worker, candidate, effort))
            except BaseException as error:  # handed to the thread that waits, which would wait for ever otherwise
                results.put(error)
                return

    def _run(self, worker: Worker, candidate: Candidate, effort: Effort) -> Outcome:
        """A server that disappears or a session that breaks is tried again.

        A kernel that breaks every session is at fault.
        """
        job = self._bench.job(candidate, effort) | {"threads": self._threads}
        failed: WorkerFailed | None = None
        for _ in range(ATTEMPTS):
            self._open_session(worker)
            try:
                request = {"do": "run", "job": job, "folder": str(self._bench.folder), "seconds": self._run_seconds}
                result = worker.ask(request, seconds=self._run_seconds + 5)
            except WorkerFailed as error:
                failed = error
                continue
            if result["status"] != "broken":
                return outcome_of(candidate, result)
            failed = WorkerFailed(result["message"], hung=result["seconds"] >= self._run_seconds)
        assert failed is not None
        status = Status.HUNG if failed.hung else Status.CRASHED
        return outcome_of(candidate, {"status": status, "samples": [], "message": f"{ATTEMPTS} sessions: {failed}"})

    def _open_session(self, worker: Worker) -> None:
        """Wait for a free server. A server that died while it was free fails here, and the next is tried."""
        message = ""
        for _ in range(ATTEMPTS):
            try:
                answer = worker.ask(self._request("open"), seconds=self._wait_seconds)
            except WorkerFailed as error:
                answer = {"message": str(error)}
            message = answer["message"]
            if not message:
                self._note_device(answer["device"])
                return
        raise TargetError(f"no server with key {self._key!r} came free: {message}. What was measured is kept.")

    def _note_device(self, found: Sequence[str | None] | None) -> None:
        """Times of unlike devices must not stand side by side."""
        name, driver = found or (None, None)
        device = name or f"unknown device with key {self._key}", driver
        self._device = self._device or device
        if device != self._device:
            raise TargetError(
                f"the servers with key {self._key!r} are not alike: {self._device} and {device}. Give them keys of their own."
            )

    def _request(self, action: str) -> dict[str, Any]:
        host, port = self._tracker
        return {
            "do": action, "host": host, "port": port, "key": self._key, "seconds": self._run_seconds,
            "device": str(self.target.target_class),
        }  # fmt: skip
