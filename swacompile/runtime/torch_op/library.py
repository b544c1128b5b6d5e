"""The operator's library in this process: loading it, giving it kernels, and building those that it misses."""

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch

from swacompile.errors import ArtifactError
from swacompile.runtime.cuda.table import features_of
from swacompile.runtime.torch_op.build import kernel_library
from swacompile.runtime.torch_op.cuda_build import arch_of, cuda_kernel_library, runtime_folder
from swacompile.schedules.cuda.choose import Shape
from swacompile.schedules.cuda.spec import KernelSpec
from swacompile.workload import DType

log = logging.getLogger(__name__)

MESSAGE_BYTES = 2048
_BRAIN_FLOAT = 4  # DLPack's code of bfloat16
_Handler = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
)


class _CudaNeed(ctypes.Structure):
    """CudaNeed of cuda_kernels.h."""

    _fields_ = (
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("head_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("features", ctypes.c_uint32),
        ("group", ctypes.c_int64),
        ("band", ctypes.c_int64),
    )


_CudaHandler = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_CudaNeed), ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
)


class OperatorLibrary:
    """The loaded library of torch.ops.swacompile.banded_attention."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # torch's
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.swacompile_torch_call_count.restype = ctypes.c_uint64
        self._handler = _Handler(self._build_missing)  # the library keeps its address: it must live as long
        self._library.swacompile_torch_on_missing(self._handler)
        self._library.swacompile_torch_cuda_call_count.restype = ctypes.c_uint64
        self._cuda_handler = _CudaHandler(self._build_missing_cuda)
        self._library.swacompile_torch_on_missing_cuda(self._cuda_handler)

    def add_kernels(self, path: Path) -> None:
        """Load a kernel library. Raises ArtifactError where it is none, or none for this machine."""
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        failed = self._library.swacompile_torch_add_kernels(
            str(path.resolve()).encode(), message, ctypes.c_size_t(MESSAGE_BYTES)
        )
        if failed:
            raise ArtifactError(message.value.decode(errors="replace"))
        log.info("loaded kernels from %s", path)

    def add_cuda_kernels(self, path: Path, carried: Path | None = None) -> None:
        """Load a library of CUDA kernels; TVM's runtime from `carried` where TVM is not installed.

        Raises ArtifactError where the runtime or the GPU's driver is missing, or the library is none of ours.
        """
        folder = runtime_folder(carried)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        failed = self._library.swacompile_torch_add_cuda_kernels(
            str(path.resolve()).encode(), str(folder.resolve()).encode(), message, ctypes.c_size_t(MESSAGE_BYTES)
        )
        if failed:
            raise ArtifactError(message.value.decode(errors="replace"))
        log.info("loaded CUDA kernels from %s", path)

    def call_count(self) -> int:
        """How many times the operator has run a kernel in this process, on a CPU or on a GPU."""
        return int(self._library.swacompile_torch_call_count() + self._library.swacompile_torch_cuda_call_count())

    def _build_missing(self, code: int, bits: int, head_size: int, value_size: int, message: int, size: int) -> int:
        """Called from C++ for a kernel that is not loaded; an exception must not pass there and becomes a message."""
        try:
            self.add_kernels(kernel_library(_dtype(code, bits), head_size, value_size))
        except Exception as error:
            return _failed(error, message, size)
        return 0

    def _build_missing_cuda(self, need: Any, major: int, minor: int, message: int, size: int) -> int:
        """The same for a GPU of compute capability `major`.`minor`."""
        try:
            wanted = need.contents
            spec = KernelSpec(
                dtype=_dtype(wanted.code, wanted.bits).long_name,
                head_size=wanted.head_size,
                value_size=wanted.value_size,
                features=features_of(wanted.features),
            )
            shape = Shape(group=wanted.group, band=None if wanted.band < 0 else wanted.band)
            self.add_cuda_kernels(cuda_kernel_library(spec, arch_of(major, minor), shape))
        except Exception as error:
            return _failed(error, message, size)
        return 0


def _dtype(code: int, bits: int) -> DType:
    return DType.BF16 if code == _BRAIN_FLOAT else DType.F32 if bits == 32 else DType.F16


def _failed(error: Exception, message: int, size: int) -> int:
    """Write the error's text, cut to `size` bytes, for C++."""
    text = str(error).encode()[: size - 1] + b"\0"
    ctypes.memmove(message, text, len(text))
    return 1
