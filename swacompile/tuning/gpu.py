"""Kernels on a GPU with CUDA's runtime, tvm_ffi and TVM's two runtime libraries: neither torch nor a compiler.

Bundles carry this file. A call is launched as a model's is, by swacompile.runtime.cuda.launch.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from swacompile.runtime.cuda.launch import Extras, Launcher, Numbers, Plan
from swacompile.runtime.cuda.library import CUDA_RUNTIME, CudaLibrary
from swacompile.tuning.dlpack import CUDA, Exporter
from swacompile.tuning.turns import turn

FAR = 3
"""A timed call's operands are copied until they are this many times the L2 cache, and the copies used in turns: a
model's keys and values are not in the cache either."""
MOST_COPIES = 16
MOST_LAUNCHES = 256
WARM_UP_MS = 80.0
"""Enough for clocks to fall to what the power limit allows."""
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NON_BLOCKING, _RELAXED = 1, 2
_HOST_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_NAN_BYTE = 0xFF
"""Repeated, it is a NaN of every floating-point type."""

Array = Any
Job = dict[str, Any]


class CudaError(Exception):
    """A call of CUDA's runtime failed."""


class Cuda:
    """CUDA's runtime: a call raises CudaError unless it returns 0. Memory is freed with the process."""

    def __init__(self) -> None:
        for name in (CUDA_RUNTIME, f"/usr/local/cuda/lib64/{CUDA_RUNTIME}"):
            try:
                self._library = ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
                break
            except OSError:
                continue
        else:
            raise CudaError(f"{CUDA_RUNTIME} was not found: install CUDA 13's runtime, or set LD_LIBRARY_PATH")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self._library.cudaGetErrorString(code).decode()}")

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """The handle or address that a call writes through its first argument."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return handle

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        self("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)


class DeviceTensor(Exporter):
    """A tensor in a GPU's memory, with what `Launcher` asks of torch's."""

    def __init__(self, cuda: Cuda, shape: Sequence[int], name: str, strides: Sequence[int] | None = None) -> None:
        self.shape = tuple(shape)
        self.device = SimpleNamespace(index=0)
        self._cuda = cuda
        self._strides = tuple(strides or (math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        elements = 1 + sum((extent - 1) * step for extent, step in zip(shape, self._strides, strict=True))
        self.bytes = elements * (int(name.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8)
        self._address = int(cuda.made("cudaMalloc", ctypes.c_size_t(self.bytes)).value or 0)
        super().__init__(self._address, self.shape, self._strides, name, device=CUDA, kept=cuda)

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def data_ptr(self) -> int:
        return self._address

    def poison(self) -> None:
        self._cuda("cudaMemset", ctypes.c_void_p(self._address), _NAN_BYTE, ctypes.c_size_t(self.bytes))

    def write(self, array: Array) -> None:
        whole = np.ascontiguousarray(array)
        self._cuda.copy(self._address, whole.ctypes.data, whole.nbytes, _HOST_TO_DEVICE)

    def read(self, into: Array) -> Array:
        self._cuda.copy(into.ctypes.data, self._address, into.nbytes, _DEVICE_TO_HOST)
        return into

    def copied(self, name: str) -> "DeviceTensor":
        other = DeviceTensor(self._cuda, self.shape, name, self._strides)
        self._cuda.copy(other.data_ptr(), self._address, self.bytes, _DEVICE_TO_DEVICE)
        return other


class _TorchlessLauncher(Launcher):
    def __init__(self, library: CudaLibrary, cuda: Cuda) -> None:
        super().__init__(library)
        self._cuda = cuda

    def floats(self, like: Any, shape: tuple[int, ...]) -> Any:
        return DeviceTensor(self._cuda, shape, "float32")


class GpuBench:
    """A job's kernel on the first GPU that CUDA shows. `inputs` makes a problem's arrays.

    Work of others on the GPU stands still while a call is timed: jobs that name the same `lock` take turns.
    """

    def __init__(self, job: Job, folder: Path, *, runtime: Path, inputs: Callable[[Job], dict[str, Array]]) -> None:
        self.cuda = Cuda()
        self.lock: str | None = job.get("lock")
        self._inputs = inputs
        library = CudaLibrary(folder / job["library"], runtime=runtime)
        (self.kernel,) = library.kernels
        self.launcher = _TorchlessLauncher(library, self.cuda)
        with self.turn(alone=False):
            self.device = library.check_device(0)
            self.stream = self.cuda.made("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def prepare(self, problem: Job) -> "GpuCall":
        arrays = self._inputs(problem)
        with self.turn(alone=False):
            return GpuCall(self, problem, arrays)

    def turn(self, *, alone: bool) -> AbstractContextManager[None]:
        return turn(Path(self.lock), alone=alone) if self.lock is not None else nullcontext()

    @contextmanager
    def current_stream(self) -> Iterator[None]:
        """Launches go to this object's stream."""
        import tvm_ffi

        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), int(self.stream.value or 0)):
            yield


class GpuCall:
    """A problem's operands on the GPU, and the launches that compute it."""

    def __init__(self, bench: GpuBench, problem: Job, arrays: dict[str, Array]) -> None:
        self._bench, self._problem = bench, problem
        self._type = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[problem["dtype"]]
        shape = (problem["batch"], problem["heads"], problem["queries"], problem["value_size"])
        self._tensors = (
            *(self._sent(arrays[name], self._type) for name in ("query", "key", "value")),
            DeviceTensor(bench.cuda, shape, self._type),
        )
        self._extras = self._sent_extras(arrays)

    def run(self) -> Array:
        """The output after one launch into memory full of NaN."""
        bench, output = self._bench, self._tensors[-1]
        with bench.turn(alone=False), bench.current_stream():
            output.poison()
            bench.cuda("cudaDeviceSynchronize")
            self._plan(self._tensors)()
            bench.cuda("cudaDeviceSynchronize")
            return output.read(np.empty(output.shape, _HOST_TYPES[self._type]))

    def time(self, samples: int, min_ms: float) -> list[float]:
        """Microseconds a call, `samples` times; a sample is a graph of launches, of at least `min_ms` milliseconds or
        MOST_LAUNCHES.
        """
        bench = self._bench
        with bench.turn(alone=True), bench.current_stream():
            plans = [self._plan(self._tensors), *(self._plan(self._copied()) for _ in range(self._copies() - 1))]
            bench.cuda("cudaDeviceSynchronize")
            each_ms = self._replayed(self._graph(plans[:1] * 3)) / 3
            count = min(MOST_LAUNCHES, math.ceil(min_ms / each_ms))
            count = max(len(plans), count // len(plans) * len(plans))
            graph = self._graph([plans[i % len(plans)] for i in range(count)])
            for _ in range(1 + int(WARM_UP_MS / (each_ms * count))):
                self._replayed(graph)
            return [self._replayed(graph) / count * 1e3 for _ in range(samples)]

    def _plan(self, tensors: tuple[Any, ...]) -> Plan:
        problem = self._problem
        numbers = Numbers(
            **{name: problem[name] for name in ("left", "right", "offset", "chunk_size", "scale", "softcap")}
        )
        query, key, value, output = tensors
        return self._bench.launcher.plan(self._bench.kernel, (query, key, value, output), numbers, self._extras)

    def _graph(self, plans: Sequence[Plan]) -> ctypes.c_void_p:
        """Launches as a CUDA graph: a replay has no gaps in which Python prepares the next launch."""
        cuda, stream = self._bench.cuda, self._bench.stream
        cuda("cudaStreamBeginCapture", stream, _RELAXED)
        for plan in plans:
            plan()
        graph = ctypes.c_void_p()
        cuda("cudaStreamEndCapture", stream, ctypes.byref(graph))
        return cuda.made("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))

    def _replayed(self, graph: ctypes.c_void_p) -> float:
        """Milliseconds of one replay, between two events of the GPU."""
        cuda, stream = self._bench.cuda, self._bench.stream
        start, end = cuda.made("cudaEventCreate"), cuda.made("cudaEventCreate")
        cuda("cudaEventRecord", start, stream)
        cuda("cudaGraphLaunch", graph, stream)
        cuda("cudaEventRecord", end, stream)
        cuda("cudaEventSynchronize", end)
        elapsed = ctypes.c_float()
        cuda("cudaEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value

    def _copies(self) -> int:
        problem, kernel = self._problem, self._bench.kernel.spec
        seen = min(problem["keys"], problem["left"] + problem["right"] + problem["queries"])
        columns = problem["heads"] * problem["queries"] + problem["kv_heads"] * seen
        element = np.dtype(_HOST_TYPES[self._type]).itemsize
        touched = element * problem["batch"] * columns * (kernel.head_size + kernel.value_size)
        return int(max(1, min(MOST_COPIES, math.ceil(FAR * self._bench.device.l2_bytes / touched))))

    def _copied(self) -> tuple[Any, ...]:
        return tuple(tensor.copied(self._type) for tensor in self._tensors)

    def _sent(self, array: Array, name: str) -> Any:
        tensor = DeviceTensor(self._bench.cuda, array.shape, name)
        tensor.write(array)
        return tensor

    def _sent_extras(self, arrays: dict[str, Array]) -> Extras:
        types = {"key_padding": "uint8", "segments": "int64", "sinks": self._type, "alibi_slopes": "float32"}
        sent = {name: self._sent(arrays[name], of) for name, of in types.items() if arrays[name].size}
        bias = arrays["bias"]
        if bias.size:
            problem = self._problem
            shape = (problem["batch"], problem["heads"], problem["queries"], problem["keys"])
            sent["bias"] = DeviceTensor(self._bench.cuda, shape, self._type, (0, 0, problem["keys"], 1))
            sent["bias"].write(bias)
        return Extras(**sent)
