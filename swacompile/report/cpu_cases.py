"""What the CPU benchmark times: one attention with all its sizes, the sets of them that documents show, and those of a workload or a model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swacompile.errors import ArgumentError
from swacompile.tuning.problem import SOFTCAP
from swacompile.workload import DType, Feature, Workload

if TYPE_CHECKING:
    from swacompile.passes.plan_rewrite import Replacement

KV_HEADS = 8
"""Of a case made from a workload, which says only how many query heads share one of them."""
TIMED_FEATURES = frozenset({Feature.TWO_SIDED, Feature.KEY_PADDING, Feature.SINKS, Feature.SOFTCAP, Feature.DECODE})
"""What some peer can compute, too."""
TIMED_TYPES = (DType.F32, DType.F16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Attention of `queries` queries, the last of `keys` positions, each over `window` keys of which `right` follow it. Batch 1.

    `padded` has a key padding operand that hides nothing, as a batch of one sentence has.
    """

    heads: int
    kv_heads: int
    head_size: int
    queries: int
    keys: int
    window: int
    right: int = 0
    value_size: int | None = None
    dtype: DType = DType.F32
    softcap: float = 0.0
    sinks: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or not 1 <= self.queries <= self.keys or not 0 <= self.right < self.window:
            raise ValueError(f"kv_heads must divide heads, queries be 1 to keys, window more than right: {self}")

    @classmethod
    def of(cls, workload: Workload, *, kv_heads: int = KV_HEADS, length: int | None = None) -> "Case":
        """A call of this workload, of `length` keys where given. Raises ArgumentError for what no peer computes."""
        odd = sorted(workload.features - TIMED_FEATURES)
        if odd or workload.dtype not in TIMED_TYPES:
            types, features = (
                ", ".join(TIMED_TYPES),
                ", ".join(feature for feature in Feature if feature in TIMED_FEATURES),
            )
            raise ArgumentError(
                f"{workload}: the benchmark has no peers for {odd[0] if odd else workload.dtype}; "
                f"expected one of {types} and no other features than {features}"
            )
        keys = length or workload.length
        two_sided = Feature.TWO_SIDED in workload.features
        window = min(workload.window or 2 * keys, 2 * keys) if two_sided else min(workload.window or keys, keys)
        return cls(
            heads=kv_heads * workload.group,
            kv_heads=kv_heads,
            head_size=workload.head_size,
            value_size=workload.value_size,
            queries=1 if Feature.DECODE in workload.features else keys,
            keys=keys,
            window=window,
            right=(window - 1) // 2 if two_sided else 0,
            dtype=workload.dtype,
            softcap=SOFTCAP if Feature.SOFTCAP in workload.features else 0.0,
            sinks=Feature.SINKS in workload.features,
            padded=Feature.KEY_PADDING in workload.features,
        )

    @property
    def workload(self) -> Workload:
        """What the tuning database knows the case by."""
        present = {
            Feature.TWO_SIDED: self.right > 0,
            Feature.KEY_PADDING: self.padded,
            Feature.SINKS: self.sinks,
            Feature.SOFTCAP: self.softcap != 0.0,
            Feature.DECODE: self.queries == 1,
        }
        return Workload.of(
            dtype=self.dtype,
            head_size=self.head_size,
            value_size=self.columns,
            group=self.group,
            window=self.window,
            length=self.keys,
            features=frozenset(feature for feature, is_there in present.items() if is_there),
        )

    def __str__(self) -> str:
        sizes = f"{self.heads}/{self.kv_heads} heads, D {self.head_size}"
        extras = [
            *([f"V {self.columns}"] if self.columns != self.head_size else []),
            *([] if self.dtype is DType.F32 else [self.dtype.long_name]),
            *([f"{self.right} to the right"] if self.right else []),
            *(["softcap"] if self.softcap else []),
            *(["sinks"] if self.sinks else []),
            *(["key padding"] if self.padded else []),
        ]
        return ", ".join([sizes, f"{self.queries} x {self.keys}", f"window {self.window}", *extras])

    @property
    def columns(self) -> int:
        """Size of a value."""
        return self.value_size or self.head_size

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def left(self) -> int:
        return self.window - 1 - self.right

    @property
    def offset(self) -> int:
        """Key position of the first query."""
        return self.keys - self.queries

    def seen(self, row: int, rows: int = 1) -> tuple[int, int]:
        """First key that some query of a run sees, and the one after the last."""
        first = row + self.offset
        return max(0, first - self.left), min(self.keys, first + rows + self.right)

    @property
    def pairs(self) -> int:
        """(query, key) pairs inside the band, of one head."""
        positions = np.arange(self.offset, self.keys, dtype=np.int64)
        stops, starts = np.minimum(positions + self.right + 1, self.keys), np.maximum(positions - self.left, 0)
        return int((stops - starts).sum())

    @property
    def flops(self) -> float:
        """Two products' multiply-adds for the pairs inside the band."""
        return 2.0 * self.heads * (self.head_size + self.columns) * self.pairs

    @property
    def bytes(self) -> float:
        """Keys and values that some query sees, once each."""
        first, stop = self.seen(0, self.queries)
        return float(self.dtype.bytes * self.kv_heads * (self.head_size + self.columns) * (stop - first))

    @property
    def output_bytes(self) -> int:
        return self.dtype.bytes * self.heads * self.queries * self.columns

    def mask(self) -> npt.NDArray[np.bool_]:
        """(queries, keys), true = visible."""
        return self.band(0, self.queries, 0, self.keys)

    def band(self, row: int, stop_row: int, key: int, stop_key: int) -> npt.NDArray[np.bool_]:
        """The part of the mask for a run of queries and a run of keys."""
        positions = np.arange(row, stop_row)[:, None] + self.offset
        distance = np.arange(key, stop_key)[None, :] - positions
        visible: npt.NDArray[np.bool_] = (distance <= self.right) & (distance >= -self.left)
        return visible


LENGTHS = (512, 1024, 4096, 16384)
WINDOWS = (128, 512, 2048)
SHAPES = ((8, 8, 64), (32, 8, 128))
# A window longer than the sequence is the sequence: all of it is visible.
SETS = {
    "prefill": tuple(
        Case(heads=heads, kv_heads=kv_heads, head_size=size, queries=length, keys=length, window=window)
        for heads, kv_heads, size in SHAPES
        for length in LENGTHS
        for window in sorted({min(window, length) for window in WINDOWS})
    ),
    "short": tuple(
        Case(heads=8, kv_heads=8, head_size=64, queries=length, keys=length, window=length)
        for length in (16, 32, 64, 128, 256)
    ),
    "decode": tuple(
        Case(heads=heads, kv_heads=8, head_size=128, queries=1, keys=16384, window=window)
        for heads in (8, 32)
        for window in (1024, 16384)
    ),
}


def cases_named(text: str, *, length: int | None = None) -> tuple[Case, ...]:
    """The cases of a set, a workload or a model file, the latter two with `length` keys where it is given.

    Raises ArgumentError and ModelError.
    """
    if text in SETS:
        return SETS[text]
    if Path(text).suffix in (".onnx", ".pt2"):
        return _of_model(Path(text), length)
    try:
        workload = Workload.parse(text)
    except ArgumentError as error:
        raise ArgumentError(f"{error}; or a model file (.onnx, .pt2), or a set: {', '.join(SETS)}") from error
    return (Case.of(workload, length=length),)


def _of_model(model: Path, length: int | None) -> tuple[Case, ...]:
    """Prefill and decode of every kind of attention that compiling the model would replace."""
    from swacompile import pipeline
    from swacompile.passes.plan_rewrite import Replacement, plan_rewrite
    from swacompile.passes.read_masks import read_masks

    reading = read_masks(pipeline.read(model).graph)
    outcomes = plan_rewrite(reading, pipeline.find(reading), full=False)
    replaced = [outcome for outcome in outcomes if isinstance(outcome, Replacement)]
    if not replaced:
        raise ArgumentError(f"{model}: nothing to time, for no attention has a window that could be proven")
    return tuple(dict.fromkeys(case for replacement in replaced for case in _of_replacement(replacement, length)))


def _of_replacement(replacement: "Replacement", length: int | None) -> Iterator[Case]:
    """Its own number of heads and its own window; a workload has classes of windows."""
    from swacompile.tuning.shapes import workloads_of

    for workload in workloads_of([replacement]):
        case = Case.of(workload, kv_heads=replacement.site.kv_heads, length=length)
        left, right = (
            case.keys if side < 0 else min(side, case.keys)
            for side in (replacement.left_window_size, replacement.right_window_size)
        )
        yield replace(case, window=left + 1 + right, right=right)
