"""Memory as tvm_ffi takes it: a DLPack producer of any address, shape, strides and type, on the host or a GPU."""

import ctypes
from collections.abc import Sequence
from typing import Any

CPU, CUDA = 1, 2
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}


class _Managed(ctypes.Structure):
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


class Exporter:
    """A DLPack producer. Neither numpy's own, which refuses bfloat16 and read-only views, nor any framework is needed.

    It lives as long as its tensors must; `kept` is what owns the memory. `strides` count elements, `name` is a type such
    as bfloat16.
    """

    def __init__(
        self, address: int, shape: Sequence[int], strides: Sequence[int], name: str, *, device: int, kept: object
    ) -> None:
        extents, steps = ((ctypes.c_int64 * len(shape))(*values) for values in (shape, strides))
        code = name.rstrip("0123456789")
        self._keep = (kept, extents, steps)
        self._device = device
        self._managed = _Managed(
            data=address,
            device_type=device,
            ndim=len(shape),
            code=_CODES[code],
            bits=int(name.removeprefix(code)),
            lanes=1,
            shape=extents,
            strides=steps,
        )

    def __dlpack__(self, **_: object) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._device, 0)
