"""What a CUDA kernel computes (KernelSpec) and how (WgmmaConfig, MmaConfig). Needs neither TVM nor a GPU."""

from dataclasses import dataclass, fields

DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
MAX_HEAD_SIZE = 256
ELEMENT_BYTES = 2
"""Of the types that `wgmma` kernels take."""
BARRIER_BYTES = 1024
"""More than all barriers of a wgmma kernel, and the alignment of the pool."""
ROW_PAD_BYTES = 16
"""Between two rows of an mma kernel's shared memory: puts the rows of an ldmatrix into different banks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Parts of the operator that a kernel was built with. What is off costs nothing at run time.

    Windows, offset, scale and grouped heads are always there.
    """

    sinks: bool = False
    softcap: bool = False
    key_padding: bool = False
    segments: bool = False
    bias: bool = False
    alibi: bool = False
    chunked: bool = False
    zeroed: bool = False
    lse: bool = False
    split: bool = False
    """Each of several thread blocks takes a share of a row's keys and writes a float32 partial result and its log-
    sum-exp.
    """

    def __post_init__(self) -> None:
        clashing = [name for name in ("segments", "chunked", "split") if self.zeroed and getattr(self, name)]
        if clashing:
            raise ValueError(
                f"kind 'zeroed' has only a window and key padding, not {', '.join(clashing)}: build without"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    @property
    def changes_scores(self) -> bool:
        """Scores need more than the product with `scale`."""
        return self.softcap or self.bias or self.alibi

    @property
    def hides_single_keys(self) -> bool:
        """A tile inside the window may still hold hidden keys."""
        return self.key_padding or self.segments


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel's meaning: element type, head sizes and features."""

    dtype: str
    """float32 is multiplied as three products of tf32 halves, good to 2^-20 of a product's terms, unless `tf32`."""
    head_size: int
    value_size: int
    features: Features = Features()
    tf32: bool = False
    """float32 operands are rounded to tf32's 10 bits and multiplied once: faster, and as inexact as float16."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"CUDA kernels take {', '.join(DTYPES)}, not {self.dtype}: cast query, key and value")
        if self.tf32 and self.dtype != "float32":
            raise ValueError(f"tf32 is a way to multiply float32, not {self.dtype}: leave it out")
        for name in ("head_size", "value_size"):
            size = getattr(self, name)
            if size % 8 or not 8 <= size <= MAX_HEAD_SIZE:
                raise ValueError(f"{name} must be a multiple of 8 from 8 to {MAX_HEAD_SIZE}, not {size}")

    @property
    def symbol(self) -> str:
        """Name of the exported function, before the family's suffix."""
        kind = "tf32" if self.tf32 else DTYPES[self.dtype]
        parts = ["swa", kind, f"d{self.head_size}", f"v{self.value_size}", *self.features.names]
        return "_".join(parts)

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class WgmmaConfig:
    """Tiles of the Hopper family: one producer warpgroup and `consumers` warpgroups of 64 query rows each."""

    keys_per_tile: int
    consumers: int = 2
    key_stages: int = 2
    value_stages: int = 2
    query_stages: int = 1
    pack: int = 1
    """Query heads of one group that share a tile's rows; a power of two."""
    blocks_per_sm: int = 1
    pingpong: bool = True
    """Consumers take turns on the tensor cores, so that one's softmax runs beside the others' products."""
    overlap: bool = False
    """A consumer's softmax runs beside its own product of values, not only beside other consumers' products."""
    query_steps: int = 0
    """Sixteen-column steps of the query that stay in registers, 4 a thread each; products of the others read the query
    from shared memory again for each key tile.
    """
    tail_keys: int = 0
    """Width of a narrower product for the first key tile, taken where the band's rest fits; 0 = none."""
    stage_output: bool = False
    """Outputs leave through shared memory and TMA; else from registers, which needs no shared memory and takes
    longer.
    """
    polynomial_every: int = 0
    """Every n-th exponential is computed by multiply-adds instead of the special-function unit; 0 = none."""

    def __post_init__(self) -> None:
        if self.keys_per_tile % 16 or not 16 <= self.keys_per_tile <= 256:
            raise ValueError(
                f"keys_per_tile must be a multiple of 16 up to 256 (wgmma's n and k), not {self.keys_per_tile}"
            )
        if self.pack & (self.pack - 1) or not 1 <= self.pack <= 64:
            raise ValueError(f"pack must be a power of two up to 64 (a warpgroup's rows), not {self.pack}")
        if not 1 <= self.consumers <= 3:
            raise ValueError(f"consumers must be 1, 2 or 3, not {self.consumers}")
        if self.tail_keys % 16 or not 0 <= self.tail_keys < self.keys_per_tile:
            raise ValueError(
                f"tail_keys must be a multiple of 16 below keys_per_tile={self.keys_per_tile}, not {self.tail_keys}"
            )

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def positions(self) -> int:
        """Query positions of one tile."""
        return self.rows // self.pack

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's thread, from setmaxnreg's multiples of 8."""
        at_entry = min(65536 // (self.threads * self.blocks_per_sm), 255) // 8 * 8
        # The producer's loop needs 40; where a thread has fewer than that at entry it must do with 24.
        producer = {1: 40, 2: 40, 3: 32}[self.consumers] if at_entry >= 128 else 24
        consumer = (at_entry * (self.consumers + 1) - producer) // self.consumers // 8 * 8
        return producer, min(consumer, 256)

    @staticmethod
    def chunk(spec: KernelSpec) -> int:
        """Columns of one swizzled row of shared memory: 128 bytes where head sizes allow, else 64."""
        return 64 if spec.head_size % 64 == 0 and spec.value_size % 64 == 0 else 32

    def stages_output(self, spec: KernelSpec) -> bool:
        """Partial results are float32 and leave from registers."""
        return self.stage_output and not spec.features.split

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of one thread block, barriers included."""
        chunk = self.chunk(spec)
        head, value = padded(spec.head_size, chunk), padded(spec.value_size, chunk)
        queries = self.query_stages * self.rows * head
        keys = self.keys_per_tile * (self.key_stages * head + self.value_stages * value)
        outputs = self.rows * value if self.stages_output(spec) else 0
        return (queries + keys + outputs) * ELEMENT_BYTES + BARRIER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaConfig:
    """Tiles of the portable family: `warps` warps of `row_blocks` times 16 query rows each, all of which also copy."""

    keys_per_tile: int
    warps: int = 4
    row_blocks: int = 1
    """Two use each fragment of keys and values twice, and twice the registers."""
    stages: int = 2
    pack: int = 1
    blocks_per_sm: int = 1

    def __post_init__(self) -> None:
        if self.keys_per_tile % 16 or self.keys_per_tile < 16:
            raise ValueError(f"keys_per_tile must be a positive multiple of 16 (the mma's k), not {self.keys_per_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, one to fill and one to read, not {self.stages}")
        if self.pack & (self.pack - 1) or not 1 <= self.pack <= self.rows:
            raise ValueError(f"pack must be a power of two up to {self.rows} rows, not {self.pack}")

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.row_blocks

    @property
    def positions(self) -> int:
        return self.rows // self.pack

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of one thread block."""
        head, value = (
            padded(size, 16) * spec.element_bytes + ROW_PAD_BYTES for size in (spec.head_size, spec.value_size)
        )
        return self.rows * head + self.stages * self.keys_per_tile * (head + value)


Config = WgmmaConfig | MmaConfig
