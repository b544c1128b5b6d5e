"""Kernels that run beside an attention kernel: merging shares of split keys, and summing values for the zeroed kind."""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder

from swacompile.schedules.cuda import abi
from swacompile.schedules.cuda.combine_symbols import combine_symbol, value_sum_symbol
from swacompile.schedules.cuda.scores import add_sink
from swacompile.schedules.cuda.trace import (
    LN_2,
    LOG2_E,
    MINUS_INFINITY,
    Registers,
    When,
    all_of,
    div,
    emit,
    f32,
    fixed,
    load_strided,
    mod,
    scalar,
    store_strided,
)

WARPS = 4
SUM_COLUMNS = 32
SUM_WARPS = 16
UNROLL = 8


def trace_combine(dtype: str, value_size: int, *, sinks: bool, lse: bool) -> tuple[str, Any]:
    """(partial (N*B,H,S,V) float32, partial_lse (N*B,H,S) float32, output, sinks, lse, splits): a softmax-weighted
    sum over N.

    One warp a row; partial results are normalised, so their weights are exp(lse_i - lse).
    """
    name = combine_symbol(dtype, value_size, sinks=sinks, lse=lse)
    per_lane = -(-value_size // 32)

    def body() -> None:
        partial_handle, partial_lse_handle, output_handle = (
            abi.handle(n) for n in ("partial", "partial_lse", "output")
        )
        sinks_handle, lse_handle = abi.handle("sinks"), abi.handle("lse")
        splits = abi.integer("splits")
        batch, heads, queries = T.int64(), T.int64(), T.int64()
        shares = T.int64()
        partial = abi.strided(partial_handle, (shares, heads, queries, T.int64(value_size)), "float32")
        partial_lse = builder.match_buffer(partial_lse_handle, (shares, heads, queries), "float32", align=4)
        output = abi.strided(output_handle, (batch, heads, queries, T.int64(value_size)), dtype)
        sink_buffer = builder.match_buffer(sinks_handle, (heads,), dtype, align=2) if sinks else None
        lse_buffer = builder.match_buffer(lse_handle, (batch, heads, queries), "float32", align=4) if lse else None
        h_count, s_count, b_count = abi.narrow(heads), abi.narrow(queries), abi.narrow(batch)
        with abi.device_entry(1):
            block = T.cta_id([div(h_count * s_count * b_count + (WARPS - 1), WARPS)])
            thread = T.thread_id([WARPS * 32])
            row, lane = fixed(block * WARPS + div(thread, 32)), fixed(mod(thread, 32))
            b, h, s = (
                fixed(div(row, h_count * s_count)),
                fixed(mod(div(row, s_count), h_count)),
                fixed(mod(row, s_count)),
            )
            with When(row < h_count * s_count * b_count):
                peak, total, weight = scalar(MINUS_INFINITY, "float32"), scalar(0.0, "float32"), scalar(1.0, "float32")
                sums = Registers(per_lane, "float32")
                for i in range(per_lane):
                    sums[i] = 0.0
                share = scalar(0)
                with T.While(share[0] < splits):
                    peak[0] = T.max(peak[0], partial_lse[share[0] * b_count + b, h, s])
                    share[0] = share[0] + 1
                peak[0] = T.Select(peak[0] == f32(MINUS_INFINITY), f32(0.0), peak[0] * f32(LOG2_E))
                share[0] = 0
                with T.While(share[0] < splits):
                    index = fixed(share[0] * b_count + b)
                    factor = fixed(T.exp2(partial_lse[index, h, s] * f32(LOG2_E) - peak[0]), "float32")
                    total[0] = total[0] + factor
                    for i in range(per_lane):
                        column = T.min(lane + 32 * i, value_size - 1)
                        sums[i] = sums[i] + factor * load_strided(partial, index, h, s, column)
                    share[0] = share[0] + 1
                if sink_buffer is not None:
                    add_sink(total, peak, weight, sink_buffer[h])
                positive = total[0] > f32(0.0)
                weight[0] = T.Select(positive, weight[0] / total[0], f32(0.0))
                for i in range(per_lane):
                    with When(lane + 32 * i < value_size):
                        store_strided(output, sums[i] * weight[0], b, h, s, lane + 32 * i)
                if lse_buffer is not None:
                    value = T.if_then_else(positive, (peak[0] + T.log2(total[0])) * f32(LN_2), f32(MINUS_INFINITY))
                    with When(lane == 0):
                        T.buffer_store(lse_buffer, value, [b, h, s])

    return name, abi.trace_function(name, body)


def trace_value_sum(dtype: str, value_size: int, *, key_padding: bool) -> tuple[str, Any]:
    """(value (B,K,T,V), key_padding (B,T) uint8 or None, sums (B,K,V+1) float32): column sums over visible keys, and
    their number last.

    One block for 32 columns of a head, the same order of additions whatever the device.
    """
    name = value_sum_symbol(dtype, value_size, key_padding=key_padding)
    column_blocks = -(-(value_size + 1) // SUM_COLUMNS)

    def body() -> None:
        value_handle, padding_handle, sums_handle = (abi.handle(n) for n in ("value", "key_padding", "value_sum"))
        batch, heads, keys = T.int64(), T.int64(), T.int64()
        value = abi.strided(value_handle, (batch, heads, keys, T.int64(value_size)), dtype)
        padding = builder.match_buffer(padding_handle, (batch, keys), "uint8", align=1) if key_padding else None
        sums = builder.match_buffer(sums_handle, (batch, heads, T.int64(value_size + 1)), "float32", align=4)
        h_count, k_count, b_count = abi.narrow(heads), abi.narrow(keys), abi.narrow(batch)
        with abi.device_entry(1):
            block = T.cta_id([h_count * b_count * column_blocks])
            thread = T.thread_id([SUM_WARPS * 32])
            pool = T.SMEMPool()
            shares: Any = pool.alloc((SUM_WARPS, SUM_COLUMNS), "float32", align=16)
            pool.commit()
            warp, lane = fixed(div(thread, 32)), fixed(mod(thread, 32))
            pair = fixed(div(block, column_blocks))
            b, h = fixed(div(pair, h_count)), fixed(mod(pair, h_count))
            column = fixed(mod(block, column_blocks) * SUM_COLUMNS + lane)
            accumulators = Registers(UNROLL, "float32")
            for i in range(UNROLL):
                accumulators[i] = 0.0
            key = scalar(warp)
            with T.While(key[0] < k_count):
                for i in range(UNROLL):
                    at = T.min(key[0] + i * SUM_WARPS, k_count - 1)
                    seen = key[0] + i * SUM_WARPS < k_count
                    if padding is not None:
                        seen = all_of(seen, padding[b, at] != T.uint8(0))
                    element = load_strided(value, b, h, at, T.min(column, value_size - 1))
                    element = T.Select(column < value_size, element, f32(1.0))
                    accumulators[i] = accumulators[i] + T.Select(seen, element, f32(0.0))
                key[0] = key[0] + UNROLL * SUM_WARPS
            for i in range(1, UNROLL):
                accumulators[0] = accumulators[0] + accumulators[i]
            T.buffer_store(shares, accumulators[0], [warp, lane])
            emit(T.cuda.cta_sync())
            with When(all_of(warp == 0, column <= value_size)):
                total = scalar(0.0, "float32")
                for i in range(SUM_WARPS):
                    total[0] = total[0] + shares[i, lane]
                T.buffer_store(sums, total[0], [b, h, column])

    return name, abi.trace_function(name, body)
