"""What the CPU benchmark times: our kernel in ONNX Runtime, and other ways to compute the same band. All get float32 operands in BHSD order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Run = Callable[[], Any]
"""One call; gives the output, as an array or something that numpy takes for one."""

ONNX_IR_VERSION = 10
CHUNK_ROWS = 256
MOST_SCORE_BYTES = 1.2e9
MOST_DENSE_FLOPS = 6e11


class UnavailableError(Exception):
    """The contender cannot do this case here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Causal attention of `queries` queries, the last of `keys` positions, each over `window` keys. Batch 1."""

    heads: int
    kv_heads: int
    head_size: int
    queries: int
    keys: int
    window: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or not 1 <= self.queries <= self.keys or self.window < 1:
            raise ValueError(f"kv_heads must divide heads, queries be 1 to keys, window at least 1: {self}")

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def flops(self) -> float:
        """Of the pairs inside the band, two products of head_size multiply-adds each."""
        positions = np.arange(self.keys - self.queries, self.keys)
        return float(4 * self.heads * self.head_size * np.minimum(positions + 1, self.window).sum())

    @property
    def bytes(self) -> float:
        """Keys and values that some query sees, once each."""
        return 8.0 * self.kv_heads * self.head_size * min(self.keys, self.window + self.queries - 1)

    def refuse_if_dense_is_too_much(self, *, stores_scores: bool) -> None:
        """For contenders that compute every pair, or keep every pair's score. Raises UnavailableError."""
        pairs = self.heads * self.queries * self.keys
        if stores_scores and 4 * pairs > MOST_SCORE_BYTES:
            raise UnavailableError(f"left out: {4e-9 * pairs:.0f} GB of scores")
        if 4 * self.head_size * pairs > MOST_DENSE_FLOPS:
            raise UnavailableError(f"left out: {4e-12 * self.head_size * pairs:.1f} TFLOP of dense work")

    def mask(self) -> npt.NDArray[np.bool_]:
        """(queries, keys), true = visible."""
        distance = np.arange(self.keys)[None, :] - np.arange(self.keys - self.queries, self.keys)[:, None]
        visible: npt.NDArray[np.bool_] = (distance <= 0) & (distance > -self.window)
        return visible


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A case with its operands."""

    case: Case
    threads: int
    library: Path
    """ONNX Runtime library with our kernel for the case's head size."""
    query: Floats
    key: Floats
    value: Floats

    @classmethod
    def draw(cls, case: Case, *, threads: int, library: Path, seed: int = 0) -> "Problem":
        draw = np.random.default_rng(seed)

        def tensor(heads: int, length: int) -> Floats:
            return draw.standard_normal((1, heads, length, case.head_size), dtype=np.float32)

        return cls(
            case=case,
            threads=threads,
            library=library,
            query=tensor(case.heads, case.queries),
            key=tensor(case.kv_heads, case.keys),
            value=tensor(case.kv_heads, case.keys),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """`prepare` may raise UnavailableError, or anything that a missing package or operator raises."""

    name: str
    prepare: Callable[[Problem], Run] = field(repr=False)


def ours(problem: Problem) -> Run:
    """swacompile::BandedAttention through the ONNX Runtime library."""
    case = problem.case
    attributes = {
        "layout": "BHSD",
        "scale": case.scale,
        "softcap": 0.0,
        "left_window_size": case.window - 1,
        "right_window_size": 0,
        "alignment": "bottom_right",
        "chunk_size": 0,
        "kind": "hidden",
    }
    node = _node("BandedAttention", ["query", "key", "value"], "swacompile", attributes)
    return _run_model(problem, [node], _operands(problem), {"": 18, "swacompile": 1}, library=problem.library)


def ort_dense(problem: Problem) -> Run:
    """MatMul, mask added, Softmax, MatMul, as exporters write attention; heads of a group broadcast."""
    case = problem.case
    case.refuse_if_dense_is_too_much(stores_scores=True)
    grouped = (1, case.kv_heads, case.group, case.queries, case.head_size)
    shared = (1, case.kv_heads, 1, case.keys, case.head_size)
    feeds = {
        "query": problem.query.reshape(grouped),
        "key": np.ascontiguousarray(problem.key.reshape(shared).swapaxes(-1, -2)),
        "value": problem.value.reshape(shared),
        "mask": np.where(case.mask(), 0, np.finfo(np.float32).min).astype(np.float32),
        "scale": np.float32(case.scale),
    }
    nodes = [
        _node("MatMul", ["query", "key"], output="products"),
        _node("Mul", ["products", "scale"], output="scaled"),
        _node("Add", ["scaled", "mask"], output="masked"),
        _node("Softmax", ["masked"], attributes={"axis": -1}, output="weights"),
        _node("MatMul", ["weights", "value"]),
    ]
    return _run_model(problem, nodes, feeds, {"": 18}, shape=(1, case.heads, case.queries, case.head_size))


def ort_gqa(problem: Problem) -> Run:
    """com.microsoft.GroupQueryAttention with local_window_size; one head's queries follow another's in memory (BSHD)."""
    case = problem.case
    if case.queries != case.keys:
        raise UnavailableError("its cache appends keys, which would be timed too")
    case.refuse_if_dense_is_too_much(stores_scores=True)
    feeds = {
        name: np.ascontiguousarray(array.swapaxes(1, 2)).reshape(1, array.shape[2], -1)
        for name, array in _operands(problem).items()
    }
    feeds["seqlens"] = np.array([case.keys - 1], dtype=np.int32)
    feeds["total"] = np.array([case.keys], dtype=np.int32)
    attributes = {
        "num_heads": case.heads,
        "kv_num_heads": case.kv_heads,
        "local_window_size": case.window,
        "scale": case.scale,
    }
    inputs = ["query", "key", "value", "", "", "seqlens", "total"]
    node = _node("GroupQueryAttention", inputs, "com.microsoft", attributes)
    node.output.extend(["present_key", "present_value"])
    run = _run_model(problem, [node], feeds, {"": 18, "com.microsoft": 1})
    return _reordered(run, lambda out: out.reshape(1, case.keys, case.heads, case.head_size).swapaxes(1, 2))


def ort_attention(problem: Problem) -> Run:
    """ONNX Attention, opset 25, with its window."""
    case = problem.case
    case.refuse_if_dense_is_too_much(stores_scores=True)
    attributes = {
        "is_causal": 1,
        "left_window_size": case.window - 1,
        "right_window_size": 0,
        "scale": case.scale,
    }
    node = _node("Attention", ["query", "key", "value"], attributes=attributes)
    return _run_model(problem, [node], _operands(problem), {"": 25})


def torch_sdpa(problem: Problem) -> Run:
    """scaled_dot_product_attention with the band as a boolean mask."""
    problem.case.refuse_if_dense_is_too_much(stores_scores=False)
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = _torch_operands(problem)
    mask = torch.from_numpy(problem.case.mask())
    grouped = problem.case.group > 1
    return lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def torch_chunked(problem: Problem) -> Run:
    """What one writes by hand: blocks of queries, each with SDPA over the slice of keys that it can see."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    case = problem.case
    query, key, value = _torch_operands(problem)
    grouped, offset = case.group > 1, case.keys - case.queries
    blocks = []
    for first in range(0, case.queries, CHUNK_ROWS):
        stop = min(first + CHUNK_ROWS, case.queries)
        low = max(0, first + offset - case.window + 1)
        distance = torch.arange(low, stop + offset)[None, :] - torch.arange(first + offset, stop + offset)[:, None]
        blocks.append((first, stop, low, stop + offset, (distance <= 0) & (distance > -case.window)))

    def run() -> Any:
        output = torch.empty_like(query)
        for first, stop, low, high, mask in blocks:
            output[:, :, first:stop] = scaled_dot_product_attention(
                query[:, :, first:stop],
                key[:, :, low:high],
                value[:, :, low:high],
                attn_mask=None if case.queries == 1 else mask,
                enable_gqa=grouped,
            )
        return output

    return run


def torch_flex(problem: Problem) -> Run:
    """Compiled flex_attention with a block mask. Needs a C++ compiler; compiles for a minute the first time."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = problem.case
    query, key, value = _torch_operands(problem)
    offset, window, grouped = case.keys - case.queries, case.window, case.group > 1

    def visible(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx + offset) & (kv_idx > q_idx + offset - window)

    blocks = create_block_mask(visible, None, None, case.queries, case.keys, device="cpu")
    compiled: Any = torch.compile(flex_attention)

    def run() -> Any:
        with torch.no_grad():
            return compiled(query, key, value, block_mask=blocks, enable_gqa=grouped)

    return run


OURS = Contender(name="swacompile", prepare=ours)
PEERS = (
    Contender(name="torch SDPA + mask", prepare=torch_sdpa),
    Contender(name="torch chunked", prepare=torch_chunked),
    Contender(name="flex_attention", prepare=torch_flex),
    Contender(name="ORT dense", prepare=ort_dense),
    Contender(name="ORT GQA", prepare=ort_gqa),
    Contender(name="ORT Attention-25", prepare=ort_attention),
)


def matrix_products(size: int, threads: int) -> tuple[Run, ...]:
    """Square float32 products in ONNX Runtime and in torch: the yardsticks."""
    import torch

    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    nodes = [_node("MatMul", ["a", "b"])]
    ort_product = _session_run(nodes, {"a": a, "b": a}, {"": 18}, threads=threads)
    left, out = torch.from_numpy(a), torch.empty(size, size)
    return ort_product, lambda: torch.mm(left, left, out=out)


def _operands(problem: Problem) -> dict[str, Floats]:
    return {"query": problem.query, "key": problem.key, "value": problem.value}


def _torch_operands(problem: Problem) -> tuple[Any, ...]:
    import torch

    torch.set_num_threads(problem.threads)
    return tuple(torch.from_numpy(array) for array in _operands(problem).values())


def _node(
    kind: str, inputs: list[str], domain: str = "", attributes: dict[str, Any] | None = None, output: str = "output"
) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, [output], domain=domain, **(attributes or {}))


def _run_model(
    problem: Problem,
    nodes: list[Any],
    feeds: dict[str, Any],
    opsets: dict[str, int],
    *,
    library: Path | None = None,
    shape: tuple[int, ...] | None = None,
) -> Run:
    run = _session_run(nodes, feeds, opsets, threads=problem.threads, library=library)
    return run if shape is None else _reordered(run, lambda out: out.reshape(shape))


def _reordered(run: Run, view: Callable[[Any], Any]) -> Run:
    return lambda: view(run())


def _session_run(
    nodes: list[Any], feeds: dict[str, Any], opsets: dict[str, int], *, threads: int, library: Path | None = None
) -> Run:
    """A call of a model of these nodes, on threads that do not spin between calls and so leave the machine to the next contender."""
    import onnxruntime as ort
    from onnx import helper

    def info(name: str, value: Any) -> Any:
        array = np.asarray(value)
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        nodes,
        "contender",
        [info(name, value) for name, value in feeds.items()],
        [helper.make_tensor_value_info("output", 1, None)],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ONNX_IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    return lambda: session.run(["output"], arrays)[0]
