"""One call's operands and sizes as the kernel sees them (docs/operator.md, CPU kernel ABI), and the band's bounds for a query."""

from dataclasses import dataclass
from typing import Self

from tvm import tirx
from tvm.tirx.script.builder import ir as builder

from swacompile.schedules.cpu.elements import Elements
from swacompile.schedules.cpu.emit import Buffer, Expr, all_of, clamp, f32, i64, let, splat
from swacompile.schedules.cpu.vector_math import LOG2_E


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Run-time operands and sizes. Sizes are int64, has_* are booleans, all the same for the whole call."""

    elements: Elements
    head_size: int
    value_size: int
    query: Buffer
    key: Buffer
    value: Buffer
    key_padding: Buffer
    segments: Buffer
    sinks: Buffer
    bias: Buffer
    alibi_slopes: Buffer
    output: Buffer
    batch: Expr
    heads: Expr
    kv_heads: Expr
    queries: Expr
    keys: Expr
    left: Expr
    right: Expr
    offset: Expr
    chunk_size: Expr
    zeroed: Expr
    scale: Expr
    softcap: Expr
    has_padding: Expr
    has_segments: Expr
    has_sinks: Expr
    has_bias: Expr
    has_alibi: Expr

    @classmethod
    def declare(cls, elements: Elements, head_size: int, value_size: int) -> Self:
        """Declare the arguments of the function that is open in the builder, in the ABI's order."""
        names = ("batch", "heads", "kv_heads", "queries", "keys")
        batch, heads, kv_heads, queries, keys = (tirx.Var(name, "int64") for name in names)
        dtype = elements.dtype.long_name
        query = _tensor("query", (batch, heads, queries, i64(head_size)), dtype)
        key = _tensor("key", (batch, kv_heads, keys, i64(head_size)), dtype)
        value = _tensor("value", (batch, kv_heads, keys, i64(value_size)), dtype)
        padding, padding_rows = _optional("key_padding", 2, "uint8")
        segments, segment_rows = _optional("segments", 2, "int64")
        sinks, sink_count = _optional("sinks", 1, dtype)
        bias, bias_batch = _optional("bias", 4, dtype)
        alibi, slope_count = _optional("alibi_slopes", 1, "float32")
        output = _tensor("output", (batch, heads, queries, i64(value_size)), dtype)
        left, right, offset, chunk_size, zeroed = (
            _argument(name, "int64") for name in ("left", "right", "offset", "chunk_size", "zeroed")
        )
        scale, softcap = (_argument(name, "float32") for name in ("scale", "softcap"))
        return cls(
            elements=elements,
            head_size=head_size,
            value_size=value_size,
            query=query,
            key=key,
            value=value,
            key_padding=padding,
            segments=segments,
            sinks=sinks,
            bias=bias,
            alibi_slopes=alibi,
            output=output,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            queries=queries,
            keys=keys,
            left=left,
            right=right,
            offset=offset,
            chunk_size=chunk_size,
            zeroed=tirx.NE(zeroed, i64(0)),
            scale=scale,
            softcap=softcap,
            has_padding=padding_rows > 0,
            has_segments=segment_rows > 0,
            has_sinks=sink_count > 0,
            has_bias=bias_batch > 0,
            has_alibi=slope_count > 0,
        )

    @property
    def group(self) -> Expr:
        """Query heads per key/value head."""
        return tirx.truncdiv(self.heads, tirx.max(self.kv_heads, i64(1)))

    @property
    def changes_scores(self) -> Expr:
        """Whether scores need more than scale and band: they then go through a pass of their own."""
        hides = tirx.Or(self.has_padding, self.segmented)
        return tirx.Or(hides, tirx.Or(self.has_bias, tirx.Or(self.has_alibi, tirx.NE(self.softcap, f32(0.0)))))

    def band(self, position: Expr, lanes: int) -> tuple[Expr, Expr]:
        """First key in the window and the one after the last, in [0, T], for key positions of queries (int64, `lanes` of them).

        Both grow with the position. A query that sees nothing has first >= last.
        """
        keys = splat(self.keys, lanes)
        zero = splat(i64(0), lanes)
        first = position - splat(self.left, lanes)
        stop = position + splat(self.right + 1, lanes)
        return clamp(first, zero, keys), clamp(stop, zero, keys)

    def chunk(self, position: Expr) -> tuple[Expr, Expr]:
        """First key of the position's chunk and the one after the last, in [0, T]. Only where `chunked`."""
        # Division that rounds down: before the first key positions are negative.
        shifted = let(tirx.Select(position < 0, position - (self.chunk_size - 1), position))
        start = let(tirx.truncdiv(shifted, tirx.max(self.chunk_size, i64(1))) * self.chunk_size)
        return clamp(start, i64(0), self.keys), clamp(start + self.chunk_size, i64(0), self.keys)

    @property
    def chunked(self) -> Expr:
        return all_of(self.chunk_size > 0, tirx.Not(self.zeroed))

    @property
    def segmented(self) -> Expr:
        return all_of(self.has_segments, tirx.Not(self.zeroed))

    def segment_of(self, batch: Expr, position: Expr) -> Expr:
        """Segment (int64) of the query at a position; meaningless where the position is no key."""
        return let(self.segments[batch, clamp(position, i64(0), self.keys - 1)])

    def scale_log2(self) -> Expr:
        """Factor from a dot product to a score in units of log2, in which the softmax works."""
        return let(self.scale * f32(LOG2_E))

    def sink(self, head: Expr) -> Expr:
        """The head's sink in units of log2; read only where there are sinks."""
        return let(self.elements.load(self.sinks, head) * f32(LOG2_E))


def _tensor(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
    """A 4-D operand with any strides but the last. align=4: the ABI promises no more than the element's alignment."""
    handle = builder.arg(name, tirx.Var(f"{name}_handle", "handle"))
    strides = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(3)]
    return builder.match_buffer(handle, shape, dtype, strides=[*strides, i64(1)], align=_bytes(dtype))


def _optional(name: str, rank: int, dtype: str) -> tuple[Buffer, Expr]:
    """An operand with sizes of its own (0 = absent) and any strides, and its first size."""
    handle = builder.arg(name, tirx.Var(f"{name}_handle", "handle"))
    shape = [tirx.Var(f"{name}_size{axis}", "int64") for axis in range(rank)]
    strides = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(rank)]
    return builder.match_buffer(handle, shape, dtype, strides=strides, align=_bytes(dtype)), shape[0]


def _argument(name: str, dtype: str) -> Expr:
    return builder.arg(name, tirx.Var(name, dtype))


def _bytes(dtype: str) -> int:
    return {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int64": 8}[dtype]
