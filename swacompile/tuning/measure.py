"""Candidates become outcomes: built in processes of their own, checked, and timed on this machine."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from swacompile.errors import TargetError
from swacompile.target import Target, TargetClass, host_targets
from swacompile.tuning import runner
from swacompile.tuning.config import Config
from swacompile.tuning.problem import write_expected
from swacompile.tuning.record import Origin, Provenance, Status
from swacompile.tuning.rules import rule_for
from swacompile.tuning.turns import DEFAULT_LOCK, turn
from swacompile.tuning.worker import Worker, WorkerFailed, python_module
from swacompile.workload import Workload

BUILD_SECONDS = 120.0
RUN_SECONDS = 60.0
PREPARED = 4
"""Candidates for a GPU that get ready beside each other."""
BUILD_COMMAND = python_module("swacompile.tuning.build_worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A Config to measure for a workload."""

    workload: Workload
    config: Config
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure: `samples` times at least `min_ms` milliseconds."""

    rung: int
    samples: int
    min_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a candidate; `samples` are microseconds a call, empty unless the status is OK."""

    candidate: Candidate
    status: Status
    samples: tuple[float, ...] = ()
    message: str = ""


class Measurer(Protocol):
    """A place where candidates are measured. Outcomes come as they are known, in any order, one a candidate."""

    @property
    def target(self) -> Target: ...

    @property
    def provenance(self) -> Provenance: ...

    def measure(self, candidates: Sequence[Candidate], effort: Effort) -> Iterator[Outcome]: ...


class Workbench(AbstractContextManager["Workbench"]):
    """A folder with built libraries and expected rows. Candidates that share a kernel and a Config share a library."""

    def __init__(
        self, target: Target, *, builders: int | None = None, command: tuple[str, ...] = BUILD_COMMAND,
        build_seconds: float = BUILD_SECONDS,
        lock: Path = DEFAULT_LOCK,
    ) -> None:  # fmt: skip
        self.target = target
        self.lock = lock
        self.folder = Path(tempfile.mkdtemp(prefix="swacompile-tune-"))
        self._failures: dict[str, Outcome] = {}
        self._seconds = build_seconds
        self._count = builders or os.cpu_count() or 1
        self._workers = [Worker(command) for _ in range(self._count)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def build(self, candidates: Sequence[Candidate]) -> dict[Candidate, Outcome | None]:
        """Build what is not built yet, several at a time; None for a candidate that can be run."""
        for candidate in candidates:
            self.jobs_folder_ready(candidate.workload)
        with turn(self.lock, alone=False), ThreadPoolExecutor(self._count) as pool:
            distinct = {self.library(candidate): candidate for candidate in candidates}
            list(pool.map(self._build_one, distinct.values()))
        return {candidate: self._failure(candidate) for candidate in candidates}

    def library(self, candidate: Candidate) -> str:
        """The library's file name, which says what is in it."""
        function = rule_for(candidate.workload, self.target).function_name(candidate.workload, self.target)
        return f"{function}-{str(candidate.config).replace(':', '-').replace(',', '-')}.so"

    def job(self, candidate: Candidate, effort: Effort) -> dict[str, Any]:
        """What the runner needs to measure a built candidate."""
        return {
            "library": self.library(candidate),
            "function": rule_for(candidate.workload, self.target).function_name(candidate.workload, self.target),
            "device": str(self.target.target_class),
            "problems": self.jobs_folder_ready(candidate.workload),
            "samples": effort.samples,
            "min_ms": effort.min_ms,
        }

    def jobs_folder_ready(self, workload: Workload) -> list[dict[str, Any]]:
        """The workload's problems, their expected rows in the folder."""
        return write_expected(workload, self.target.target_class, self.folder)

    def _failure(self, candidate: Candidate) -> Outcome | None:
        failed = self._failures.get(self.library(candidate))
        return failed and Outcome(candidate=candidate, status=failed.status, message=failed.message)

    def _build_one(self, candidate: Candidate) -> None:
        name = self.library(candidate)
        library = self.folder / name
        if library.exists() or name in self._failures:
            return
        request = {
            "target": self.target.name,
            "workload": str(candidate.workload),
            "config": str(candidate.config),
            "library": str(library),
        }
        worker = self._idle.get()
        try:
            message = worker.ask(request, seconds=self._seconds)["message"]
        except WorkerFailed as error:
            message = f"building: {error}"
        finally:
            self._idle.put(worker)
        if message or not library.exists():
            library.unlink(missing_ok=True)
            text = runner.printable(message or "no library was written")
            self._failures[name] = Outcome(candidate=candidate, status=Status.BUILD_FAILED, message=text)


class LocalMeasurer:
    """This machine. Candidates are built several at a time, then timed one at a time with nothing else running.

    For a GPU `prepared` candidates get ready at once, as with a bundle's runner: its timing takes turns, and what the
    CPU does beside it does not matter.
    """

    def __init__(
        self, bench: Workbench, *, threads: int = 1, run_seconds: float = RUN_SECONDS, prepared: int | None = None
    ) -> None:
        self._bench = bench
        self._threads = threads
        self._seconds = run_seconds
        self._prepared = prepared or (PREPARED if bench.target.target_class is TargetClass.CUDA else 1)
        self._device = device_here(bench.target)

    @property
    def target(self) -> Target:
        return self._bench.target

    @property
    def provenance(self) -> Provenance:
        name, driver = self._device
        return provenance_here(self.target, device=name, threads=self._threads, driver=driver)

    def measure(self, candidates: Sequence[Candidate], effort: Effort) -> Iterator[Outcome]:
        built = self._bench.build(candidates)
        yield from (failure for failure in built.values() if failure is not None)
        runnable = [candidate for candidate, failure in built.items() if failure is None]

        def run(candidate: Candidate) -> Outcome:
            return self._run(candidate, effort)

        with turn(self._bench.lock, alone=True):
            if self._prepared == 1:
                yield from map(run, runnable)
            else:
                yield from runner.side_by_side(runnable, run, lambda o: o.status is Status.HUNG, self._prepared)

    def _run(self, candidate: Candidate, effort: Effort) -> Outcome:
        job = self._bench.job(candidate, effort) | {"lock": str(self._bench.folder / "turns.lock")}
        result = runner.run_contained(job, self._bench.folder, threads=self._threads, seconds=self._seconds)
        return outcome_of(candidate, result)


def outcome_of(candidate: Candidate, result: dict[str, Any]) -> Outcome:
    """A runner's result as an outcome."""
    return Outcome(
        candidate=candidate,
        status=Status(result["status"]),
        samples=tuple(result["samples"]),
        message=runner.printable(result["message"]),
    )


def provenance_here(target: Target, *, device: str, threads: int, driver: str | None = None) -> Provenance:
    """Provenance of kernels built with this installation."""
    packages = ("swacompile", "apache-tvm")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return Provenance(device=device, threads=threads, revision=revision_of(target), versions=versions, driver=driver)


def device_here(target: Target) -> tuple[str, str | None]:
    """Name and driver of the device here that runs the target's kernels. Raises TargetError where there is none."""
    elsewhere = "Or, to measure on another machine: --export-bundle work.tar, or --tracker and --key."
    if target.target_class is TargetClass.CPU and target not in host_targets():
        raise TargetError(f"this processor does not run kernels of {target.name}: choose another target. {elsewhere}")
    try:
        return runner.device_of(target.target_class)
    except SystemExit as error:
        raise TargetError(f"{error} {elsewhere}") from error


def revision_of(target: Target) -> str:
    """Revision of the sources of a target's kernels."""
    dtype = "f32" if target.target_class is TargetClass.CPU else "bf16"
    return rule_for(Workload.parse(f"{dtype}-d64-v64-g1-w16-n16"), target).revision()
