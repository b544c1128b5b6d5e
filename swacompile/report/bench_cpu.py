"""Times the CPU kernel beside its peers, paired: in each round every contender runs once, so that a change in the machine's speed meets all."""

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from swacompile.kernels.build import KernelVariant, build_cpu_object
from swacompile.kernels.reference import Call, banded_attention
from swacompile.report.cpu_contenders import OURS, PEERS, Case, Contender, Problem, Run, matrix_products
from swacompile.runtime.ort_library import LibraryKernel, build_ort_library
from swacompile.target import CPU_INFO, Target, host_targets
from swacompile.workload import DType

JSON_VERSION = 1
PRODUCT_SIZE = 1024
SAMPLED_ROWS = 5
LARGEST_ERROR = 1e-4
SLOW_SECONDS = 2.0
"""A contender that takes longer is timed once."""
PACKAGES = ("apache-tvm", "onnxruntime", "torch", "numpy")

LENGTHS = (512, 1024, 4096, 16384)
WINDOWS = (128, 512, 2048)
SHAPES = ((8, 8, 64), (32, 8, 128))
CASES = tuple(
    Case(heads=heads, kv_heads=kv_heads, head_size=size, queries=length, keys=length, window=window)
    for heads, kv_heads, size in SHAPES
    for length in LENGTHS
    for window in WINDOWS
    if window <= length
)
SHORT_CASES = tuple(
    Case(heads=8, kv_heads=8, head_size=64, queries=length, keys=length, window=512)
    for length in (1, 16, 32, 64, 128, 256)
)
DECODE_CASES = tuple(
    Case(heads=heads, kv_heads=8, head_size=128, queries=1, keys=16384, window=1024) for heads in (8, 32)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender on one case. Times are of one call in seconds; `low` and `high` the 10th and 90th percentile.

    `ratio` is the median over the rounds of its time to ours; `of_product` its useful rate to that of a square matrix product in the
    same run; `extra_bytes` how much the process grew in the first call, output included. Without a result `refused` says why.
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
    extra_bytes: int = 0
    error: float = 0.0
    refused: str = ""


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
            processor=_processor(),
            cores=os.cpu_count() or 1,
            target=target.name,
            versions=tuple((name, _version(name)) for name in PACKAGES),
            day=date.today().isoformat(),
        )


def bench(
    cases: Sequence[Case],
    *,
    threads: int,
    seconds: float = 4.0,
    contenders: Iterable[Contender] = PEERS,
    target: Target | None = None,
) -> Iterator[Row]:
    """Rows case by case, ours first. `seconds` is what one case may take, beyond three rounds of every contender.

    Raises TargetError and ToolchainError where our kernels cannot be built here.
    """
    with tempfile.TemporaryDirectory(prefix="swacompile-") as folder:
        library = _build_library({case.head_size for case in cases}, target or host_targets()[0], Path(folder))
        for case in cases:
            problem = Problem.draw(case, threads=threads, library=library)
            yield from _bench_case(problem, [OURS, *contenders], seconds)


def to_json(machine: Machine, rows: Iterable[Row]) -> str:
    """Machine and rows, with every field of Row."""
    return json.dumps(
        {"version": JSON_VERSION, "machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=1
    )


def markdown(rows: Iterable[Row]) -> str:
    """A table, a line per contender and case."""
    lines = [
        "| heads | D | queries x keys | window | contender | ms (10-90 %) | ours faster by | useful GFLOP/s | of sgemm | extra MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row.case
        start = f"| {case.heads}/{case.kv_heads} | {case.head_size} | {case.queries} x {case.keys} | {case.window} | {row.contender} |"
        if row.refused:
            lines.append(f"{start} {row.refused} | | | | |")
            continue
        spread = f"{1e3 * row.median:.3g} ({1e3 * row.low:.3g}-{1e3 * row.high:.3g})"
        rate = f"{row.gflops:.0f} | {100 * row.of_product:.0f} %"
        lines.append(f"{start} {spread} | {row.ratio:.2f} | {rate} | {row.extra_bytes / 1e6:.1f} |")
    return "\n".join(lines)


def _bench_case(problem: Problem, contenders: Sequence[Contender], seconds: float) -> Iterator[Row]:
    runs: dict[str, Run] = {}
    firsts: dict[str, Row] = {}
    for contender in contenders:
        row, run = _first_call(problem, contender)
        firsts[contender.name] = row
        if run is not None:
            runs[contender.name] = run
    times = _paired_times(runs, seconds)
    product = _product_rate(problem.threads)
    for name, first in firsts.items():
        yield _finished(first, times[name], times[OURS.name], product) if name in times else first


def _first_call(problem: Problem, contender: Contender) -> tuple[Row, Run | None]:
    """The row with the first call's memory and error, and the contender if it may go on."""
    case, threads = problem.case, problem.threads
    try:
        run = contender.prepare(problem)
        before = _resident_bytes()
        _reset_peak()
        output = run()
        grown = max(0, _peak_bytes() - before)
        error = _error(problem, np.asarray(output))
    except Exception as failure:  # whatever a package without this operator raises: it is a result of the comparison
        if contender is OURS:
            raise
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        return Row(case=case, contender=contender.name, threads=threads, refused=reason[-1][:120]), None
    if not error < LARGEST_ERROR:
        wrong = f"wrong by {error:.1e}"
        return Row(case=case, contender=contender.name, threads=threads, error=error, refused=wrong), None
    return Row(case=case, contender=contender.name, threads=threads, extra_bytes=grown, error=error), run


def _paired_times(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (time.perf_counter() < until and rounds < 200):
        for name, run in runs.items():
            if times[name] and times[name][0] > SLOW_SECONDS:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def _finished(first: Row, own: list[float], reference: list[float], product: float) -> Row:
    median = statistics.median(own)
    low, high = np.percentile(own, [10, 90])
    gflops = first.case.flops / median / 1e9
    return Row(
        case=first.case,
        contender=first.contender,
        threads=first.threads,
        median=median,
        low=float(low),
        high=float(high),
        rounds=len(own),
        ratio=statistics.median(a / b for a, b in zip(own, reference, strict=False)),
        gflops=gflops,
        of_product=gflops / product,
        gbytes=first.case.bytes / median / 1e9,
        extra_bytes=first.extra_bytes,
        error=first.error,
    )


def _product_rate(threads: int) -> float:
    """GFLOP/s of the faster of two libraries' float32 product, in this run."""
    rates = []
    for run in matrix_products(PRODUCT_SIZE, threads):
        run()
        spent = [_timed(run) for _ in range(5)]
        rates.append(2 * PRODUCT_SIZE**3 / statistics.median(spent) / 1e9)
    return max(rates)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _error(problem: Problem, output: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> float:
    """Largest difference from the float64 reference over a few queries, of all heads."""
    case = problem.case
    worst = 0.0
    for row in np.linspace(0, case.queries - 1, min(SAMPLED_ROWS, case.queries)).astype(int):
        position = int(row) + case.keys - case.queries
        low = max(0, position - case.window + 1)
        call = Call(
            query=problem.query[:, :, row : row + 1],
            key=problem.key[:, :, low : position + 1],
            value=problem.value[:, :, low : position + 1],
            scale=case.scale,
        )
        worst = max(worst, float(np.abs(output[:, :, row : row + 1] - banded_attention(call)).max()))
    return worst


def _build_library(head_sizes: Iterable[int], target: Target, folder: Path) -> Path:
    variants = [KernelVariant(dtype=DType.F32, head_size=size, value_size=size) for size in sorted(head_sizes)]
    build_cpu_object(variants, target, folder / "kernels.o")
    rows = [LibraryKernel(variant=variant, target=target) for variant in variants]
    return build_ort_library([folder / "kernels.o"], rows, folder / "libswacompile_bench.so")


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


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
