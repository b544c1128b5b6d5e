"""A stand-in for CUDA's runtime, with host memory, and a kernel library that computes with the float64 reference."""

import ctypes

import numpy as np

from swacompile.kernels.reference import Call, banded_attention
from swacompile.runtime.cuda.library import Device
from swacompile.tuning import runner

DEVICE = Device(multiprocessors=4, l2_bytes=1 << 20, major=9, minor=0)


class FakeCuda:
    """Answers as swacompile.tuning.gpu.Cuda does. Captured launches run once, at capture; a replay takes 2 ms."""

    def __init__(self):
        self._kept = []
        self.calls = []

    def __call__(self, name, *arguments):
        self.calls.append(name)
        if name == "cudaMemset":
            ctypes.memset(*(getattr(argument, "value", argument) for argument in arguments))
        if name == "cudaEventElapsedTime":
            arguments[0]._obj.value = 2.0

    def made(self, name, *arguments):
        self.calls.append(name)
        if name != "cudaMalloc":
            return ctypes.c_void_p(1)
        self._kept.append(ctypes.create_string_buffer(arguments[0].value + 64))
        return ctypes.c_void_p((ctypes.addressof(self._kept[-1]) + 63) // 64 * 64)

    def copy(self, to, source, size, kind):
        ctypes.memmove(to, source, size)


class FakeLibrary:
    """One mma kernel without splits. `widened` keys too many are visible on the left."""

    def __init__(self, kernel, *, widened=0):
        self.kernels = (kernel,)
        self._widened = widened
        self.launched = []

    def check_device(self, index):
        return DEVICE

    def function(self, name):
        return self._launch

    def _launch(self, query, key, value, output, lse, padding, segments, sinks, bias, slopes, value_sum, *numbers):
        kv_heads, keys, left, right, offset, _chunk, splits, heads_per_wave, blocks, scale, softcap = numbers
        self.launched.append(query.data_ptr())
        assert (kv_heads, keys) == key.shape[1:3] and splits == 1 and heads_per_wave >= 1 and blocks >= 4
        call = Call(
            query=seen(query), key=seen(key), value=seen(value), sinks=seen(sinks), bias=seen(bias), alibi_slopes=seen(slopes),
            key_padding=seen(padding), segments=seen(segments), left=left + self._widened, right=right, offset=offset,
            scale=scale, softcap=softcap,
        )  # fmt: skip
        result = runner.encode(banded_attention(call).astype(np.float32), "bf16")
        ctypes.memmove(output.data_ptr(), result.ctypes.data, result.nbytes)


def seen(tensor):
    """A device tensor's values."""
    if tensor is None:
        return None
    managed = tensor._managed
    kinds = {(0, 64): np.int64, (1, 8): np.uint8, (2, 32): np.float32, (4, 16): np.uint16}
    dtype = np.dtype(kinds[managed.code, managed.bits])
    memory = (ctypes.c_char * tensor.bytes).from_address(tensor.data_ptr())
    steps = [step * dtype.itemsize for step in tensor.stride()]
    array = np.ndarray(tensor.shape, dtype, memory, strides=steps)
    return runner.decode(array, "bf16") if dtype == np.uint16 else array
