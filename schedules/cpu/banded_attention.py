"""One TVM function for every call of swacompile::BandedAttention with given element type and head sizes (docs/operator.md)."""

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as builder

from swacompile.schedules.cpu.elements import Elements
from swacompile.schedules.cpu.emit import (
    Buffer,
    Expr,
    ceil_div,
    clamp,
    either,
    equal,
    f32,
    for_range,
    i64,
    let,
    load,
    minimum,
    scratch,
    select,
    splat,
    store,
    when,
)
from swacompile.schedules.cpu.problem import Problem
from swacompile.schedules.cpu.row_path import RowPath, RowScratch
from swacompile.schedules.cpu.tile_path import TilePath, TileScratch
from swacompile.schedules.cpu.tiles import Tiles, split_columns
from swacompile.workload import DType

CHUNKS = 64
"""Most pieces that the work is cut into for the host's threads; a piece allocates scratch once."""
PRODUCTS_WORTH_A_CHUNK = 200_000
"""Multiply-adds, some 10 us, beside which the allocation of scratch is nothing."""
SHORT_QUERIES = 1
"""With no more queries than this, a row at a time beats a tile."""


def banded_attention(
    *, name: str, dtype: DType, head_size: int, value_size: int, tiles: Tiles, converts_f16: bool
) -> tirx.PrimFunc:
    """The function as TIR, with the exported symbol `name`."""
    elements = Elements(dtype=dtype, converts_f16=converts_f16)
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name(name)
        builder.func_attr({"global_symbol": name, "tirx.noalias": True})
        _emit_function(Problem.declare(elements, head_size, value_size), tiles)
    return ir.get()


def _emit_function(problem: Problem, tiles: Tiles) -> None:
    value_sum = _sum_values(problem, tiles)
    short = let(problem.queries <= SHORT_QUERIES)
    jobs = select(short, _row_jobs(problem, tiles), _tile_jobs(problem, tiles))
    chunks = clamp(tirx.truncdiv(_products(problem), i64(PRODUCTS_WORTH_A_CHUNK)), i64(1), minimum(jobs, i64(CHUNKS)))
    with builder.parallel(i64(0), chunks) as chunk:
        worker = _Worker(problem, tiles, value_sum)
        with for_range(tirx.truncdiv(chunk * jobs, chunks), tirx.truncdiv((chunk + 1) * jobs, chunks)) as job:
            worker.emit(job, short)


def _products(problem: Problem) -> Expr:
    """Multiply-adds of the call, where every query sees a whole window."""
    seen = clamp(problem.left + problem.right + 1, i64(1), problem.keys)
    return let(problem.batch * problem.heads * problem.queries * seen * (problem.head_size + problem.value_size))


def _tile_count(problem: Problem, tiles: Tiles) -> Expr:
    return ceil_div(problem.queries, i64(tiles.queries))


def _tile_jobs(problem: Problem, tiles: Tiles) -> Expr:
    return let(problem.batch * problem.heads * _tile_count(problem, tiles))


def _head_blocks(problem: Problem, tiles: Tiles) -> Expr:
    return ceil_div(problem.group, i64(tiles.row_heads))


def _row_jobs(problem: Problem, tiles: Tiles) -> Expr:
    return let(problem.batch * problem.kv_heads * problem.queries * _head_blocks(problem, tiles))


class _Worker:
    """What one piece of the work runs: jobs of the tile path or of the row path, with the row path repeating tiles that met NaN or infinity."""

    def __init__(self, problem: Problem, tiles: Tiles, value_sum: Buffer) -> None:
        self._problem = problem
        self._tiles = tiles
        self._tile_path = TilePath(problem, tiles, TileScratch.allocate(problem, tiles), value_sum)
        memory = RowScratch.allocate(problem, tiles)
        # By the most heads that each takes: a group of two should not pay for four.
        self._row_paths = {
            heads: RowPath(problem, tiles, memory, value_sum, heads=heads)
            for heads in sorted({1, min(2, tiles.row_heads), tiles.row_heads})
        }
        # batch, first head, last head, first query, number of queries: what the row path is to do in this job
        self._row = scratch(5, "int64")

    def emit(self, job: Expr, short: Expr) -> None:
        either(short, lambda: self._plan_row(job), lambda: self._run_tile(job))
        batch, first, last, query0, count = (load(self._row, i64(i)) for i in range(5))
        with for_range(query0, query0 + count) as query:
            self._emit_row(sorted(self._row_paths), batch, first, last, query)

    def _emit_row(self, sizes: list[int], batch: Expr, first: Expr, last: Expr, query: Expr) -> None:
        """By the smallest path that takes these heads."""
        smallest, *larger = sizes
        if larger:
            either(
                last - first < smallest,
                lambda: self._row_paths[smallest].emit(batch, first, last, query),
                lambda: self._emit_row(larger, batch, first, last, query),
            )
        else:
            self._row_paths[smallest].emit(batch, first, last, query)

    def _set_row(self, *values: Expr) -> None:
        for i, value in enumerate(values):
            store(self._row, value, i64(i))

    def _plan_row(self, job: Expr) -> None:
        problem, tiles = self._problem, self._tiles
        blocks = _head_blocks(problem, tiles)
        rest = let(tirx.truncdiv(job, problem.queries))
        query = let(job - rest * problem.queries)
        pair = let(tirx.truncdiv(rest, blocks))
        block = let(rest - pair * blocks)
        batch = let(tirx.truncdiv(pair, problem.kv_heads))
        kv_head = let(pair - batch * problem.kv_heads)
        first = let(kv_head * problem.group + block * tiles.row_heads)
        last = minimum(first + tiles.row_heads - 1, (kv_head + 1) * problem.group - 1)
        self._set_row(batch, first, last, query, i64(1))

    def _run_tile(self, job: Expr) -> None:
        problem, tiles = self._problem, self._tiles
        batch, head, tile = self._tile_of(job)
        last = _tile_jobs(problem, tiles) - 1
        self._tile_path.emit(batch, head, tile, self._tile_of(minimum(job + 1, last)))
        query0 = let(tile * tiles.queries)
        rows = minimum(i64(tiles.queries), problem.queries - query0)
        self._set_row(batch, head, head, query0, select(self._tile_path.is_finite(), i64(0), rows))

    def _tile_of(self, job: Expr) -> tuple[Expr, Expr, Expr]:
        """Batch, head and tile. Jobs are in the order batch, key/value head, tile, query head: heads of a group share their keys while
        these are in the cache."""
        problem, tiles = self._problem, self._tiles
        count = _tile_count(problem, tiles)
        rest = let(tirx.truncdiv(job, problem.group))
        in_group = let(job - rest * problem.group)
        pair = let(tirx.truncdiv(rest, count))
        tile = self._fold(let(rest - pair * count), count)
        batch = let(tirx.truncdiv(pair, problem.kv_heads))
        kv_head = let(pair - batch * problem.kv_heads)
        return batch, let(kv_head * problem.group + in_group), tile

    def _fold(self, tile: Expr, count: Expr) -> Expr:
        """Where tiles cost unequal shares (a side of the band reaches far), take them from both ends in turn: equal runs then cost the same."""
        half = let(tirx.truncdiv(tile, i64(2)))
        folded = select(equal(tile, half * 2), half, count - 1 - half)
        uneven = self._problem.left + self._problem.right > tirx.truncdiv(self._problem.keys, i64(4))
        return select(uneven, folded, tile)


def _sum_values(problem: Problem, tiles: Tiles) -> Buffer:
    """(B*K, V + 1): sums of the values of all visible keys and, last, their number. Only for zeroed bands; else one row, unused."""
    size = problem.value_size
    rows = select(problem.zeroed, problem.batch * problem.kv_heads, i64(1))
    sums = builder.alloc_buffer((rows, i64(size + 1)), "float32", scope="global")
    with when(problem.zeroed), builder.parallel(i64(0), problem.batch * problem.kv_heads) as pair:
        batch = let(tirx.truncdiv(pair, problem.kv_heads))
        kv_head = let(pair - batch * problem.kv_heads)
        pieces = [piece for group in split_columns(size, tiles.lanes, tiles.output_vectors) for piece in group]
        for column, lanes in pieces:
            store(sums, splat(0.0, lanes), pair, i64(column), lanes=lanes)
        store(sums, f32(0.0), pair, i64(size))
        with for_range(0, problem.keys) as key, when(_shown(problem, batch, key)):
            for column, lanes in pieces:
                value = problem.elements.load(problem.value, batch, kv_head, key, i64(column), lanes=lanes)
                so_far = load(sums, pair, i64(column), lanes=lanes)
                store(sums, so_far + value, pair, i64(column), lanes=lanes)
            store(sums, load(sums, pair, i64(size)) + f32(1.0), pair, i64(size))
    return sums


def _shown(problem: Problem, batch: Expr, key: Expr) -> Any:
    """Whether padding shows a key. The padding operand is read only where it exists."""
    hidden = tirx.if_then_else(
        problem.has_padding, equal(problem.key_padding[batch, key], tirx.const(0, "uint8")), False
    )
    return tirx.Not(hidden)
