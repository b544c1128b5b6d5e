"""The portable family (sm_80 and later): `mma.sync` on fragments from `ldmatrix`, tiles brought by `cp.async`.

A thread block takes one tile. While a key tile is multiplied the next ones are under way. Rows of shared memory are
padded by 16 bytes, which puts the eight rows of an `ldmatrix` into different banks for every head size; head sizes
are padded to 16 with zeros that `cp.async` writes.
"""

from typing import Any

from tvm.script import tirx as T

from swacompile.schedules.cuda import abi
from swacompile.schedules.cuda.problem import Operands, Rows, Sizes, Tile
from swacompile.schedules.cuda.scores import Finish, OnlineSoftmax, Scores, store_output, store_partial
from swacompile.schedules.cuda.spec import ROW_PAD, KernelSpec, MmaConfig, padded
from swacompile.schedules.cuda.trace import (
    FULL_WARP,
    LOG2_E,
    PTX_TYPE,
    Registers,
    When,
    all_of,
    div,
    emit,
    f32,
    fixed,
    inline_cuda,
    mod,
    pack_pair,
    ptx,
    scalar,
)

CHUNK = 8
"""Elements of 16 bytes, what one `cp.async` brings."""
LARGEST_QUERY_IN_REGISTERS = 128
LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_MATRIX_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


def _copy(target: Any, source: Any, batch: Any, head: Any, row: Any, column: Any, valid: Any) -> None:
    """Start to copy 16 bytes of a 4-D buffer to shared memory, or zeros where `valid` is false."""
    text = """__forceinline__ __device__ void swa_copy16(void* target, const void* p, int b, int h, int s, int d,
    bool valid, long long sb, long long sh, long long ss) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  const char* source = static_cast<const char*>(p) + 2 * (b * sb + h * sh + s * ss + d);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(address), "l"(source), "r"(bytes) : "memory");
}
"""
    emit(inline_cuda("swa_copy16", text, target, source.data, batch, head, row, column, valid, *source.strides[:3]))


class RowBlock:
    """Registers of 16 query rows of a warp."""

    def __init__(self, body: "Body", first_row: Any) -> None:
        spec, config = body.spec, body.config
        self.first_row = fixed(first_row)
        self.scores = Registers(config.keys_per_tile // 2, "float32")
        self.weights = Registers(config.keys_per_tile // 4, "uint32")
        self.outputs = Registers(body.value // 2, "float32")
        self.softmax = OnlineSoftmax(
            spec.features, keys_per_tile=config.keys_per_tile, scale=fixed(body.call.scale * f32(LOG2_E), "float32")
        )
        self.rows = Rows(body.tile, self.first_row + div(body.lane, 4))
        self.query = Registers(body.head // 4, "uint32") if body.query_in_registers else Registers(4, "uint32")

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
        self.query_in_registers = self.head <= LARGEST_QUERY_IN_REGISTERS and config.row_blocks == 1
        self._q, self._k, self._v = inputs
        block = T.cta_id([abi.tiles(call, positions=config.positions, pack=config.pack)])
        self._thread = T.thread_id([config.threads])
        pool = T.SMEMPool()
        self._sq: Any = pool.alloc((config.rows, self.head + ROW_PAD), spec.dtype, align=128)
        self._sk: Any = pool.alloc((config.stages, config.keys_per_tile, self.head + ROW_PAD), spec.dtype, align=128)
        self._sv: Any = pool.alloc((config.stages, config.keys_per_tile, self.value + ROW_PAD), spec.dtype, align=128)
        pool.commit()
        # A shuffle tells the compiler that the warp's number is the same in all its lanes.
        self.warp = fixed(T.tvm_warp_shuffle(T.uint32(FULL_WARP), div(self._thread, 32), 0, 32, 32))
        self.lane = fixed(mod(self._thread, 32))
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
            keys_per_tile=config.keys_per_tile,
            lane=self.lane,
            scale=call.scale,
            softcap=call.softcap,
        )
        self._finish = Finish(spec, operands, lane=self.lane)
        per_warp = 16 * config.row_blocks
        self._blocks = [RowBlock(self, self.warp * per_warp + 16 * i) for i in range(config.row_blocks)]
        self._fragment = Registers(4, "uint32")

    def emit(self) -> None:
        stages = self.config.stages
        self._copy_queries()
        loading = scalar(self.tile.count - 1)
        for stage in range(stages - 1):
            self._start_next(loading, stage)
        for block in self._blocks:
            block.reset()
        ptx("cp.async.wait_group", max(stages - 2, 0))
        emit(T.cuda.cta_sync())
        if self.query_in_registers:
            self._load_queries()
        slot, free, step = scalar(0), scalar(stages - 1), scalar(self.tile.count - 1)
        with T.While(step[0] >= 0):
            ptx("cp.async.wait_group", max(stages - 2, 0))
            emit(T.cuda.cta_sync())
            self._start_next(loading, free[0])
            self._attend(slot[0], step[0])
            for ring in (slot, free):
                ring[0] = T.Select(ring[0] == stages - 1, T.int32(0), ring[0] + 1)
            step[0] = step[0] - 1
        ptx("cp.async.wait_group", 0)
        for block in self._blocks:
            self._finish.apply(block.softmax, block.outputs, self.tile, block.rows)
            if self.spec.features.split:
                store_partial(
                    self.call.output,
                    block.outputs,
                    self.tile,
                    block.rows,
                    lane=self.lane,
                    value_size=self.spec.value_size,
                )
            else:
                store_output(self.call.output, block.outputs, self.tile, block.rows, lane=self.lane, spec=self.spec)

    def _start_next(self, loading: Registers, slot: Any) -> None:
        """Start to load the next key tile, from right to left; a group is committed even when none is left, so that
        counts stay.
        """
        with When(loading[0] >= 0):
            first = fixed(self.tile.first_key + loading[0] * self.config.keys_per_tile)
            self._copy_keys(self._sk, self._k, slot, first, self.spec.head_size, self.head)
            self._copy_keys(self._sv, self._v, slot, first, self.spec.value_size, self.value)
        ptx("cp.async.commit_group")
        loading[0] = loading[0] - 1

    def _copy_keys(self, target: Any, source: Any, slot: Any, first: Any, size: int, columns: int) -> None:
        tile, keys = self.tile, self.sizes.keys
        for row, column, inside in self._chunks(self.config.keys_per_tile, columns):
            key = fixed(first + row)
            valid = all_of(key < keys, column < size)
            with When(inside):
                at = T.min(column, size - CHUNK)
                _copy(
                    target.ptr_to([slot, row, column]),
                    source,
                    tile.batch,
                    tile.kv_head,
                    T.min(key, keys - 1),
                    at,
                    valid,
                )

    def _copy_queries(self) -> None:
        tile, sizes, pack, size = self.tile, self.sizes, self.config.pack, self.spec.head_size
        for row, column, inside in self._chunks(self.config.rows, self.head):
            query = fixed(tile.first_query + div(row, pack))
            in_group = fixed(tile.group_block * pack + mod(row, pack))
            valid = all_of(query < sizes.queries, in_group < sizes.group, column < size)
            head = tile.kv_head * sizes.group + T.min(in_group, sizes.group - 1)
            with When(inside):
                at = T.min(column, size - CHUNK)
                _copy(
                    self._sq.ptr_to([row, column]),
                    self._q,
                    tile.batch,
                    head,
                    T.min(query, sizes.queries - 1),
                    at,
                    valid,
                )

    def _chunks(self, rows: int, columns: int) -> list[tuple[Any, Any, Any]]:
        """(row, column, exists) of each 16 bytes of a tile that this thread copies."""
        threads, per_row = self.config.threads, columns // CHUNK
        total = rows * per_row
        chunks = []
        for start in range(0, total, threads):
            index = fixed(self._thread + start)
            exists = T.bool(True) if start + threads <= total else index < total
            row = fixed(div(index, per_row))
            chunks.append((row, fixed((index - row * per_row) * CHUNK), exists))
        return chunks

    def _load_queries(self) -> None:
        for block in self._blocks:
            for step in range(self.head // 16):
                self._load_query_fragment(block, step, block.query.all()[4 * step : 4 * step + 4])

    def _load_query_fragment(self, block: RowBlock, step: int, registers: list[Any]) -> None:
        row = block.first_row + (self._matrix % 2) * 8 + self._matrix_row
        ptx(LOAD_MATRIX, *registers, self._sq.ptr_to([row, step * 16 + div(self._matrix, 2) * 8]))

    def _attend(self, slot: Any, step: Any) -> None:
        first = fixed(self.tile.first_key + step * self.config.keys_per_tile)
        self._multiply_keys(slot)
        for block in self._blocks:
            self._modifier.apply(block.scores, self.tile, block.rows, first)
            block.softmax.next(block.scores)
            block.softmax.rescale(block.outputs)
            for i in range(block.weights.length):
                pack_pair(block.weights, i, block.scores[2 * i], block.scores[2 * i + 1], self.spec.dtype)
        self._multiply_values(slot)

    def _multiply_keys(self, slot: Any) -> None:
        for block in self._blocks:
            block.clear_scores()
        for step in range(self.head // 16):
            if not self.query_in_registers:
                for block in self._blocks:
                    self._load_query_fragment(block, step, block.query.all())
            for pair in range(self.config.keys_per_tile // 16):
                row = pair * 16 + div(self._matrix, 2) * 8 + self._matrix_row
                address = self._sk.ptr_to([slot, row, step * 16 + (self._matrix % 2) * 8])
                ptx(LOAD_MATRIX, *self._fragment.all(), address)
                for block in self._blocks:
                    start = 4 * step if self.query_in_registers else 0
                    self._multiply(block.scores, pair, block.query.all()[start : start + 4])

    def _multiply_values(self, slot: Any) -> None:
        for step in range(self.config.keys_per_tile // 16):
            row = step * 16 + (self._matrix % 2) * 8 + self._matrix_row
            for pair in range(self.value // 16):
                address = self._sv.ptr_to([slot, row, pair * 16 + div(self._matrix, 2) * 8])
                ptx(LOAD_MATRIX_TRANSPOSED, *self._fragment.all(), address)
                for block in self._blocks:
                    self._multiply(block.outputs, pair, block.weights.all()[4 * step : 4 * step + 4])

    def _multiply(self, target: Registers, pair: int, left: list[Any]) -> None:
        """Add the product of a 16 x 16 fragment with the loaded 16 x 16 one to two neighbouring 16 x 8 accumulators."""
        kind = PTX_TYPE[self.spec.dtype]
        for half in range(2):
            accumulator = target.all()[8 * pair + 4 * half : 8 * pair + 4 * half + 4]
            right = [self._fragment[2 * half], self._fragment[2 * half + 1]]
            ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", *accumulator, *left, *right, *accumulator)


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
