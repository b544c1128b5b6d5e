"""Call a CPU kernel in this process, on numpy arrays and with TVM's own thread pool. For tests and measurements."""

from typing import Any

import numpy as np

from swacompile.kernels.build import KernelVariant
from swacompile.kernels.reference import Array, Call
from swacompile.target import Target
from swacompile.workload import DType


def run(module: Any, variant: KernelVariant, target: Target, call: Call, output: Array | None = None) -> Array:
    """The output (B,H,S,V) of the variant's function in `module`; written into `output` where given, which may have strides.

    Arrays are of the variant's element type; bfloat16 ones are ml_dtypes.bfloat16. Nothing is copied.
    """
    if output is None:
        output = np.full((*call.query.shape[:3], call.value.shape[3]), np.nan, dtype=call.query.dtype)
    module[variant.function_name(target)](*arguments(call, output))
    return output


def arguments(call: Call, output: Array) -> tuple[Any, ...]:
    """The ABI's arguments, tensors without a copy. They keep the arrays alive."""
    element = call.query.dtype
    batch, heads, queries, _ = call.query.shape
    bias = call.bias
    if bias is not None:
        bias = np.broadcast_to(bias, (batch, heads, queries, call.key.shape[2]))
    tensors = (
        call.query,
        call.key,
        call.value,
        _or_empty(call.key_padding, (0, 0), np.dtype(np.uint8)),
        _or_empty(call.segments, (0, 0), np.dtype(np.int64)),
        _or_empty(call.sinks, (0,), element),
        _or_empty(bias, (0, 0, 0, 0), element),
        _or_empty(call.alibi_slopes, (0,), np.dtype(np.float32)),
        output,
    )
    integers = (call.left, call.right, call.offset, call.chunk_size, int(call.zeroed))
    return (*(to_tensor(array) for array in tensors), *integers, float(call.scale), float(call.softcap))


def element_type(dtype: DType) -> "np.dtype[Any]":
    """The numpy type of a kernel's elements."""
    if dtype is DType.BF16:
        import ml_dtypes

        brain: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return brain
    return np.dtype(dtype.long_name)


def to_tensor(array: Array) -> Any:
    """A TVM tensor over the array's memory. numpy has no DLPack code for bfloat16, so torch carries those over."""
    import tvm_ffi

    if not array.flags.writeable:
        array = _writeable(array)
    if array.dtype.name == "bfloat16":
        import torch

        return tvm_ffi.from_dlpack(torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16))
    return tvm_ffi.from_dlpack(array)


def _writeable(array: Array) -> Array:
    """The same view marked writeable, which numpy asks for before it shares memory; kernels only read it."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class _View:
        __array_interface__ = interface
        owner = array

    return np.asarray(_View()).view(array.dtype)


def _or_empty(array: Array | None, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """An absent operand has no elements, but an address."""
    return np.zeros(shape, dtype=dtype) if array is None else array.astype(dtype, copy=False)
