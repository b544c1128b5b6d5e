"""Few queries: one query position and a few heads of its group at a time, reading exactly the keys of its window, each once.

A vector's lanes are head columns in the products and keys in the softmax. Keys hidden by data are skipped, so that not even a NaN among their
values is seen; the tile path hands rows over for that reason.
"""

from dataclasses import dataclass
from typing import Self

from tvm import tirx

from swacompile.schedules.cpu.emit import (
    MINUS_INFINITY,
    Buffer,
    Expr,
    Registers,
    all_of,
    any_of,
    ceil_div,
    clamp,
    either,
    equal,
    f32,
    for_range,
    i64,
    let,
    load,
    maximum,
    minimum,
    prefetch_row,
    scratch,
    select,
    splat,
    store,
    when,
)
from swacompile.schedules.cpu.problem import Problem
from swacompile.schedules.cpu.tiles import Tiles, split_columns
from swacompile.schedules.cpu.vector_math import LOG2_E, exp2, reduce_lanes, sum_each, sum_lanes, tanh

Piece = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScratch:
    """One thread's memory: queries, one block of scores, unfinished outputs (a row per head), and which keys of the block are hidden."""

    query: Buffer
    scores: Buffer
    partial: Buffer
    hidden: Buffer

    @classmethod
    def allocate(cls, problem: Problem, tiles: Tiles) -> Self:
        return cls(
            query=scratch(tiles.row_heads * problem.head_size),
            scores=scratch(tiles.row_heads * tiles.row_keys),
            partial=scratch(tiles.row_heads * problem.value_size),
            hidden=scratch(tiles.row_keys, "uint8"),
        )


class RowPath:
    """Emits the code for `heads` (a Python number) query heads of one key/value head at one query position."""

    def __init__(self, problem: Problem, tiles: Tiles, memory: RowScratch, value_sum: Buffer, *, heads: int) -> None:
        self._problem = problem
        self._tiles = tiles
        self._memory = memory
        self._value_sum = value_sum
        self._count = heads
        self._vectors_at_once = max(1, tiles.accumulators // heads)

    def emit(self, batch: Expr, first_head: Expr, last_head: Expr, query: Expr) -> None:
        """Heads beyond `last_head` repeat it: their results are the same numbers, written twice."""
        problem = self._problem
        self._batch, self._query = batch, query
        self._heads = [minimum(first_head + i, last_head) for i in range(self._count)]
        self._kv_head = let(tirx.truncdiv(first_head, problem.group))
        self._position = let(query + problem.offset)
        self._find_bounds()
        self._load_queries()
        self._start_softmax()
        tiles = self._tiles
        blocks = maximum(ceil_div(self._stop - self._first, i64(tiles.row_keys)), i64(1))
        with for_range(0, blocks) as index:
            self._key0 = let(self._first + index * tiles.row_keys)
            self._key_count = clamp(self._stop - self._key0, i64(0), i64(tiles.row_keys))
            self._vectors = ceil_div(self._key_count, i64(tiles.lanes))
            self._is_first = let(equal(index, i64(0)))
            self._is_last = let(equal(index, blocks - 1))
            self._emit_scores()
            self._change_scores()
            self._emit_softmax()
            self._emit_output()

    def _find_bounds(self) -> None:
        problem = self._problem
        first, stop = problem.band(self._position, 1)
        bounds = Registers(2, 1, "int64")
        bounds[0], bounds[1] = first, stop
        with when(problem.chunked):
            start, end = problem.chunk(self._position)
            bounds[0] = tirx.max(bounds[0], start)
            bounds[1] = tirx.min(bounds[1], end)
        with when(all_of(problem.segmented, any_of(self._position < 0, self._position >= problem.keys))):
            bounds[1] = bounds[0]
        self._first = let(bounds[0])
        self._stop = maximum(bounds[0], bounds[1])
        covers_all = all_of(equal(self._first, i64(0)), equal(self._stop, problem.keys))
        self._zeroed = let(all_of(problem.zeroed, tirx.Not(covers_all)))
        self._fill = select(self._zeroed, f32(0.0), f32(MINUS_INFINITY))

    def _load_queries(self) -> None:
        problem = self._problem
        scale = problem.scale_log2()
        for i, head in enumerate(self._heads):
            for column, lanes in self._columns(problem.head_size):
                value = problem.elements.load(problem.query, self._batch, head, self._query, i64(column), lanes=lanes)
                store(self._memory.query, value * splat(scale, lanes), i * problem.head_size + column, lanes=lanes)

    def _columns(self, size: int) -> list[Piece]:
        return [
            piece for group in split_columns(size, self._tiles.lanes, self._tiles.output_vectors) for piece in group
        ]

    def _start_softmax(self) -> None:
        problem = self._problem
        self._maximum = Registers(self._count, 1)
        self._total = Registers(self._count, 1)
        self._rescale = Registers(self._count, 1)
        self._outside = Registers(self._count, 1)
        for i, head in enumerate(self._heads):
            self._maximum[i] = f32(MINUS_INFINITY)
            self._outside[i] = f32(0.0)
            with when(problem.has_sinks):
                self._maximum[i] = problem.sink(head)
            start = let(self._maximum[i])
            highest = select(all_of(self._zeroed, tirx.Not(start > f32(0.0))), f32(0.0), start)
            self._maximum[i] = highest
            self._total[i] = select(equal(start, f32(MINUS_INFINITY)), f32(0.0), exp2(start - highest, 1))

    def _emit_scores(self) -> None:
        """A block's dot products; a key is loaded once for all heads."""
        problem = self._problem
        pieces = self._columns(problem.head_size)
        with for_range(0, self._key_count) as row:
            key = [
                problem.elements.load(
                    problem.key, self._batch, self._kv_head, self._key0 + row, i64(column), lanes=width
                )
                for column, width in pieces
            ]
            self._prefetch(problem.value, self._key0 + row, problem.value_size)
            for i, product in enumerate(self._dots(key, pieces)):
                store(self._memory.scores, product, i * self._tiles.row_keys + row)

    def _prefetch(self, operand: Buffer, key: Expr, columns: int) -> None:
        """A key's row: the products alternate between keys and values in blocks too short for the processor to foresee."""
        size = self._problem.elements.dtype.bytes
        prefetch_row(operand, self._batch, self._kv_head, key, columns=columns, element_bytes=size, level=1)

    def _dots(self, key: list[Expr], pieces: list[Piece]) -> list[Expr]:
        """A key's product with each head's query."""
        sums: dict[int, list[Expr]] = {}
        for value, (column, lanes) in zip(key, pieces, strict=True):
            places = [head * self._problem.head_size + column for head in range(self._count)]
            products = [let(load(self._memory.query, place, lanes=lanes) * value) for place in places]
            so_far = sums.get(lanes)
            sums[lanes] = products if so_far is None else [let(a + b) for a, b in zip(so_far, products, strict=True)]
        totals = [sum_each(vectors, lanes) for lanes, vectors in sums.items()]
        return [let(sum(parts[1:], start=parts[0])) for parts in zip(*totals, strict=True)]

    def _change_scores(self) -> None:
        """Softcap, ALiBi, bias, hidden keys, and the lanes beyond the block's end."""
        lanes, memory = self._tiles.lanes, self._memory
        with for_range(0, self._vectors) as vector:
            row = let(vector * lanes)
            lane = let(tirx.Ramp(row, i64(1), lanes))
            exists = let(lane < splat(self._key_count, lanes))
            key = let(tirx.min(lane + splat(self._key0, lanes), splat(self._problem.keys - 1, lanes)))
            hidden = Registers(1, lanes, "uint8")
            hidden[0] = splat(tirx.const(0, "uint8"), lanes)
            self._find_hidden(hidden, key)
            shown = let(all_of(exists, equal(hidden[0], splat(tirx.const(0, "uint8"), lanes))))
            store(memory.hidden, hidden[0], row, lanes=lanes)
            for i in range(self._count):
                place = let(row + i * self._tiles.row_keys)
                score = Registers(1, lanes)
                score[0] = load(memory.scores, place, lanes=lanes)
                self._add_to_score(score, i, key)
                store(memory.scores, select(shown, score[0], splat(self._fill, lanes)), place, lanes=lanes)

    def _find_hidden(self, hidden: Registers, key: Expr) -> None:
        problem, lanes = self._problem, self._tiles.lanes
        batch = self._batch
        yes, no = (splat(tirx.const(value, "uint8"), lanes) for value in (1, 0))
        with when(problem.has_padding):
            hidden[0] = select(equal(let(problem.key_padding[batch, key]), no), yes, no)
        with when(problem.segmented):
            of_query = splat(problem.segment_of(self._batch, self._position), lanes)
            other = let(problem.segments[batch, key])
            hidden[0] = select(equal(other, of_query), let(hidden[0]), yes)

    def _add_to_score(self, score: Registers, head: int, key: Expr) -> None:
        problem, lanes = self._problem, self._tiles.lanes
        with when(tirx.NE(problem.softcap, f32(0.0))):
            cap = let(problem.softcap * f32(LOG2_E))
            score[0] = tanh(let(score[0] / splat(cap, lanes)), lanes) * splat(cap, lanes)
        with when(problem.has_alibi):
            slope = let(problem.alibi_slopes[self._heads[head]] * f32(LOG2_E))
            distance = tirx.Cast(f"float32x{lanes}", key - splat(self._position, lanes))
            score[0] = score[0] + splat(slope, lanes) * distance
        with when(problem.has_bias):
            bias = problem.elements.load_at(problem.bias, self._batch, self._heads[head], self._query, key)
            score[0] = score[0] + bias * splat(LOG2_E, lanes)

    def _emit_softmax(self) -> None:
        for i in range(self._count):
            before = let(self._maximum[i])
            highest = self._highest(i, before)
            self._maximum[i] = highest
            base = select(equal(highest, f32(MINUS_INFINITY)), f32(0.0), highest)
            self._rescale[i] = exp2(before - base, 1)
            with when(self._zeroed):
                self._outside[i] = exp2(let(f32(0.0) - base), 1)
            self._total[i] = self._total[i] * self._rescale[i] + self._weigh(i, base)

    def _highest(self, head: int, before: Expr) -> Expr:
        lanes = self._tiles.lanes
        best = Registers(1, lanes)
        best[0] = splat(before, lanes)
        with for_range(0, self._vectors) as vector:
            place = vector * lanes + head * self._tiles.row_keys
            best[0] = tirx.max(best[0], load(self._memory.scores, place, lanes=lanes))
        return reduce_lanes(let(best[0]), lanes, tirx.max)

    def _weigh(self, head: int, base: Expr) -> Expr:
        """Scores become weights (less the weight outside the band, which is 0 unless zeroed); their sum."""
        lanes = self._tiles.lanes
        total = Registers(1, lanes)
        total[0] = 0.0
        outside = let(splat(self._outside[head], lanes))
        with for_range(0, self._vectors) as vector:
            place = let(vector * lanes + head * self._tiles.row_keys)
            score = load(self._memory.scores, place, lanes=lanes)
            weight = let(exp2(let(score - splat(base, lanes)), lanes) - outside)
            store(self._memory.scores, weight, place, lanes=lanes)
            total[0] = total[0] + weight
        return sum_lanes(let(total[0]), lanes)

    def _emit_output(self) -> None:
        for group in split_columns(self._problem.value_size, self._tiles.lanes, self._vectors_at_once):
            self._output_columns(group)

    def _output_columns(self, group: tuple[Piece, ...]) -> None:
        problem = self._problem
        pieces = [Registers(self._count, lanes) for _, lanes in group]
        either(self._is_first, lambda: self._clear(pieces), lambda: self._reload(pieces, group))
        hides = any_of(problem.has_padding, problem.segmented)
        either(hides, lambda: self._add_shown_values(pieces, group), lambda: self._add_all_values(pieces, group))
        either(self._is_last, lambda: self._finish(pieces, group), lambda: self._keep(pieces, group))

    def _add_shown_values(self, pieces: list[Registers], group: tuple[Piece, ...]) -> None:
        with for_range(0, self._key_count) as row, when(equal(self._memory.hidden[row], tirx.const(0, "uint8"))):
            self._add_value(pieces, group, row)

    def _add_all_values(self, pieces: list[Registers], group: tuple[Piece, ...]) -> None:
        with for_range(0, self._key_count) as row:
            self._add_value(pieces, group, row)

    def _add_value(self, pieces: list[Registers], group: tuple[Piece, ...], row: Expr) -> None:
        problem = self._problem
        values = [
            problem.elements.load(problem.value, self._batch, self._kv_head, self._key0 + row, i64(column), lanes=lanes)
            for column, lanes in group
        ]
        if group[0][0] == 0:
            self._prefetch(problem.key, self._key0 + self._tiles.row_keys + row, problem.head_size)
        for head in range(self._count):
            weight = load(self._memory.scores, head * self._tiles.row_keys + row)
            for acc, value, (_, lanes) in zip(pieces, values, group, strict=True):
                acc[head] = acc[head] + splat(weight, lanes) * value

    def _clear(self, pieces: list[Registers]) -> None:
        for acc in pieces:
            for i in range(self._count):
                acc[i] = 0.0

    def _place(self, head: int, column: int) -> int:
        return head * self._problem.value_size + column

    def _reload(self, pieces: list[Registers], group: tuple[Piece, ...]) -> None:
        for i in range(self._count):
            rescale = let(self._rescale[i])
            for acc, (column, lanes) in zip(pieces, group, strict=True):
                acc[i] = load(self._memory.partial, self._place(i, column), lanes=lanes) * splat(rescale, lanes)

    def _keep(self, pieces: list[Registers], group: tuple[Piece, ...]) -> None:
        for i in range(self._count):
            for acc, (column, lanes) in zip(pieces, group, strict=True):
                store(self._memory.partial, acc[i], self._place(i, column), lanes=lanes)

    def _finish(self, pieces: list[Registers], group: tuple[Piece, ...]) -> None:
        problem = self._problem
        row = let(self._batch * problem.kv_heads + self._kv_head)
        for i, head in enumerate(self._heads):
            total = Registers(1, 1)
            total[0] = self._total[i]
            with when(self._zeroed):
                total[0] = total[0] + self._outside[i] * self._value_sum[row, i64(problem.value_size)]
                for acc, (column, lanes) in zip(pieces, group, strict=True):
                    everything = load(self._value_sum, row, i64(column), lanes=lanes)
                    acc[i] = acc[i] + splat(let(self._outside[i]), lanes) * everything
            whole = let(total[0])
            nothing = let(equal(whole, f32(0.0)))
            inverse = select(nothing, f32(0.0), f32(1.0) / select(nothing, f32(1.0), whole))
            for acc, (column, lanes) in zip(pieces, group, strict=True):
                result = let(acc[i] * splat(inverse, lanes))
                problem.elements.store(problem.output, result, self._batch, head, self._query, i64(column), lanes=lanes)
