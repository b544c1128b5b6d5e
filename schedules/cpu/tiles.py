"""How much of the work one thread holds at a time: the sizes of tiles and of register blocks."""

import itertools
from dataclasses import dataclass

from swacompile.target import CpuLimits
from swacompile.workload import DType

SCRATCH_BYTES = 64 * 1024
"""What one thread may use beside the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of the tile path (many queries) and the row path (few). Lanes are float32 elements of a vector.

    A register block of the first product holds `score_keys` keys x `score_vectors` vectors of queries; one of the second holds `output_rows` queries x
    `output_vectors` vectors of the value's columns.
    """

    lanes: int
    queries: int
    keys: int
    score_keys: int
    score_vectors: int
    output_rows: int
    output_vectors: int
    row_keys: int = 32
    row_heads: int = 4

    def __post_init__(self) -> None:
        if self.queries % (self.lanes * self.score_vectors) or self.lanes % self.output_rows:
            raise ValueError(f"{self.queries} queries do not split into register blocks of {self}")
        if self.keys % self.score_keys or self.row_keys % self.lanes:
            raise ValueError(f"{self.keys} keys do not split into register blocks of {self}")

    @property
    def query_vectors(self) -> int:
        return self.queries // self.lanes

    @property
    def accumulators(self) -> int:
        """Vector registers that hold sums in the second product; the row path divides them among its heads."""
        return self.output_rows * self.output_vectors

    @property
    def output_columns(self) -> int:
        """Most columns of the value in one register block."""
        return self.lanes * self.output_vectors


def choose_tiles(*, dtype: DType, head_size: int, value_size: int, limits: CpuLimits) -> Tiles:
    """The largest tiles that fit the scratch memory: more queries first (keys and values are read once per tile), then more keys.

    Raises ValueError where even the smallest do not fit.
    """
    lanes = limits.floats_per_vector
    wide = limits.vector_registers >= 32
    for vectors, queries, keys in itertools.product((3, 2, 1) if wide else (2, 1), (48, 32, 16), (96, 48, 24)):
        if queries % (vectors * lanes):
            continue
        tiles = Tiles(
            lanes=lanes,
            queries=queries,
            keys=keys,
            score_keys=min(24 if wide else 12, 12 * vectors) // vectors,
            score_vectors=vectors,
            output_rows=4,
            output_vectors=4 if wide else 2,
        )
        if scratch_bytes(tiles, dtype=dtype, head_size=head_size, value_size=value_size) <= SCRATCH_BYTES:
            return tiles
    raise ValueError(
        f"head sizes {head_size} and {value_size} need more than {SCRATCH_BYTES} bytes of scratch a thread"
    )


def scratch_bytes(tiles: Tiles, *, dtype: DType, head_size: int, value_size: int) -> int:
    """What a thread allocates on the tile path and the row path together."""
    floats = tiles.queries * head_size + tiles.keys * tiles.queries
    floats += tiles.row_heads * (head_size + value_size + tiles.row_keys) + tiles.row_keys
    if dtype is not DType.F32:
        floats += tiles.queries * value_size
        floats += max(tiles.score_keys * head_size, tiles.keys * min(tiles.output_columns, value_size))
    return 4 * (floats + 9 * tiles.queries + 2 * tiles.keys + 64)


def split_columns(columns: int, lanes: int, most: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Columns as groups of (first column, lanes): even groups of up to `most` whole vectors, then the rest in ever smaller ones.

    The pieces cover exactly `columns`, so that nothing beyond a row is read or written.
    """
    whole = columns // lanes
    groups: list[tuple[tuple[int, int], ...]] = []
    count = -(-whole // most)
    for group in range(count):
        first, stop = whole * group // count, whole * (group + 1) // count
        groups.append(tuple((vector * lanes, lanes) for vector in range(first, stop)))
    rest = split_tail(whole * lanes, columns, lanes)
    groups.extend(rest[i : i + most] for i in range(0, len(rest), most))
    return tuple(groups)


def split_tail(first: int, stop: int, lanes: int) -> tuple[tuple[int, int], ...]:
    """[first, stop), shorter than a vector, as (start, power of two) pieces."""
    pieces = []
    while first < stop:
        lanes //= 2
        if first + lanes <= stop:
            pieces.append((first, lanes))
            first += lanes
    return tuple(pieces)
