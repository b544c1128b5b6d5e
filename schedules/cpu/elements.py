"""Elements of 16 and 32 bits in memory, float32 in registers."""

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from swacompile.schedules.cpu.emit import Buffer, Expr, lane_indices, lanes_of, let, select, splat, store
from swacompile.workload import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Loads and stores of one element type. `converts_f16`: the instruction set has conversions between float16 and float32."""

    dtype: DType
    converts_f16: bool

    def load(self, buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
        """`lanes` neighbours along the last axis as float32."""
        return self.load_at(buffer, *index[:-1], lane_indices(index[-1], lanes))

    def load_at(self, buffer: Buffer, *index: Expr) -> Expr:
        """Elements at indices, of which the last may be a vector, as float32."""
        raw = buffer[index]
        if self.dtype is DType.F32:
            return let(raw)
        if self.dtype is DType.F16 and self.converts_f16:
            return let(tirx.Cast(_like(raw, "float32"), raw))
        bits = let(tirx.Cast(_like(raw, "uint32"), tirx.reinterpret(_like(raw, "uint16"), raw)))
        return _bf16_to_f32(bits) if self.dtype is DType.BF16 else _f16_to_f32(bits)

    def store(self, buffer: Buffer, value: Expr, *index: Expr, lanes: int = 1) -> None:
        """Round float32 to nearest even and store it."""
        if self.dtype is DType.F32:
            stored = value
        elif self.dtype is DType.F16 and self.converts_f16:
            stored = tirx.Cast(_like(value, "float16"), value)
        else:
            bits = let(tirx.reinterpret(_like(value, "uint32"), value))
            short = _bf16_bits(bits) if self.dtype is DType.BF16 else _f16_bits(bits)
            stored = tirx.reinterpret(_like(value, self.dtype.long_name), tirx.Cast(_like(value, "uint16"), short))
        store(buffer, stored, *index, lanes=lanes)


def _like(value: Expr, dtype: str) -> str:
    lanes = lanes_of(value)
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _constant(value: int, like: Expr) -> Any:
    return splat(tirx.const(value, "uint32"), lanes_of(like))


def _as_float(bits: Expr) -> Expr:
    return tirx.reinterpret(_like(bits, "float32"), bits)


def _bf16_to_f32(bits: Expr) -> Expr:
    return let(_as_float(bits << _constant(16, bits)))


def _f16_to_f32(bits: Expr) -> Expr:
    """Exponent and fraction moved into place are the value times 2^-112, subnormals included."""
    sign = let((bits & _constant(0x8000, bits)) << _constant(16, bits))
    moved = let((bits & _constant(0x7FFF, bits)) << _constant(13, bits))
    scaled = let(tirx.reinterpret(_like(bits, "uint32"), _as_float(moved) * splat(2.0**112, lanes_of(bits))))
    special = let(moved | _constant(0x7F800000, bits))
    magnitude = select(moved >= _constant(0x7C00 << 13, bits), special, scaled)
    return let(_as_float(magnitude | sign))


def _bf16_bits(bits: Expr) -> Expr:
    upper = let(bits >> _constant(16, bits))
    rounded = let((bits + _constant(0x7FFF, bits) + (upper & _constant(1, bits))) >> _constant(16, bits))
    is_nan = (bits & _constant(0x7FFFFFFF, bits)) > _constant(0x7F800000, bits)
    return select(is_nan, upper | _constant(0x40, bits), rounded)


def _f16_bits(bits: Expr) -> Expr:
    """Three ranges: what rounds to infinity, float16's subnormals (aligned by adding 1/2), and the rest."""
    magnitude = let(bits & _constant(0x7FFFFFFF, bits))
    sign = let((bits >> _constant(16, bits)) & _constant(0x8000, bits))
    half = tirx.reinterpret(_like(bits, "uint32"), _as_float(magnitude) + splat(0.5, lanes_of(bits)))
    subnormal = let(half - _constant(0x3F000000, bits))
    odd = let((magnitude >> _constant(13, bits)) & _constant(1, bits))
    normal = let((magnitude + _constant(0xC8000FFF, bits) + odd) >> _constant(13, bits))
    special = select(magnitude > _constant(0x7F800000, bits), _constant(0x7E00, bits), _constant(0x7C00, bits))
    finite = select(magnitude < _constant(0x38800000, bits), subnormal, normal)
    return let(select(magnitude >= _constant(0x47800000, bits), special, finite) | sign)
