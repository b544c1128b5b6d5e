"""The calls on which a workload's candidates are checked and timed, and the rows that they must give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swacompile.kernels.reference import UNBOUNDED, Call, banded_attention
from swacompile.tuning import runner
from swacompile.workload import DType, Feature, Workload

MAX_QUERIES = 4096
MAX_PRODUCTS = 2.0e10
"""Multiply-adds of a timed call: about half a second on one core."""
DECODE_HEADS = 8
"""Key/value heads of a timed decode call, so that its keys and values do not stay in the inner caches."""
SOFTCAP = 50.0
TOLERANCE = {DType.F32: 1e-4, DType.F16: 6e-3, DType.BF16: 4e-2}
"""Largest error on values of a standard normal distribution.

The edge cases' windows are short, so that one key more shows.
"""
_EDGE_WINDOW = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call. Queries are the last of the keys; `rows` are the queries whose outputs are checked."""

    name: str
    workload: Workload
    kv_heads: int
    heads: int
    queries: int
    keys: int
    left: int
    right: int
    chunk_size: int
    rows: tuple[int, ...]
    timed: bool

    def document(self) -> dict[str, Any]:
        """What the runner needs, as JSON values."""
        workload = self.workload
        features = sorted(str(feature) for feature in workload.features)
        return {
            "name": self.name,
            "dtype": str(workload.dtype),
            "batch": 1,
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
            "rows": list(self.rows),
            "tolerance": TOLERANCE[workload.dtype],
            "timed": self.timed,
            "expected": f"{self.name}-{workload}.npy",
        }


def problems(workload: Workload) -> tuple[Problem, ...]:
    """Small calls with uneven sizes first, then the timed one.

    A library holds all paths, so all are checked, whatever is timed.
    """
    return (_edges(workload, queries=77), _edges(workload, queries=1), timed_problem(workload))


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


def expected_rows(problem: Problem) -> npt.NDArray[np.float64]:
    """The checked rows (1, heads, rows, V) in float64, of the same inputs that the runner makes."""
    document = problem.document()
    arrays = runner.inputs(document)
    dtype = document["dtype"]

    def floats(name: str) -> npt.NDArray[np.float64] | None:
        return runner.decode(arrays[name], dtype) if arrays[name].size else None

    query, bias = floats("query"), floats("bias")
    assert query is not None
    shared: dict[str, Any] = {
        "key": floats("key"),
        "value": floats("value"),
        "sinks": floats("sinks"),
        "key_padding": arrays["key_padding"] if arrays["key_padding"].size else None,
        "segments": arrays["segments"] if arrays["segments"].size else None,
        "alibi_slopes": arrays["alibi_slopes"] if arrays["alibi_slopes"].size else None,
        "left": problem.left,
        "right": problem.right,
        "chunk_size": problem.chunk_size,
        "zeroed": Feature.ZEROED in problem.workload.features,
        "scale": document["scale"],
        "softcap": document["softcap"],
    }
    offset = document["offset"]
    rows = []
    for row in problem.rows:
        here = None if bias is None else bias[:, :, row : row + 1]
        call = Call(query=query[:, :, row : row + 1], bias=here, offset=offset + row, **shared)
        rows.append(banded_attention(call))
    return np.concatenate(rows, axis=2)


def write_expected(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """The runner's documents of a workload's problems, their expected rows saved in `folder` unless they are there."""
    documents = []
    for problem in problems(workload):
        document = problem.document()
        path = folder / document["expected"]
        if not path.exists():
            np.save(path, expected_rows(problem), allow_pickle=False)
        documents.append(document)
    return documents


def _edges(workload: Workload, *, queries: int) -> Problem:
    """Sizes that no tile divides, two key/value heads, and a window short enough that a key more or less is seen."""
    left, right = _sides(workload, None if workload.window is None else min(workload.window, _EDGE_WINDOW))
    return Problem(
        name=f"edges{queries}",
        workload=workload,
        kv_heads=2,
        heads=2 * min(workload.group, 5),
        queries=queries,
        keys=93,
        left=left,
        right=right,
        chunk_size=13 if Feature.CHUNKED in workload.features else 0,
        rows=tuple(range(queries)),
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
