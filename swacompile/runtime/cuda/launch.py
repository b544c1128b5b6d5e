"""Launches attention kernels: descriptors are encoded once for given tensors, after that a call is one launch (two
with split keys).
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swacompile.runtime.cuda.library import CudaLibrary, CudaRuntimeError, Device, Kernel
from swacompile.schedules.cuda.combine_symbols import combine_symbol, value_sum_symbol
from swacompile.schedules.cuda.spec import WgmmaConfig

UNBOUNDED = 2**31 - 1
TENSOR_MAP_BYTES = 128
KEPT_PLANS = 64
# Half of the L2 cache for keys and values; the rest passes queries and outputs through.
L2_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Scalars of a call. Window bounds are inclusive; UNBOUNDED for none."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    offset: int = 0
    chunk_size: int = 0
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """Optional tensors; see docs/cuda_kernels.md for their types. One is read if the kernel has the feature."""

    lse: Any = None
    key_padding: Any = None
    segments: Any = None
    sinks: Any = None
    bias: Any = None
    alibi_slopes: Any = None


class Plan:
    """A launch that is ready: calling it enqueues the kernels on the current stream of the tensors' device, and
    allocates nothing.

    Holds its tensors, whose addresses are in it. Capturable in a CUDA graph after one call outside of it, which loads
    the module.
    """

    def __init__(self, launches: list[tuple[Callable[..., Any], tuple[Any, ...]]], kept: tuple[Any, ...]) -> None:
        self._launches = launches
        self._kept = kept

    def __call__(self) -> None:
        for function, arguments in self._launches:
            function(*arguments)


class Launcher:
    """Plans launches of a library's kernels, and keeps the last plans for tensors that come again."""

    def __init__(self, library: CudaLibrary) -> None:
        self._library = library
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()

    def __call__(self, kernel: Kernel, tensors: tuple[Any, Any, Any, Any], numbers: Numbers, extras: Extras) -> None:
        """`tensors`: query, key, value, output."""
        optional = (extras.lse, extras.key_padding, extras.segments, extras.sinks, extras.bias, extras.alibi_slopes)
        key = (kernel, numbers, *(_identity(t) for t in (*tensors, *optional)))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self.plan(kernel, tensors, numbers, extras)
            if len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        plan()

    def plan(
        self,
        kernel: Kernel,
        tensors: tuple[Any, Any, Any, Any],
        numbers: Numbers,
        extras: Extras,
        *,
        splits: int | None = None,
    ) -> Plan:
        """Check arguments, encode descriptors, allocate workspaces.

        `splits` overrides into how many shares a split kernel cuts the keys. Raises CudaRuntimeError for a tensor
        that does not fit.
        """
        query, key, value, output = tensors
        check_tensors(kernel, tensors, numbers)
        device = self._library.check_device(query.device.index or 0)
        features = kernel.spec.features
        wanted = splits or (_splits(kernel, query, key, numbers, device) if features.split else 1)
        launches: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        value_sum = self._sum_values(kernel, value, extras, launches) if features.zeroed else None
        target, lse = output, extras.lse
        if features.split:
            batch, heads, queries, _ = query.shape
            target = self.floats(query, (wanted * batch, heads, queries, kernel.spec.value_size))
            lse = self.floats(query, (wanted * batch, heads, queries))
        maps = self._describe(kernel, tensors)
        extra_handles = (
            lse,
            extras.key_padding,
            extras.segments,
            extras.sinks,
            extras.bias,
            extras.alibi_slopes,
            value_sum,
        )
        leading = maps.pointers if maps else (query, key, value)
        arguments = (
            *leading,
            target,
            *extra_handles,
            key.shape[1],
            key.shape[2],
            numbers.left,
            numbers.right,
            numbers.offset,
            max(numbers.chunk_size, 1),
            wanted,
            _heads_per_wave(kernel, query, key, numbers, device),
            device.multiprocessors * kernel.config.blocks_per_sm,
            float(numbers.scale),
            float(numbers.softcap),
        )
        launches.append((self._library.function(kernel.spec.symbol), arguments))
        if features.split:
            name = combine_symbol(kernel.spec.dtype, kernel.spec.value_size, sinks=features.sinks, lse=features.lse)
            merged = (target, lse, output, extras.sinks, extras.lse, wanted)
            launches.append((self._library.function(name), merged))
        return Plan(launches, (tensors, extras, maps, value_sum))

    def floats(self, like: Any, shape: tuple[int, ...]) -> Any:
        """A float32 workspace on a tensor's device."""
        import torch

        return like.new_empty(shape, dtype=torch.float32)

    def _describe(self, kernel: Kernel, tensors: tuple[Any, Any, Any, Any]) -> "TensorMaps | None":
        if not isinstance(kernel.config, WgmmaConfig):
            return None
        maps = TensorMaps()
        self._library.function(f"{kernel.spec.symbol}_describe")(*tensors, *maps.pointers)
        return maps

    def _sum_values(
        self, kernel: Kernel, value: Any, extras: Extras, launches: list[tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> Any:
        spec = kernel.spec
        batch, heads, _, size = value.shape
        sums = self.floats(value, (batch, heads, size + 1))
        name = value_sum_symbol(spec.dtype, spec.value_size, key_padding=spec.features.key_padding)
        launches.append((self._library.function(name), (value, extras.key_padding, sums)))
        return sums


class TensorMaps:
    """Host memory of four tensor maps, aligned to 64 bytes as the driver asks."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(4 * TENSOR_MAP_BYTES + 64)
        start = -(-ctypes.addressof(self._memory) // 64) * 64
        self.pointers = tuple(ctypes.c_void_p(start + i * TENSOR_MAP_BYTES) for i in range(4))


def check_tensors(kernel: Kernel, tensors: tuple[Any, Any, Any, Any], numbers: Numbers) -> None:
    """Raises CudaRuntimeError unless shapes agree and addresses and strides are multiples of 16 bytes."""
    query, key, value, output = tensors
    batch, heads, queries, _ = query.shape
    expected = {
        "query": (query, (batch, heads, queries, kernel.spec.head_size)),
        "key": (key, (batch, key.shape[1], key.shape[2], kernel.spec.head_size)),
        "value": (value, (batch, key.shape[1], key.shape[2], kernel.spec.value_size)),
        "output": (output, (batch, heads, queries, kernel.spec.value_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise CudaRuntimeError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        odd_stride = any(
            stride * kernel.spec.element_bytes % 16
            for stride, extent in zip(tensor.stride()[:3], shape[:3], strict=True)
            if extent > 1
        )
        if tensor.stride()[-1] != 1 or odd_stride or tensor.data_ptr() % 16:
            raise CudaRuntimeError(
                f"{name} has strides {tensor.stride()} and address {tensor.data_ptr():#x}: the last stride must be 1, "
                "the others and the address multiples of 16 bytes; make it contiguous"
            )
    if heads % key.shape[1]:
        raise CudaRuntimeError(f"query has {heads} heads, no multiple of key's {key.shape[1]}")
    if not numbers.scale > 0:
        raise CudaRuntimeError(f"scale must be positive, not {numbers.scale}: fold its sign into query")


def _identity(tensor: Any) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _band(kernel: Kernel, key: Any, numbers: Numbers) -> int:
    """Keys that one tile of queries touches at most."""
    return int(min(key.shape[2], numbers.left + numbers.right + kernel.config.positions))


def _heads_per_wave(kernel: Kernel, query: Any, key: Any, numbers: Numbers, device: Device) -> int:
    """Even waves whose windows fit in a share of the L2 cache, or in twice that where one wave takes all: a single one
    leaves no block idle between waves.
    """
    pairs = key.shape[0] * key.shape[1]
    spec = kernel.spec
    window_bytes = spec.element_bytes * _band(kernel, key, numbers) * (spec.head_size + spec.value_size)
    fitting = max(1, int(L2_SHARE * device.l2_bytes / window_bytes))
    waves = 1 if pairs <= 2 * fitting else -(-pairs // fitting)
    return int(-(-pairs // waves))


def _splits(kernel: Kernel, query: Any, key: Any, numbers: Numbers, device: Device) -> int:
    """Shares that fill the device once, none under two key tiles."""
    config = kernel.config
    batch, heads, queries, _ = query.shape
    groups = -(-(heads // key.shape[1]) // config.pack)
    tiles = batch * key.shape[1] * groups * -(-queries // config.positions)
    key_tiles = -(-_band(kernel, key, numbers) // config.keys_per_tile)
    free = device.multiprocessors * config.blocks_per_sm // max(tiles, 1)
    return int(max(1, min(free, key_tiles // 2)))
