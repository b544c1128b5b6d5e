"""How the portable family multiplies: fragments of `mma.sync` for 16-bit types and for float32.

A left fragment has 16 rows and `depth` columns in 4 registers, a right one `depth` rows and 16 columns in 4: two of 8
columns. `ldmatrix` moves rows of 16 bytes, 8 elements of 16 bits or 4 of 32, and gives both kinds their fragments of
queries and keys; only those of weights and values differ.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from tvm.script import tirx as T

from swacompile.schedules.cuda.spec import KernelSpec
from swacompile.schedules.cuda.trace import PTX_TYPE, Registers, div, emit, inline_cuda, mod, pack_pair, ptx

LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_MATRIX_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


class Fragments(Protocol):
    depth: int
    """Columns of a left fragment."""

    def weights(self, keys: int) -> Registers:
        """What `round` writes for a tile of `keys` keys."""

    def round(self, weights: Registers, scores: Registers) -> None: ...

    def left(self, weights: Registers, step: int) -> list[Any]:
        """The step-th left fragment of rounded weights."""

    def load_values(self, target: Registers, values: Any, slot: Any, step: int, pair: int, lane: Any) -> None:
        """The right fragment of the step-th `depth` keys and the pair-th 16 columns."""

    def multiply(self, accumulator: Sequence[Any], left: Sequence[Any], right: Sequence[Any]) -> None: ...


def fragments_of(spec: KernelSpec) -> Fragments:
    return SingleFragments(splits=not spec.tf32) if spec.dtype == "float32" else HalfFragments(spec.dtype)


class HalfFragments:
    """float16 and bfloat16."""

    depth = 16

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        kind = PTX_TYPE[dtype]
        self._instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"

    def weights(self, keys: int) -> Registers:
        return Registers(keys // 4, "uint32")

    def round(self, weights: Registers, scores: Registers) -> None:
        for i in range(weights.length):
            pack_pair(weights, i, scores[2 * i], scores[2 * i + 1], self._dtype)

    def left(self, weights: Registers, step: int) -> list[Any]:
        return weights.all()[4 * step : 4 * step + 4]

    def load_values(self, target: Registers, values: Any, slot: Any, step: int, pair: int, lane: Any) -> None:
        row = step * 16 + mod(lane, 16)
        address = values.ptr_to([slot, row, pair * 16 + div(lane, 16) * 8])
        ptx(LOAD_MATRIX_TRANSPOSED, *target.all(), address)

    def multiply(self, accumulator: Sequence[Any], left: Sequence[Any], right: Sequence[Any]) -> None:
        ptx(self._instruction, *accumulator, *left, *right, *accumulator)


class SingleFragments:
    """float32 through tf32, whose products have 10 bits of each factor: rounded to that, or in two parts.

    In parts a = a1 + a2, a product is a1 b1 + a1 b2 + a2 b1; what is left out is below 2^-20 of it.
    """

    depth = 8

    def __init__(self, *, splits: bool) -> None:
        self._function = "swa_multiply_3xtf32" if splits else "swa_multiply_tf32"

    def weights(self, keys: int) -> Registers:
        return Registers(keys // 2, "uint32")

    def round(self, weights: Registers, scores: Registers) -> None:
        for i in range(weights.length):
            weights[i] = T.reinterpret("uint32", scores[i])

    def left(self, weights: Registers, step: int) -> list[Any]:
        # A lane's accumulators are columns 2t and 2t + 1, a left fragment's t and t + 4: the keys of a fragment change
        # places, in `load_values` too.
        return [weights[4 * step + i] for i in (0, 2, 1, 3)]

    def load_values(self, target: Registers, values: Any, slot: Any, step: int, pair: int, lane: Any) -> None:
        key, column = step * 8 + mod(lane, 4) * 2, pair * 16 + div(lane, 4)
        for half in range(2):
            for e in range(2):
                value = values[slot, key + e, column + 8 * half]
                target[2 * half + e] = T.reinterpret("uint32", value)

    def multiply(self, accumulator: Sequence[Any], left: Sequence[Any], right: Sequence[Any]) -> None:
        emit(inline_cuda(self._function, _MULTIPLY_TF32, *accumulator, *left, *right))


# A part is cut off, not rounded: one instruction, and the rest is exact. What is rounded once gets half of what tf32
# drops added first; the instruction ignores the bits below.
_MULTIPLY_TF32 = """#ifndef SWA_MULTIPLY_TF32
#define SWA_MULTIPLY_TF32
__forceinline__ __device__ void swa_mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <int n> __forceinline__ __device__ void swa_cut_tf32(const unsigned (&x)[n], unsigned (&high)[n], unsigned (&low)[n]) {
  for (int i = 0; i < n; ++i) {
    high[i] = x[i] & 0xffffe000u;
    low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
  }
}
__forceinline__ __device__ void swa_multiply_3xtf32(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,
    unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  float d[4] = {d0, d1, d2, d3};
  unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}, ah[4], al[4], bh[2], bl[2];
  swa_cut_tf32(a, ah, al);
  swa_cut_tf32(b, bh, bl);
  swa_mma_tf32(d, al, bh);
  swa_mma_tf32(d, ah, bl);
  swa_mma_tf32(d, ah, bh);
  d0 = d[0]; d1 = d[1]; d2 = d[2]; d3 = d[3];
}
__forceinline__ __device__ void swa_multiply_tf32(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,
    unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  float d[4] = {d0, d1, d2, d3};
  unsigned a[4] = {a0 + 0x1000u, a1 + 0x1000u, a2 + 0x1000u, a3 + 0x1000u}, b[2] = {b0 + 0x1000u, b1 + 0x1000u};
  swa_mma_tf32(d, a, b);
  d0 = d[0]; d1 = d[1]; d2 = d[2]; d3 = d[3];
}
#endif
"""
