"""Checks CUDA kernels on a GPU against a float64 reference. Runs without TVM's compiler: `python cuda_device.py
LIBRARY.so... [--runtime FOLDER]`.

Inputs are fresh, everything around them and the outputs is poisoned with NaN, and a window that is off by one must be
told from the right one. All cases run twice: on the GPU as it is, where each block takes a tile or two, and as if it
had few multiprocessors and no cache, where each takes many tiles in several waves.
"""

import argparse
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swacompile.runtime.cuda.launch import UNBOUNDED, Extras, Launcher, Numbers
from swacompile.runtime.cuda.library import CudaLibrary, Device, Kernel
from swacompile.schedules.cuda.spec import DTYPES, Features

# ||out - ref|| / ||ref||: half a unit in the last place of the output and as much of the weights.
TOLERANCE = {"bf16": 4e-3, "f16": 6e-4, "tf32": 1e-3, "f32": 1e-5}
LSE_TOLERANCE = 2e-3
FAR = 1 << 28


class CrowdedLibrary(CudaLibrary):
    """As if the GPU were small."""

    def check_device(self, index: int) -> Device:
        return replace(super().check_device(index), multiprocessors=5, l2_bytes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int
    keys: int
    numbers: Numbers
    layout: str = "BSHD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    kernel: str
    case: Case
    error: float
    lse_error: float
    off_by_one: float
    """Distance to the reference of a window one wider on the left, or infinity where that shows the same."""
    problem: str = ""


def poisoned(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (B,H,S,D) view into a larger tensor of NaN, and that tensor."""
    b, h, s, d = shape
    if layout == "BSHD":
        whole = torch.full((b, s + 3, h + 1, d + 8), float("nan"), dtype=dtype, device="cuda")
        return whole[:, :s, :h, :d].transpose(1, 2), whole
    whole = torch.full((b, h + 1, s + 3, d + 8), float("nan"), dtype=dtype, device="cuda")
    return whole[:, :h, :s, :d], whole


def tolerance(kernel: Kernel) -> float:
    return TOLERANCE["tf32" if kernel.spec.tf32 else DTYPES[kernel.spec.dtype]]


def draw_extras(kernel: Kernel, case: Case) -> Extras:
    features, dtype = kernel.spec.features, getattr(torch, kernel.spec.dtype)
    b, h = case.batch, case.kv_heads * case.group
    segments = torch.arange(case.keys, device="cuda")[None].expand(b, -1) // max(case.keys // 3, 1)
    return Extras(
        lse=torch.full((b, h, case.queries), float("nan"), device="cuda") if features.lse else None,
        key_padding=(torch.rand(b, case.keys, device="cuda") < 0.8).to(torch.uint8) if features.key_padding else None,
        segments=segments.contiguous() if features.segments else None,
        sinks=torch.randn(h, device="cuda").to(dtype) if features.sinks else None,
        bias=torch.randn(1, h, case.queries, case.keys, device="cuda").to(dtype).expand(b, -1, -1, -1)
        if features.bias
        else None,
        alibi_slopes=torch.rand(h, device="cuda") * 0.02 if features.alibi else None,
    )


def visible_keys(features: Features, case: Case, extras: Extras) -> tuple[torch.Tensor, torch.Tensor]:
    """(band, rest): both bool, broadcastable to (B,1,S,T). A key counts if rest holds; its score counts if band holds
    too.
    """
    n = case.numbers
    p = torch.arange(case.queries, device="cuda")[:, None] + n.offset
    k = torch.arange(case.keys, device="cuda")[None]
    band = (k - p >= -n.left) & (k - p <= n.right)
    if features.chunked:
        band = band & (
            torch.div(p, n.chunk_size, rounding_mode="floor") == torch.div(k, n.chunk_size, rounding_mode="floor")
        )
    band, rest = band[None, None], torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    if extras.segments is not None:
        position = torch.arange(case.queries, device="cuda") + n.offset
        inside = position.clamp(0, case.keys - 1)
        same = extras.segments[:, inside][:, None, :, None] == extras.segments[:, None, None, :]
        band = band & same & (inside == position)[:, None]  # A query whose position is no key has no segment.
    if extras.key_padding is not None:
        rest = extras.key_padding.bool()[:, None, None, :]
    return band, rest


def reference(
    kernel: Kernel, case: Case, tensors: tuple[torch.Tensor, ...], extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B,H,S,V) and log-sum-exp (B,H,S) in float64, dense."""
    features, n = kernel.spec.features, case.numbers
    q, k, v = (t.double() for t in tensors)
    k, v = k.repeat_interleave(case.group, 1), v.repeat_interleave(case.group, 1)
    scores = q @ k.transpose(-1, -2) * n.scale
    if features.softcap:
        scores = n.softcap * torch.tanh(scores / n.softcap)
    if extras.alibi_slopes is not None:
        position = torch.arange(case.queries, device="cuda")[:, None] + n.offset
        distance = torch.arange(case.keys, device="cuda")[None] - position
        scores = scores + extras.alibi_slopes.double()[None, :, None, None] * distance
    if extras.bias is not None:
        scores = scores + extras.bias.double()
    band, rest = visible_keys(features, case, extras)
    scores = torch.where(band, scores, 0.0 if features.zeroed else float("-inf"))
    scores = torch.where(rest, scores, float("-inf"))
    padded = scores
    if extras.sinks is not None:
        sink = extras.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        padded = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(padded, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return weights @ v, lse


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def check(launcher: Launcher, kernel: Kernel, case: Case) -> Outcome:
    dtype, spec = getattr(torch, kernel.spec.dtype), kernel.spec
    b, h, kv = case.batch, case.kv_heads * case.group, case.kv_heads
    shapes = [
        (b, h, case.queries, spec.head_size),
        (b, kv, case.keys, spec.head_size),
        (b, kv, case.keys, spec.value_size),
    ]
    tensors = []
    for shape in shapes:
        view, _ = poisoned(shape, dtype, case.layout)
        tensors.append(view.copy_(torch.randn(shape, device="cuda")))
    output, whole = poisoned((b, h, case.queries, spec.value_size), dtype, case.layout)
    extras = draw_extras(kernel, case)
    query, key, value = tensors
    launcher(kernel, (query, key, value, output), case.numbers, extras)
    torch.cuda.synchronize()
    first = output.clone()
    problem = (
        ""
        if int(whole.isnan().sum()) == whole.numel() - output.numel()
        else "wrote outside the output, or left some of it, or NaN"
    )
    launcher(kernel, (query, key, value, output), case.numbers, extras)
    torch.cuda.synchronize()
    if not torch.equal(first, output):
        problem = problem or "two runs differ"
    expected, expected_lse = reference(kernel, case, tuple(tensors), extras)
    error = relative(output, expected)
    lse_error = 0.0
    if extras.lse is not None:
        seen = expected_lse.isfinite()
        lse_error = float((extras.lse.double() - expected_lse)[seen].abs().max()) if bool(seen.any()) else 0.0
        if not bool((extras.lse[~seen] == float("-inf")).all()):
            problem = problem or "log-sum-exp of an empty row is not -inf"
    if not error <= tolerance(kernel):
        problem = problem or "output is off"
    if not lse_error <= LSE_TOLERANCE:
        problem = problem or "log-sum-exp is off"
    wider = replace(case, numbers=replace(case.numbers, left=min(case.numbers.left, FAR) + 1))
    other = reference(kernel, wider, tuple(tensors), extras)[0]
    off_by_one = float("inf") if torch.equal(other, expected) else relative(output, other)
    if off_by_one < 2 * tolerance(kernel):
        problem = problem or "a window off by one would pass"
    return Outcome(
        kernel=spec.symbol, case=case, error=error, lse_error=lse_error, off_by_one=off_by_one, problem=problem
    )


def cases_for(kernel: Kernel) -> Iterator[Case]:
    """Windows around the tile's size and the length's ends, ragged lengths, both layouts, groups that a tile's
    packing does not divide.
    """
    features, tile = kernel.spec.features, kernel.config.keys_per_tile
    scale = kernel.spec.head_size**-0.5
    base = Numbers(scale=scale, softcap=3.0 if features.softcap else 0.0, chunk_size=96 if features.chunked else 0)
    length = 333
    if features.split:
        for queries, left in itertools.product((1, 3, 16), (0, tile, 400, UNBOUNDED)):
            numbers = replace(base, left=left, right=0, offset=777 - queries)
            yield Case(batch=2, kv_heads=2, group=5, queries=queries, keys=777, numbers=numbers)
        return
    for left in (0, 1, tile - 1, tile, tile + 1, length - 1, length, length + 1, UNBOUNDED):
        yield Case(kv_heads=2, group=2, queries=length, keys=length, numbers=replace(base, left=left, right=0))
    for left, right in ((7, 3), (130, 64), (UNBOUNDED, UNBOUNDED), (0, UNBOUNDED), (50, 0)):
        numbers = replace(base, left=left, right=right, offset=31 if features.chunked else 0)
        yield Case(batch=2, group=3, queries=200, keys=290, numbers=numbers, layout="BHSD")
    yield Case(batch=2, kv_heads=2, group=8, queries=65, keys=513, numbers=replace(base, left=127, right=0, offset=448))
    # Some rows see no key at all.
    yield Case(kv_heads=3, group=1, queries=129, keys=64, numbers=replace(base, left=16, right=0), layout="BHSD")
    yield Case(kv_heads=1, group=4, queries=700, keys=640, numbers=replace(base, left=100, right=20, offset=-60))
    # Many pairs of batch and head: many waves where the cache is small.
    yield Case(batch=3, kv_heads=3, group=2, queries=400, keys=400, numbers=replace(base, left=100, right=0))


def check_library(path: Path, runtime: Path | None = None) -> Iterator[Outcome]:
    libraries = [kind(path, runtime=runtime) for kind in (CudaLibrary, CrowdedLibrary)]
    for kernel in libraries[0].kernels:
        torch.manual_seed(zlib.crc32(kernel.spec.symbol.encode()))
        for library in libraries:
            launcher = Launcher(library)
            for case in cases_for(kernel):
                yield check(launcher, kernel, case)


def check_launch(launcher: Launcher, kernel: Kernel) -> list[str]:
    """What does not hold of: a captured graph replays, the caller's stream is used, a plan allocates nothing when
    called.
    """
    case = Case(kv_heads=2, group=2, queries=2048, keys=2048, numbers=Numbers(left=100, right=0, scale=0.1))
    spec, problems = kernel.spec, []
    dtype = getattr(torch, spec.dtype)
    cuda: Any = torch.cuda
    query, fresh = (torch.randn(1, 4, 2048, spec.head_size, device="cuda").to(dtype) for _ in range(2))
    key = torch.randn(1, 2, 2048, spec.head_size, device="cuda").to(dtype)
    value = torch.randn(1, 2, 2048, spec.value_size, device="cuda").to(dtype)
    output = torch.zeros(1, 4, 2048, spec.value_size, device="cuda", dtype=dtype)
    extras = draw_extras(kernel, case)
    plan = launcher.plan(kernel, (query, key, value, output), case.numbers, extras)
    plan()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    plan()
    if torch.cuda.memory_stats()["allocation.all.allocated"] != before:
        problems.append("calling a plan allocates device memory")
    stream = cuda.Stream()
    with torch.cuda.stream(stream):
        cuda._sleep(100_000_000)
        query.copy_(fresh)
        plan()
    torch.cuda.synchronize()
    expected = reference(kernel, case, (fresh, key, value), extras)[0]
    if not relative(output, expected) <= tolerance(kernel):
        problems.append("the launch did not wait for the caller's stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if not relative(output, expected) <= tolerance(kernel):
        problems.append("a replayed graph gives another output")
    return problems


def report(path: Path, outcomes: Sequence[Outcome]) -> None:
    for symbol, group in itertools.groupby(outcomes, key=lambda o: o.kernel):
        mine = list(group)
        bad = [o for o in mine if o.problem]
        worst = max(o.error for o in mine)
        closest = min(o.off_by_one for o in mine)
        lse = max(o.lse_error for o in mine)
        print(
            f"{path.stem} {symbol}: {len(mine)} cases, {len(bad)} bad, error {worst:.2e}, lse {lse:.1e}, "
            f"off by one {closest:.2e}"
        )
        for o in bad[:4]:
            print(f"  {o.problem}: {o.error:.3e} {o.lse_error:.2e} {o.case}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--runtime", type=Path)
    arguments = parser.parse_args()
    failed = False
    for path in arguments.libraries:
        outcomes = list(check_library(path, arguments.runtime))
        report(path, outcomes)
        library = CudaLibrary(path, runtime=arguments.runtime)
        problems = [(k.spec.symbol, p) for k in library.kernels[:2] for p in check_launch(Launcher(library), k)]
        print(f"{path.stem} launch:", problems or "graph, stream and allocation hold")
        failed = failed or bool(problems) or any(o.problem for o in outcomes)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
