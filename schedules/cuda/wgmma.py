"""The Hopper family (sm_90a): TMA copies by one producer warp, products by `wgmma`, one softmax beside the other's
products.

A thread block takes tiles until none is left. The producer's warp fills rings of key and value tiles and of query
tiles; each consumer warpgroup owns 64 rows: S = Q K^T with both operands in shared memory, P from registers times V.
The product of a key tile is started together with that of the earlier tile's values, for which its weights are kept;
consumers overlap with each other and, where a config says so, a softmax with its own consumer's product.

Shared memory holds rows of 64 or 32 columns in the 128- or 64-byte swizzle. Head sizes are padded to it by TMA, which
reads zeros beyond an edge and writes nothing there; so do lengths, and a group of query heads that is no multiple of
`pack`.
"""

from typing import Any

from tvm.script import tirx as T

from swacompile.schedules.cuda import abi
from swacompile.schedules.cuda.problem import Operands, Rows, Sizes, Tile
from swacompile.schedules.cuda.scores import Finish, OnlineSoftmax, Scores, store_float32, store_output
from swacompile.schedules.cuda.spec import ELEMENT_BYTES, KernelSpec, WgmmaConfig
from swacompile.schedules.cuda.trace import (
    FULL_WARP,
    LOG2_E,
    PTX_TYPE,
    Registers,
    When,
    all_of,
    branch,
    ceil_div,
    div,
    emit,
    f32,
    fence_registers,
    fixed,
    mod,
    pack_pair,
    ptx,
    scalar,
    wait_wgmma,
)

MAPPED = ("query", "key", "value", "output")
NO_TILE = -1
FIRST_PINGPONG_BARRIER = 1
FIRST_STORE_BARRIER = 5
LOAD_4D = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE_5D = "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group"
LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
STORE_MATRIX = "stmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_5D = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"


class Layout:
    """Columns of a head in swizzled chunks."""

    def __init__(self, spec: KernelSpec) -> None:
        self.chunk = WgmmaConfig.chunk(spec)
        self.head_chunks = -(-spec.head_size // self.chunk)
        self.value_chunks = -(-spec.value_size // self.chunk)
        self.head = self.head_chunks * self.chunk
        self.value = self.value_chunks * self.chunk
        self.row_bytes = self.chunk * ELEMENT_BYTES
        self.tma_swizzle = {64: 3, 32: 2}[self.chunk]
        layout_type = {64: 1, 32: 2}[self.chunk]
        self._descriptor = (layout_type << 62) | ((8 * self.row_bytes >> 4) << 32)

    def k_major(self) -> int:
        return self._descriptor | (1 << 16)

    def mn_major(self, rows: int) -> int:
        """`rows` of a chunk lie between two neighbouring groups of columns."""
        return self._descriptor | ((rows * self.row_bytes >> 4) << 16)

    def column_step(self, step: int, rows: int) -> int:
        """Descriptor offset of the step-th 16 columns of a tile of `rows` rows."""
        per_chunk = self.chunk // 16
        return (step // per_chunk * rows * self.row_bytes + step % per_chunk * 32) >> 4

    def row_step(self, step: int) -> int:
        """Descriptor offset of the step-th 16 rows."""
        return step * 16 * self.row_bytes >> 4

    def swizzled(self, piece: Any, row: Any) -> Any:
        """Column inside a chunk of the piece-th 16 bytes of `row`."""
        phase = row % 8 if self.chunk == 64 else (row // 2) % 4
        return (piece ^ phase) * 8


class Ring:
    """Slot and phase of a ring of buffers, as one side of it sees them."""

    def __init__(self, length: int, phase: int) -> None:
        self._length = length
        self.slot = scalar(0)
        self.phase = scalar(phase)

    def advance(self) -> None:
        if self._length == 1:
            self.phase[0] = self.phase[0] ^ 1
            return
        self.slot[0] = self.slot[0] + 1
        with When(self.slot[0] == self._length):
            self.slot[0] = 0
            self.phase[0] = self.phase[0] ^ 1


class Memory:
    """Shared memory of a thread block: three rings and their barriers."""

    def __init__(self, spec: KernelSpec, config: WgmmaConfig, layout: Layout) -> None:
        pool = T.SMEMPool()
        self.q: Any = pool.alloc(
            (config.query_stages, layout.head_chunks, config.rows, layout.chunk), spec.dtype, align=1024
        )
        self.k: Any = pool.alloc(
            (config.key_stages, layout.head_chunks, config.keys_per_tile, layout.chunk), spec.dtype, align=1024
        )
        self.v: Any = pool.alloc(
            (config.value_stages, layout.value_chunks, config.keys_per_tile, layout.chunk), spec.dtype, align=1024
        )
        self.o: Any = None
        if config.stages_output(spec):
            self.o = pool.alloc((layout.value_chunks, config.rows, layout.chunk), spec.dtype, align=1024)
        self.tile: Any = pool.alloc((config.query_stages * config.consumers,), "int32", align=8)
        """Number of the tile that a consumer's queries are of."""
        self.query_full, self.query_empty = self._barriers(pool, config.query_stages * config.consumers)
        self.key_full, self.key_empty = self._barriers(pool, config.key_stages)
        self.value_full, self.value_empty = self._barriers(pool, config.value_stages)
        pool.commit()
        self._counts = (
            (self.query_full, config.query_stages * config.consumers, 1),
            (self.query_empty, config.query_stages * config.consumers, 4),
            (self.key_full, config.key_stages, 1),
            (self.key_empty, config.key_stages, 4 * config.consumers),
            (self.value_full, config.value_stages, 1),
            (self.value_empty, config.value_stages, 4 * config.consumers),
        )

    @staticmethod
    def _barriers(pool: Any, count: int) -> tuple[Any, Any]:
        return pool.alloc((count,), "uint64", align=8), pool.alloc((count,), "uint64", align=8)

    def initialise(self) -> None:
        for barrier, length, arrivals in self._counts:
            for i in range(length):
                ptx("mbarrier.init.shared.b64", barrier.ptr_to([i]), T.uint32(arrivals))
        ptx("fence.mbarrier_init.release.cluster")
        ptx("fence.proxy.async.shared::cta")


def wait(barrier: Any, index: Any, phase: Any) -> None:
    emit(T.cuda.mbarrier_wait(barrier.ptr_to([index]), phase))


def arrive(barrier: Any, index: Any) -> None:
    ptx("mbarrier.arrive.shared.b64", barrier.ptr_to([index]), T.uint32(1))


def expect(barrier: Any, index: Any, transferred: int) -> None:
    ptx("mbarrier.arrive.expect_tx.shared.b64", barrier.ptr_to([index]), T.uint32(transferred))


class Body:
    """Device code of one kernel."""

    def __init__(
        self,
        spec: KernelSpec,
        config: WgmmaConfig,
        sizes: Sizes,
        operands: Operands,
        maps: tuple[Any, ...],
        call: abi.Call,
    ) -> None:
        self.spec, self.config, self.sizes, self.operands = spec, config, sizes, operands
        self.layout = Layout(spec)
        self.q_map, self.k_map, self.v_map, self.o_map = maps
        self.stages_output = config.stages_output(spec)
        self.output = call.output
        self.scale, self.softcap = call.scale, call.softcap
        self.blocks = call.blocks
        self.block = T.cta_id([T.min(call.blocks, abi.tiles(call, positions=config.positions, pack=config.pack))])
        self.warpgroup = T.warpgroup_id([config.consumers + 1])
        self.warp = T.warp_id_in_wg([4])
        self.lane = T.lane_id([32])
        self.memory = Memory(spec, config, self.layout)

    def emit(self) -> None:
        with When(all_of(self.warpgroup == 0, self.warp == 0, self.lane == 0)):
            for tensor_map in (self.q_map, self.k_map, self.v_map, *([self.o_map] if self.stages_output else [])):
                ptx("prefetch.tensormap", T.address_of(tensor_map))
            self.memory.initialise()
        emit(T.cuda.cta_sync())
        branch(self.warpgroup == 0, Producer(self).emit, Consumer(self).emit)

    def tile(self, index: Any) -> Tile:
        config = self.config
        return Tile(
            index,
            self.sizes,
            positions=config.positions,
            pack=config.pack,
            keys_per_tile=config.keys_per_tile,
            features=self.spec.features,
        )


class Producer:
    """One thread that keeps the rings full. Keys run from the band's right end to its left."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def emit(self) -> None:
        body, config = self._body, self._body.config
        ptx("setmaxnreg.dec.sync.aligned.u32", config.registers[0])
        with When(all_of(body.warp == 0, body.lane == 0)):
            # A producer's first waits must pass: phase 1 of a fresh barrier counts as completed.
            self._queries = Ring(config.query_stages, 1)
            self._keys = Ring(config.key_stages, 1)
            self._values = Ring(config.value_stages, 1)
            self._all_tiles()

    def _all_tiles(self) -> None:
        """Runs over the blocks to and fro: costs fall along a wave's tiles where a band begins, and the block that had a
        round's longest takes the next round's shortest. Each wave begins anew, or few ones that fill the grid together.
        """
        body = self._body
        positions, pack = body.config.positions, body.config.pack
        total = fixed(Tile.total(body.sizes, positions=positions, pack=pack))
        grid = fixed(T.min(body.blocks, total))
        wave = fixed(Tile.wave(body.sizes, positions=positions, pack=pack))
        period = fixed(wave * ceil_div(grid, wave))
        first_stride = fixed(2 * (grid - body.block) - 1)
        index, stop, stride = scalar(body.block), scalar(period), scalar(first_stride)
        with T.While(index[0] < total):
            self._tile(index[0])
            index[0] = index[0] + stride[0]
            stride[0] = 2 * grid - stride[0]
            with When(index[0] >= stop[0]):
                index[0] = stop[0] + body.block
                stop[0] = stop[0] + period
                stride[0] = first_stride
        for consumer in range(body.config.consumers):
            arrive(body.memory.query_full, self._announce(T.int32(NO_TILE), consumer))

    def _announce(self, index: Any, consumer: int) -> Any:
        """Tell a consumer its next tile, once it has read the queries before. Returns the barrier of its queries."""
        memory = self._body.memory
        barrier = fixed(self._queries.slot[0] * self._body.config.consumers + consumer)
        wait(memory.query_empty, barrier, self._queries.phase[0])
        T.buffer_store(memory.tile, index, [barrier])
        return barrier

    def _tile(self, index: Any) -> None:
        tile = self._body.tile(index)
        with When(tile.count > 0):
            self._load_keys(tile, tile.count - 1)
        for consumer in range(self._body.config.consumers):
            self._load_queries(tile, index, consumer)
        self._queries.advance()
        with When(tile.count > 0):
            step = scalar(tile.count - 1)
            with T.While(step[0] > 0):
                self._load_keys(tile, step[0] - 1)
                self._load_values(tile, step[0])
                step[0] = step[0] - 1
            self._load_values(tile, 0)

    def _load_queries(self, tile: Tile, index: Any, consumer: int) -> None:
        body, config, memory = self._body, self._body.config, self._body.memory
        slot = self._queries.slot[0]
        barrier = self._announce(index, consumer)
        expect(memory.query_full, barrier, 64 * body.layout.head * ELEMENT_BYTES)
        first = tile.first_query + consumer * (64 // config.pack)
        for c in range(body.layout.head_chunks):
            ptx(
                LOAD_5D,
                memory.q.ptr_to([slot, c, consumer * 64, 0]),
                T.address_of(body.q_map),
                c * body.layout.chunk,
                tile.group_block * config.pack,
                tile.kv_head,
                first,
                tile.batch,
                memory.query_full.ptr_to([barrier]),
            )

    def _load_keys(self, tile: Tile, step: Any) -> None:
        body, memory = self._body, self._body.memory
        self._load(
            tile, step, memory.k, body.k_map, body.layout.head_chunks, (memory.key_full, memory.key_empty), self._keys
        )

    def _load_values(self, tile: Tile, step: Any) -> None:
        body, memory = self._body, self._body.memory
        self._load(
            tile,
            step,
            memory.v,
            body.v_map,
            body.layout.value_chunks,
            (memory.value_full, memory.value_empty),
            self._values,
        )

    def _load(
        self, tile: Tile, step: Any, target: Any, source: Any, chunks: int, barriers: tuple[Any, Any], ring: Ring
    ) -> None:
        layout, width = self._body.layout, self._body.config.keys_per_tile
        full, empty = barriers
        slot = ring.slot[0]
        wait(empty, slot, ring.phase[0])
        expect(full, slot, width * chunks * layout.row_bytes)
        for c in range(chunks):
            ptx(
                LOAD_4D,
                target.ptr_to([slot, c, 0, 0]),
                T.address_of(source),
                c * layout.chunk,
                tile.first_key + step * width,
                tile.kv_head,
                tile.batch,
                full.ptr_to([slot]),
            )
        ring.advance()


class Consumer:
    """One warpgroup's 64 rows."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def emit(self) -> None:
        body, config, layout = self._body, self._body.config, self._body.layout
        spec, memory = body.spec, body.memory
        ptx("setmaxnreg.inc.sync.aligned.u32", config.registers[1])
        self._index = fixed(body.warpgroup - 1)
        self._queries = Ring(config.query_stages, 0)
        self._keys = Ring(config.key_stages, 0)
        self._values = Ring(config.value_stages, 0)
        rows = div(self._index * 64 * layout.row_bytes, 16)
        self._q_descriptor = self._describe(memory.q, 4, layout.k_major(), rows)
        self._k_descriptor = self._describe(memory.k, 4, layout.k_major(), 0)
        self._v_descriptor = self._describe(memory.v, 4, layout.mn_major(config.keys_per_tile), 0)
        self._scores = Registers(config.keys_per_tile // 2, "float32")
        self._weights = Registers(max(config.keys_per_tile // 4, 4), "uint32")
        self._outputs = Registers(layout.value // 2, "float32")
        self._query = Registers(max(4 * self._query_steps, 1), "uint32")
        scale_log2 = fixed(body.scale * f32(LOG2_E), "float32")
        self._modifier = Scores(
            spec,
            body.sizes,
            body.operands,
            lane=body.lane,
            scale=body.scale,
            softcap=body.softcap,
        )
        self._softmax = OnlineSoftmax(
            spec.features,
            scale=scale_log2,
            polynomial_every=config.polynomial_every,
            degree=3 if spec.dtype == "bfloat16" else 4,
        )
        self._finish = Finish(spec, body.operands, lane=body.lane)
        self._give_first_turn()
        index = scalar(self._next_tile())
        with T.While(index[0] != NO_TILE):
            self._tile(body.tile(index[0]))
            index[0] = self._next_tile()
        if body.stages_output:
            with When(self._leads):
                ptx("cp.async.bulk.wait_group", 0)

    @property
    def _leads(self) -> Any:
        return all_of(self._body.warp == 0, self._body.lane == 0)

    @property
    def _alternates(self) -> bool:
        return self._body.config.pingpong and self._body.config.consumers > 1

    @property
    def _query_steps(self) -> int:
        return min(self._body.config.query_steps, self._body.layout.head // 16)

    def _describe(self, buffer: Any, rank: int, high: int, offset: Any) -> Any:
        address = T.cast(T.cuda.cvta_generic_to_shared(buffer.ptr_to([0] * rank)), "uint64")
        low = T.shift_right(T.bitwise_and(address, T.uint64(0x3FFFF)), T.uint64(4))
        # In halves: a constant above 2^63 does not pass TVM's FFI.
        upper = T.shift_left(T.uint64(high >> 32), T.uint64(32))
        fields = T.bitwise_or(upper, T.uint64(high & 0xFFFFFFFF))
        return fixed(T.bitwise_or(low, fields) + T.cast(offset, "uint64"), "uint64")

    def _turn(self, action: str, consumer: Any) -> None:
        """A consumer's barrier opens once it waits there and all others have arrived: they had their turns."""
        threads = T.uint32(128 * self._body.config.consumers)
        ptx(f"bar.{action}", T.cast(consumer + FIRST_PINGPONG_BARRIER, "uint32"), threads)

    def _give_first_turn(self) -> None:
        if self._alternates:
            for earlier in range(self._body.config.consumers - 1):
                with When(self._index > earlier):
                    self._turn("arrive", T.int32(earlier))

    def _take_turn(self) -> None:
        if self._alternates:
            self._turn("sync", self._index)

    def _give_turn(self) -> None:
        consumers = self._body.config.consumers
        if self._alternates:
            for distance in range(1, consumers):
                self._turn("arrive", mod(self._index + distance, consumers))

    def _next_tile(self) -> Any:
        """Waits for its queries, too. The lane that reads is the one that gives the queries back, so that the producer
        never writes before.
        """
        memory = self._body.memory
        barrier = fixed(self._queries.slot[0] * self._body.config.consumers + self._index)
        wait(memory.query_full, barrier, self._queries.phase[0])
        number = scalar(T.int32(NO_TILE))
        with When(self._body.lane == 0):
            number[0] = memory.tile[barrier]
        return T.tvm_warp_shuffle(T.uint32(FULL_WARP), number[0], 0, 32, 32)

    def _tile(self, tile: Tile) -> None:
        body = self._body
        self._rows = Rows(tile, self._index * 64 + body.warp * 16 + div(body.lane, 4))
        for i in range(self._outputs.length):
            self._outputs[i] = 0.0
        self._softmax.reset()
        branch(tile.count > 0, lambda: self._attend(tile), self._release_queries)
        self._queries.advance()
        self._finish.apply(self._softmax, self._outputs, tile, self._rows)
        if body.spec.features.split:
            store_float32(body.output, self._outputs, tile, self._rows, lane=body.lane, value_size=body.spec.value_size)
        elif body.stages_output:
            self._store_staged(tile)
        else:
            store_output(body.output, self._outputs, tile, self._rows, lane=body.lane, spec=body.spec)

    def _attend(self, tile: Tile) -> None:
        """All key tiles, from right to left. The first may be narrower."""
        config = self._body.config
        self._load_queries()
        step = scalar(tile.count - 1)
        if config.tail_keys and not self._body.spec.features.split:
            branch(
                tile.keys - step[0] * config.keys_per_tile <= config.tail_keys,
                lambda: self._start(tile, step, config.tail_keys),
                lambda: self._start(tile, step, config.keys_per_tile),
            )
        else:
            self._start(tile, step, config.keys_per_tile)
        with T.While(step[0] > 0):
            step[0] = step[0] - 1
            self._continue(tile, step)
        self._wait_for_values()
        self._multiply_values()
        self._end_values()

    def _start(self, tile: Tile, step: Registers, width: int) -> None:
        """Weights of the first tile; those beyond `width` are 0."""
        scores = self._scores.leading(width // 2)
        wait(self._body.memory.key_full, self._keys.slot[0], self._keys.phase[0])
        self._take_turn()
        self._multiply_keys(scores)
        self._give_turn()
        self._end_keys(scores, step, pending=0)
        self._modifier.apply(scores, tile, self._rows, tile.first_key + step[0] * self._body.config.keys_per_tile)
        self._softmax.first(scores)
        self._round_weights(scores)
        for i in range(scores.length // 2, self._weights.length):
            self._weights[i] = 0

    def _continue(self, tile: Tile, step: Registers) -> None:
        """Products of another key tile and of the earlier one's values, then weights."""
        config = self._body.config
        wait(self._body.memory.key_full, self._keys.slot[0], self._keys.phase[0])
        self._take_turn()
        self._multiply_keys(self._scores)
        self._wait_for_values()
        self._multiply_values()
        self._give_turn()
        self._end_keys(self._scores, step, pending=1)
        self._modifier.apply(self._scores, tile, self._rows, tile.first_key + step[0] * config.keys_per_tile)
        self._softmax.next(self._scores)
        if config.overlap:
            with When(self._softmax.must_rescale()):
                # ptxas moves a wait up to its block's start. This branch begins one, after the exponentials.
                wait_wgmma(0, self._outputs.all())
                self._softmax.rescale(self._outputs)
            self._end_values()
            self._round_weights(self._scores)
        else:
            self._end_values()
            self._round_weights(self._scores)
            with When(self._softmax.must_rescale()):
                self._softmax.rescale(self._outputs)

    def _wait_for_values(self) -> None:
        wait(self._body.memory.value_full, self._values.slot[0], self._values.phase[0])

    def _end_keys(self, scores: Registers, step: Registers, *, pending: int) -> None:
        wait_wgmma(pending, scores.all())
        self._release(self._body.memory.key_empty, self._keys)
        with When(step[0] == 0):
            self._release_queries()

    def _end_values(self) -> None:
        wait_wgmma(0, self._outputs.all())
        self._release(self._body.memory.value_empty, self._values)

    def _load_queries(self) -> None:
        """The steps that stay in registers, as `wgmma`'s left operand holds them."""
        layout, memory = self._body.layout, self._body.memory
        row = fixed(self._index * 64 + self._body.warp * 16 + mod(self._body.lane, 16))
        per_chunk = layout.chunk // 16
        for step in range(self._query_steps):
            column = layout.swizzled(step % per_chunk * 2 + div(self._body.lane, 16), row)
            source = memory.q.ptr_to([self._queries.slot[0], step // per_chunk, row, column])
            ptx(LOAD_MATRIX, *self._query.all()[4 * step : 4 * step + 4], source)

    def _multiply_keys(self, scores: Registers) -> None:
        body, config, layout = self._body, self._body.config, self._body.layout
        kind = PTX_TYPE[body.spec.dtype]
        instruction = f"wgmma.mma_async.sync.aligned.m64n{2 * scores.length}k16.f32.{kind}.{kind}"
        stage = layout.head_chunks * config.rows * layout.row_bytes >> 4
        q = fixed(self._q_descriptor + T.cast(self._queries.slot[0] * stage, "uint64"), "uint64")
        stage = layout.head_chunks * config.keys_per_tile * layout.row_bytes >> 4
        k = fixed(self._k_descriptor + T.cast(self._keys.slot[0] * stage, "uint64"), "uint64")
        fence_registers(scores)
        if self._query_steps:
            fence_registers(self._query)
        ptx("wgmma.fence.sync.aligned")
        for step in range(layout.head // 16):
            k_step = k + T.uint64(layout.column_step(step, config.keys_per_tile))
            if step < self._query_steps:
                query = self._query.all()[4 * step : 4 * step + 4]
                ptx(instruction, *scores.all(), *query, k_step, T.bool(step > 0), 1, 1, 0)
            else:
                q_step = q + T.uint64(layout.column_step(step, config.rows))
                ptx(instruction, *scores.all(), q_step, k_step, T.bool(step > 0), 1, 1, 0, 0)
        ptx("wgmma.commit_group.sync.aligned")

    def _multiply_values(self) -> None:
        body, config, layout = self._body, self._body.config, self._body.layout
        kind = PTX_TYPE[body.spec.dtype]
        instruction = f"wgmma.mma_async.sync.aligned.m64n{layout.value}k16.f32.{kind}.{kind}"
        stage = layout.value_chunks * config.keys_per_tile * layout.row_bytes >> 4
        v = fixed(self._v_descriptor + T.cast(self._values.slot[0] * stage, "uint64"), "uint64")
        fence_registers(self._outputs)
        fence_registers(self._weights)
        ptx("wgmma.fence.sync.aligned")
        for step in range(config.keys_per_tile // 16):
            weights = [self._weights[4 * step + j] for j in range(4)]
            v_step = T.uint64(layout.row_step(step))
            ptx(instruction, *self._outputs.all(), *weights, v + v_step, T.bool(True), 1, 1, 1)
        ptx("wgmma.commit_group.sync.aligned")

    def _round_weights(self, scores: Registers) -> None:
        for i in range(scores.length // 2):
            pack_pair(self._weights, i, scores[2 * i], scores[2 * i + 1], self._body.spec.dtype)

    def _release(self, barrier: Any, ring: Ring) -> None:
        with When(self._body.lane == 0):
            arrive(barrier, ring.slot[0])
        ring.advance()

    def _release_queries(self) -> None:
        """Give the query rows back: their last product is done, and the next tile's may come while this one ends."""
        with When(self._body.lane == 0):
            arrive(self._body.memory.query_empty, self._queries.slot[0] * self._body.config.consumers + self._index)

    def _store_staged(self, tile: Tile) -> None:
        """Output through shared memory; TMA writes it while the next tile is under way."""
        body, config, layout, target = self._body, self._body.config, self._body.layout, self._body.memory.o
        barrier = T.cast(self._index + FIRST_STORE_BARRIER, "uint32")
        with When(self._leads):
            ptx("cp.async.bulk.wait_group.read", 0)
        ptx("bar.sync", barrier, T.uint32(128))
        row = fixed(self._index * 64 + body.warp * 16 + body.lane % 16)
        per_chunk = layout.chunk // 16
        for step in range(layout.value // 16):
            for j in range(4):
                at = 8 * step + 2 * j
                pack_pair(self._weights, j, self._outputs[at], self._outputs[at + 1], body.spec.dtype)
            column = layout.swizzled(step % per_chunk * 2 + div(body.lane, 16), row)
            ptx(STORE_MATRIX, target.ptr_to([step // per_chunk, row, column]), *self._weights.all()[:4])
        ptx("fence.proxy.async.shared::cta")
        ptx("bar.sync", barrier, T.uint32(128))
        with When(self._leads):
            first = tile.first_query + self._index * (64 // config.pack)
            for c in range(layout.value_chunks):
                ptx(
                    STORE_5D,
                    T.address_of(body.o_map),
                    c * layout.chunk,
                    tile.group_block * config.pack,
                    tile.kv_head,
                    first,
                    tile.batch,
                    target.ptr_to([c, self._index * 64, 0]),
                )
            ptx("cp.async.bulk.commit_group")


def _encode(
    tensor_map: Any, spec: KernelSpec, data: Any, sizes: list[Any], strides: list[Any], box: list[int], swizzle: int
) -> None:
    """Sizes innermost first; strides in elements, without the innermost, which is 1."""
    byte_strides = [T.cast(s, "int64") * T.int64(ELEMENT_BYTES) for s in strides]
    rank = len(sizes)
    emit(
        T.call_packed(
            "runtime.cuTensorMapEncodeTiled",
            tensor_map,
            spec.dtype,
            rank,
            data,
            *sizes,
            *byte_strides,
            *box,
            *[1] * rank,
            0,
            swizzle,
            2,
            0,
        )
    )


def trace_describe(spec: KernelSpec, config: WgmmaConfig, name: str) -> Any:
    """Host function (query, key, value, output, 4 pointers to 128-byte tensor maps) that encodes what TMA needs.

    The maps depend on addresses, shapes and strides only, so a caller that repeats those keeps them.
    """
    layout = Layout(spec)
    rows_box = [layout.chunk, config.pack, 1, 64 // config.pack, 1]
    keys_box = [layout.chunk, config.keys_per_tile, 1, 1]

    def encode_rows(target: Any, buffer: Any, size: int, kv_heads: Any) -> None:
        batch, heads, length, _ = buffer.shape
        by_batch, by_head, by_row, _ = buffer.strides
        group = T.truncdiv(heads, kv_heads)
        extents = [size, group, kv_heads, length, batch]
        _encode(
            target,
            spec,
            buffer.data,
            extents,
            [by_head, by_head * group, by_row, by_batch],
            rows_box,
            layout.tma_swizzle,
        )

    def encode_keys(target: Any, buffer: Any, size: int) -> None:
        batch, heads, length, _ = buffer.shape
        by_batch, by_head, by_row, _ = buffer.strides
        extents = [size, length, heads, batch]
        _encode(target, spec, buffer.data, extents, [by_row, by_head, by_batch], keys_box, layout.tma_swizzle)

    def body() -> None:
        q, k, v, o = (abi.handle(name) for name in MAPPED)
        q_map, k_map, v_map, o_map = (abi.tensor_map(f"{name}_map") for name in MAPPED)
        batch, heads, kv_heads, queries, keys = (T.int64() for _ in range(5))
        head_size, value_size = T.int64(spec.head_size), T.int64(spec.value_size)
        query = abi.strided(q, (batch, heads, queries, head_size), spec.dtype)
        key = abi.strided(k, (batch, kv_heads, keys, head_size), spec.dtype)
        value = abi.strided(v, (batch, kv_heads, keys, value_size), spec.dtype)
        encode_rows(q_map, query, spec.head_size, kv_heads)
        encode_keys(k_map, key, spec.head_size)
        encode_keys(v_map, value, spec.value_size)
        if config.stages_output(spec):
            output = abi.strided(o, (batch, heads, queries, value_size), spec.dtype)
            encode_rows(o_map, output, spec.value_size, kv_heads)

    return abi.trace_function(name, body)


def trace_launch(spec: KernelSpec, config: WgmmaConfig, name: str) -> Any:
    """Launches the kernel on maps that `trace_describe`'s function wrote."""

    def body() -> None:
        maps = tuple(abi.tensor_map(f"{name}_map") for name in MAPPED)
        call = abi.declare_call(spec)
        operands = abi.bind_operands(spec, call)
        with abi.device_entry(config.blocks_per_sm):
            Body(spec, config, abi.device_sizes(call), operands, maps, call).emit()

    return abi.trace_function(name, body)


def trace(spec: KernelSpec, config: WgmmaConfig) -> dict[str, Any]:
    """The functions of one kernel, by exported name."""
    name = spec.symbol
    return {
        f"{name}_describe": trace_describe(spec, config, f"{name}_describe"),
        name: trace_launch(spec, config, name),
    }
