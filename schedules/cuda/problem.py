"""Run-time values of one launch as TIRx expressions, and the order in which thread blocks take tiles."""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from swacompile.schedules.cuda.spec import Features
from swacompile.schedules.cuda.trace import Registers, all_of, ceil_div, div, fixed, mod, scalar

UNBOUNDED = 1 << 29
"""A window this wide hides nothing: lengths are below it, and sums of two still fit int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths, counts and window of a call, as int32 expressions."""

    batch: Any
    kv_heads: Any
    group: Any
    """Query heads per key/value head."""
    queries: Any
    keys: Any
    left: Any
    right: Any
    offset: Any
    chunk: Any
    splits: Any
    heads_per_wave: Any
    """(batch, key/value head) pairs whose tiles run side by side; chosen so that their windows stay in the L2 cache."""

    @property
    def heads(self) -> Any:
        return self.kv_heads * self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Device buffers besides query, key, value and output. Those that the features leave out are never read."""

    key_padding: Any
    segments: Any
    sinks: Any
    bias: Any
    alibi: Any
    lse: Any
    value_sum: Any
    """(B, K, V + 1) float32: sum of the visible values, and in the last column their number."""


def clamp_window(bound: Any) -> Any:
    return T.min(bound, T.int32(UNBOUNDED))


class Tile:
    """A run of query positions of one (batch, key/value head, block of grouped heads), and the key tiles that its
    band touches.
    """

    def __init__(
        self, index: Any, sizes: Sizes, *, positions: int, pack: int, keys_per_tile: int, features: Features
    ) -> None:
        self.sizes = sizes
        self.positions = positions
        self.pack = pack
        blocks = fixed(ceil_div(sizes.queries, positions))
        group_blocks = fixed(ceil_div(sizes.group, pack))
        if features.split:
            rest = fixed(div(index, sizes.splits))
            self.split = fixed(index - rest * sizes.splits)
        else:
            rest, self.split = index, T.int32(0)
        pair_and_block = fixed(div(rest, group_blocks))
        self.group_block = fixed(rest - pair_and_block * group_blocks)
        # Waves of heads; inside a wave all heads of a query block run together. Late blocks, whose bands are
        # the longest, come first.
        wave = fixed(div(pair_and_block, sizes.heads_per_wave * blocks))
        within = fixed(pair_and_block - wave * sizes.heads_per_wave * blocks)
        first_pair = fixed(wave * sizes.heads_per_wave)
        width = fixed(T.min(sizes.heads_per_wave, sizes.batch * sizes.kv_heads - first_pair))
        block = fixed(div(within, width))
        pair = fixed(first_pair + within - block * width)
        self.batch = fixed(div(pair, sizes.kv_heads))
        self.kv_head = fixed(pair - self.batch * sizes.kv_heads)
        self.first_query = fixed((blocks - 1 - block) * positions)
        self._find_keys(keys_per_tile, features)

    def _find_keys(self, keys_per_tile: int, features: Features) -> None:
        sizes = self.sizes
        first = fixed(self.first_query + sizes.offset)
        last = fixed(T.min(self.first_query + self.positions, sizes.queries) - 1 + sizes.offset)
        start = scalar(T.max(first - sizes.left, 0))
        stop = scalar(T.min(last + sizes.right + 1, sizes.keys))
        if features.chunked:
            start[0] = T.max(start[0], T.floordiv(first, sizes.chunk) * sizes.chunk)
            stop[0] = T.min(stop[0], (T.floordiv(last, sizes.chunk) + 1) * sizes.chunk)
        self.keys = fixed(T.max(stop[0] - start[0], 0))
        count = fixed(ceil_div(self.keys, keys_per_tile))
        if features.split:
            lowest = fixed(div(count * self.split, sizes.splits))
            self.count = fixed(div(count * (self.split + 1), sizes.splits) - lowest)
            self.first_key = fixed(start[0] + lowest * keys_per_tile)
        else:
            self.count = count
            self.first_key = start[0]

    @staticmethod
    def total(sizes: Sizes, *, positions: int, pack: int) -> Any:
        return Tile._of_pairs(sizes.kv_heads * sizes.batch, sizes, positions=positions, pack=pack)

    @staticmethod
    def wave(sizes: Sizes, *, positions: int, pack: int) -> Any:
        """Tiles of all waves but the last."""
        return Tile._of_pairs(sizes.heads_per_wave, sizes, positions=positions, pack=pack)

    @staticmethod
    def _of_pairs(pairs: Any, sizes: Sizes, *, positions: int, pack: int) -> Any:
        return ceil_div(sizes.queries, positions) * ceil_div(sizes.group, pack) * pairs * sizes.splits


class Rows:
    """The two accumulator rows, `row` and `row + 8`, of one thread: their query positions and heads."""

    def __init__(self, tile: Tile, row: Any) -> None:
        self._tile = tile
        self._row: Registers = scalar(row)

    def query(self, half: int) -> Any:
        if 8 % self._tile.pack == 0:
            return self._tile.first_query + div(self._row[0], self._tile.pack) + 8 * half // self._tile.pack
        return self._tile.first_query + div(self._row[0] + 8 * half, self._tile.pack)

    def position(self, half: int) -> Any:
        """Position among the keys."""
        return self.query(half) + self._tile.sizes.offset

    def in_group(self, half: int) -> Any:
        return self._tile.group_block * self._tile.pack + mod(self._row[0] + 8 * half, self._tile.pack)

    def head(self, half: int) -> Any:
        """Query head, held inside the group so that a tile's unused rows read a valid one."""
        in_group = T.min(self.in_group(half), self._tile.sizes.group - 1)
        return self._tile.kv_head * self._tile.sizes.group + in_group

    def exists(self, half: int) -> Any:
        return all_of(self.query(half) < self._tile.sizes.queries, self.in_group(half) < self._tile.sizes.group)
