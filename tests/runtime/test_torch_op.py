"""torch.ops.swacompile.banded_attention with a stand-in kernel: operands, strides, threads, gradients, messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import swacompile.torch as swacompile_torch  # noqa: E402  after the check for torch
from swacompile.errors import ArtifactError  # noqa: E402
from swacompile.kernels.build import KernelVariant  # noqa: E402
from swacompile.kernels.reference import countable, in_band  # noqa: E402
from swacompile.runtime.kernel_link import link_kernel_library  # noqa: E402
from swacompile.runtime.torch_op import library  # noqa: E402
from swacompile.target import host_targets  # noqa: E402
from tests.runtime.cases import BY_NAME, CASES, PLAIN, TOLERANCE, Case, error_of  # noqa: E402
from tests.runtime.conftest import SIZES, stand_in_object  # noqa: E402

pytestmark = pytest.mark.torch

GRADIENT_TOLERANCE = 2e-5
OPTIONAL = ("key_padding", "segments", "sinks", "bias", "alibi_slopes", "offset")
DIFFERENTIABLE = ("query", "key", "value", "sinks", "bias", "alibi_slopes")
# Cases whose left side hides no key, or none that a chunk does not hide too.
NO_LEFT_EDGE = (
    "unbounded-left", "unbounded", "window-beyond-length", "window-of-31-bits", "offset-before-keys", "offset-beyond-32-bits",
    "offset-far-back", "chunk", "chunk-offset",
)  # fmt: skip
operator = torch.ops.swacompile.banded_attention.default


@pytest.fixture(scope="module", autouse=True)
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Plain C kernels under the names of real ones."""
    folder = tmp_path_factory.mktemp("torch_op")
    target = host_targets()[0]
    variants = [
        KernelVariant(dtype=dtype, head_size=d, value_size=v) for dtype, sizes in SIZES.items() for d, v in sizes
    ]
    objects = [stand_in_object(variant, target, folder) for variant in variants]
    swacompile_torch.add_kernels(link_kernel_library(objects, variants, (target,), folder / "kernels.so"))


def tensors(case: Case) -> dict[str, "torch.Tensor"]:
    """The case's operands in logical order (batch, heads, length, size): a BSHD case becomes a view."""
    made = {name: torch.from_numpy(np.array(array)) for name, array in case.operands.items()}
    if case.layout == "BSHD":
        made |= {name: made[name].transpose(1, 2) for name in ("query", "key", "value")}
    return made


def options(case: Case) -> dict[str, object]:
    return {
        "scale": case.scale,
        "softcap": case.softcap,
        "left_window_size": case.left,
        "right_window_size": case.right,
        "bottom_right": case.alignment == "bottom_right",
        "chunk_size": case.chunk_size,
        "zeroed": case.kind == "zeroed",
        "bshd_output": case.layout == "BSHD",
    }


def run(case: Case, operands: dict[str, "torch.Tensor"] | None = None) -> np.ndarray:
    """The output in the case's layout; it must lie in memory in that order."""
    given = operands or tensors(case)
    before = swacompile_torch.call_count()
    output = operator(*(given.get(name) for name in ("query", "key", "value", *OPTIONAL)), **options(case))
    assert swacompile_torch.call_count() == before + 1
    output = output.transpose(1, 2) if case.layout == "BSHD" else output
    assert output.is_contiguous()
    return output.detach().numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case) -> None:
    output = run(case)
    assert error_of(output, case) < TOLERANCE[case.dtype]
    if case.name not in NO_LEFT_EDGE:
        assert error_of(output, case.but(left=case.left + 1)) > 10 * TOLERANCE[case.dtype]


def test_bfloat16() -> None:
    operands = {name: tensor.bfloat16() for name, tensor in tensors(PLAIN).items()}
    output = operator(operands["query"], operands["key"], operands["value"], **options(PLAIN))
    assert output.dtype == torch.bfloat16
    assert np.abs(output.float().numpy() - PLAIN.expected).max() < 4e-2


def test_takes_any_strides() -> None:
    case = BY_NAME["everything"]
    strided = {}
    for name, tensor in tensors(case).items():
        wide = torch.zeros([2 * extent + 1 for extent in tensor.shape], dtype=tensor.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        strided[name] = view.copy_(tensor)
    assert error_of(run(case, strided), case) < TOLERANCE[case.dtype]


def test_copies_no_operand_that_has_rows() -> None:
    """With rows in one piece nothing but the output is allocated."""
    case = BY_NAME["BSHD"]
    given = tensors(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(case, given)
    copies = ("aten::empty", "aten::empty_strided", "aten::contiguous", "aten::clone", "aten::copy_")
    assert [event.name for event in profile.events() if event.name in copies] == ["aten::empty_strided"]


def test_empty_tensors_need_no_kernel() -> None:
    no_keys = operator(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 0, 16), torch.ones(1, 2, 0, 16), scale=1.0)
    assert no_keys.shape == (1, 2, 3, 16) and not no_keys.any()
    no_batch = operator(torch.ones(0, 2, 3, 16), torch.ones(0, 2, 5, 16), torch.ones(0, 2, 5, 16), scale=1.0)
    assert no_batch.shape == (0, 2, 3, 16)


@pytest.mark.parametrize("name", ["causal", "everything", "BSHD"])
def test_opcheck(name: str) -> None:
    case = BY_NAME[name]
    given = tensors(case)
    for differentiable in set(DIFFERENTIABLE) & set(given):
        given[differentiable].requires_grad_()
    torch.library.opcheck(
        operator, tuple(given.get(name) for name in ("query", "key", "value", *OPTIONAL)), options(case)
    )


def dense(case: Case, given: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """The operator in float64 torch operations, for its gradient. Masks come from the numpy reference."""
    heads = case.heads // case.kv_heads
    key, value = (given[name].repeat_interleave(heads, 1) for name in ("key", "value"))
    call = case.call
    scores = given["query"] @ key.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if "alibi_slopes" in given:
        distance = torch.from_numpy(call.keys[None, :] - call.positions[:, None]).double()
        scores = scores + given["alibi_slopes"][None, :, None, None] * distance
    if "bias" in given:
        scores = scores + given["bias"]
    if call.zeroed:
        scores = scores * torch.from_numpy(in_band(call))
    scores = scores.masked_fill(~torch.from_numpy(countable(call)), -torch.inf)
    if "sinks" in given:
        sinks = given["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights[..., : key.shape[2]] @ value


def gradients(case: Case, function: object, dtype: "torch.dtype") -> dict[str, np.ndarray]:
    """Gradients of a fixed weighted sum of the outputs."""
    given = tensors(case)
    for name in set(DIFFERENTIABLE) & set(given):
        kept = torch.float32 if name == "alibi_slopes" and dtype != torch.float64 else dtype
        given[name] = given[name].to(kept).detach().requires_grad_()
    output = function(case, given)  # type: ignore[operator]
    factor = torch.from_numpy(np.random.default_rng(1).standard_normal(output.shape)).to(output.dtype)
    (output * factor).sum().backward()
    return {name: tensor.grad.double().numpy() for name, tensor in given.items() if tensor.grad is not None}


def banded(case: Case, given: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    return operator(*(given.get(name) for name in ("query", "key", "value", *OPTIONAL)), **options(case))


GRADIENT_CASES = (
    "causal",
    "two-sided",
    "one-key-head",
    "unbounded",
    "offset-before-keys",
    "value-size",
    "softcap",
    "sinks",
    "key-padding",
    "segments-offset",
    "chunk-offset",
    "bias-full",
    "bias-shared",
    "bias-per-head",
    "alibi",
    "zeroed",
    "zeroed-operands",
    "everything",
    "BSHD",
)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swacompile.runtime.torch_op.backward.BLOCK_ROWS", (8, 8))  # several blocks, the last one short
    case = BY_NAME[name]
    found, expected = gradients(case, banded, torch.float32), gradients(case, dense, torch.float64)
    assert found.keys() == expected.keys() == set(DIFFERENTIABLE) & set(case.operands)
    for operand, gradient in expected.items():
        assert np.abs(found[operand] - gradient).max() < GRADIENT_TOLERANCE * max(1.0, np.abs(gradient).max()), operand
    if case.name not in NO_LEFT_EDGE:
        wrong = gradients(case.but(left=case.left + 1), dense, torch.float64)
        assert np.abs(found["query"] - wrong["query"]).max() > 1e-2


def test_gradient_needs_no_square_of_the_length() -> None:
    length, window, size = 4096, 64, 16

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, tuple | list) else (result,)
            sizes = [part.untyped_storage().size() // 4 for part in made if isinstance(part, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    operands = [torch.randn(1, 1, length, size) for _ in range(4)]
    with Largest() as largest:
        torch.ops.swacompile.banded_attention_backward(
            *operands,
            None,
            None,
            None,
            None,
            None,
            None,
            scale=0.25,
            softcap=0.0,
            left_window_size=window,
            right_window_size=0,
            bottom_right=False,
            chunk_size=0,
            zeroed=False,
            output_mask=[True, True, True, False, False, False],
        )
    assert largest.elements < length * length // 8


def test_second_derivative_is_refused() -> None:
    query = torch.randn(1, 2, 5, 16, requires_grad=True)
    output = operator(query, query, query, scale=1.0, left_window_size=2, right_window_size=0)
    (first,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="banded_attention_backward"):
        first.sum().backward()


def test_result_does_not_depend_on_threads_and_starts_none() -> None:
    case = PLAIN.but(queries=700, keys=700, left=100)
    threads = torch.get_num_threads()
    several = run(case)
    started = len(list(Path("/proc/self/task").iterdir()))
    run(case)
    assert len(list(Path("/proc/self/task").iterdir())) == started
    torch.set_num_threads(1)
    try:
        assert np.array_equal(run(case), several)
    finally:
        torch.set_num_threads(threads)


BAD = {
    "float64": (
        dict(query=torch.ones(1, 2, 5, 16, dtype=torch.float64)),
        {},
        "expected float32, float16 or bfloat16, found Double",
    ),
    "rank": (dict(query=torch.ones(2, 5, 16)), {}, "expected query, key and value of 4 axes"),
    "value": (
        dict(value=torch.ones(1, 2, 4, 16)),
        {},
        r"operand value: expected shape \(B, K, T, V\) = \[1, 2, 5, 16\], found \[1, 2, 4",
    ),
    "heads": (dict(query=torch.ones(1, 3, 5, 16)), {}, "that the key heads divide, found 3 and 2"),
    "padding": (dict(key_padding=torch.ones(1, 5)), {}, "operand key_padding: expected Bool, found Float"),
    "bias": (dict(bias=torch.ones(1, 1, 2, 5)), {}, r"operand bias: expected shape \(1 or B, 1 or H, 1 or S, T\)"),
    "offset": (dict(offset=torch.ones(1)), {}, "operand offset: expected Long, found Float"),
    "window": ({}, dict(left_window_size=-2), "left_window_size: expected -1 .unbounded. or more, found -2"),
    "softcap": ({}, dict(softcap=-1.0), "softcap: expected 0 .none. or more, found -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_says_what_is_wrong(name: str) -> None:
    operands, attributes, message = BAD[name]
    given = {part: torch.ones(1, 2, 5, 16) for part in ("query", "key", "value")} | operands
    with pytest.raises(RuntimeError, match=message):
        operator(*(given.get(part) for part in ("query", "key", "value", *OPTIONAL)), scale=1.0, **attributes)


def test_says_why_a_kernel_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Path:
        raise ImportError("TVM is not installed, so no kernel can be built")

    monkeypatch.setattr(library, "kernel_library", refuse)
    odd = torch.ones(1, 1, 2, 7)
    with pytest.raises(RuntimeError, match="no kernel for float32 with head sizes D=7, V=7: TVM is not installed"):
        operator(odd, odd, odd, scale=1.0)


def test_refuses_other_libraries(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        swacompile_torch.add_kernels(tmp_path / "nowhere.so")
    with pytest.raises(ArtifactError, match="expected a kernel library of swacompile"):
        swacompile_torch.add_kernels(Path(torch.__file__).parent / "lib" / "libc10.so")


@pytest.mark.cpu
def test_builds_a_missing_kernel_once(tmp_path: Path) -> None:
    """In a process of its own with an empty cache for kernels; the second process finds the library."""
    program = (
        "import logging, os, sys, torch; logging.basicConfig(level=logging.WARNING)\n"
        "import swacompile.torch\n"
        f"os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}\n"
        "x = torch.randn(1, 1, 6, 4)\n"
        "mask = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)\n"
        "expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)\n"
        "found = torch.ops.swacompile.banded_attention(x, x, x, scale=0.5, left_window_size=2, right_window_size=0)\n"
        "assert (found - expected).abs().max() < 1e-5\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300) for _ in range(2)
    )
    assert first.returncode == 0 and "building the kernel swa_f32_d4_v4_" in first.stderr, first.stderr
    assert second.returncode == 0 and "building" not in second.stderr, second.stderr
