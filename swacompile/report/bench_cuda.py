"""Times CUDA kernels beside their peers: SDPA with the dense mask, compiled flex_attention, cuDNN's band and, where it is
installed, FlashAttention 3's window.

Every peer does the same work on the same inputs in the same process, checked on sampled rows against float64. A time
is the median of launches with the L2 cache flushed before each (triton.testing.do_bench); all take turns for some
rounds, and the median of those is reported. The floor of a case is the greater of its products over the measured rate
of a large matrix product and its bytes, each read or written once, over the measured rate of a large copy.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from swacompile.target import Target
from swacompile.workload import DType, Feature, Workload

if TYPE_CHECKING:
    import torch

    from swacompile.runtime.cuda.launch import Launcher
    from swacompile.runtime.cuda.library import Kernel
    from swacompile.tuning.database import Database
    from swacompile.tuning.kernel_choice import CudaKernelChoice

ROW_TOLERANCE = 1e-2
MASK_BYTES_LIMIT = 40e9
EAGER_BLOCK_MASK_CELLS = 1 << 30
"""Above it flex_attention's block mask is compiled: without, its cells and their indices are held in memory; with, Triton
takes up to a minute for it, and for some lengths more than anyone waits.
"""
DECODING_QUERIES = 16
WARM_UP_MS = 50
REPEAT_MS = 200
ROUNDS = 5
OURS = "swacompile"
FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules that offer it: its own and that of a package with the forward pass alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One attention. `left` and `right` are inclusive; None is unbounded. Queries are the last of the keys."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    keys: int
    left: int | None
    right: int | None = 0
    queries: int | None = None
    sinks: bool = False

    @property
    def query_count(self) -> int:
        return self.keys if self.queries is None else self.queries

    @property
    def offset(self) -> int:
        return self.keys - self.query_count

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        total = 0
        for row in range(self.query_count):
            low, high = self.span(row)
            total += max(high - low + 1, 0)
        return total

    def span(self, row: int) -> tuple[int, int]:
        position = row + self.offset
        low = 0 if self.left is None else max(0, position - self.left)
        high = self.keys - 1 if self.right is None else min(self.keys - 1, position + self.right)
        return low, high

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.head_size * self.pairs

    @property
    def bytes(self) -> float:
        """Query and output once, and once each key and value that some query sees; 2 bytes an element."""
        first, last = self.span(0)[0], self.span(self.query_count - 1)[1]
        rows = 2 * self.heads * self.query_count + 2 * self.kv_heads * (last - first + 1)
        return 2.0 * self.batch * self.head_size * rows


CASES = (
    Case(name="mistral-16k-w4096", batch=1, heads=32, kv_heads=8, head_size=128, keys=16384, left=4095),
    Case(name="mistral-128k-w4096", batch=1, heads=32, kv_heads=8, head_size=128, keys=131072, left=4095),
    Case(name="gemma3-32k-w1024", batch=1, heads=16, kv_heads=8, head_size=256, keys=32768, left=1023),
    Case(name="gptoss-32k-w128", batch=1, heads=64, kv_heads=8, head_size=64, keys=32768, left=127),
    Case(name="gptoss-32k-w128-sinks", batch=1, heads=64, kv_heads=8, head_size=64, keys=32768, left=127, sinks=True),
    Case(name="modernbert-8x8k-pm64", batch=8, heads=12, kv_heads=12, head_size=64, keys=8192, left=64, right=64),
    Case(name="phi3-16k-w2047", batch=1, heads=32, kv_heads=32, head_size=96, keys=16384, left=2046),
    Case(name="d64-16k-w1024", batch=1, heads=32, kv_heads=8, head_size=64, keys=16384, left=1023),
    Case(name="dense-causal-16k", batch=1, heads=32, kv_heads=32, head_size=128, keys=16384, left=None),
    Case(name="decode-64x32k-w4096", batch=64, heads=32, kv_heads=8, head_size=128, keys=32768, left=4095, queries=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Measured on the device at hand: bfloat16 matrix products in FLOP/s, copies in bytes read and written a second."""

    product: float
    copy: float

    def floor_ms(self, case: Case) -> float:
        return 1e3 * max(case.flops / self.product, case.bytes / self.copy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    `error` is ||out - ref|| / ||ref|| on the sampled rows; `failure` says why there is no time. `ratio` is the median of
    the rounds' times over ours; `tuning` says where our kernel's tiles come from.
    """

    case: str
    peer: str
    milliseconds: float = math.nan
    ratio: float = math.nan
    tflops: float = math.nan
    floor_share: float = math.nan
    error: float = math.nan
    failure: str = ""
    tuning: str = ""


def workload_of(case: Case) -> Workload:
    band = None if case.left is None or case.right is None else case.left + case.right + 1
    named = {
        Feature.TWO_SIDED: case.right != 0,
        Feature.SINKS: case.sinks,
        Feature.DECODE: case.query_count <= DECODING_QUERIES,
    }
    return Workload.of(
        dtype=DType.BF16,
        head_size=case.head_size,
        value_size=case.head_size,
        group=case.heads // case.kv_heads,
        window=band,
        length=case.keys,
        features=frozenset(feature for feature, there in named.items() if there),
    )


def choice_of(case: Case, target: Target, database: "Database", *, device: str | None = None) -> "CudaKernelChoice":
    """The kernel that `case` gets on `target`, with tuned tiles where the database has some."""
    from swacompile.tuning.cuda_rule import default_kernel
    from swacompile.tuning.kernel_choice import choose_cuda_kernels

    workload = workload_of(case)
    kernel = default_kernel(workload, target)
    if kernel is None:
        raise ValueError(f"{target.name} has no kernel for {workload}")
    (choice,) = choose_cuda_kernels([kernel], [workload], target, database, device=device)
    return choice


def build_libraries(
    folder: Path, cases: Sequence[Case], target: Target, database: "Database", *, device: str | None = None
) -> dict[str, str]:
    """One kernel library a case, `<case>.so`; needs TVM and nvcc, no GPU. By case, where the tiles come from."""
    from swacompile.tuning.kernel_choice import build_cuda_choices

    origins = {}
    for case in cases:
        choice = choice_of(case, target, database, device=device)
        (built,) = build_cuda_choices([choice], target, folder / f"{case.name}.so")
        origins[case.name] = str(built.choice)
    return origins


def run(
    folder: Path,
    cases: Sequence[Case],
    ceilings: Ceilings,
    *,
    runtime: Path | None = None,
    contenders: Sequence[str] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Time `build_libraries`' kernels and their peers: those whose names hold one of `contenders`, or all.

    `runtime`: where TVM's two runtime libraries lie, None for TVM's own.
    """
    from swacompile.runtime.cuda.launch import Launcher
    from swacompile.runtime.cuda.library import CudaLibrary

    for case in cases:
        problem = Problem(case)
        library = CudaLibrary(folder / f"{case.name}.so", runtime=runtime)
        runs = {OURS: ours(problem, Launcher(library), library.kernels[0])}
        for name, peer in peers(problem):
            if contenders is None or any(part.lower() in name.lower() for part in contenders):
                runs[name] = peer
        tuning = (origins or {}).get(case.name, "")
        for row in compare(problem, runs, ceilings):
            yield replace(row, tuning=tuning) if row.peer == OURS else row


def compare(problem: "Problem", runs: Mapping[str, Callable[[], Any]], ceilings: Ceilings) -> Iterator[Row]:
    """Check each contender, then time those that are right in turns."""
    rows = {name: problem.checked(name, run) for name, run in runs.items()}
    right = [name for name, row in rows.items() if not row.failure]
    times: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(ROUNDS):
        for name in right:
            times[name].append(time_ms(runs[name]))
    for name, row in rows.items():
        if row.failure:
            yield row
            continue
        middle = median(times[name])
        ratios = [a / b for a, b in zip(times[name], times.get(OURS, ()), strict=False)]
        yield replace(
            row,
            milliseconds=middle,
            ratio=median(ratios) if ratios else math.nan,
            tflops=problem.case.flops / middle / 1e9,
            floor_share=ceilings.floor_ms(problem.case) / middle,
        )


def measure_ceilings() -> Ceilings:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = time_ms(lambda: a @ b)
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source))
    return Ceilings(product=2 * 8192**3 / product * 1e3, copy=2 * 4 * source.numel() / copy * 1e3)


def time_ms(run: Callable[[], Any]) -> float:
    testing: Any = importlib.import_module("triton.testing")
    return float(testing.do_bench(run, warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="median"))


class Problem:
    """Inputs of a case on the device, in (B,S,H,D) memory, and reference rows."""

    def __init__(self, case: Case) -> None:
        import torch

        self.case = case

        def draw(heads: int, length: int) -> "torch.Tensor":
            return torch.randn(
                case.batch, length, heads, case.head_size, device="cuda", dtype=torch.bfloat16
            ).transpose(1, 2)

        self.query, self.key, self.value = (
            draw(case.heads, case.query_count),
            draw(case.kv_heads, case.keys),
            draw(case.kv_heads, case.keys),
        )
        self.output = torch.full_like(self.query, float("nan"))
        self.sinks = torch.randn(case.heads, device="cuda", dtype=torch.bfloat16) if case.sinks else None
        count = case.query_count
        self.rows = sorted({0, 1, count // 3, count // 2 + 5 if count > 10 else 0, count - 1} & set(range(count)))
        self.expected = self._reference()

    @property
    def scale(self) -> float:
        return float(self.case.head_size**-0.5)

    def _reference(self) -> "torch.Tensor":
        import torch

        case, outputs = self.case, []
        group = case.heads // case.kv_heads
        for row in self.rows:
            low, high = case.span(row)
            key, value = (t[:, :, low : high + 1].double().repeat_interleave(group, 1) for t in (self.key, self.value))
            scores = torch.einsum("bhd,bhkd->bhk", self.query[:, :, row].double(), key) * self.scale
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.double()[None, :, None].expand(case.batch, -1, 1)], -1)
            weights = scores.softmax(-1)[..., : value.shape[2]]
            outputs.append(torch.einsum("bhk,bhkd->bhd", weights, value))
        return torch.stack(outputs, 2)

    def checked(self, peer: str, run: Callable[[], Any]) -> Row:
        """`run` returns the (B,H,S,D) output."""
        import torch

        try:
            output = run()
            torch.cuda.synchronize()
            got = output[:, :, self.rows].double()
            error = float((got - self.expected).norm() / self.expected.norm())
        except Exception as failure:  # A peer that refuses a case is a line of the table, whatever it raises.
            return Row(case=self.case.name, peer=peer, failure=f"{type(failure).__name__}: {failure}"[:200])
        return Row(case=self.case.name, peer=peer, error=error, failure="" if error < ROW_TOLERANCE else "wrong result")


def ours(problem: Problem, launcher: "Launcher", kernel: "Kernel") -> Callable[[], Any]:
    """A planned launch of `kernel`, into poisoned output."""
    from swacompile.runtime.cuda.launch import UNBOUNDED, Extras, Numbers

    case = problem.case
    numbers = Numbers(
        left=UNBOUNDED if case.left is None else case.left,
        right=UNBOUNDED if case.right is None else case.right,
        offset=case.offset,
        scale=problem.scale,
    )
    tensors = (problem.query, problem.key, problem.value, problem.output)
    problem.output.fill_(float("nan"))
    plan = launcher.plan(kernel, tensors, numbers, Extras(sinks=problem.sinks))

    def run() -> Any:
        plan()
        return problem.output

    return run


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The peers that can do this case; building one may itself raise, at the first call."""
    case = problem.case
    if case.sinks:
        return
    if case.query_count == 1 and case.left is not None:
        yield "sdpa on the slice", _deferred(lambda: _sdpa_slice(problem))
    elif case.query_count * case.keys <= MASK_BYTES_LIMIT / 40 and case.keys <= 16384:
        yield "sdpa with mask", _deferred(lambda: _sdpa_masked(problem))
    if case.left is None and case.right == 0:
        yield "sdpa flash backend", _deferred(lambda: _sdpa_flash(problem))
    if case.query_count > 1:
        yield "cudnn band", _deferred(lambda: _cudnn(problem))
    flash_3 = next((name for name in FLASH_3 if importlib.util.find_spec(name)), None)
    if flash_3 is not None:
        yield "flash_attention 3", _deferred(lambda: _flash_3(problem, flash_3))
    yield "flex_attention", _deferred(lambda: _flex(problem))


def _deferred(build: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    built: list[Callable[[], Any]] = []

    def run() -> Any:
        if not built:
            built.append(build())
        return built[0]()

    return run


def _contiguous(problem: Problem) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    return problem.query.contiguous(), problem.key.contiguous(), problem.value.contiguous()


def _flex(problem: Problem) -> Callable[[], Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = problem.case
    left, right, offset = case.left, case.right, case.offset

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        inside = k - q - offset <= (case.keys if right is None else right)
        return inside & (q + offset - k <= (case.keys if left is None else left))

    build = (
        create_block_mask
        if case.query_count * case.keys <= EAGER_BLOCK_MASK_CELLS
        else torch.compile(create_block_mask)
    )
    mask = build(visible, None, None, case.query_count, case.keys, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    query, key, value = _contiguous(problem)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def _sdpa_masked(problem: Problem) -> Callable[[], Any]:
    import torch

    case = problem.case
    q, k = (
        torch.arange(case.query_count, device="cuda")[:, None] + case.offset,
        torch.arange(case.keys, device="cuda")[None],
    )
    mask = (q - k <= (case.keys if case.left is None else case.left)) & (
        k - q <= (case.keys if case.right is None else case.right)
    )
    group = case.heads // case.kv_heads
    query, key, value = _contiguous(problem)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _sdpa_flash(problem: Problem) -> Callable[[], Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gqa = problem.case.heads != problem.case.kv_heads
    query, key, value = _contiguous(problem)

    def run() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)

    return run


def _flash_3(problem: Problem, module: str) -> Callable[[], Any]:
    """On (B,S,H,D) tensors, as it takes them."""
    attention = importlib.import_module(module).flash_attn_func
    case = problem.case
    query, key, value = (t.transpose(1, 2) for t in (problem.query, problem.key, problem.value))
    window = tuple(-1 if side is None else side for side in (case.left, case.right))

    def run() -> Any:
        output = attention(query, key, value, causal=case.right == 0, window_size=window)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return run


def _sdpa_slice(problem: Problem) -> Callable[[], Any]:
    import torch

    low, high = problem.case.span(0)
    gqa = problem.case.heads != problem.case.kv_heads
    query, key, value = _contiguous(problem)
    key, value = key[:, :, low : high + 1], value[:, :, low : high + 1]
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=gqa)


def _cudnn(problem: Problem) -> Callable[[], Any]:
    import torch

    cudnn: Any = importlib.import_module("cudnn")
    case = problem.case
    query, key, value = _contiguous(problem)
    handle = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
    float32 = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=float32, compute_data_type=float32, handle=handle
    )
    q, k, v = (graph.tensor_like(t) for t in (query, key, value))
    bounds = {}
    if case.left is not None:
        bounds["diagonal_band_left_bound"] = case.left + 1
    if case.right is not None:
        bounds["diagonal_band_right_bound"] = case.right
    o, _ = graph.sdpa(
        name="attention",
        q=q,
        k=k,
        v=v,
        generate_stats=False,
        attn_scale=problem.scale,
        diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT if case.offset else cudnn.diagonal_alignment.TOP_LEFT,
        **bounds,
    )
    output = torch.empty_like(query)
    o.set_output(True).set_dim(list(output.shape)).set_stride(list(output.stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def run() -> Any:
        graph.execute({q: query, k: key, v: value, o: output}, workspace, handle=handle)
        return output

    return run
