"""Default tiles for a kernel, from what was fastest on an H100 (docs/cuda_kernels.md); tuning records go before them.

A rule answers None for "not mine". Rules are tried in order, the last of a family takes every kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from swacompile.schedules.cuda.arch import CudaArch
from swacompile.schedules.cuda.spec import Config, KernelSpec, MmaConfig, WgmmaConfig

SHORT_BAND = 256
MOST_PACKED = 8
FEW_FEATURES = 4
MOST_PACKED_DECODING = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is known of the calls to come."""

    group: int = 1
    """Query heads per key/value head."""
    band: int | None = None
    """Keys that a query sees at most; None is unbounded."""

    @property
    def pack(self) -> int:
        """Query heads of one tile, a power of two that divides the group: fewer positions waste less of a band's edges."""
        return min(self.group & -self.group, MOST_PACKED)

    @property
    def pack_decoding(self) -> int:
        """All heads of a group, so that keys are read once; rows beyond the group stay empty."""
        return min(1 << (self.group - 1).bit_length(), MOST_PACKED_DECODING)

    @property
    def is_short(self) -> bool:
        return self.band is not None and self.band <= SHORT_BAND


Rule = Callable[[KernelSpec, Shape], Config | None]


def choose(spec: KernelSpec, arch: CudaArch, shape: Shape) -> Config:
    """Tiles of the best family of `arch`. Raises ValueError where none fits its shared memory."""
    for family in arch.families:
        for rule in RULES[family] if spec.dtype in DTYPES_OF[family] else ():
            config = rule(spec, shape)
            if config is not None and arch.holds(config.shared_bytes(spec), config.blocks_per_sm):
                return config
    raise ValueError(f"no tiles of {spec.symbol} fit the {arch.shared_per_block} bytes of shared memory of {arch.name}")


def _widest(spec: KernelSpec) -> int:
    return max(spec.head_size, spec.value_size)


def _is_plain(spec: KernelSpec) -> bool:
    """Nothing between the products that needs registers of its own."""
    features = spec.features
    return not (features.changes_scores or features.hides_single_keys or features.zeroed or features.chunked)


def wgmma_split(spec: KernelSpec, shape: Shape) -> Config | None:
    """Few rows, many keys: what counts is bytes under way, two blocks of three stages each."""
    if not spec.features.split:
        return None
    wide = _widest(spec) > 128
    return WgmmaConfig(
        keys_per_tile=32 if wide else 64,
        consumers=1,
        key_stages=3,
        value_stages=3,
        pack=shape.pack_decoding,
        blocks_per_sm=1 if wide or not _is_plain(spec) else 2,
    )


def wgmma_short_packed(spec: KernelSpec, shape: Shape) -> Config | None:
    """A band of few tiles is bound by memory: two blocks a multiprocessor hide each other's start and end."""
    if not (shape.is_short and shape.pack > 1 and _widest(spec) <= 64 and _is_plain(spec)):
        return None
    return WgmmaConfig(
        keys_per_tile=48,
        key_stages=3,
        value_stages=3,
        query_stages=3,
        pack=shape.pack,
        blocks_per_sm=2,
        stage_output=True,
    )


def wgmma_short(spec: KernelSpec, shape: Shape) -> Config | None:
    """One head a tile: 64 rows waste least of a short band."""
    if not (shape.is_short and _widest(spec) <= 64 and _is_plain(spec)):
        return None
    return WgmmaConfig(keys_per_tile=64, consumers=1, pack=shape.pack, blocks_per_sm=3, stage_output=True)


def wgmma_three_consumers(spec: KernelSpec, shape: Shape) -> Config | None:
    """192 rows read keys and values from the L2 cache a third less often than 128, in 160 registers a thread."""
    widest = _widest(spec)
    if widest > 128 or not _is_plain(spec):
        return None
    if widest > 96:
        return WgmmaConfig(
            keys_per_tile=80,
            consumers=3,
            key_stages=3,
            pack=shape.pack,
            pingpong=False,
            overlap=True,
            query_steps=2,
            stage_output=True,
        )
    if widest > 64:
        return WgmmaConfig(keys_per_tile=112, consumers=3, pack=shape.pack, pingpong=False, stage_output=True)
    # Exponentials take as long as products: here turns and overlap pay.
    return WgmmaConfig(keys_per_tile=112, consumers=3, pack=shape.pack, overlap=True, stage_output=True)


def wgmma_packed_64(spec: KernelSpec, shape: Shape) -> Config | None:
    """A narrower first tile saves exponentials. With other heads or features ptxas serialises these products (C7511)."""
    if not (spec.head_size == spec.value_size == 64 and shape.pack >= 4 and not spec.features.names):
        return None
    return WgmmaConfig(
        keys_per_tile=112,
        consumers=3,
        key_stages=3,
        value_stages=3,
        pack=shape.pack,
        overlap=True,
        query_steps=2,
        tail_keys=64,
        stage_output=True,
    )


def wgmma_two_consumers(spec: KernelSpec, shape: Shape) -> Config | None:
    """232 registers a thread, for wide heads and for features. The widths are those that ptxas fits without spills."""
    widest = _widest(spec)
    if _is_plain(spec):
        return WgmmaConfig(keys_per_tile=64, pack=shape.pack, overlap=True, query_steps=6)
    features = spec.features
    if widest > 192 and features.bias:
        keys = 32 if len(features.names) <= FEW_FEATURES else 16
        return WgmmaConfig(keys_per_tile=keys, consumers=1, pack=shape.pack)
    if widest > 128:
        narrow = features.bias or features.segments or len(features.names) > FEW_FEATURES
        return WgmmaConfig(keys_per_tile=32 if narrow else 48, pack=shape.pack)
    return WgmmaConfig(keys_per_tile=96 if widest <= 64 else 64, pack=shape.pack)


def mma_two_row_blocks(spec: KernelSpec, shape: Shape) -> Config | None:
    """Fragments of keys and values are used twice, where registers allow."""
    widest = _widest(spec)
    if widest > 128 or not _is_plain(spec) or spec.features.split:
        return None
    return MmaConfig(
        keys_per_tile=64 if widest <= 64 else 48, row_blocks=2, pack=shape.pack, blocks_per_sm=2 if widest <= 64 else 1
    )


def mma_two_row_blocks_narrow(spec: KernelSpec, shape: Shape) -> Config | None:
    """For the 100 KiB of a multiprocessor of sm_86, sm_89 and sm_120, which two of the wider do not share."""
    config = mma_two_row_blocks(spec, shape)
    return None if config is None else replace(config, keys_per_tile=48)


def mma_any(spec: KernelSpec, shape: Shape) -> Config | None:
    pack = shape.pack_decoding if spec.features.split else shape.pack
    fits_64 = _widest(spec) <= 128 if _is_plain(spec) else _widest(spec) <= 64
    fits_32 = _widest(spec) <= 192 or _is_plain(spec)
    return MmaConfig(keys_per_tile=64 if fits_64 else 32 if fits_32 else 16, pack=pack)


def mma_small(spec: KernelSpec, shape: Shape) -> Config | None:
    """For the 99 KiB of sm_86, sm_89 and sm_120."""
    return MmaConfig(keys_per_tile=32 if _widest(spec) <= 128 else 16, pack=shape.pack)


def mma_float32(spec: KernelSpec, shape: Shape) -> Config | None:
    """Twice the bytes and, in parts, thrice the products."""
    if spec.dtype != "float32":
        return None
    pack = shape.pack_decoding if spec.features.split else shape.pack
    if _widest(spec) > 128 or not _is_plain(spec):
        return MmaConfig(keys_per_tile=16, pack=pack)
    if spec.features.split:
        return MmaConfig(keys_per_tile=32, pack=pack)
    return MmaConfig(keys_per_tile=32 if _widest(spec) <= 64 else 16, row_blocks=2, pack=pack)


def mma_float32_small(spec: KernelSpec, shape: Shape) -> Config | None:
    """For 99 KiB."""
    if spec.dtype != "float32":
        return None
    return MmaConfig(keys_per_tile=16, warps=4 if _widest(spec) <= 192 else 2, pack=shape.pack)


DTYPES_OF = {"wgmma": ("float16", "bfloat16"), "mma": ("float16", "bfloat16", "float32")}
RULES: dict[str, tuple[Rule, ...]] = {
    "wgmma": (
        wgmma_split,
        wgmma_short_packed,
        wgmma_short,
        wgmma_packed_64,
        wgmma_three_consumers,
        wgmma_two_consumers,
    ),
    "mma": (mma_float32, mma_float32_small, mma_two_row_blocks, mma_two_row_blocks_narrow, mma_any, mma_small),
}
