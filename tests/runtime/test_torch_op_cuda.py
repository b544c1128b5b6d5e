"""torch.ops.swacompile.banded_attention on CUDA tensors, on the GPU at hand.

Kernels are built where TVM is installed; else they come from the libraries that SWACOMPILE_TEST_CUDA_KERNELS lists,
with TVM's runtime beside them.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import swacompile.torch as swacompile_torch  # noqa: E402  after the check for torch
from swacompile.torch_backend import swacompile as backend  # noqa: E402
from tests.runtime.cases import CASES, PLAIN, TOLERANCE, Case, error_of  # noqa: E402
from tests.runtime.test_torch_op import DIFFERENTIABLE, NO_LEFT_EDGE, OPTIONAL, operator, options, tensors  # noqa: E402

pytestmark = pytest.mark.gpu

HALF = {case.name: case.but(dtype="float16") for case in CASES}
DECODE = PLAIN.but(name="decode", dtype="float16", queries=1, keys=3000, left=2000, alignment="bottom_right")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    for library in filter(None, os.environ.get("SWACOMPILE_TEST_CUDA_KERNELS", "").split(os.pathsep)):
        swacompile_torch.add_cuda_kernels(library, Path(library).parent)


def on_gpu(case: Case) -> dict[str, "torch.Tensor"]:
    return {name: tensor.cuda() for name, tensor in tensors(case).items()}


def call(case: Case, given: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    before = swacompile_torch.call_count()
    output = operator(*(given.get(name) for name in ("query", "key", "value", *OPTIONAL)), **options(case))
    assert swacompile_torch.call_count() == before + 1
    return output


def run(case: Case, given: dict[str, "torch.Tensor"] | None = None) -> np.ndarray:
    """The output in the case's layout."""
    output = call(case, given or on_gpu(case))
    return (output.transpose(1, 2) if case.layout == "BSHD" else output).cpu().numpy()


@pytest.mark.parametrize("case", HALF.values(), ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case) -> None:
    output = run(case)
    assert error_of(output, case) < TOLERANCE[case.dtype]
    if case.name not in NO_LEFT_EDGE:
        assert error_of(output, case.but(left=case.left + 1)) > 5 * TOLERANCE[case.dtype]


def test_few_queries_split_the_keys() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        output = run(DECODE)
    assert any("split" in event.key for event in profile.key_averages())
    assert error_of(output, DECODE) < TOLERANCE["float16"]
    assert error_of(output, DECODE.but(left=100)) > TOLERANCE["float16"]


def test_bfloat16() -> None:
    given = {name: tensor.bfloat16() for name, tensor in on_gpu(PLAIN).items()}
    output = call(PLAIN, given)
    assert output.dtype == torch.bfloat16
    assert np.abs(output.float().cpu().numpy() - PLAIN.expected).max() < 4e-2


def test_takes_any_strides() -> None:
    case = HALF["everything"]
    strided = {}
    for name, tensor in on_gpu(case).items():
        wide = torch.zeros([2 * extent + 1 for extent in tensor.shape], dtype=tensor.dtype, device="cuda")
        strided[name] = wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    assert error_of(run(case, strided), case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("case", "count"),
    [(PLAIN.but(name="many rows", dtype="float16", queries=500, keys=500, left=3), 1), (DECODE, 2)],
    ids=["many rows", "decode"],
)
def test_nothing_but_output_and_shares_is_allocated(case: Case, count: int) -> None:
    given = on_gpu(case)
    call(case, given)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call(case, given)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + count


def test_runs_on_the_current_stream() -> None:
    """The inputs are written on a stream that is busy first: a launch on another stream would read them too early."""
    case = HALF["two-sided"]
    given = on_gpu(case)
    late = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, tensor in late.items():
            tensor.copy_(given[name])
        output = call(case, late)
    stream.synchronize()
    assert error_of(output.cpu().numpy(), case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [HALF["two-sided"], HALF["zeroed"], DECODE], ids=lambda case: case.name)
def test_is_capturable(case: Case) -> None:
    given = on_gpu(case)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    call(case, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(case, given)
    for tensor in given.values():
        tensor.zero_()
    graph.replay()
    assert not output.any()
    for name, tensor in given.items():
        tensor.copy_(kept[name])
    graph.replay()
    assert error_of(output.cpu().numpy(), case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["causal", "everything", "BSHD"])
def test_opcheck(name: str) -> None:
    case = HALF[name]
    given = on_gpu(case)
    for differentiable in set(DIFFERENTIABLE) & set(given):
        given[differentiable].requires_grad_()
    operands = tuple(given.get(name) for name in ("query", "key", "value", *OPTIONAL))
    torch.library.opcheck(operator, operands, options(case))


@pytest.mark.parametrize("name", ["causal", "everything", "zeroed-operands"])
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    """tests/runtime/test_torch_op.py compares those with a float64 reference."""
    case = HALF[name]
    given = on_gpu(case)
    wanted = [name in given for name in DIFFERENTIABLE]
    for differentiable in set(DIFFERENTIABLE) & set(given):
        given[differentiable].requires_grad_()
    output = call(case, given)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape).to(output)
    found = torch.autograd.grad(output, [given[name] for name in DIFFERENTIABLE if name in given], weights)
    moved = {name: tensor.detach().cpu() for name, tensor in given.items()}
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in moved.items()}
    expected = torch.ops.swacompile.banded_attention_backward(
        weights.cpu().float(),
        *(exact.get(name) for name in ("query", "key", "value", *OPTIONAL)),
        **{option: value for option, value in options(case).items() if option != "bshd_output"},
        output_mask=wanted,
    )
    for gradient, there in zip(found, itertools.compress(expected, wanted), strict=True):
        assert gradient.device.type == "cuda"
        assert (gradient.cpu().float() - there).norm() / there.norm() < 2e-3


class Windowed(torch.nn.Module):
    """Attention over the last 5 keys, between two products."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.size = size
        self.inside, self.outside = torch.nn.Linear(64, 3 * 4 * size), torch.nn.Linear(4 * size, 64)

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        query, key, value = self.inside(x).unflatten(-1, (3, 4, self.size)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1], device=x.device)
        mask = (place <= place[:, None]) & (place > place[:, None] - 5)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.outside(output.transpose(1, 2).flatten(2))


def test_torch_compile_replaces_the_attention() -> None:
    torch.manual_seed(0)
    model = Windowed().cuda().half()
    x = torch.randn(2, 50, 64, device="cuda", dtype=torch.float16)
    expected = model(x)
    before = swacompile_torch.call_count()
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert swacompile_torch.call_count() > before
    assert (output - expected).abs().max() < 4e-3


def test_torch_compile_leaves_what_has_no_kernel() -> None:
    """The program must not fail where it worked before."""
    torch.manual_seed(0)
    model = Windowed(size=12).cuda().half()
    x = torch.randn(2, 40, 64, device="cuda", dtype=torch.float16)
    before = swacompile_torch.call_count()
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert swacompile_torch.call_count() == before
    assert (output - model(x)).abs().max() < 4e-3


def test_says_what_there_is_no_kernel_for() -> None:
    odd = torch.zeros(1, 1, 8, 12, device="cuda", dtype=torch.float16)
    missing = "no CUDA kernel for float16, head sizes D=12, V=12 on sm_.*: head_size must be a multiple of 8"
    with pytest.raises(RuntimeError, match=missing):
        operator(odd, odd, odd, scale=1.0)
    even = odd.new_zeros(1, 1, 8, 16)
    with pytest.raises(RuntimeError, match="scale: expected more than 0 on CUDA, found -1"):
        operator(even, even, even, scale=-1.0)
    with pytest.raises(RuntimeError, match="operand key: expected device cuda:0 as the query's, found cpu"):
        operator(even, even.cpu(), even, scale=1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_a_gpu_that_is_not_the_current_one() -> None:
    case = HALF["two-sided"]
    given = {name: tensor.to("cuda:1") for name, tensor in tensors(case).items()}
    with torch.cuda.device(0):
        output = call(case, given)
        assert torch.cuda.current_device() == 0
    assert error_of(output.cpu().numpy(), case) < TOLERANCE[case.dtype]
