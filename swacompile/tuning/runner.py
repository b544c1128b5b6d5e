"""Check and time built kernels with numpy, tvm_ffi and libtvm_runtime.so alone: no compiler, no network, no other
file of this package.

    python -m swacompile_runner work.tar -o results.jsonl [--threads N]

A bundle holds a copy of this file as swacompile_runner.py. Every candidate runs in a process of its own, so that one
that crashes
or hangs costs only itself. Kernels are machine code: run bundles from people you trust only.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
RUNTIME = "libtvm_runtime.so"
SEED = 20240229
SCHEMA = 1
WARM_UP_SECONDS = 0.2
MAX_SECONDS = 20.0
"""Samples end after this long, though never before the third."""
CANDIDATE_SECONDS = 120.0

Array = Any
Job = dict[str, Any]


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
        drawn = random.standard_normal(shape if present else [0] * len(shape))
        return encode(drawn.astype(np.float32), dtype)

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
    """What is wrong with an output (B,H,S,V), of which `expected` holds the problem's checked rows.

    None where nothing is.
    """
    found = decode(output, problem["dtype"])[:, :, problem["rows"]]
    error = np.abs(found - expected)
    if bool((error <= problem["tolerance"]).all()):
        return None
    place = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    row = problem["rows"][place[2]]
    return (
        f"head {place[1]}, query {row}, column {place[3]} of {problem['name']}: "
        f"expected {expected[place]:.6g}, found {found[place]:.6g}, tolerance {problem['tolerance']:g}"
    )


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and the interquartile range as a share of it."""
    low, median, high = np.percentile(np.asarray(samples), [25, 50, 75])
    return float(median), float((high - low) / median)


def run_job(job: Job, folder: Path) -> Job:
    """Check a job's kernel on every problem, then time it on those marked so.

    Status, times in microseconds, message.
    """
    runtime = _load_runtime(folder)
    function = runtime.load_module(str((folder / job["library"]).resolve()))[job["function"]]
    samples: list[float] = []
    for problem in job["problems"]:
        arrays = operands(problem)
        tensors = [_tensor(runtime, array, type_name(array, problem["dtype"])) for array in arrays]
        arguments = [*tensors, *scalars(problem)]
        function(*arguments)
        wrong = wrong_rows(problem, arrays[-1], np.load(folder / problem["expected"], allow_pickle=False))
        if wrong is not None:
            return {"status": "wrong", "samples": [], "message": wrong}
        if problem["timed"]:
            samples = _time(lambda arguments=arguments: function(*arguments), job["samples"], job["min_ms"])
    return {"status": "ok", "samples": samples, "message": ""}


def _time(call: Any, samples: int, min_ms: float) -> list[float]:
    """Microseconds a call, `samples` times; a sample repeats the call for at least `min_ms`."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < min(WARM_UP_SECONDS, min_ms / 1e3):
        call()
        calls += 1
    each = (time.perf_counter() - start) / calls
    count = max(1, int(min_ms / 1e3 / each))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < samples and (len(times) < 3 or time.perf_counter() - begin < MAX_SECONDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    return times


class _DLTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, its parts in one row."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_DL_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}


class _Exporter:
    """An array as a DLPack producer. numpy's own refuses bfloat16 and read-only views.

    Lives as long as its tensor must.
    """

    def __init__(self, array: Array, name: str) -> None:
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
        self._keep = (array, shape, strides)
        self._managed = _DLTensor(
            data=array.ctypes.data or 64, device_type=1, ndim=array.ndim, code=_DL_CODES[name.rstrip("0123456789")],
            bits=array.itemsize * 8, lanes=1, shape=shape, strides=strides,
        )  # fmt: skip

    def __dlpack__(self, **_: object) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


_EXPORTED: list[_Exporter] = []


def _tensor(runtime: Any, array: Array, name: str) -> Any:
    _EXPORTED.append(_Exporter(array, name))
    return runtime.from_dlpack(_EXPORTED[-1])


def _load_runtime(folder: Path) -> Any:
    """tvm_ffi with TVM's runtime library in the process.

    The bundle's own, or that of an installed TVM, which is not imported.
    """
    # tvm_ffi imports torch where it finds it, which takes a second.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import tvm_ffi

    ctypes.CDLL(str(_runtime_library(folder)), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


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


def device_name() -> str:
    """The processor's name: Linux' model name, or what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())


def finished(record: Job, result: Job, *, device: str, threads: int) -> Job:
    """A record, as the database has it, of a candidate's template and its result."""
    times = result["samples"]
    median, spread = summary(times) if result["status"] == "ok" else (None, None)
    return {
        "schema": SCHEMA,
        **record,
        "status": result["status"],
        "samples": len(times),
        "median_us": median,
        "spread": spread,
        "device": device,
        "threads": threads,
        "driver": None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "message": printable(result["message"]),
    }


def printable(text: str) -> str:
    """One line of at most 300 characters that any reader accepts."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def measure_bundle(folder: Path, out: Path, *, threads: int, seconds: float) -> int:
    """Measure every candidate of an unpacked bundle that `out` does not hold yet; gives the number measured."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise SystemExit(f"expected a bundle of format {FORMAT}, found {manifest.get('format')}: export it again.")
    done = set(_measured(out))
    todo = [job for job in manifest["jobs"] if _key(job["record"]) not in done]
    device = device_name()
    with out.open("a") as file:
        for number, job in enumerate(todo, start=1):
            result = run_contained(job, folder, threads=threads, seconds=seconds)
            record = finished(job["record"], result, device=device, threads=threads)
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            shown = (
                f"{record['median_us']:.1f} us" if record["median_us"] else f"{record['status']}: {record['message']}"
            )
            print(f"{number}/{len(todo)} {record['workload']} {record['config']} {shown}", flush=True)
    return len(todo)


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
    return (record["target"], record["workload"], record["config"], record["revision"])


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
        count = measure_bundle(folder, Path(options.output), threads=options.threads, seconds=options.timeout)
    print(f"{count} candidates measured; results in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
