"""The operator's library in this process: loading it, giving it kernels, and building those that it misses."""

import ctypes
import logging
from pathlib import Path

import torch

from swacompile.errors import ArtifactError
from swacompile.runtime.torch_op.build import kernel_library
from swacompile.workload import DType

log = logging.getLogger(__name__)

MESSAGE_BYTES = 2048
_BRAIN_FLOAT = 4  # DLPack's code of bfloat16
_Handler = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
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

    def add_kernels(self, path: Path) -> None:
        """Load a kernel library. Raises ArtifactError where it is none, or none for this machine."""
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        failed = self._library.swacompile_torch_add_kernels(
            str(path.resolve()).encode(), message, ctypes.c_size_t(MESSAGE_BYTES)
        )
        if failed:
            raise ArtifactError(message.value.decode(errors="replace"))
        log.info("loaded kernels from %s", path)

    def call_count(self) -> int:
        """How many times a kernel has run in this process."""
        return int(self._library.swacompile_torch_call_count())

    def _build_missing(self, code: int, bits: int, head_size: int, value_size: int, message: int, size: int) -> int:
        """Called from C++ for a kernel that is not loaded; an exception must not pass there and becomes a message."""
        try:
            dtype = DType.BF16 if code == _BRAIN_FLOAT else DType.F32 if bits == 32 else DType.F16
            self.add_kernels(kernel_library(dtype, head_size, value_size))
        except Exception as error:
            text = str(error).encode()[: size - 1] + b"\0"
            ctypes.memmove(message, text, len(text))
            return 1
        return 0
