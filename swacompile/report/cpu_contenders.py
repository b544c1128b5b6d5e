"""What the CPU benchmark times: our kernel in ONNX Runtime, and other ways to compute the same band. All get operands in BHSD order.

ONNX Runtime's contenders and the hand-chunked loop write into one output, made before; torch's own operators make theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swacompile.kernels.cpu_call import element_type
from swacompile.report.cpu_cases import Case

Floats = npt.NDArray[np.floating[Any]]
Run = Callable[[], Any]
"""One call; gives the output, as an array or something that numpy takes for one."""

ONNX_IR_VERSION = 10
CHUNK_ROWS = 256
MOST_SCORE_BYTES = 2.5e9
MOST_DENSE_FLOPS = 6e11


class UnavailableError(Exception):
    """The contender cannot do this case here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A case with its operands: query (1,H,S,D), key (1,K,T,D), value (1,K,T,V), sinks (H,) or None."""

    case: Case
    threads: int
    library: Path
    """ONNX Runtime library with our kernel for the case's head size."""
    query: Floats
    key: Floats
    value: Floats
    sinks: Floats | None

    @classmethod
    def draw(cls, case: Case, *, threads: int, library: Path, seed: int = 0) -> "Problem":
        draw = np.random.default_rng(seed)

        def tensor(*shape: int) -> Floats:
            return draw.standard_normal(shape, dtype=np.float32).astype(element_type(case.dtype), copy=False)

        return cls(
            case=case,
            threads=threads,
            library=library,
            query=tensor(1, case.heads, case.queries, case.head_size),
            key=tensor(1, case.kv_heads, case.keys, case.head_size),
            value=tensor(1, case.kv_heads, case.keys, case.columns),
            sinks=tensor(case.heads) if case.sinks else None,
        )

    @property
    def operands(self) -> dict[str, Floats]:
        return {"query": self.query, "key": self.key, "value": self.value}

    def refuse_if_dense_is_too_much(self, *, stores_scores: bool) -> None:
        """For contenders that compute every pair, or keep every pair's score. Raises UnavailableError."""
        case = self.case
        pairs = case.heads * case.queries * case.keys
        if stores_scores and case.dtype.bytes * pairs > MOST_SCORE_BYTES:
            raise UnavailableError(f"left out: {case.dtype.bytes * pairs / 1e9:.0f} GB of scores")
        flops = 2 * (case.head_size + case.columns) * pairs
        if flops > MOST_DENSE_FLOPS:
            raise UnavailableError(f"left out: {flops / 1e12:.1f} TFLOP of dense work")

    def refuse(self, **unknown: bool) -> None:
        """For contenders that lack something that the case has. Raises UnavailableError."""
        for name, needed in unknown.items():
            if needed:
                raise UnavailableError(f"has no {name.replace('_', ' ')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """`prepare` may raise UnavailableError, or anything that a missing package or operator raises. `makes_output`: anew in each call."""

    name: str
    prepare: Callable[[Problem], Run] = field(repr=False)
    makes_output: bool = False


def ours(problem: Problem) -> Run:
    """swacompile::BandedAttention through the ONNX Runtime library."""
    case = problem.case
    attributes = {
        "layout": "BHSD",
        "scale": case.scale,
        "softcap": case.softcap,
        "left_window_size": case.left,
        "right_window_size": case.right,
        "alignment": "bottom_right",
        "chunk_size": 0,
        "kind": "hidden",
    }
    feeds: dict[str, Any] = dict(problem.operands)
    inputs = ["query", "key", "value", *_present("key_padding", case.padded), "", *_present("sinks", case.sinks)]
    if case.padded:
        feeds["key_padding"] = np.ones((1, case.keys), np.bool_)
    if problem.sinks is not None:
        feeds["sinks"] = problem.sinks
    node = _node("BandedAttention", inputs, "swacompile", attributes)
    return _run_model(problem, [node], feeds, {"": 18, "swacompile": 1}, library=problem.library)


def _present(name: str, is_there: bool) -> list[str]:
    return [name if is_there else ""]


def ort_dense(problem: Problem) -> Run:
    """MatMul, mask added, Softmax, MatMul, as exporters write attention; heads of a group broadcast, sinks are a column more."""
    problem.refuse_if_dense_is_too_much(stores_scores=True)
    case, element = problem.case, problem.query.dtype
    grouped = (1, case.kv_heads, case.group, case.queries)
    feeds = {
        "query": problem.query.reshape(*grouped, case.head_size),
        "key": np.ascontiguousarray(problem.key[:, :, None].swapaxes(-1, -2)),
        "value": problem.value[:, :, None],
        "mask": np.where(case.mask(), 0, np.finfo(element).min).astype(element),
        "scale": np.array(case.scale, element),
    }
    nodes = [
        _node("MatMul", ["query", "key"], output="products"),
        _node("Mul", ["products", "scale"], output="scaled"),
        *_softcap_nodes(case, feeds),
        _node("Add", ["capped" if case.softcap else "scaled", "mask"], output="masked"),
        *_softmax_nodes(problem, grouped, feeds),
        _node("MatMul", ["weights", "value"]),
    ]
    return _run_model(problem, nodes, feeds, {"": 18}, shape=(*grouped, case.columns))


def _softcap_nodes(case: Case, feeds: dict[str, Any]) -> list[Any]:
    if not case.softcap:
        return []
    feeds["cap"] = np.array(case.softcap, feeds["scale"].dtype)
    feeds["scale"] = feeds["scale"] / feeds["cap"]
    return [_node("Tanh", ["scaled"], output="bounded"), _node("Mul", ["bounded", "cap"], output="capped")]


def _softmax_nodes(problem: Problem, grouped: tuple[int, ...], feeds: dict[str, Any]) -> list[Any]:
    if problem.sinks is None:
        return [_node("Softmax", ["masked"], attributes={"axis": -1}, output="weights")]
    case = problem.case
    column = problem.sinks.reshape(1, case.kv_heads, case.group, 1, 1)
    feeds["sinks"] = np.ascontiguousarray(np.broadcast_to(column, (*grouped, 1)))
    feeds |= {name: np.array([value], np.int64) for name, value in (("start", 0), ("stop", case.keys), ("axis", -1))}
    return [
        _node("Concat", ["masked", "sinks"], attributes={"axis": -1}, output="joined"),
        _node("Softmax", ["joined"], attributes={"axis": -1}, output="all_weights"),
        _node("Slice", ["all_weights", "start", "stop", "axis"], output="weights"),
    ]


def ort_gqa(problem: Problem) -> Run:
    """com.microsoft.GroupQueryAttention with local_window_size; one head's queries follow another's in memory (BSHD)."""
    case = problem.case
    problem.refuse(keys_after_the_query=case.right > 0, value_size_of_its_own=case.columns != case.head_size)
    if case.queries != case.keys:
        raise UnavailableError("its cache appends keys, which would be timed too")
    problem.refuse_if_dense_is_too_much(stores_scores=True)
    feeds: dict[str, Any] = {
        name: np.ascontiguousarray(array.swapaxes(1, 2)).reshape(1, array.shape[2], -1)
        for name, array in problem.operands.items()
    }
    feeds["seqlens"] = np.array([case.keys - 1], dtype=np.int32)
    feeds["total"] = np.array([case.keys], dtype=np.int32)
    attributes = {
        "num_heads": case.heads,
        "kv_num_heads": case.kv_heads,
        "local_window_size": case.window,
        "scale": case.scale,
        "softcap": case.softcap,
    }
    inputs = ["query", "key", "value", "", "", "seqlens", "total"]
    if problem.sinks is not None:
        feeds["sinks"] = problem.sinks
        inputs += ["", "", "", "", "sinks"]
    node = _node("GroupQueryAttention", inputs, "com.microsoft", attributes)
    node.output.extend(["present_key", "present_value"])
    run = _run_model(
        problem, [node], feeds, {"": 18, "com.microsoft": 1}, shape=(1, case.keys, case.heads * case.head_size)
    )
    return _viewed(run, lambda out: out.reshape(1, case.keys, case.heads, case.head_size).swapaxes(1, 2))


def ort_attention(problem: Problem) -> Run:
    """ONNX Attention, opset 25, with its window."""
    case = problem.case
    problem.refuse(sinks=case.sinks)
    problem.refuse_if_dense_is_too_much(stores_scores=True)
    attributes = {
        "is_causal": int(case.right == 0),
        "left_window_size": case.left,
        "right_window_size": case.right,
        "scale": case.scale,
        "softcap": case.softcap,
    }
    # The number of valid keys: with it, the last query stands at the last key.
    counts = {} if case.queries == case.keys else {"counts": np.asarray([case.keys])}
    node = _node(
        "Attention", ["query", "key", "value", *(["", "", "", *counts] if counts else [])], attributes=attributes
    )
    return _run_model(problem, [node], problem.operands | counts, {"": 25})


def torch_sdpa(problem: Problem) -> Run:
    """scaled_dot_product_attention with the band as a boolean mask."""
    case = problem.case
    problem.refuse(sinks=case.sinks, softcap=case.softcap != 0)
    problem.refuse_if_dense_is_too_much(stores_scores=False)
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = _torch_operands(problem)
    mask = torch.from_numpy(case.mask())
    grouped = case.group > 1
    return lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def torch_chunked(problem: Problem) -> Run:
    """What one writes by hand: blocks of queries, each with SDPA over the slice of keys that it can see."""
    case = problem.case
    problem.refuse(sinks=case.sinks, softcap=case.softcap != 0)
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = _torch_operands(problem)
    output = torch.from_numpy(_output(problem))
    blocks = []
    for first in range(0, case.queries, CHUNK_ROWS):
        stop = min(first + CHUNK_ROWS, case.queries)
        low, high = case.seen(first, stop - first)
        mask = torch.from_numpy(case.band(first, stop, low, high))
        blocks.append((first, stop, low, high, None if case.queries == 1 else mask))

    def run() -> Any:
        for first, stop, low, high, mask in blocks:
            output[:, :, first:stop] = scaled_dot_product_attention(
                query[:, :, first:stop],
                key[:, :, low:high],
                value[:, :, low:high],
                attn_mask=mask,
                enable_gqa=case.group > 1,
            )
        return output

    return run


def torch_flex(problem: Problem) -> Run:
    """Compiled flex_attention with a block mask. Needs a C++ compiler; here, outside all measurements, it compiles for half a minute."""
    case = problem.case
    problem.refuse(sinks=case.sinks)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = _torch_operands(problem)
    offset, left, right, cap = case.offset, case.left, case.right, case.softcap

    def visible(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx + offset + right) & (kv_idx >= q_idx + offset - left)

    def capped(score: Any, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * torch.tanh(score / cap)

    blocks = create_block_mask(visible, None, None, case.queries, case.keys, device="cpu")
    torch._dynamo.reset()  # else the eighth case would not be compiled: torch gives up on a function with so many versions
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return compiled(
                query, key, value, score_mod=capped if cap else None, block_mask=blocks, enable_gqa=case.group > 1
            )

    run()
    return run


OURS = Contender(name="swacompile", prepare=ours)
PEERS = (
    Contender(name="torch SDPA + mask", prepare=torch_sdpa, makes_output=True),
    Contender(name="torch chunked", prepare=torch_chunked),
    Contender(name="flex_attention", prepare=torch_flex, makes_output=True),
    Contender(name="ORT dense", prepare=ort_dense),
    Contender(name="ORT GQA", prepare=ort_gqa),
    Contender(name="ORT Attention-25", prepare=ort_attention),
)


def matrix_products(size: int, threads: int) -> dict[str, Run]:
    """Square float32 products in ONNX Runtime and, where it is installed, in torch: the yardsticks of arithmetic."""
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    out = np.zeros_like(a)
    runs = {"ORT MatMul": _session_run([_node("MatMul", ["a", "b"])], {"a": a, "b": a}, {"": 18}, out, threads=threads)}
    torch = _torch(threads)
    if torch is not None:
        left, result = torch.from_numpy(a), torch.from_numpy(out)
        runs["torch mm"] = lambda: torch.mm(left, left, out=result)
    return runs


def memory_reads(size: int, threads: int) -> dict[str, Run]:
    """Ways to read `size` bytes of float32 once: the yardsticks of memory."""
    rows = np.ones((max(size // 4096, 1), 1024), np.float32)
    vector, result = np.ones(1024, np.float32), np.ones(len(rows), np.float32)
    runs: dict[str, Run] = {"numpy max": rows.max}
    torch = _torch(threads)
    if torch is not None:
        matrix, column, out = (torch.from_numpy(array) for array in (rows, vector, result))
        runs |= {
            "torch mv": lambda: torch.mv(matrix, column, out=out),
            "torch sum": matrix.sum,
            "torch max": matrix.max,
        }
    return runs


def _torch(threads: int) -> Any:
    """torch with this many threads, None where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    torch.set_num_threads(threads)
    return torch


def _torch_operands(problem: Problem) -> tuple[Any, ...]:
    import torch

    torch.set_num_threads(problem.threads)
    return tuple(torch.from_numpy(array) for array in problem.operands.values())


def _output(problem: Problem) -> Floats:
    """Room for the output, of NaN: its pages exist, and what is not written shows."""
    case = problem.case
    return np.full((1, case.heads, case.queries, case.columns), np.nan, problem.query.dtype)


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
    """`shape`: of the model's output, where it is not the problem's."""
    output = _output(problem)
    target = output if shape is None else output.reshape(shape)
    run = _session_run(nodes, feeds, opsets, target, threads=problem.threads, library=library)
    return _viewed(run, lambda out: out if out.ndim == 3 else out.reshape(output.shape))


def _viewed(run: Run, view: Callable[[Any], Any]) -> Run:
    return lambda: view(run())


def _session_run(
    nodes: list[Any],
    feeds: dict[str, Any],
    opsets: dict[str, int],
    output: Floats,
    *,
    threads: int,
    library: Path | None = None,
) -> Run:
    """A call of a model of these nodes, bound to its operands, on threads that do not spin between calls and so leave the machine to the next contender."""
    import onnxruntime as ort
    from onnx import helper

    def info(name: str, value: Any) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)

    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "contender",
        [info(name, value) for name, value in arrays.items()],
        [helper.make_tensor_value_info("output", helper.np_dtype_to_tensor_dtype(output.dtype), None)],
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
    binding = session.io_binding()
    for name, value in arrays.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("output", "cpu", 0, output.dtype, output.shape, output.ctypes.data)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return output

    return run
