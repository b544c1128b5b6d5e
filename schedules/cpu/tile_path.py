"""Many queries: a tile of queries of one head against key tiles, S^T = K Q^T first, then O = P V, with the softmax taken along the way.

Keys and values are read where they lie; only the queries are transposed, once a tile. A vector's lanes are queries, so the softmax never crosses
lanes. Scores outside the band are neither computed (by whole register blocks), nor weighted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    shuffle,
    splat,
    store,
    when,
)
from swacompile.schedules.cpu.problem import Problem
from swacompile.schedules.cpu.tiles import Tiles, split_columns
from swacompile.schedules.cpu.vector_math import LOG2_E, exp2, sum_lanes, tanh, transpose
from swacompile.workload import DType

ORIGIN = (i64(0), i64(0), i64(0))
"""With these indices the last one of a 4-D operand counts elements from its start."""
Piece = tuple[int, int]
"""First column and lanes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileScratch:
    """One thread's memory.

    Per key of a tile: where its row starts, in elements. Per query: bounds of the visible keys, running maximum and sum, and factors
    for the output.
    """

    packed: Buffer
    scores: Buffer
    partial: Buffer | None
    converted: Buffer | None
    key_offset: Buffer
    first: Buffer
    stop: Buffer
    position: Buffer
    segment: Buffer
    maximum: Buffer
    total: Buffer
    rescale: Buffer
    outside: Buffer
    inverse: Buffer
    suspect: Buffer

    @classmethod
    def allocate(cls, problem: Problem, tiles: Tiles) -> Self:
        queries = tiles.queries
        partial = converted = None
        if problem.elements.dtype is not DType.F32:
            partial = scratch(queries * problem.value_size)
            columns = min(tiles.output_columns, problem.value_size)
            converted = scratch(max(tiles.score_keys * problem.head_size, tiles.keys * columns))
        return cls(
            packed=scratch(problem.head_size * queries),
            scores=scratch(tiles.keys * queries),
            partial=partial,
            converted=converted,
            key_offset=scratch(tiles.keys + tiles.lanes, "int64"),
            first=scratch(queries, "int32"),
            stop=scratch(queries, "int32"),
            position=scratch(queries, "int32"),
            segment=scratch(queries, "int64"),
            maximum=scratch(queries),
            total=scratch(queries),
            rescale=scratch(queries),
            outside=scratch(queries),
            inverse=scratch(queries),
            suspect=scratch(tiles.lanes),
        )


class TilePath:
    """Emits the code for one tile of queries. `value_sum` (B*K, V + 1) holds the sums over all visible values and their number."""

    def __init__(self, problem: Problem, tiles: Tiles, memory: TileScratch, value_sum: Buffer) -> None:
        self._problem = problem
        self._tiles = tiles
        self._memory = memory
        self._value_sum = value_sum

    def emit(self, batch: Expr, head: Expr, tile: Expr, following: tuple[Expr, Expr, Expr]) -> None:
        """Compute the tile. Afterwards `suspect` holds a NaN if an output is not finite. `following` is the next tile, for its operands."""
        problem, tiles = self._problem, self._tiles
        self._plan_prefetch(*following)
        self._batch, self._head = batch, head
        self._kv_head = let(tirx.truncdiv(head, problem.group))
        self._query0 = let(tile * tiles.queries)
        self._rows = minimum(i64(tiles.queries), problem.queries - self._query0)
        self._vectors = ceil_div(self._rows, i64(tiles.lanes))
        self._pack_queries()
        self._find_bounds()
        self._start_softmax()
        self._emit_key_tiles()

    def _plan_prefetch(self, batch: Expr, head: Expr, tile: Expr) -> None:
        """Tiles meet their operands' rows in runs too short for the processor to foresee."""
        problem, tiles = self._problem, self._tiles
        query0 = let(tile * tiles.queries)
        stop = minimum(query0 + tiles.queries + problem.offset + problem.right, problem.keys)
        self._next_query = (batch, head, query0)
        self._next_key = (batch, let(tirx.truncdiv(head, problem.group)), let(stop - tiles.queries))

    def _prefetch_next_keys(self, key: Expr) -> None:
        """During each block of keys an even share of the keys and values that the next tile adds."""
        problem, tiles = self._problem, self._tiles
        batch, kv_head, first = self._next_key
        blocks = maximum(ceil_div(self._stop_key - self._first_key, i64(tiles.score_keys)), i64(1))
        share = ceil_div(i64(tiles.queries), blocks)
        start = let(tirx.truncdiv(key - self._first_key, i64(tiles.score_keys)) * share)
        with for_range(start, minimum(start + share, i64(tiles.queries))) as row:
            for operand, columns in ((problem.key, problem.head_size), (problem.value, problem.value_size)):
                self._prefetch(operand, batch, kv_head, first + row, columns)

    def _prefetch_next_queries(self, row0: Expr) -> None:
        batch, head, first = self._next_query
        for i in range(self._tiles.output_rows):
            self._prefetch(self._problem.query, batch, head, first + row0 + i, self._problem.head_size)

    def _prefetch(self, operand: Buffer, batch: Expr, head: Expr, row: Expr, columns: int) -> None:
        size = self._problem.elements.dtype.bytes
        prefetch_row(operand, batch, head, row, columns=columns, element_bytes=size, level=2)

    def _pack_queries(self) -> None:
        """Queries transposed, scaled to units of log2: packed[d, query]. Rows past the end repeat the last one."""
        problem, lanes = self._problem, self._tiles.lanes
        whole = problem.head_size // lanes * lanes
        scale = problem.scale_log2()
        with for_range(0, self._vectors) as vector:
            row0 = let(self._query0 + vector * lanes)
            rows = [minimum(row0 + i, problem.queries - 1) for i in range(lanes)]
            with for_range(0, whole // lanes) as block:
                loaded = [
                    problem.elements.load(problem.query, self._batch, self._head, row, block * lanes, lanes=lanes)
                    for row in rows
                ]
                for i, column in enumerate(transpose(loaded, lanes)):
                    self._store_packed(column * splat(scale, lanes), block * lanes + i, vector)
            for column in range(whole, problem.head_size):
                scalars = [
                    problem.elements.load(problem.query, self._batch, self._head, row, i64(column)) for row in rows
                ]
                self._store_packed(shuffle(scalars, range(lanes)) * splat(scale, lanes), i64(column), vector)

    def _store_packed(self, value: Expr, column: Expr, vector: Expr) -> None:
        lanes = self._tiles.lanes
        store(self._memory.packed, value, column * self._tiles.queries + vector * lanes, lanes=lanes)

    def _find_bounds(self) -> None:
        """Positions and visible ranges of the tile's queries; rows past the end repeat the last one, so that both stay monotone."""
        problem, lanes, memory = self._problem, self._tiles.lanes, self._memory
        for vector in range(self._tiles.query_vectors):
            query = tirx.min(_lanes_from(self._query0 + vector * lanes, lanes), splat(problem.queries - 1, lanes))
            position = let(query + splat(problem.offset, lanes))
            first, stop = problem.band(position, lanes)
            for buffer, value in ((memory.first, first), (memory.stop, stop), (memory.position, position)):
                store(buffer, tirx.Cast(f"int32x{lanes}", value), vector * lanes, lanes=lanes)
        with when(tirx.Or(problem.chunked, problem.segmented)), for_range(0, self._tiles.queries) as row:
            position_of_row = let(tirx.Cast("int64", memory.position[row]))
            with when(problem.chunked):
                start, end = problem.chunk(position_of_row)
                store(memory.first, tirx.max(memory.first[row], tirx.Cast("int32", start)), row)
                store(memory.stop, tirx.min(memory.stop[row], tirx.Cast("int32", end)), row)
            with when(problem.segmented):
                store(memory.segment, problem.segment_of(self._batch, position_of_row), row)

    def _start_softmax(self) -> None:
        problem, lanes, memory = self._problem, self._tiles.lanes, self._memory
        self._first_key = let(tirx.Cast("int64", memory.first[0]))
        self._stop_key = let(tirx.Cast("int64", memory.stop[self._tiles.queries - 1]))
        # A zeroed band that hides nothing is plain attention, and the formula for zeroed ones would cancel.
        covers_all = all_of(
            equal(memory.first[self._tiles.queries - 1], tirx.const(0, "int32")),
            equal(memory.stop[0], _int32(problem.keys)),
        )
        self._zeroed = let(all_of(problem.zeroed, tirx.Not(covers_all)))
        self._fill = select(self._zeroed, f32(0.0), f32(MINUS_INFINITY))
        sink = Registers(1, 1)
        sink[0] = f32(MINUS_INFINITY)
        with when(problem.has_sinks):
            sink[0] = problem.sink(self._head)
        start = let(sink[0])
        highest = select(all_of(self._zeroed, tirx.Not(start > f32(0.0))), f32(0.0), start)
        share = select(equal(start, f32(MINUS_INFINITY)), f32(0.0), exp2(start - highest, 1))
        for vector in range(self._tiles.query_vectors):
            store(memory.maximum, splat(highest, lanes), vector * lanes, lanes=lanes)
            store(memory.total, splat(share, lanes), vector * lanes, lanes=lanes)
        store(memory.suspect, splat(0.0, lanes), 0, lanes=lanes)

    def _emit_key_tiles(self) -> None:
        """Key tiles of equal size, so that the last is not a remnant. There is always one, if an empty one, to write the output."""
        tiles = self._tiles
        span = maximum(self._stop_key - self._first_key, i64(0))
        count = maximum(ceil_div(span, i64(tiles.keys)), i64(1))
        even = let(ceil_div(ceil_div(span, count), i64(tiles.score_keys)) * tiles.score_keys)
        with for_range(0, count) as index:
            self._key0 = let(self._first_key + index * even)
            self._key_count = clamp(self._stop_key - self._key0, i64(0), even)
            self._is_first = let(equal(index, i64(0)))
            self._is_last = let(equal(index, count - 1))
            self._find_keys()
            self._emit_scores()
            with when(self._problem.changes_scores):
                self._change_scores()
            self._emit_softmax()
            self._emit_output()

    # Scores

    def _find_keys(self) -> None:
        """Where the tile's keys start; beyond the last key, where that one does. A table, because LLVM would rather compute each row's
        address anew for every element than hold eight of them in registers."""
        key, lanes = self._problem.key, self._tiles.lanes
        batch_stride, head_stride, stride = key.strides[:3]
        base = let(self._batch * batch_stride + self._kv_head * head_stride)
        rows = ceil_div(self._key_count, i64(self._tiles.score_keys)) * self._tiles.score_keys
        with for_range(0, ceil_div(rows, i64(lanes))) as vector:
            index = _lanes_from(self._key0 + vector * lanes, lanes)
            row = let(tirx.min(index, splat(self._problem.keys - 1, lanes)))
            place = splat(base, lanes) + row * splat(stride, lanes)
            store(self._memory.key_offset, place, vector * lanes, lanes=lanes)

    def _emit_scores(self) -> None:
        tiles = self._tiles
        width = tiles.score_vectors
        with for_range(0, ceil_div(self._key_count, i64(tiles.score_keys))) as block:
            row = let(block * tiles.score_keys)
            key = let(self._key0 + row)
            self._prefetch_next_keys(key)
            if self._memory.converted is not None:
                self._convert_keys(row)
            with for_range(0, ceil_div(self._vectors, i64(width))) as group:
                vector = let(group * width)
                touched = all_of(self._touches(key, vector, width), vector + width <= self._vectors)
                either(
                    touched,
                    partial(self._score_block, row, key, vector, width),
                    partial(self._score_vectors, row, key, vector, width),
                )

    def _score_vectors(self, row: Expr, key: Expr, vector: Expr, width: int) -> None:
        """The vectors of a group that a block touches, one by one."""
        with (
            for_range(vector, minimum(vector + width, self._vectors)) as single,
            when(self._touches(key, single, 1)),
        ):
            self._score_block(row, key, single, 1)

    def _touches(self, key: Expr, vector: Expr, width: int) -> Expr:
        """Whether each of `width` vectors has a query that may see one of the block's keys."""
        lanes = self._tiles.lanes
        last_first = self._memory.first[(vector + (width - 1)) * lanes]
        first_stop = self._memory.stop[vector * lanes + (lanes - 1)]
        return all_of(last_first < _int32(key + self._tiles.score_keys), _int32(key) < first_stop)

    def _score_block(self, row: Expr, key: Expr, vector: Expr, width: int) -> None:
        """Scores of score_keys keys and `width` vectors of queries, hidden ones filled unless a later pass does that."""
        tiles, memory, lanes = self._tiles, self._memory, self._tiles.lanes
        acc = [Registers(width, lanes) for _ in range(tiles.score_keys)]
        for row_acc in acc:
            for j in range(width):
                row_acc[j] = 0.0
        keys = [load(memory.key_offset, row + i) for i in range(tiles.score_keys)]
        with for_range(0, self._problem.head_size) as column:
            base = let(column * tiles.queries + vector * lanes)
            queries = [load(memory.packed, base + i * lanes, lanes=lanes) for i in range(width)]
            for i in range(tiles.score_keys):
                scalar = splat(self._load_key(keys[i], i, column), lanes)
                for j in range(width):
                    acc[i][j] = acc[i][j] + scalar * queries[j]
        last_lane = (vector + width) * lanes - 1
        inside = all_of(
            memory.first[last_lane] <= _int32(key), _int32(key + tiles.score_keys) <= memory.stop[vector * lanes]
        )
        as_they_are = any_of(inside, self._problem.changes_scores)
        either(
            as_they_are,
            lambda: self._store_scores(acc, row, key, vector, width, masked=False),
            lambda: self._store_scores(acc, row, key, vector, width, masked=True),
        )

    def _load_key(self, offset: Expr, row: int, column: Expr) -> Expr:
        if self._memory.converted is not None:
            return load(self._memory.converted, row * self._problem.head_size + column)
        return load(self._problem.key, *ORIGIN, offset + column)

    def _convert_keys(self, row: Expr) -> None:
        """A block's keys as float32."""
        problem = self._problem
        pieces = [
            piece
            for group in split_columns(problem.head_size, self._tiles.lanes, self._tiles.output_vectors)
            for piece in group
        ]
        for i in range(self._tiles.score_keys):
            source = load(self._memory.key_offset, row + i)
            for column, width in pieces:
                value = problem.elements.load(problem.key, *ORIGIN, source + column, lanes=width)
                store(self._memory.converted, value, i * problem.head_size + column, lanes=width)

    def _store_scores(
        self, acc: list[Registers], row: Expr, key: Expr, vector: Expr, width: int, *, masked: bool
    ) -> None:
        tiles, lanes = self._tiles, self._tiles.lanes
        for j in range(width):
            column = let((vector + j) * lanes)
            visible = self._visible_lanes(vector + j) if masked else None
            for i in range(tiles.score_keys):
                value = let(acc[i][j])
                if visible is not None:
                    value = select(visible(key + i), value, splat(self._fill, lanes))
                store(self._memory.scores, value, (row + i) * tiles.queries + column, lanes=lanes)

    def _visible_lanes(self, vector: Expr) -> Callable[[Expr], Expr]:
        """A function from a key to the lanes whose window holds it."""
        lanes = self._tiles.lanes
        first = load(self._memory.first, vector * lanes, lanes=lanes)
        stop = load(self._memory.stop, vector * lanes, lanes=lanes)

        def visible(key: Expr) -> Expr:
            key_lanes = let(splat(_int32(key), lanes))
            return let(all_of(first <= key_lanes, key_lanes < stop))

        return visible

    def _key_range(self, first_query: Expr, last_query: Expr) -> tuple[Expr, Expr]:
        """Rows of the key tile that a run of queries may see."""
        start = tirx.Cast("int64", self._memory.first[first_query]) - self._key0
        stop = tirx.Cast("int64", self._memory.stop[last_query]) - self._key0
        return clamp(start, i64(0), self._key_count), clamp(stop, i64(0), self._key_count)

    # What changes scores

    def _change_scores(self) -> None:
        """Softcap, ALiBi, bias, then everything that hides: for calls that have more than a band."""
        problem, memory, lanes = self._problem, self._memory, self._tiles.lanes
        slope = Registers(1, 1)
        slope[0] = 0.0
        with when(problem.has_alibi):
            slope[0] = problem.alibi_slopes[self._head] * f32(LOG2_E)
        with for_range(0, self._vectors) as vector:
            column = let(vector * lanes)
            visible = self._visible_lanes(vector)
            position = load(memory.position, column, lanes=lanes)
            queries = [minimum(self._query0 + column + i, problem.queries - 1) for i in range(lanes)]
            start, stop = self._key_range(column, column + (lanes - 1))
            score = Registers(1, lanes)
            with for_range(start, stop) as row:
                key = let(self._key0 + row)
                place = let(row * self._tiles.queries + column)
                score[0] = load(memory.scores, place, lanes=lanes)
                self._add_to_score(score, key, position, queries, slope)
                score[0] = select(visible(key), score[0], splat(self._fill, lanes))
                self._hide_by_data(score, key, column, position)
                store(memory.scores, score[0], place, lanes=lanes)

    def _add_to_score(self, score: Registers, key: Expr, position: Expr, queries: list[Expr], slope: Registers) -> None:
        problem, lanes = self._problem, self._tiles.lanes
        with when(tirx.NE(problem.softcap, f32(0.0))):
            cap = let(problem.softcap * f32(LOG2_E))
            score[0] = tanh(let(score[0] / splat(cap, lanes)), lanes) * splat(cap, lanes)
        with when(problem.has_alibi):
            distance = tirx.Cast(f"float32x{lanes}", splat(_int32(key), lanes) - position)
            score[0] = score[0] + splat(slope[0], lanes) * distance
        with when(problem.has_bias):
            biases = [problem.elements.load(problem.bias, self._batch, self._head, query, key) for query in queries]
            score[0] = score[0] + shuffle(biases, range(lanes)) * splat(LOG2_E, lanes)

    def _hide_by_data(self, score: Registers, key: Expr, column: Expr, position: Expr) -> None:
        problem, lanes = self._problem, self._tiles.lanes
        with when(problem.has_padding), when(equal(problem.key_padding[self._batch, key], tirx.const(0, "uint8"))):
            score[0] = splat(self._fill, lanes)
        with when(problem.segmented):
            of_query = load(self._memory.segment, column, lanes=lanes)
            of_key = let(splat(load(problem.segments, self._batch, key), lanes))
            zero = splat(tirx.const(0, "int32"), lanes)
            exists = all_of(zero <= position, position < splat(_int32(problem.keys), lanes))
            score[0] = select(let(all_of(equal(of_query, of_key), exists)), score[0], splat(self._fill, lanes))

    # Softmax

    def _emit_softmax(self) -> None:
        """Scores become weights relative to the running maximum; lanes are queries."""
        lanes, memory = self._tiles.lanes, self._memory
        with for_range(0, self._vectors) as vector:
            column = let(vector * lanes)
            start, stop = self._key_range(column, column + (lanes - 1))
            state = Registers(1, lanes)
            state[0] = before = load(memory.maximum, column, lanes=lanes)
            with for_range(start, stop) as row:
                score = load(memory.scores, row * self._tiles.queries + column, lanes=lanes)
                state[0] = tirx.max(state[0], score)
            highest = let(state[0])
            store(memory.maximum, highest, column, lanes=lanes)
            # A row that has seen only -inf: subtracting that would make NaN.
            base = select(equal(highest, splat(MINUS_INFINITY, lanes)), splat(0.0, lanes), highest)
            rescale = exp2(before - base, lanes)
            store(memory.rescale, rescale, column, lanes=lanes)
            total = Registers(1, lanes)
            total[0] = load(memory.total, column, lanes=lanes) * rescale
            either(
                self._zeroed,
                partial(self._weigh, column, start, stop, base, total, zeroed=True),
                partial(self._weigh, column, start, stop, base, total, zeroed=False),
            )
            store(memory.total, total[0], column, lanes=lanes)
            with when(self._is_last):
                self._finish_softmax(column)

    def _weigh(self, column: Expr, start: Expr, stop: Expr, base: Expr, total: Registers, *, zeroed: bool) -> None:
        """2^(score - maximum); where zeroed, less the weight 2^(0 - maximum) that the key has anyway."""
        lanes, memory = self._tiles.lanes, self._memory
        outside = exp2(let(splat(0.0, lanes) - base), lanes) if zeroed else None
        if outside is not None:
            store(memory.outside, outside, column, lanes=lanes)
        with for_range(start, stop) as row:
            place = let(row * self._tiles.queries + column)
            weight = exp2(let(load(memory.scores, place, lanes=lanes) - base), lanes)
            if outside is not None:
                weight = let(weight - outside)
            store(memory.scores, weight, place, lanes=lanes)
            total[0] = total[0] + weight

    def _finish_softmax(self, column: Expr) -> None:
        lanes, memory, problem = self._tiles.lanes, self._memory, self._problem
        whole = Registers(1, lanes)
        whole[0] = load(memory.total, column, lanes=lanes)
        with when(self._zeroed):
            count = let(splat(self._value_sum[self._value_sum_row(), problem.value_size], lanes))
            whole[0] = whole[0] + load(memory.outside, column, lanes=lanes) * count
        total = let(whole[0])
        nothing = equal(total, splat(0.0, lanes))
        safe = select(nothing, splat(1.0, lanes), total)
        inverse = select(nothing, splat(0.0, lanes), splat(1.0, lanes) / safe)
        store(memory.inverse, inverse, column, lanes=lanes)

    def _value_sum_row(self) -> Expr:
        return self._batch * self._problem.kv_heads + self._kv_head

    # Output

    def _emit_output(self) -> None:
        tiles = self._tiles
        for group in split_columns(self._problem.value_size, tiles.lanes, tiles.output_vectors):
            if self._memory.converted is not None:
                self._convert_values(group)
            with for_range(0, ceil_div(self._rows, i64(tiles.output_rows))) as block:
                self._output_block(let(block * tiles.output_rows), group)

    def _convert_values(self, group: tuple[Piece, ...]) -> None:
        problem = self._problem
        width = group[-1][0] + group[-1][1] - group[0][0]
        with for_range(0, self._key_count) as row:
            for column, lanes in group:
                value = problem.elements.load(
                    problem.value, self._batch, self._kv_head, self._key0 + row, column, lanes=lanes
                )
                store(self._memory.converted, value, row * width + (column - group[0][0]), lanes=lanes)

    def _load_value(self, row: Expr, piece: Piece, group: tuple[Piece, ...]) -> Expr:
        column, lanes = piece
        if self._memory.converted is not None:
            width = group[-1][0] + group[-1][1] - group[0][0]
            return load(self._memory.converted, row * width + (column - group[0][0]), lanes=lanes)
        return load(self._problem.value, self._batch, self._kv_head, self._key0 + row, column, lanes=lanes)

    def _output_block(self, row0: Expr, group: tuple[Piece, ...]) -> None:
        """output_rows queries x one group of columns, over the keys that any of these queries sees."""
        rows = self._tiles.output_rows
        if group[0][0] == 0:
            with when(self._is_last):
                self._prefetch_next_queries(row0)
        pieces = [Registers(rows, lanes) for _, lanes in group]
        either(self._is_first, lambda: self._clear(pieces), lambda: self._reload(pieces, row0, group))
        start, stop = self._key_range(row0, row0 + (rows - 1))
        with for_range(start, stop) as key:
            values = [self._load_value(key, piece, group) for piece in group]
            place = let(key * self._tiles.queries + row0)
            for i in range(rows):
                weight = load(self._memory.scores, place + i)
                for acc, value, (_, lanes) in zip(pieces, values, group, strict=True):
                    acc[i] = acc[i] + splat(weight, lanes) * value
        either(
            self._is_last,
            lambda: self._finish(pieces, row0, group),
            lambda: self._keep(pieces, row0, group),
        )

    def _clear(self, pieces: list[Registers]) -> None:
        for acc in pieces:
            for i in range(self._tiles.output_rows):
                acc[i] = 0.0

    def _reload(self, pieces: list[Registers], row0: Expr, group: tuple[Piece, ...]) -> None:
        """What earlier key tiles gave, relative to the new maximum."""
        for i in range(self._tiles.output_rows):
            rescale = load(self._memory.rescale, row0 + i)
            for acc, (column, lanes) in zip(pieces, group, strict=True):
                acc[i] = self._load_partial(row0 + i, column, lanes) * splat(rescale, lanes)

    def _load_partial(self, row: Expr, column: int, lanes: int) -> Expr:
        if self._memory.partial is not None:
            return load(self._memory.partial, row * self._problem.value_size + column, lanes=lanes)
        query = minimum(self._query0 + row, self._problem.queries - 1)
        return load(self._problem.output, self._batch, self._head, query, column, lanes=lanes)

    def _keep(self, pieces: list[Registers], row0: Expr, group: tuple[Piece, ...]) -> None:
        """Between key tiles float32 partial results wait in the output itself."""
        for i in range(self._tiles.output_rows):
            with when(row0 + i < self._rows):
                for acc, (column, lanes) in zip(pieces, group, strict=True):
                    if self._memory.partial is not None:
                        place = (row0 + i) * self._problem.value_size + column
                        store(self._memory.partial, acc[i], place, lanes=lanes)
                    else:
                        index = (self._batch, self._head, self._query0 + row0 + i, i64(column))
                        store(self._problem.output, acc[i], *index, lanes=lanes)

    def _finish(self, pieces: list[Registers], row0: Expr, group: tuple[Piece, ...]) -> None:
        problem, memory = self._problem, self._memory
        with when(self._zeroed):
            for i in range(self._tiles.output_rows):
                outside = load(memory.outside, row0 + i)
                for acc, (column, lanes) in zip(pieces, group, strict=True):
                    everything = load(self._value_sum, self._value_sum_row(), i64(column), lanes=lanes)
                    acc[i] = acc[i] + splat(outside, lanes) * everything
        for i in range(self._tiles.output_rows):
            inverse = load(memory.inverse, row0 + i)
            with when(row0 + i < self._rows):
                for acc, (column, lanes) in zip(pieces, group, strict=True):
                    result = let(acc[i] * splat(inverse, lanes))
                    index = (self._batch, self._head, self._query0 + row0 + i, i64(column))
                    problem.elements.store(problem.output, result, *index, lanes=lanes)
                    # 0 * finite adds nothing; 0 * inf and NaN leave a NaN.
                    seen = load(memory.suspect, 0, lanes=lanes)
                    store(memory.suspect, seen + result * splat(0.0, lanes), 0, lanes=lanes)

    def is_finite(self) -> Expr:
        """Whether all outputs of the last tile are finite. (TVM's != is false for NaN, its == as well.)"""
        lanes = self._tiles.lanes
        return equal(sum_lanes(load(self._memory.suspect, 0, lanes=lanes), lanes), f32(0.0))


def _lanes_from(base: Expr, lanes: int) -> Expr:
    return tirx.Ramp(base, i64(1), lanes)


def _int32(value: Expr) -> Expr:
    return tirx.Cast("int32", value)
