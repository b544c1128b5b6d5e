"""Tracing TIRx kernels from plain Python.

A function called inside `@T.prim_func` may emit statements, so tiles, stages and warps are ordinary Python values,
loops over them unroll, and only what is written with `While`, `When` or a run-time expression becomes code. TIRx
expressions are trees: a value used twice is put in a register first (`scalar`), or its computation is emitted twice.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import tvm
from tvm.script import tirx as T

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
FULL_WARP = 0xFFFFFFFF
PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}


class Registers:
    """A local array whose every index is a Python constant, so that it stays in registers."""

    def __init__(self, length: int, dtype: str) -> None:
        self.buffer: Any = T.alloc_local([length], dtype)
        self.length = length
        self.dtype = dtype

    def __getitem__(self, index: int) -> Any:
        return self.buffer[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if isinstance(value, int | float):
            value = tvm.tirx.const(value, self.dtype)
        T.buffer_store(self.buffer, value, [index])

    def all(self) -> list[Any]:
        return [self.buffer[i] for i in range(self.length)]

    def leading(self, length: int) -> "Registers":
        """The first `length` of these registers, as an array of their own."""
        part = object.__new__(Registers)
        part.buffer, part.length, part.dtype = self.buffer, length, self.dtype
        return part


def scalar(value: Any, dtype: str = "int32") -> Registers:
    """A mutable register holding `value`; read it with `[0]`."""
    register = Registers(1, dtype)
    register[0] = value
    return register


def fixed(value: Any, dtype: str = "int32") -> Any:
    """`value`, computed once."""
    return scalar(value, dtype)[0]


def emit(expression: Any) -> None:
    T.evaluate(expression)


def ptx(instruction: str, *operands: Any) -> None:
    emit(T.ptx[instruction](*operands))


def all_of(*conditions: Any) -> Any:
    return tvm.tirx.all(*conditions)


def any_of(*conditions: Any) -> Any:
    return tvm.tirx.any(*conditions)


def div(a: Any, b: Any) -> Any:
    """Division of non-negative integers."""
    return T.truncdiv(a, b)


def mod(a: Any, b: Any) -> Any:
    """Remainder of non-negative integers."""
    return T.truncmod(a, b)


def ceil_div(a: Any, b: Any) -> Any:
    return div(a + (b - 1), b)


def f32(value: float) -> Any:
    return T.float32(value)


MINUS_INFINITY = float("-inf")


class When:
    """`with When(condition):` emits an if."""

    def __init__(self, condition: Any) -> None:
        self._if: Any = T.If(condition)
        self._then: Any = None

    def __enter__(self) -> None:
        self._if.__enter__()
        self._then = T.Then()
        self._then.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._then.__exit__(kind, error, trace)
        self._if.__exit__(kind, error, trace)


def branch(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """One if/else: setmaxnreg needs every warpgroup's role to be an arm of the same one."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def inline_cuda(name: str, source: str, *operands: Any, returns: str = "void") -> Any:
    """A call of a device function given as CUDA text, for the few instructions TIRx has no word for."""
    return T.cuda.func_call(name, *operands, source_code=source, return_type=returns)


def wait_wgmma(pending: int, accumulators: Sequence[Any]) -> None:
    """Wait until `pending` groups are in flight, with the accumulators as in/out operands: a fence that the compiler
    respects.
    """
    count = len(accumulators)
    name = f"swa_wgmma_wait{pending}_r{count}"
    emit(
        inline_cuda(
            name, _fence_source(name, count, "float", "f", f"wgmma.wait_group.sync.aligned {pending};"), *accumulators
        )
    )


def fence_registers(registers: Registers) -> None:
    """Keep the compiler from moving writes of `registers` past this point."""
    kind, constraint = ("float", "f") if registers.dtype == "float32" else ("uint32_t", "r")
    name = f"swa_fence_{constraint}{registers.length}"
    emit(inline_cuda(name, _fence_source(name, registers.length, kind, constraint, ""), *registers.all()))


def _fence_source(name: str, count: int, kind: str, constraint: str, instruction: str) -> str:
    parameters = ", ".join(f"{kind}& r{i}" for i in range(count))
    operands = ", ".join(f'"+{constraint}"(r{i})' for i in range(count))
    statement = f'asm volatile("{instruction}" : {operands} :: "memory");'
    return f"__forceinline__ __device__ void {name}({parameters}) {{ {statement} }}\n"


def pack_pair(target: Registers, index: int, low: Any, high: Any, dtype: str) -> None:
    """Round two float32 to `dtype` and put them into one 32-bit register, `low` in the lower half."""
    emit(T.ptx[f"cvt.rn.{PTX_TYPE[dtype]}x2.f32"](target[index], high, low))


def reduce_quad(value: Registers, combine: Callable[[Any, Any], Any]) -> None:
    """All-reduce over the four lanes that share a row of an mma accumulator."""
    for distance in (1, 2):
        other = T.tvm_warp_shuffle_xor(T.uint32(FULL_WARP), value[0], distance, 32, 32)
        value[0] = combine(value[0], other)


def any_lane(condition: Any) -> Any:
    """True in every lane of the warp if true in one."""
    source = "__forceinline__ __device__ bool swa_any_lane(bool c) { return __any_sync(0xffffffffu, c); }\n"
    return inline_cuda("swa_any_lane", source, condition, returns="bool")


# 2^r on [-1/2, 1/2] with value 1 at 0, least maximum relative error (Lawson's iteration): 1.0e-4 and 2.8e-6.
_EXP2_COEFFICIENTS = {
    3: (0.69328293, 0.24221096, 0.05500893),
    4: (0.69312419, 0.24024099, 0.05590642, 0.00958285),
}


def exp2_polynomial(x: Any, degree: int) -> Any:
    """2^x for x <= 100 on the multiply-add units, exactly 0 for x <= -127.

    The special-function unit does 16 a cycle and multiprocessor, which is what a D = 64 attention spends its time on.
    """
    name = f"swa_exp2_poly{degree}"
    horner = f"{_EXP2_COEFFICIENTS[degree][-1]!r}f"
    for c in (*reversed(_EXP2_COEFFICIENTS[degree][:-1]), 1.0):
        horner = f"fmaf({horner}, r, {c!r}f)"
    source = f"""__forceinline__ __device__ float {name}(float x) {{
  x = fmaxf(x, -127.0f);
  float t = x + 12582912.0f;
  float r = x - (t - 12582912.0f);
  return __int_as_float(__float_as_int({horner}) + (__float_as_int(t) << 23));
}}
"""
    return inline_cuda(name, source, x, returns="float32")


_CUDA_TYPE = {"bfloat16": "nv_bfloat16", "float16": "half", "float32": "float"}
_OFFSET = "b * sb + h * sh + s * ss + d"
_OFFSET_PARAMETERS = "int b, int h, int s, int d, long long sb, long long sh, long long ss"


def load_strided(buffer: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
    """One element of a 4-D buffer as float32. Offsets are 64-bit, which those of TIRx's own accesses are not."""
    name = f"swa_load_{buffer.dtype}"
    kind = _CUDA_TYPE[str(buffer.dtype)]
    source = (
        f"__forceinline__ __device__ float {name}(const void* p, {_OFFSET_PARAMETERS}) "
        f"{{ return static_cast<float>(static_cast<const {kind}*>(p)[{_OFFSET}]); }}\n"
    )
    return inline_cuda(name, source, buffer.data, batch, head, row, column, *buffer.strides[:3], returns="float32")


def store_strided(buffer: Any, value: Any, batch: Any, head: Any, row: Any, column: Any) -> None:
    """Round a float32 to the buffer's type and store it."""
    name = f"swa_store_{buffer.dtype}"
    kind = _CUDA_TYPE[str(buffer.dtype)]
    source = (
        f"__forceinline__ __device__ void {name}(void* p, float x, {_OFFSET_PARAMETERS}) "
        f"{{ static_cast<{kind}*>(p)[{_OFFSET}] = static_cast<{kind}>(x); }}\n"
    )
    emit(inline_cuda(name, source, buffer.data, value, batch, head, row, column, *buffer.strides[:3]))


def store_words(buffer: Any, words: Registers, batch: Any, head: Any, row: Any, column: Any) -> None:
    """Store four 32-bit registers as 16 bytes of a 4-D buffer of 16-bit elements."""
    source = f"""__forceinline__ __device__ void swa_store_words(void* p, unsigned w0, unsigned w1, unsigned w2,
    unsigned w3, {_OFFSET_PARAMETERS}) {{
  *reinterpret_cast<uint4*>(static_cast<unsigned short*>(p) + ({_OFFSET})) = make_uint4(w0, w1, w2, w3);
}}
"""
    strides = buffer.strides[:3]
    emit(inline_cuda("swa_store_words", source, buffer.data, *words.all(), batch, head, row, column, *strides))


def transpose_quad(words: Registers, quad_lane: Any) -> None:
    """Word j of lane t goes to word t of lane j, among each four lanes."""
    source = """__forceinline__ __device__ void swa_exchange(unsigned& low, unsigned& high, bool upper, int distance) {
  unsigned received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
  (upper ? low : high) = received;
}
__forceinline__ __device__ void swa_transpose_quad(unsigned& w0, unsigned& w1, unsigned& w2, unsigned& w3, int lane) {
  swa_exchange(w0, w1, lane & 1, 1);
  swa_exchange(w2, w3, lane & 1, 1);
  swa_exchange(w0, w2, lane & 2, 2);
  swa_exchange(w1, w3, lane & 2, 2);
}
"""
    emit(inline_cuda("swa_transpose_quad", source, *words.all(), quad_lane))
