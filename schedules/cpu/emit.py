"""The words that the CPU kernels are written in: explicit vectors, loops and conditions over TVM's IR builder.

Kernels are plain Python functions that emit statements into the open builder. Python loops unroll; `for_range`, `when` and `either` become code.
Expressions are trees, so whatever is used twice is bound with `let` first. Vectors are explicit (ramps and broadcasts), which LLVM takes as they
are: nothing depends on an auto-vectoriser. All index arithmetic is int64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as builder

Expr = Any
"""A TIR expression, or a Python number where TIR takes one."""
Buffer = Any

MINUS_INFINITY = float("-inf")
CACHE_LINE = 64


def f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def i64(value: int) -> Expr:
    return tirx.const(value, "int64")


def as_i64(value: Expr) -> Expr:
    """Python integers as int64; expressions as they are."""
    return i64(value) if isinstance(value, int) else value


def splat(value: Expr, lanes: int) -> Expr:
    """`value` in every lane; Python floats become float32."""
    if isinstance(value, float):
        value = f32(value)
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def lanes_of(value: Expr) -> int:
    _, _, lanes = str(value.ty).partition("x")
    return int(lanes or 1)


def lane_indices(base: Expr, lanes: int, step: Expr = 1) -> Expr:
    """base, base + step, ... as int64."""
    base = as_i64(base)
    return base if lanes == 1 else tirx.Ramp(base, as_i64(step), lanes)


def load(buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
    """`lanes` neighbours along the last axis, bound to a name."""
    return let(buffer[(*index[:-1], lane_indices(index[-1], lanes))])


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int = 1) -> None:
    builder.buffer_store(buffer, value, [*index[:-1], lane_indices(index[-1], lanes)])


def let(value: Expr) -> Expr:
    """`value`, computed once, here. Vectors of booleans stay expressions: TVM's analyser cannot bind them."""
    if isinstance(value, int | float | tirx.Var) or str(value.ty).startswith("boolx"):
        return value
    return builder.Bind(value)


def minimum(a: Expr, b: Expr) -> Expr:
    return let(tirx.min(a, b))


def maximum(a: Expr, b: Expr) -> Expr:
    return let(tirx.max(a, b))


def clamp(value: Expr, low: Expr, high: Expr) -> Expr:
    return let(tirx.min(tirx.max(value, low), high))


def ceil_div(a: Expr, b: Expr) -> Expr:
    """For a >= 0, b > 0."""
    return let(tirx.truncdiv(a + (b - 1), b))


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """Lane by lane. Both values must be bound: a load inside would make TVM branch per lane."""
    return let(tirx.Select(condition, let(yes), let(no)))


def equal(a: Expr, b: Expr) -> Expr:
    """a == b as an expression (`==` between TIR values is a Python object that may not end up as one)."""
    return tirx.EQ(a, b)


def all_of(*conditions: Expr) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.And(result, condition)
    return result


def any_of(*conditions: Expr) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.Or(result, condition)
    return result


def for_range(start: Expr, stop: Expr) -> AbstractContextManager[Expr]:
    """A serial loop over int64."""
    frame: AbstractContextManager[Expr] = builder.serial(as_i64(start), as_i64(stop))
    return frame


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    with builder.If(condition), builder.Then():
        yield


def either(condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
    with builder.If(condition):
        with builder.Then():
            yes()
        with builder.Else():
            no()


def scratch(length: Expr, dtype: str = "float32") -> Buffer:
    """Memory that the host runtime supplies (its workspace slots), aligned to cache lines."""
    return builder.alloc_buffer((length,), dtype, scope="global")


class Registers:
    """A local array whose every index is a Python constant, so that LLVM keeps it in registers. Its content is undefined at first.

    No more than 1024 bytes, beyond which TVM takes memory from the host's workspace slot; it also does so for scope "local".
    """

    def __init__(self, count: int, lanes: int, dtype: str = "float32") -> None:
        self._lanes = lanes
        self._buffer = builder.alloc_buffer((count * lanes,), dtype, scope="global")

    def __getitem__(self, index: int) -> Expr:
        return self._buffer[lane_indices(index * self._lanes, self._lanes)]

    def __setitem__(self, index: int, value: Expr) -> None:
        value = splat(value, self._lanes) if isinstance(value, float) else value
        store(self._buffer, value, index * self._lanes, lanes=self._lanes)


def prefetch_row(buffer: Buffer, *index: Expr, columns: int, element_bytes: int, level: int) -> None:
    """Ask for the cache lines of a row, into the first or second level. The row need not exist."""
    hints = [tirx.const(value, "int32") for value in (0, 4 - level, 1)]  # to read, level, data
    for column in range(0, columns, CACHE_LINE // element_bytes):
        address = tirx.address_of(buffer[(*index, i64(column))])
        builder.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *hints))


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Lanes picked from the concatenation of `vectors`."""
    return let(tirx.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes]))
