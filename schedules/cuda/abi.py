"""Arguments of the exported functions, declared once for every family. docs/cuda_kernels.md lists them for callers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from swacompile.schedules.cuda.problem import Operands, Sizes, Tile, clamp_window
from swacompile.schedules.cuda.spec import KernelSpec
from swacompile.schedules.cuda.trace import div, fixed


def trace_function(name: str, body: Callable[[], None]) -> Any:
    """The TIRx function `name` that `body` emits."""
    with IRBuilder() as ir, builder.prim_func():
        builder.func_name(name)
        builder.func_attr({"global_symbol": name})
        body()
    return ir.get()


@contextmanager
def device_entry(blocks_per_sm: int) -> Iterator[None]:
    """What follows runs on the device."""
    T.device_entry()
    with T.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks_per_sm}):
        yield


def handle(name: str) -> Any:
    return builder.arg(name, T.handle())


def tensor_map(name: str) -> Any:
    return builder.arg(name, T.handle("tensormap"))


def integer(name: str) -> Any:
    return builder.arg(name, T.int32())


def real(name: str) -> Any:
    return builder.arg(name, T.float32())


def strided(source: Any, shape: tuple[Any, Any, Any, Any], dtype: str) -> Any:
    """A 4-D buffer of any strides but the last, which is 1.

    Extents are int64, as DLTensor's are: strides may pass 2^31.
    """
    strides = [T.int64(), T.int64(), T.int64(), T.int64(1)]
    return builder.match_buffer(source, shape, dtype, strides=strides, align=16, layout=None)


def narrow(extent: Any) -> Any:
    return T.cast(extent, "int32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A launch's arguments besides query, key and value, bound."""

    output: Any
    operand_handles: tuple[Any, ...]
    numbers: tuple[Any, ...]
    scale: Any
    softcap: Any
    blocks: Any


_TENSORS = ("lse", "key_padding", "segments", "sinks", "bias", "alibi_slopes", "value_sum")
_NUMBERS = ("kv_heads", "keys", "left", "right", "offset", "chunk_size", "splits", "heads_per_wave")


def declare_call(spec: KernelSpec) -> Call:
    """Declare the arguments that follow a family's own: output, the optional tensors (None where absent), integers
    and floats.
    """
    output = handle("output")
    handles = tuple(handle(name) for name in _TENSORS)
    numbers = tuple(integer(name) for name in _NUMBERS)
    blocks = integer("blocks")
    scale, softcap = real("scale"), real("softcap")
    shape = (T.int64(), T.int64(), T.int64(), T.int64(spec.value_size))
    bound = strided(output, shape, "float32" if spec.features.split else spec.dtype)
    return Call(output=bound, operand_handles=handles, numbers=numbers, scale=scale, softcap=softcap, blocks=blocks)


def bind_operands(spec: KernelSpec, call: Call) -> Operands:
    """Buffers of the operands that the features name; host side, before `device_entry`."""
    lse, key_padding, segments, sinks, bias, alibi, value_sum = call.operand_handles
    features = spec.features

    def matrix(source: Any, dtype: str) -> Any:
        return builder.match_buffer(source, (T.int32(), T.int32()), dtype, align=1 if dtype == "uint8" else 8)

    def vector(source: Any, dtype: str) -> Any:
        return builder.match_buffer(source, (T.int32(),), dtype, align=4 if dtype == "float32" else 2)

    def cube(source: Any) -> Any:
        return builder.match_buffer(source, (T.int32(), T.int32(), T.int32()), "float32", align=4)

    bias_buffer = None
    if features.bias:
        shape = (T.int64(), T.int64(), T.int64(), T.int64())
        bias_buffer = builder.match_buffer(
            bias,
            shape,
            spec.dtype,
            strides=[T.int64(), T.int64(), T.int64(), T.int64(1)],
            align=spec.element_bytes,
            layout=None,
        )
    return Operands(
        key_padding=matrix(key_padding, "uint8") if features.key_padding else None,
        segments=matrix(segments, "int64") if features.segments else None,
        sinks=vector(sinks, spec.dtype) if features.sinks and not features.split else None,
        bias=bias_buffer,
        alibi=vector(alibi, "float32") if features.alibi else None,
        lse=cube(lse) if features.lse or features.split else None,
        value_sum=cube(value_sum) if features.zeroed else None,
    )


def tiles(call: Call, *, positions: int, pack: int) -> Any:
    """Tiles of a call, as the host counts them."""
    return Tile.total(_sizes(call, lambda value: value), positions=positions, pack=pack)


def device_sizes(call: Call) -> Sizes:
    """Sizes in registers; device side."""
    return _sizes(call, fixed)


def _sizes(call: Call, keep: Callable[[Any], Any]) -> Sizes:
    kv_heads, keys, left, right, offset, chunk, splits, heads_per_wave = call.numbers
    batch, heads, queries, _ = call.output.shape
    return Sizes(
        batch=keep(div(narrow(batch), splits)),
        kv_heads=kv_heads,
        group=keep(div(narrow(heads), kv_heads)),
        queries=narrow(queries),
        keys=keys,
        left=keep(clamp_window(left)),
        right=keep(clamp_window(right)),
        offset=offset,
        chunk=chunk,
        splits=splits,
        heads_per_wave=heads_per_wave,
    )
