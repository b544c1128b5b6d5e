"""Times the CPU kernel beside its peers, paired: in each round every contender has a turn, so that a change in the machine's speed meets all."""

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from swacompile.errors import ArgumentError
from swacompile.kernels.reference import Array, Call, banded_attention
from swacompile.report.cpu_cases import Case
from swacompile.report.cpu_contenders import (
    OURS,
    PEERS,
    Contender,
    Problem,
    Run,
    UnavailableError,
    matrix_products,
    memory_reads,
)
from swacompile.runtime.kernel_link import build_objects
from swacompile.runtime.ort_library import LibraryKernel, build_ort_library, call_count
from swacompile.target import Target, host_targets
from swacompile.tuning.database import Database
from swacompile.tuning.kernel_choice import KernelChoice, choose_cpu_kernels
from swacompile.tuning.problem import TOLERANCE
from swacompile.tuning.runner import device_name

JSON_VERSION = 1
PRODUCT_SIZE = 1024
SAMPLED_ROWS = 5
SLOW_SECONDS = 2.0
"""A contender whose first call takes longer has no more turns than one."""
TURN_SECONDS = 0.02
PAUSE_SECONDS = 0.02
"""Before a turn, so that the last contender's threads have stopped waiting for work."""
MOST_ROUNDS = 200
PACKAGES = ("swacompile", "apache-tvm", "onnxruntime", "torch", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender on one case. Times are of one call in seconds; `low` and `high` the 10th and 90th percentile of the turns.

    `ratio` is the median over the rounds of its time to ours; `of_product` and `of_read` of its useful rate to that of a square float32
    matrix product, and to that of reading as many bytes, in the same rounds; `extra_bytes` how much the process grew in the first call,
    beyond the output. Without a result `refused` says why. `tuning` says where our kernel's sizes come from.
    """

    case: Case
    contender: str
    threads: int
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    rounds: int = 0
    ratio: float = 0.0
    gflops: float = 0.0
    of_product: float = 0.0
    gbytes: float = 0.0
    of_read: float = 0.0
    extra_bytes: int = 0
    error: float = 0.0
    refused: str = ""
    tuning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and with what it was measured."""

    processor: str
    cores: int
    target: str
    versions: tuple[tuple[str, str], ...]
    day: str

    @classmethod
    def here(cls, target: Target) -> "Machine":
        return cls(
            processor=device_name(),
            cores=os.cpu_count() or 1,
            target=target.name,
            versions=tuple((name, _version(name)) for name in PACKAGES),
            day=date.today().isoformat(),
        )


def bench(
    cases: Sequence[Case],
    *,
    threads: Sequence[int] = (1,),
    seconds: float = 4.0,
    contenders: Iterable[Contender] = PEERS,
    target: Target | None = None,
    database: Database | None = None,
) -> Iterator[Row]:
    """Rows case by case and number of threads by number of threads, ours first. Our kernels are those that `compile` would build.

    `seconds` is what one case may take, beyond three rounds of every contender. Raises ArgumentError for head sizes that no kernel fits,
    TargetError and ToolchainError where our kernels cannot be built here.
    """
    with tempfile.TemporaryDirectory(prefix="swacompile-") as folder:
        libraries = _Libraries(Path(folder), target or host_targets()[0], database or Database())
        for case in cases:
            choice = libraries.choice(case)
            for count in threads:
                problem = Problem.draw(case, threads=count, library=libraries.build(choice))
                tuning = "; ".join(map(str, choice.choices))
                yield from _bench_case(problem, [OURS, *contenders], seconds, tuning)


@dataclass(frozen=True, slots=True)
class _Libraries:
    """A library for every kernel that differs in its sizes."""

    folder: Path
    target: Target
    database: Database
    built: dict[object, Path] = field(default_factory=dict)

    def choice(self, case: Case) -> KernelChoice:
        try:
            (choice,) = choose_cpu_kernels([case.workload], self.target, self.database, device=device_name())
        except ValueError as error:
            raise ArgumentError(f"{case}: {error}") from error
        return choice

    def build(self, choice: KernelChoice) -> Path:
        key = (choice.variant, choice.tiles)
        if key not in self.built:
            place = self.folder / str(len(self.built))
            place.mkdir()
            objects = build_objects([choice.variant], [self.target], place, [choice])
            rows = [LibraryKernel(variant=choice.variant, target=self.target)]
            self.built[key] = build_ort_library(objects, rows, place / "libswacompile_bench.so")
        return self.built[key]


def to_json(machine: Machine, rows: Iterable[Row]) -> str:
    """Machine and rows, with every field of Row."""
    return json.dumps(
        {"version": JSON_VERSION, "machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=1
    )


def _bench_case(problem: Problem, contenders: Sequence[Contender], seconds: float, tuning: str) -> Iterator[Row]:
    runs: dict[str, Run] = {}
    rows: list[Row] = []
    times: dict[str, list[float]] = {}
    for contender in contenders:
        row, run = _first_call(problem, contender)
        rows.append(row)
        if run is None:
            continue
        times[row.contender] = []
        if row.median > SLOW_SECONDS and contender is not OURS:
            times[row.contender].append(row.median)
        else:
            runs[contender.name] = run
    products = matrix_products(PRODUCT_SIZE, problem.threads)
    reads = memory_reads(int(problem.case.bytes), problem.threads) if problem.case.queries == 1 else {}
    yardsticks = _turns({**runs, **products, **reads}, seconds)
    times |= {name: yardsticks[name] for name in runs}
    product = [2e-9 * PRODUCT_SIZE**3 / best for best in _fastest(yardsticks, products)]
    read = [1e-9 * problem.case.bytes / best for best in _fastest(yardsticks, reads)]
    for row in rows:
        if row.refused:
            yield row
        else:
            yield _finished(row, times[row.contender], times[OURS.name], product, read, tuning)


def _first_call(problem: Problem, contender: Contender) -> tuple[Row, Run | None]:
    """The row with the first call's time, memory and error, and the contender if it may go on. For ours, raises where another kernel ran."""
    case, threads = problem.case, problem.threads
    try:
        run = contender.prepare(problem)
        before, counted = _resident_bytes(), _calls(problem, contender)
        _reset_peak()
        start = time.perf_counter()
        output = run()
        spent = time.perf_counter() - start
        grown = max(0, _peak_bytes() - before - (case.output_bytes if contender.makes_output else 0))
        error = _error(problem, np.asarray(output))
    except Exception as failure:  # whatever a package without this operator raises: it is a result of the comparison
        if contender is OURS:
            raise
        return Row(case=case, contender=contender.name, threads=threads, refused=_reason(failure)), None
    if contender is OURS and _calls(problem, contender) != counted + 1:
        raise RuntimeError(
            f"expected one call of the kernel in {problem.library}, found {_calls(problem, contender) - counted}"
        )
    if not error < TOLERANCE[case.dtype]:
        wrong = f"wrong by {error:.1e}"
        return Row(case=case, contender=contender.name, threads=threads, error=error, refused=wrong), None
    return Row(case=case, contender=contender.name, threads=threads, median=spent, extra_bytes=grown, error=error), run


def _calls(problem: Problem, contender: Contender) -> int:
    return call_count(problem.library) if contender is OURS else 0


def _reason(failure: Exception) -> str:
    if isinstance(failure, ModuleNotFoundError):
        return f"{failure.name} is not installed"
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[-1][:120] if isinstance(failure, UnavailableError) else f"{type(failure).__name__}: {lines[-1]}"[:120]


def _turns(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Every run's times, of as many rounds as `seconds` allow and at least three."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (time.perf_counter() < until and rounds < MOST_ROUNDS):
        for name, run in runs.items():
            times[name].append(_turn(run))
        rounds += 1
    return times


def _turn(run: Run) -> float:
    """Seconds a call: of short calls the median of several, after one that brings operands into the caches and wakes threads."""
    time.sleep(PAUSE_SECONDS)
    first = _timed(run)
    if first > TURN_SECONDS:
        return first
    count = max(3, min(50, int(TURN_SECONDS / max(first, 1e-6))))
    return statistics.median(_timed(run) for _ in range(count))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fastest(times: Mapping[str, list[float]], names: Iterable[str]) -> list[float]:
    """Round by round, of the run with the smallest median."""
    found = [times[name] for name in names]
    return min(found, key=statistics.median) if found else []


def _finished(
    first: Row, own: list[float], ours: list[float], product: list[float], read: list[float], tuning: str
) -> Row:
    case = first.case
    low, high = np.percentile(own, [10, 90])

    def relative(rates: list[float], work: float) -> float:
        """Median over the rounds of the rate of `work` to `rates`."""
        return (
            statistics.median(1e-9 * work / mine / rate for mine, rate in zip(own, rates, strict=False))
            if rates
            else 0.0
        )

    return Row(
        case=case,
        contender=first.contender,
        threads=first.threads,
        median=statistics.median(own),
        low=float(low),
        high=float(high),
        rounds=len(own),
        ratio=statistics.median(mine / other for mine, other in zip(own, ours, strict=False)),
        gflops=1e-9 * case.flops / statistics.median(own),
        of_product=relative(product, case.flops),
        gbytes=1e-9 * case.bytes / statistics.median(own),
        of_read=relative(read, case.bytes),
        extra_bytes=first.extra_bytes,
        error=first.error,
        tuning=tuning if first.contender == OURS.name else "",
    )


def _error(problem: Problem, output: Array) -> float:
    """Largest difference from the float64 reference over a few queries, of all heads."""
    case = problem.case
    worst = 0.0
    for row in np.linspace(0, case.queries - 1, min(SAMPLED_ROWS, case.queries)).astype(int):
        low, high = case.seen(int(row))
        call = Call(
            query=problem.query[:, :, row : row + 1],
            key=problem.key[:, :, low:high],
            value=problem.value[:, :, low:high],
            sinks=problem.sinks,
            scale=case.scale,
            softcap=case.softcap,
        )
        found = output[:, :, row : row + 1].astype(np.float64)
        worst = max(worst, float(np.abs(found - banded_attention(call)).max()))
    return worst


def _resident_bytes() -> int:
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """A size from Linux's account of this process; elsewhere the peak that POSIX knows of."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> None:
    """Linux only; elsewhere the peak is the process's highest so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
