"""CPU kernels against the float64 reference. A kernel is built once for all cases of its variant."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from swacompile.kernels import cpu_call
from swacompile.kernels.build import KernelVariant, build_cpu_module
from swacompile.kernels.reference import UNBOUNDED, Array, Call, banded_attention
from swacompile.target import host_targets, target_named
from swacompile.workload import DType
from tests.schedules.cpu_cases import FEATURES, Case, Sizes, moved_window
from tests.tolerances import KERNEL_ATOL, WINDOW_OFF_BY_ONE

pytestmark = pytest.mark.cpu

Run = Callable[[Call], Array]
TILE = 48
SQUARE = Sizes(batch=2, heads=4, kv_heads=2, queries=130, keys=130)
LATER = Sizes(batch=2, heads=3, kv_heads=3, queries=61, keys=150)
DECODE = Sizes(batch=2, heads=10, kv_heads=2, queries=1, keys=200)


@pytest.fixture(scope="session")
def kernels() -> Callable[..., Run]:
    """Gives a function that runs a variant on this machine, for a target (the best one where not named)."""
    built: dict[tuple[str, KernelVariant], Any] = {}

    def kernel(dtype: DType, head_size: int, value_size: int, target_name: str | None = None) -> Run:
        target = host_targets()[0] if target_name is None else target_named(target_name)
        variant = KernelVariant(dtype=dtype, head_size=head_size, value_size=value_size)
        if (target.name, variant) not in built:
            built[target.name, variant] = build_cpu_module([variant], target)
        return lambda call: cpu_call.run(built[target.name, variant], variant, target, call)

    return kernel


def check(run: Run, call: Call, dtype: DType = DType.F32) -> None:
    """The output equals the reference, and does not equal that of a window one key narrower."""
    output = run(call).astype(np.float64)
    np.testing.assert_allclose(output, banded_attention(call), rtol=0, atol=KERNEL_ATOL[dtype])
    narrower = moved_window(call)
    assert np.abs(run(narrower).astype(np.float64) - banded_attention(call)).max() > WINDOW_OFF_BY_ONE[dtype]


def window_cases() -> list[Case]:
    cases = []
    for window in (1, TILE - 1, TILE, TILE + 1, 95, 96, 97, 129, 130, 131):
        cases.append(Case(sizes=SQUARE, left=window - 1, right=0, bshd=window % 2 == 1))
    for left, right in ((5, 5), (3, 40), (40, 3), (UNBOUNDED, 0), (0, UNBOUNDED), (UNBOUNDED, 7), (20, -2), (-3, 30)):
        cases.append(Case(sizes=SQUARE, left=left, right=right))
        cases.append(Case(sizes=LATER, left=left, right=right, bshd=True))
    cases.append(Case(sizes=SQUARE, left=UNBOUNDED, right=UNBOUNDED))
    return cases


def length_cases() -> list[Case]:
    return [
        Case(sizes=Sizes(heads=4, kv_heads=kv_heads, queries=length, keys=length), left=9, right=2)
        for length, kv_heads in (
            (2, 1),
            (7, 2),
            (15, 4),
            (16, 1),
            (17, 2),
            (TILE - 1, 4),
            (TILE, 1),
            (TILE + 1, 2),
            (501, 1),
        )
    ]


def decode_cases() -> list[Case]:
    sizes = [
        Sizes(heads=heads, kv_heads=kv_heads, queries=1, keys=keys)
        for heads, kv_heads, keys in ((1, 1, 1), (3, 3, 64), (4, 2, 65), (8, 2, 129), (10, 2, 200), (7, 1, 333))
    ]
    return [Case(sizes=size, left=left, right=0, bshd=left == 62) for size in sizes for left in (0, 62, UNBOUNDED)]


@pytest.mark.parametrize("case", [*window_cases(), *length_cases()], ids=str)
def test_windows_and_lengths(kernels: Callable[..., Run], case: Case) -> None:
    check(kernels(DType.F32, 64, 64), case.call(DType.F32, 64, 64))


@pytest.mark.parametrize("case", decode_cases(), ids=str)
def test_one_query(kernels: Callable[..., Run], case: Case) -> None:
    call = case.call(DType.F32, 64, 64)
    run = kernels(DType.F32, 64, 64)
    np.testing.assert_allclose(run(call), banded_attention(call), rtol=0, atol=KERNEL_ATOL[DType.F32])
    if 0 < case.left < case.sizes.keys - 1:
        check(run, call)


@pytest.mark.parametrize("offset", [-140, -5, 3, 1000])
def test_queries_beside_the_keys(kernels: Callable[..., Run], offset: int) -> None:
    call = Case(sizes=LATER, left=20, right=4, offset=offset).call(DType.F32, 64, 64)
    output = kernels(DType.F32, 64, 64)(call)
    np.testing.assert_allclose(output, banded_attention(call), rtol=0, atol=KERNEL_ATOL[DType.F32])
    unseen = (call.positions - call.left >= 150) | (call.positions + call.right < 0)
    assert unseen.any() == (offset != 3)
    assert (output[:, :, unseen] == 0).all()


@pytest.mark.parametrize("queries", [61, 1])
def test_views_into_one_buffer(kernels: Callable[..., Run], queries: int) -> None:
    """Query, key and value cut out of one projection's result, the output into every other row of a larger buffer: nothing is copied."""
    length, heads, size = 61, 3, 64
    fused = np.random.default_rng(5).standard_normal((2, length, heads, 4 * size)).astype(np.float32)
    fused[..., 3 * size :] = np.nan
    query, key, value = (fused[..., i * size : (i + 1) * size].transpose(0, 2, 1, 3) for i in range(3))
    offset = length - queries
    call = Call(query=query[:, :, offset:], key=key, value=value, left=9, right=0, offset=offset, scale=0.4)
    buffer = np.full((2, heads, 2 * queries, size + 8), -7, dtype=np.float32)
    target, variant = host_targets()[0], KernelVariant(dtype=DType.F32, head_size=size, value_size=size)
    module = build_cpu_module([variant], target)
    output = buffer[:, :, ::2, :size]
    assert cpu_call.run(module, variant, target, call, output) is output
    np.testing.assert_allclose(output, banded_attention(call), rtol=0, atol=KERNEL_ATOL[DType.F32])
    assert (buffer[:, :, 1::2] == -7).all() and (buffer[..., size:] == -7).all()


PAIRS = (
    ("key_padding", "segments"),
    ("softcap", "alibi_slopes"),
    ("sinks", "bias"),
    ("zeroed", "key_padding"),
    ("zeroed", "sinks"),
)


@pytest.mark.parametrize("features", [*((name,) for name in FEATURES), *PAIRS], ids="+".join)
@pytest.mark.parametrize("sizes", [SQUARE, LATER, DECODE], ids=str)
def test_features(kernels: Callable[..., Run], sizes: Sizes, features: tuple[str, ...]) -> None:
    call = Case(sizes=sizes, left=17, right=6, features=features, bshd=len(features) == 2).call(DType.F32, 64, 64)
    check(kernels(DType.F32, 64, 64), call)


@pytest.mark.parametrize("sizes", [SQUARE, DECODE], ids=str)
def test_every_feature_at_once(kernels: Callable[..., Run], sizes: Sizes) -> None:
    features = tuple(name for name in FEATURES if name not in ("bias_per_batch", "zeroed"))
    check(kernels(DType.F32, 64, 64), Case(sizes=sizes, left=40, right=6, features=features).call(DType.F32, 64, 64))


@pytest.mark.parametrize("left", [UNBOUNDED, 129])
def test_zeroed_band_that_covers_every_key(kernels: Callable[..., Run], left: int) -> None:
    """Scores far below 0, where the formula for zeroed bands would cancel."""
    call = replace(
        Case(sizes=SQUARE, left=left, right=UNBOUNDED, features=("zeroed", "bias")).call(DType.F32, 64, 64), scale=0.1
    )
    assert call.bias is not None
    call = replace(call, bias=call.bias - np.float32(60))
    np.testing.assert_allclose(
        kernels(DType.F32, 64, 64)(call), banded_attention(call), rtol=0, atol=KERNEL_ATOL[DType.F32]
    )


SIZES_AND_DTYPES = (
    (DType.F32, 8, 8),
    (DType.F32, 80, 37),
    (DType.F32, 128, 128),
    (DType.F16, 64, 64),
    (DType.BF16, 40, 24),
    (DType.F16, 256, 256),
)


@pytest.mark.parametrize(("dtype", "head_size", "value_size"), SIZES_AND_DTYPES)
def test_head_sizes_and_element_types(
    kernels: Callable[..., Run], dtype: DType, head_size: int, value_size: int
) -> None:
    run = kernels(dtype, head_size, value_size)
    for sizes in (SQUARE, LATER, DECODE):
        for features in ((), ("sinks", "bias"), ("zeroed",)):
            case = Case(sizes=sizes, left=17, right=6, features=features, bshd=sizes is LATER)
            check(run, case.call(dtype, head_size, value_size), dtype)


@pytest.mark.parametrize("target_name", [target.name for target in host_targets()[1:]])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_other_instruction_sets(kernels: Callable[..., Run], target_name: str, dtype: DType) -> None:
    run = kernels(dtype, 24, 40, target_name)
    for sizes in (SQUARE, LATER, DECODE):
        for features in ((), ("key_padding", "segments"), ("softcap", "alibi_slopes"), ("zeroed",)):
            check(run, Case(sizes=sizes, left=17, right=6, features=features).call(dtype, 24, 40), dtype)


def test_half_precision_numbers_of_every_kind(kernels: Callable[..., Run]) -> None:
    """Subnormals, the largest numbers and infinities pass through a row that sees one key, also where conversions are spelled out in integers."""
    special = np.array([0, -0.0, 6e-8, -3e-5, 6.1e-5, 1.0, -65504, np.inf], dtype=np.float16)
    value = np.resize(special, (1, 1, 24, 40)).astype(np.float16)
    ones = np.ones((1, 1, 24, 24), dtype=np.float16)
    for target in host_targets():
        output = kernels(DType.F16, 24, 40, target.name)(Call(query=ones, key=ones, value=value, left=0, right=0))
        np.testing.assert_array_equal(output.view(np.uint16) & 0x7FFF, value.view(np.uint16) & 0x7FFF)


@pytest.mark.parametrize("sizes", [SQUARE, DECODE], ids=str)
def test_hidden_keys_may_hold_anything(kernels: Callable[..., Run], sizes: Sizes) -> None:
    case = Case(sizes=sizes, left=17, right=0, features=("key_padding",))
    call = case.call(DType.F32, 64, 64)
    run = kernels(DType.F32, 64, 64)
    clean = run(call)
    assert call.key_padding is not None
    hidden = call.key_padding == 0
    for poison in (np.nan, np.inf):
        key, value = call.key.copy(), call.value.copy()
        for batch in range(sizes.batch):
            key[batch, :, hidden[batch]] = poison
            value[batch, :, hidden[batch]] = poison
        poisoned = run(replace(call, key=key, value=value))
        np.testing.assert_allclose(poisoned, clean, rtol=0, atol=KERNEL_ATOL[DType.F32])


def test_nan_spreads_to_the_rows_that_see_it_and_no_further(kernels: Callable[..., Run]) -> None:
    call = Case(sizes=SQUARE, left=17, right=0).call(DType.F32, 64, 64)
    run = kernels(DType.F32, 64, 64)
    for operand in ("query", "key", "value"):
        changed = getattr(call, operand).copy()
        changed[0, 0, 70, 3] = np.array([0x7FC00001], dtype=np.uint32).view(np.float32)[0]
        poisoned = replace(call, **{operand: changed})
        output, expected = run(poisoned), banded_attention(poisoned)
        assert np.isnan(expected).any() and not np.isnan(expected).all()
        np.testing.assert_array_equal(np.isnan(output), np.isnan(expected), err_msg=operand)
        finite = ~np.isnan(expected)
        np.testing.assert_allclose(output[finite], expected[finite], rtol=0, atol=KERNEL_ATOL[DType.F32])


@pytest.mark.parametrize("sizes", [SQUARE, DECODE], ids=str)
def test_infinite_and_huge_scores(kernels: Callable[..., Run], sizes: Sizes) -> None:
    call = Case(sizes=sizes, left=17, right=0, features=("bias",)).call(DType.F32, 64, 64)
    assert call.bias is not None
    run = kernels(DType.F32, 64, 64)
    hiding = call.bias.copy()
    hiding[..., ::3] = -np.inf
    hiding[:, 0] = -np.inf
    minus_infinity = replace(call, bias=hiding)
    output = run(minus_infinity)
    np.testing.assert_allclose(output, banded_attention(minus_infinity), rtol=0, atol=KERNEL_ATOL[DType.F32])
    assert (output[:, 0] == 0).all()
    huge = replace(call, query=call.query * np.float32(1e18), scale=1e10, bias=None)
    np.testing.assert_allclose(run(huge), banded_attention(huge), rtol=0, atol=KERNEL_ATOL[DType.F32])
    endless = call.bias.copy()
    endless[..., 50] = np.inf
    plus_infinity = replace(call, bias=endless)
    np.testing.assert_array_equal(np.isnan(run(plus_infinity)), np.isnan(banded_attention(plus_infinity)))


def test_refused_arguments_name_the_argument(kernels: Callable[..., Run]) -> None:
    call = Case(sizes=SQUARE, left=17, right=0).call(DType.F32, 64, 64)
    run = kernels(DType.F32, 64, 64)
    with pytest.raises(Exception, match=r"(?s)argument #1.*kv_heads"):
        run(replace(call, key=call.key[..., :32].copy()))
