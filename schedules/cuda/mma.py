"""The portable family (sm_80 and later): `mma.sync` on fragments from `ldmatrix`, tiles brought by `cp.async`.

Products are those of fragments.py: of 16-bit types, or of float32 through tf32.

A thread block takes one tile. While a key tile is multiplied the next ones are under way. Rows of shared memory are
padded by 16 bytes, which puts the eight rows of an `ldmatrix` into different banks for every head size; head sizes
are padded to 16 with zeros that `cp.async` writes.
"""

from typing import Any

from tvm.script import tirx as T

from swacompile.schedules.cuda import abi
from swacompile.schedules.cuda.fragments import LOAD_MATRIX, Fragments, fragments_of
from swacompile.schedules.cuda.problem import Operands, Rows, Sizes, Tile
from swacompile.schedules.cuda.scores import Finish, OnlineSoftmax, Scores, store_float32, store_output
from swacompile.schedules.cuda.spec import ROW_PAD_BYTES, KernelSpec, MmaConfig, padded
from swacompile.schedules.cuda.trace import (
    LOG2_E,
    Registers,
    When,
    all_of,
    div,
    emit,
    f32,
    fixed,
    inline_cuda,
    mod,
    ptx,
    scalar,
)

BYTES_OF_COPY = 16
LARGEST_QUERY_IN_REGISTERS = 256
"""Bytes of a row."""


def _copy(target: Any, source: Any, batch: Any, head: Any, row: Any, column: Any, valid: Any) -> None:
    """Start to copy 16 bytes of a 4-D buffer to shared memory, or zeros where `valid` is false."""
    size = 4 if source.dtype == "float32" else 2
    text = f"""__forceinline__ __device__ void swa_copy16_{size}(void* target, const void* p, int b, int h, int s, int d,
    bool valid, long long sb, long long sh, long long ss) {{
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  const char* source = static_cast<const char*>(p) + {size} * (b * sb + h * sh + s * ss + d);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(address), "l"(source), "r"(bytes) : "memory");
}}
"""
    strides = source.strides[:3]
    emit(inline_cuda(f"swa_copy16_{size}", text, target, source.data, batch, head, row, column, valid, *strides))


class RowBlock:
    """Registers of 16 query rows of a warp."""

    def __init__(self, body: "Body", first_row: Any) -> None:
        spec, config = body.spec, body.config
        self.first_row = first_row
        self.scores = Registers(config.keys_per_tile // 2, "float32")
        self.weights = body.fragments.weights(config.keys_per_tile)
        self.outputs = Registers(body.value // 2, "float32")
        self.softmax = OnlineSoftmax(spec.features, scale=fixed(body.call.scale * f32(LOG2_E), "float32"))
        self.rows = Rows(body.tile, div(body.lane, 4) + first_row)
        steps = body.head // body.fragments.depth if body.query_in_registers else 1
        self.query = Registers(4 * steps, "uint32")

    def reset(self) -> None:
        self.softmax.reset()
        for i in range(self.outputs.length):
            self.outputs[i] = 0.0

    def clear_scores(self) -> None:
        for i in range(self.scores.length):
            self.scores[i] = 0.0


class Body:
    """Device code of one kernel."""

    def __init__(
        self,
        spec: KernelSpec,
        config: MmaConfig,
        sizes: Sizes,
        operands: Operands,
        inputs: tuple[Any, Any, Any],
        call: abi.Call,
    ) -> None:
        self.spec, self.config, self.sizes, self.call = spec, config, sizes, call
        self.head, self.value = padded(spec.head_size, 16), padded(spec.value_size, 16)
        self.fragments: Fragments = fragments_of(spec)
        row_bytes = self.head * spec.element_bytes
        self.query_in_registers = row_bytes <= LARGEST_QUERY_IN_REGISTERS and config.row_blocks == 1
        self._q, self._k, self._v = inputs
        block = T.cta_id([abi.tiles(call, positions=config.positions, pack=config.pack)])
        self._thread = T.thread_id([config.threads])
        pool = T.SMEMPool()
        pad = ROW_PAD_BYTES // spec.element_bytes
        self._sq: Any = pool.alloc((config.rows, self.head + pad), spec.dtype, align=128)
        self._sk: Any = pool.alloc((config.stages, config.keys_per_tile, self.head + pad), spec.dtype, align=128)
        self._sv: Any = pool.alloc((config.stages, config.keys_per_tile, self.value + pad), spec.dtype, align=128)
        pool.commit()
        # Not shuffled: what comes from the thread's number alone is computed again after the loop, and not kept.
        self.warp = fixed(div(self._thread, 32))
        self.lane = fixed(mod(self._thread, 32))
        self._chunk = BYTES_OF_COPY // spec.element_bytes
        self._matrix_row, self._matrix = fixed(mod(self.lane, 8)), fixed(div(self.lane, 8))
        self.tile = Tile(
            block,
            sizes,
            positions=config.positions,
            pack=config.pack,
            keys_per_tile=config.keys_per_tile,
            features=spec.features,
        )
        self._modifier = Scores(
            spec,
            sizes,
            operands,
            lane=self.lane,
            scale=call.scale,
            softcap=call.softcap,
        )
        self._finish = Finish(spec, operands, lane=self.lane)
        first_row = fixed(self.warp * (16 * config.row_blocks))
        self._blocks = [RowBlock(self, first_row + 16 * i) for i in range(config.row_blocks)]
        self._fragment = Registers(4, "uint32")

    def emit(self) -> None:
        stages = self.config.stages
        self._copy_queries()
        slot, step = scalar(0), scalar(self.tile.count - 1)
        for stage in range(stages - 1):
            self._start_loading(step[0] - stage, stage)
        for block in self._blocks:
            block.reset()
        ptx("cp.async.wait_group", max(stages - 2, 0))
        emit(T.cuda.cta_sync())
        if self.query_in_registers:
            self._load_queries()
        with T.While(step[0] >= 0):
            ptx("cp.async.wait_group", max(stages - 2, 0))
            emit(T.cuda.cta_sync())
            free = T.Select(slot[0] == 0, T.int32(stages - 1), slot[0] - 1)
            self._start_loading(step[0] - (stages - 1), free)
            self._attend(slot[0], step[0])
            slot[0] = T.Select(slot[0] == stages - 1, T.int32(0), slot[0] + 1)
            step[0] = step[0] - 1
        ptx("cp.async.wait_group", 0)
        for block in self._blocks:
            self._finish.apply(block.softmax, block.outputs, self.tile, block.rows)
            if self.spec.features.split or self.spec.dtype == "float32":
                store_float32(
                    self.call.output,
                    block.outputs,
                    self.tile,
                    block.rows,
                    lane=self.lane,
                    value_size=self.spec.value_size,
                )
            else:
                store_output(self.call.output, block.outputs, self.tile, block.rows, lane=self.lane, spec=self.spec)

    def _start_loading(self, step: Any, slot: Any) -> None:
        """Start to load a key tile; a group is committed even when there is none, so that counts stay."""
        with When(step >= 0):
            first = fixed(self.tile.first_key + step * self.config.keys_per_tile)
            self._copy_keys(self._sk, self._k, slot, first, self.spec.head_size, self.head)
            self._copy_keys(self._sv, self._v, slot, first, self.spec.value_size, self.value)
        ptx("cp.async.commit_group")

    def _copy_keys(self, target: Any, source: Any, slot: Any, first: Any, size: int, columns: int) -> None:
        tile, keys = self.tile, self.sizes.keys
        for row, column, inside in self._chunks(self.config.keys_per_tile, columns):
            key = fixed(first + row)
            at, has_column = self._column(column, size, columns)
            with When(inside):
                _copy(
                    target.ptr_to([slot, row, column]),
                    source,
                    tile.batch,
                    tile.kv_head,
                    T.min(key, keys - 1),
                    at,
                    all_of(key < keys, has_column),
                )

    def _copy_queries(self) -> None:
        tile, sizes, pack, size = self.tile, self.sizes, self.config.pack, self.spec.head_size
        for row, column, inside in self._chunks(self.config.rows, self.head):
            query = fixed(tile.first_query + div(row, pack))
            in_group = fixed(tile.group_block * pack + mod(row, pack))
            at, has_column = self._column(column, size, self.head)
            head = tile.kv_head * sizes.group + T.min(in_group, sizes.group - 1)
            with When(inside):
                _copy(
                    self._sq.ptr_to([row, column]),
                    self._q,
                    tile.batch,
                    head,
                    T.min(query, sizes.queries - 1),
                    at,
                    all_of(query < sizes.queries, in_group < sizes.group, has_column),
                )

    def _column(self, column: Any, size: int, columns: int) -> tuple[Any, Any]:
        """A column that exists in memory, and whether it is this one: `columns` may be padded."""
        if size == columns:
            return column, T.bool(True)
        return T.min(column, size - self._chunk), column < size

    def _chunks(self, rows: int, columns: int) -> list[tuple[Any, Any, Any]]:
        """(row, column, exists) of each 16 bytes of a tile that this thread copies."""
        threads, per_row = self.config.threads, columns // self._chunk
        total = rows * per_row
        chunks = []
        row, column = self._place(self._thread, per_row)
        for start in range(0, total, threads):
            exists = T.bool(True) if start + threads <= total else self._thread + start < total
            if threads % per_row:
                chunks.append((*self._place(self._thread + start, per_row), exists))
            else:
                # One register for all rows.
                chunks.append((row + start // per_row, column, exists))
        return chunks

    def _place(self, index: Any, per_row: int) -> tuple[Any, Any]:
        row = fixed(div(index, per_row))
        return row, fixed((index - row * per_row) * self._chunk)

    def _load_queries(self) -> None:
        for block in self._blocks:
            for step in range(self.head // self.fragments.depth):
                self._load_query_fragment(block, step, block.query.all()[4 * step : 4 * step + 4])

    def _load_query_fragment(self, block: RowBlock, step: int, registers: list[Any]) -> None:
        row = block.first_row + (self._matrix % 2) * 8 + self._matrix_row
        column = step * self.fragments.depth + div(self._matrix, 2) * self._chunk
        ptx(LOAD_MATRIX, *registers, self._sq.ptr_to([row, column]))

    def _attend(self, slot: Any, step: Any) -> None:
        first = fixed(self.tile.first_key + step * self.config.keys_per_tile)
        self._multiply_keys(slot)
        for block in self._blocks:
            self._modifier.apply(block.scores, self.tile, block.rows, first)
            block.softmax.next(block.scores)
            with When(block.softmax.must_rescale()):
                block.softmax.rescale(block.outputs)
            self.fragments.round(block.weights, block.scores)
        self._multiply_values(slot)

    def _multiply_keys(self, slot: Any) -> None:
        depth = self.fragments.depth
        for block in self._blocks:
            block.clear_scores()
        for step in range(self.head // depth):
            if not self.query_in_registers:
                for block in self._blocks:
                    self._load_query_fragment(block, step, block.query.all())
            for pair in range(self.config.keys_per_tile // 16):
                row = pair * 16 + div(self._matrix, 2) * 8 + self._matrix_row
                address = self._sk.ptr_to([slot, row, step * depth + (self._matrix % 2) * self._chunk])
                ptx(LOAD_MATRIX, *self._fragment.all(), address)
                for block in self._blocks:
                    start = 4 * step if self.query_in_registers else 0
                    self._multiply(block.scores, pair, block.query.all()[start : start + 4])

    def _multiply_values(self, slot: Any) -> None:
        for step in range(self.config.keys_per_tile // self.fragments.depth):
            for pair in range(self.value // 16):
                self.fragments.load_values(self._fragment, self._sv, slot, step, pair, self.lane)
                for block in self._blocks:
                    self._multiply(block.outputs, pair, self.fragments.left(block.weights, step))

    def _multiply(self, target: Registers, pair: int, left: list[Any]) -> None:
        """Add the product of a fragment of 16 rows with the loaded one of 16 columns to two 16 x 8 accumulators."""
        for half in range(2):
            accumulator = target.all()[8 * pair + 4 * half : 8 * pair + 4 * half + 4]
            right = [self._fragment[2 * half], self._fragment[2 * half + 1]]
            self.fragments.multiply(accumulator, left, right)


def trace(spec: KernelSpec, config: MmaConfig) -> dict[str, Any]:
    """The function of one kernel, by exported name: query, key, value, then the common arguments."""

    def body() -> None:
        q, k, v = (abi.handle(name) for name in ("query", "key", "value"))
        call = abi.declare_call(spec)
        batch, heads, kv_heads, queries, keys = (T.int64() for _ in range(5))
        inputs = (
            abi.strided(q, (batch, heads, queries, T.int64(spec.head_size)), spec.dtype),
            abi.strided(k, (batch, kv_heads, keys, T.int64(spec.head_size)), spec.dtype),
            abi.strided(v, (batch, kv_heads, keys, T.int64(spec.value_size)), spec.dtype),
        )
        operands = abi.bind_operands(spec, call)
        with abi.device_entry(config.blocks_per_sm):
            Body(spec, config, abi.device_sizes(call), operands, inputs, call).emit()

    return {spec.symbol: abi.trace_function(spec.symbol, body)}
