"""Check and time built kernels with numpy, tvm_ffi and TVM's runtime libraries alone: no compiler, no network. A GPU
needs its driver and CUDA's runtime, too.

    python -m swacompile_runner work.tar -o results.jsonl [--threads N] [--jobs N]

A bundle holds a copy of this file as swacompile_runner.py, and beside it the few files of the package that it imports.
Every candidate runs in a process of its own, so that one that crashes or hangs costs only itself. Kernels are machine
code: run bundles from people you trust only.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

FORMAT = 2
MANIFEST = "manifest.json"
RUNTIME = "libtvm_runtime.so"
SEED = 20240229
SCHEMA = 1
WARM_UP_SECONDS = 0.2
MAX_SECONDS = 20.0
"""Samples end after this long, though never before the third."""
CANDIDATE_SECONDS = 120.0
DISTINCT = 1_000_003
"""Random numbers that are drawn for an operand; a longer one repeats them. A prime, so that no two rows are equal."""
FINALISTS = 2
"""Configs of a workload that a bundle's last round measures beside the default."""
ROUNDS = 2
"""Turns that they take in it."""

Array = Any
Job = dict[str, Any]
Task = TypeVar("Task")
Result = TypeVar("Result")


def element_bytes(dtype: str) -> "np.dtype[Any]":
    """The numpy type that holds a kernel's elements; bfloat16 as its 16 bits."""
    return np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])


def encode(values: Array, dtype: str) -> Array:
    """float32 to a kernel's elements, rounded to nearest even."""
    if dtype != "bf16":
        return values.astype(element_bytes(dtype))
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(elements: Array, dtype: str) -> Array:
    """A kernel's elements as float64."""
    if dtype == "bf16":
        elements = (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float64)


def inputs(problem: Job) -> dict[str, Array]:
    """A problem's operands, the same on every machine (RandomState's streams are frozen).

    Absent ones have no elements.
    """
    batch, heads, kv_heads = problem["batch"], problem["heads"], problem["kv_heads"]
    queries, keys, dtype = problem["queries"], problem["keys"], problem["dtype"]
    random = np.random.RandomState(SEED)

    def normal(*shape: int, present: bool = True) -> Array:
        extents = shape if present else (0,) * len(shape)
        drawn = random.standard_normal(min(math.prod(extents), DISTINCT))
        return np.resize(encode(drawn.astype(np.float32), dtype), extents)

    features = set(problem["features"])
    padding = np.ones((batch, keys), np.uint8)
    padding[:, : keys // 8] = 0
    segments = np.broadcast_to(np.arange(keys, dtype=np.int64) * 3 // keys, (batch, keys)).copy()
    slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    return {
        "query": normal(batch, heads, queries, problem["head_size"]),
        "key": normal(batch, kv_heads, keys, problem["head_size"]),
        "value": normal(batch, kv_heads, keys, problem["value_size"]),
        "key_padding": padding if "key_padding" in features else np.empty((0, 0), np.uint8),
        "segments": segments if "segments" in features else np.empty((0, 0), np.int64),
        "sinks": normal(heads, present="sinks" in features),
        "bias": normal(1, 1, queries, keys, present="bias" in features),
        "alibi_slopes": slopes if "alibi" in features else np.empty(0, np.float32),
    }


def scalars(problem: Job) -> list[Any]:
    """The ABI's arguments after the tensors."""
    integers = [problem[name] for name in ("left", "right", "offset", "chunk_size")]
    zeroed = int("zeroed" in problem["features"])
    return [*integers, zeroed, float(problem["scale"]), float(problem["softcap"])]


def operands(problem: Job) -> list[Array]:
    """The ABI's tensors; the last is the output, full of NaN."""
    arrays = inputs(problem)
    shape = (problem["batch"], problem["heads"], problem["queries"])
    if arrays["bias"].size:
        arrays["bias"] = np.broadcast_to(arrays["bias"], (*shape, problem["keys"]))
    output = encode(np.full((*shape, problem["value_size"]), np.nan, np.float32), problem["dtype"])
    return [*arrays.values(), output]


def type_name(array: Array, dtype: str) -> str:
    """An operand's type as DLPack and TVM name it."""
    return "bfloat16" if dtype == "bf16" and array.dtype == np.uint16 else str(array.dtype)


def wrong_rows(problem: Job, output: Array, expected: Array) -> str | None:
    """What is wrong with an output (B,H,S,V), of which `expected` holds the checked rows of the checked batches and heads.

    None where nothing is. A row's error is the distance from what is expected as a share of that one's length: a key
    more or less among W shows as about 1 / sqrt(W).
    """
    if bool(_is_nan(output, problem["dtype"]).any()):
        return f"{problem['name']}: some outputs are not written, or not a number"
    places = np.ix_(problem["batches"], problem["checked_heads"], problem["rows"])
    found = decode(output[places], problem["dtype"])
    length = np.maximum(np.linalg.norm(expected, axis=-1), np.finfo(np.float32).tiny)
    error = np.linalg.norm(found - expected, axis=-1) / length
    if bool((error <= problem["tolerance"]).all()):
        return None
    place = np.unravel_index(np.argmax(error), error.shape)
    batch, head, row = (problem[name][i] for name, i in zip(("batches", "checked_heads", "rows"), place, strict=True))
    return (
        f"batch {batch}, head {head}, query {row} of {problem['name']}: expected {expected[place][0]:.6g}, ..., "
        f"found {found[place][0]:.6g}, ...: an error of {error[place]:.3g}, tolerance {problem['tolerance']:g}"
    )


def _is_nan(elements: Array, dtype: str) -> Array:
    """Of a kernel's elements, without making them wider: an output can have 2^27."""
    if dtype == "f32":
        return np.isnan(elements)
    infinity = {"f16": 0x7C00, "bf16": 0x7F80}[dtype]
    return (elements.view(np.uint16) & 0x7FFF) > infinity


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and the interquartile range as a share of it."""
    low, median, high = np.percentile(np.asarray(samples), [25, 50, 75])
    return float(median), float((high - low) / median)


def run_job(job: Job, folder: Path) -> Job:
    """Check a job's kernel on every problem, then time it on those marked so.

    Status, times in microseconds, message.
    """
    sys.path.insert(0, str(folder))  # a bundle's own copy of what is imported goes first
    open_bench = _gpu_bench if job["device"] == "cuda" else _CpuBench
    bench = open_bench(job, folder)
    samples: list[float] = []
    for problem in job["problems"]:
        call = bench.prepare(problem)
        wrong = wrong_rows(problem, call.run(), np.load(folder / problem["expected"], allow_pickle=False))
        if wrong is not None:
            return {"status": "wrong", "samples": [], "message": wrong}
        if problem["timed"]:
            samples = call.time(job["samples"], job["min_ms"])
    return {"status": "ok", "samples": samples, "message": ""}


def _gpu_bench(job: Job, folder: Path) -> Any:
    _load_runtime(folder)
    from swacompile.tuning.gpu import GpuBench

    return GpuBench(job, folder, runtime=_runtime_library(folder).parent, inputs=inputs)


class _CpuBench:
    """A job's kernel on this machine's CPU."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._runtime = _load_runtime(folder)
        self._function = self._runtime.load_module(str((folder / job["library"]).resolve()))[job["function"]]

    def prepare(self, problem: Job) -> "_CpuCall":
        arrays = operands(problem)
        tensors = [_tensor(self._runtime, array, type_name(array, problem["dtype"])) for array in arrays]
        return _CpuCall(self._function, [*tensors, *scalars(problem)], arrays[-1])


class _CpuCall:
    def __init__(self, function: Any, arguments: list[Any], output: Array) -> None:
        self._function, self._arguments, self._output = function, arguments, output

    def run(self) -> Array:
        self._function(*self._arguments)
        return self._output

    def time(self, samples: int, min_ms: float) -> list[float]:
        """Microseconds a call, `samples` times; a sample repeats the call for at least `min_ms`."""
        function, arguments = self._function, self._arguments
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < min(WARM_UP_SECONDS, min_ms / 1e3):
            function(*arguments)
            calls += 1
        each = (time.perf_counter() - start) / calls
        count = max(1, int(min_ms / 1e3 / each))
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < samples and (len(times) < 3 or time.perf_counter() - begin < MAX_SECONDS):
            start = time.perf_counter()
            for _ in range(count):
                function(*arguments)
            times.append((time.perf_counter() - start) / count * 1e6)
        return times


_EXPORTED: list[Any] = []


def _tensor(runtime: Any, array: Array, name: str) -> Any:
    from swacompile.tuning.dlpack import CPU, Exporter

    strides = [step // array.itemsize for step in array.strides]
    _EXPORTED.append(Exporter(array.ctypes.data or 64, array.shape, strides, name, device=CPU, kept=array))
    return runtime.from_dlpack(_EXPORTED[-1])


def _load_runtime(folder: Path) -> Any:
    """tvm_ffi with TVM's runtime library in the process.

    The bundle's own, or that of an installed TVM, which is not imported.
    """
    without_torch()
    import tvm_ffi

    ctypes.CDLL(str(_runtime_library(folder)), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def without_torch() -> None:
    """Say that torch is not there: tvm_ffi imports it where it finds it, which takes a second, and nothing here needs it."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def _runtime_library(folder: Path) -> Path:
    spec = importlib.util.find_spec("tvm")
    installed = [Path(place, "lib") for place in (spec.submodule_search_locations or ())] if spec is not None else []
    for place in (folder, *installed):
        if (place / RUNTIME).is_file():
            return place / RUNTIME
    raise SystemExit(f"{RUNTIME} is missing: expected it in the bundle or in an installed tvm. Export it again.")


def run_contained(job: Job, folder: Path, *, threads: int, seconds: float) -> Job:
    """`run_job` in a process of its own: what crashes or hangs there is a status here."""
    environment = os.environ | {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(folder)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, env=environment, start_new_session=True
        )
        try:
            child.communicate(json.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"status": "hung", "samples": [], "message": f"no end after {seconds:.0f} s"}
        finally:
            _kill_group(child)
        out.seek(0)
        err.seek(0)
        return _child_result(child.returncode, out.read(), err.read())


def _kill_group(child: "subprocess.Popen[str]") -> None:
    """End a child and what it started, also when this process is interrupted."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _child_result(code: int, out: str, err: str) -> Job:
    lines = out.strip().splitlines()
    if code == 0 and lines:
        try:
            return dict(json.loads(lines[-1]))
        except ValueError:
            pass
    said = err.strip().splitlines()
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return {"status": "crashed", "samples": [], "message": f"{how}: {said[-1] if said else 'no message'}"}


def device_of(kind: str) -> tuple[str, str | None]:
    """Name of the device that jobs run on, and its driver's version; None for a CPU. Raises SystemExit without a GPU."""
    return gpu_name() if kind == "cuda" else (device_name(), None)


def gpu_name() -> tuple[str, str]:
    """Name and driver version of the first GPU that CUDA shows. Raises SystemExit where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", "--id", first, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"no NVIDIA GPU answers here ({error}): run this on a machine with one.") from error
    name, _, driver = said.strip().partition(",")
    return name.strip(), driver.strip()


def device_name() -> str:
    """The processor's name: Linux' model name, or what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())


def finished(record: Job, result: Job, *, device: tuple[str, str | None], threads: int) -> Job:
    """A record, as the database has it, of a candidate's template and its result. `device`: name and driver."""
    times = result["samples"]
    median, spread = summary(times) if result["status"] == "ok" else (None, None)
    return {
        "schema": SCHEMA,
        **record,
        "status": result["status"],
        "samples": len(times),
        "median_us": median,
        "spread": spread,
        "device": device[0],
        "threads": threads,
        "driver": device[1],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "message": printable(result["message"]),
    }


def printable(text: str) -> str:
    """One line of at most 300 characters that any reader accepts."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def side_by_side(
    tasks: Sequence[Task], run: Callable[[Task], Result], hung: Callable[[Result], bool], parallel: int
) -> Iterator[Result]:
    """Results as they come, of `parallel` tasks at a time. What hung is run again alone: it may only have waited for another
    that did.
    """
    again = []
    with ThreadPoolExecutor(parallel) as pool:
        running = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(running):
                if hung(future.result()) and parallel > 1:
                    again.append(running[future])
                else:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for what has not begun
    yield from map(run, again)


class _Session:
    """A run over a bundle: results are on the disk as soon as they are known."""

    def __init__(self, folder: Path, out: Path, *, threads: int, seconds: float, parallel: int) -> None:
        self._folder, self._out = folder, out
        self._threads, self._seconds, self._parallel = threads, seconds, parallel
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise SystemExit(f"expected a bundle of format {FORMAT}, found {manifest.get('format')}: export it again.")
        lock = str(folder.resolve() / "turns.lock")
        self._jobs: list[Job] = [job | {"lock": lock} for job in manifest["jobs"]]
        self._device = device_of(self._jobs[0]["device"]) if self._jobs else ("", None)

    def measure(self) -> int:
        """Measure every candidate that the results do not hold yet, then the best of each workload again, longer; gives
        the number of results added.
        """
        first = self._run([[job] for job in self._jobs])
        return first + self._run([[job] * ROUNDS for job in self._finalists()])

    def _run(self, turns: list[list[Job]]) -> int:
        """A list of the same job over and over is one result. Rounds take turns, so that a slow moment does not hit one
        of them alone.
        """
        done = set(_measured(self._out))
        todo = [turn for turn in turns if _key(turn[0]["record"]) not in done]
        results: list[list[Job]] = [[] for _ in todo]
        order = [(i, job) for round_ in zip(*todo, strict=True) for i, job in enumerate(round_)]
        with self._out.open("a") as file:
            measured = side_by_side(
                order, self._numbered, lambda found: bool(found[1]["status"] == "hung"), self._parallel
            )
            for i, result in measured:
                results[i].append(result)
                if len(results[i]) == len(todo[i]):
                    whole = sum(len(found) == len(turn) for found, turn in zip(results, todo, strict=True))
                    print(f"{whole}/{len(todo)} {self._write(file, todo[i][0], results[i])}", flush=True)
        return len(todo)

    def _write(self, file: TextIO, job: Job, results: list[Job]) -> str:
        """Write a record, and give what is shown of it."""
        record = finished(job["record"], _merged(results), device=self._device, threads=self._threads)
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
        return _shown(record)

    def _numbered(self, numbered: tuple[int, Job]) -> tuple[int, Job]:
        i, job = numbered
        return i, run_contained(job, self._folder, threads=self._threads, seconds=self._seconds)

    def _finalists(self) -> list[Job]:
        """Jobs of the last round: of each workload the default and the fastest others, where there is a choice."""
        times: dict[tuple[str, ...], float] = {}
        for line in self._out.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                times[_key(record)] = record["median_us"] if record["status"] == "ok" else math.inf
        chosen: list[Job] = []
        for workload in dict.fromkeys(job["record"]["workload"] for job in self._jobs):
            own = [job for job in self._jobs if job["record"]["workload"] == workload]
            good = [job for job in own if math.isfinite(times.get(_key(job["record"]), math.inf))]
            others = [job for job in good if job["record"]["origin"] != "default"]
            others.sort(key=lambda job: times[_key(job["record"])])
            defaults = [job for job in good if job["record"]["origin"] == "default"]
            if len(good) > 1:
                chosen += [*defaults, *others[:FINALISTS]]
        return [job | {"record": job["record"] | {"rung": job["record"]["rung"] + 1}} for job in chosen]


def _merged(results: Sequence[Job]) -> Job:
    """Results of one candidate as one: any failure decides."""
    failed = next((result for result in results if result["status"] != "ok"), None)
    return failed or results[0] | {"samples": [sample for result in results for sample in result["samples"]]}


def _shown(record: Job) -> str:
    time_us = record["median_us"]
    found = f"{time_us:.1f} us" if time_us is not None else f"{record['status']}: {record['message']}"
    return f"{record['workload']} {record['config']} {found}"


def _measured(out: Path) -> Iterator[tuple[str, ...]]:
    """Candidates in a file of results; a line that was cut short counts as not measured."""
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            yield _key(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue


def _key(record: Job) -> tuple[str, ...]:
    return (record["target"], record["workload"], record["config"], record["revision"], str(record["rung"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="swacompile_runner", description="Check and time the kernels of a bundle.")
    parser.add_argument(
        "bundle", nargs="?", help="what `swacompile tune --export-bundle` wrote, or its unpacked folder"
    )
    parser.add_argument(
        "-o", "--output", default="results.jsonl", help="results are added here; a second run continues"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that a kernel may use")
    parser.add_argument(
        "--jobs", type=int, default=1, help="candidates prepared at once, for a GPU: they are timed one at a time"
    )
    parser.add_argument("--timeout", type=float, default=CANDIDATE_SECONDS, help="seconds that one candidate may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(run_job(json.load(sys.stdin), Path(options.one))))
        return 0
    bundle = Path(options.bundle or Path(__file__).parent)
    with tempfile.TemporaryDirectory() as scratch:
        folder = bundle
        if bundle.is_file():
            folder = Path(scratch)
            with tarfile.open(bundle) as tar:
                tar.extractall(folder, filter="data")
        session = _Session(
            folder, Path(options.output), threads=options.threads, seconds=options.timeout, parallel=options.jobs
        )
        count = session.measure()
    print(f"{count} measurements; results in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
