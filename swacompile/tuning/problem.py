"""The calls on which a workload's candidates are checked and timed, and the rows that they must give."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swacompile.kernels.reference import UNBOUNDED, Call, banded_attention
from swacompile.target import TargetClass
from swacompile.tuning import runner
from swacompile.workload import DType, Feature, Workload

MAX_QUERIES = 4096
MAX_PRODUCTS = 2.0e10
"""Multiply-adds of a timed call: about half a second on one core."""
DECODE_HEADS = 8
"""Key/value heads of a timed decode call, so that its keys and values do not stay in the inner caches."""
GPU_HEADS = 32
GPU_QUERIES = 8192
GPU_CACHE = 65536
"""Of a timed call on a GPU: about so many query heads, and enough batches that there are so many queries, or for decode
so many keys."""
SOFTCAP = 50.0
TOLERANCE = {DType.F32: 1e-4, DType.F16: 6e-3, DType.BF16: 4e-2}
"""Largest error of an element, where values have a standard normal distribution."""
ROW_TOLERANCE = {DType.F32: 1e-4, DType.F16: 1.5e-3, DType.BF16: 1.2e-2}
"""Largest error of a row, as a share of its length: about five times what rounding makes."""
_EDGE_WINDOW = 9
_TILED_WINDOW = 130
"""Wider than a tile of keys, and short enough that one key more shows in every type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call. Queries are the last of the keys; `rows` are the queries whose outputs are checked, in the first and the
    last batch, for all query heads of the first and the last key/value head.
    """

    name: str
    workload: Workload
    batch: int = 1
    kv_heads: int
    heads: int
    queries: int
    keys: int
    left: int
    right: int
    chunk_size: int
    rows: tuple[int, ...]
    timed: bool

    @property
    def batches(self) -> tuple[int, ...]:
        """Those that are checked."""
        return tuple(sorted({0, self.batch - 1}))

    @property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Key/value heads that are checked, each with its query heads."""
        group = self.heads // self.kv_heads
        return tuple((k, tuple(range(k * group, (k + 1) * group))) for k in sorted({0, self.kv_heads - 1}))

    def document(self) -> dict[str, Any]:
        """What the runner needs, as JSON values."""
        workload = self.workload
        features = sorted(str(feature) for feature in workload.features)
        document = {
            "name": self.name,
            "dtype": str(workload.dtype),
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "queries": self.queries,
            "keys": self.keys,
            "head_size": workload.head_size,
            "value_size": workload.value_size,
            "left": self.left,
            "right": self.right,
            "offset": self.keys - self.queries,
            "chunk_size": self.chunk_size,
            "scale": workload.head_size**-0.5,
            "softcap": SOFTCAP if Feature.SOFTCAP in workload.features else 0.0,
            "features": features,
            "batches": list(self.batches),
            "checked_heads": [head for _, heads in self.groups for head in heads],
            "rows": list(self.rows),
            "tolerance": ROW_TOLERANCE[workload.dtype],
            "timed": self.timed,
        }
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return document | {"expected": f"{self.name}-{digest[:16]}.npy"}


def problems(workload: Workload, target_class: TargetClass) -> tuple[Problem, ...]:
    """Small calls with uneven sizes first, then the timed one.

    A CPU kernel holds all paths, so all are checked, whatever is timed. A CUDA kernel has one.
    """
    if target_class is TargetClass.CPU:
        return (_edges(workload, queries=77), _edges(workload, queries=1), timed_problem(workload))
    decode = Feature.DECODE in workload.features
    short = _edges(workload, queries=3 if decode else 77, whole_group=True)
    return (short, _tiled_edges(workload, queries=1 if decode else 333), gpu_timed_problem(workload))


def timed_problem(workload: Workload) -> Problem:
    """A call of the workload's size.

    Batch 1, one group of heads (fewer where that would take long), for decode a query of 8 groups.
    """
    decode = Feature.DECODE in workload.features
    queries = 1 if decode else min(workload.length, MAX_QUERIES)
    left, right = _sides(workload, workload.window)
    kv_heads = DECODE_HEADS if decode else 1
    heads = kv_heads * workload.group if decode else _affordable_heads(workload, queries)
    rows = tuple(sorted({0, 1, queries // 3, queries // 2, queries - 2, queries - 1} & set(range(queries))))
    chunk = workload.window or workload.length
    return Problem(
        name="timed",
        workload=workload,
        kv_heads=kv_heads,
        heads=heads,
        queries=queries,
        keys=workload.length,
        left=left,
        right=right,
        chunk_size=chunk if Feature.CHUNKED in workload.features else 0,
        rows=rows,
        timed=True,
    )


def gpu_timed_problem(workload: Workload) -> Problem:
    """A call that fills a GPU: all queries of a length, or for decode one query of many sequences."""
    decode = Feature.DECODE in workload.features
    queries = 1 if decode else workload.length
    kv_heads = DECODE_HEADS if decode else -(-GPU_HEADS // workload.group)
    left, right = _sides(workload, workload.window)
    rows = {0, 1, queries // 3, queries // 2, queries - 2, queries - 1} & set(range(queries))
    return Problem(
        name="timed",
        workload=workload,
        batch=max(1, (GPU_CACHE if decode else GPU_QUERIES) // workload.length),
        kv_heads=kv_heads,
        heads=kv_heads * workload.group,
        queries=queries,
        keys=workload.length,
        left=left,
        right=right,
        chunk_size=(workload.window or workload.length) if Feature.CHUNKED in workload.features else 0,
        rows=tuple(sorted(rows)),
        timed=True,
    )


def expected_rows(problem: Problem) -> npt.NDArray[np.float32]:
    """The checked rows (batches, heads, rows, V), computed in float64, of the same inputs that the runner makes."""
    document = problem.document()
    arrays = runner.inputs(document)
    rows = [
        banded_attention(_row_call(problem, document, arrays, batch, group, row))
        for batch in problem.batches
        for group in problem.groups
        for row in problem.rows
    ]
    shape = (len(problem.batches), len(problem.groups), len(problem.rows), -1, problem.workload.value_size)
    by_group = np.concatenate(rows).reshape(shape).swapaxes(2, 3)
    return by_group.reshape(shape[0], -1, shape[2], shape[4]).astype(np.float32)


def _row_call(
    problem: Problem,
    document: dict[str, Any],
    arrays: dict[str, npt.NDArray[np.generic]],
    batch: int,
    group: tuple[int, tuple[int, ...]],
    row: int,
) -> Call:
    """One row of one group of heads, with the keys that it can see and one more on either side."""
    kv_head, heads = group
    position = document["offset"] + row
    features = problem.workload.features
    all_count = Feature.ZEROED in features or Feature.CHUNKED in features
    first = 0 if all_count else max(0, min(position - problem.left - 1, problem.keys - 1))
    stop = problem.keys if all_count else max(first + 1, min(problem.keys, position + problem.right + 2))
    seen, mine = slice(first, stop), slice(heads[0], heads[-1] + 1)
    here = (slice(batch, batch + 1), slice(kv_head, kv_head + 1), seen)

    def floats(name: str, place: tuple[slice, ...]) -> npt.NDArray[np.float64] | None:
        return runner.decode(arrays[name][place], document["dtype"]) if arrays[name].size else None

    query = floats("query", (here[0], mine, slice(row, row + 1)))
    assert query is not None
    optional: dict[str, Any] = {
        "key": floats("key", here),
        "value": floats("value", here),
        "sinks": floats("sinks", (mine,)),
        "bias": floats("bias", (slice(None), slice(None), slice(row, row + 1), seen)),
        "key_padding": arrays["key_padding"][here[0], seen] if arrays["key_padding"].size else None,
        "segments": arrays["segments"][here[0], seen] if arrays["segments"].size else None,
        "alibi_slopes": arrays["alibi_slopes"][mine] if arrays["alibi_slopes"].size else None,
    }
    return Call(
        query=query, offset=position - first, left=problem.left, right=problem.right, chunk_size=problem.chunk_size,
        zeroed=Feature.ZEROED in features, scale=document["scale"], softcap=document["softcap"], **optional,
    )  # fmt: skip


def write_expected(workload: Workload, target_class: TargetClass, folder: Path) -> list[dict[str, Any]]:
    """The runner's documents of a workload's problems, their expected rows saved in `folder` unless they are there."""
    documents = []
    for problem in problems(workload, target_class):
        document = problem.document()
        path = folder / document["expected"]
        if not path.exists():
            np.save(path, expected_rows(problem), allow_pickle=False)
        documents.append(document)
    return documents


def _edges(workload: Workload, *, queries: int, whole_group: bool = False) -> Problem:
    """Sizes that no tile divides, two key/value heads, and a window short enough that a key more or less is seen."""
    left, right = _sides(workload, None if workload.window is None else min(workload.window, _EDGE_WINDOW))
    return Problem(
        name=f"edges{queries}",
        workload=workload,
        kv_heads=2,
        heads=2 * (workload.group if whole_group else min(workload.group, 5)),
        queries=queries,
        keys=93,
        left=left,
        right=right,
        chunk_size=13 if Feature.CHUNKED in workload.features else 0,
        rows=tuple(range(queries)),
        timed=False,
    )


def _tiled_edges(workload: Workload, *, queries: int) -> Problem:
    """Bands of several tiles, whole and cut; rows around the edges of tiles of queries."""
    left, right = _sides(workload, None if workload.window is None else min(workload.window, _TILED_WINDOW))
    rows = {row + step for row in range(0, queries, 64) for step in (-1, 0, 1, 17)} | {queries - 1}
    return Problem(
        name=f"tiles{queries}",
        workload=workload,
        batch=2,
        kv_heads=2,
        heads=2 * workload.group,
        queries=queries,
        keys=517,
        left=left,
        right=right,
        chunk_size=96 if Feature.CHUNKED in workload.features else 0,
        rows=tuple(sorted(rows & set(range(queries)))),
        timed=False,
    )


def _sides(workload: Workload, window: int | None) -> tuple[int, int]:
    """Inclusive left and right sides of a band of `window` keys."""
    two_sided = Feature.TWO_SIDED in workload.features
    if window is None:
        return UNBOUNDED, UNBOUNDED if two_sided else 0
    right = (window - 1) // 2 if two_sided else 0
    return window - 1 - right, right


def _affordable_heads(workload: Workload, queries: int) -> int:
    seen = min(workload.window or workload.length, workload.length)
    each = queries * seen * (workload.head_size + workload.value_size)
    affordable = max(1, int(MAX_PRODUCTS / each))
    return max(heads for heads in range(1, workload.group + 1) if heads == 1 or heads <= affordable)
