"""CPU kernels in a process without TVM: what they read, how much memory they take, and that the number of tasks changes nothing."""

from collections.abc import Callable

import numpy as np
import pytest

from swacompile.kernels.build import KernelVariant
from swacompile.kernels.reference import UNBOUNDED, banded_attention
from swacompile.schedules.cpu.tiles import SCRATCH_BYTES
from swacompile.target import host_targets, target_named
from swacompile.workload import DType
from tests.schedules.cpu_cases import Case, Sizes, moved_window
from tests.schedules.cpu_host import HostedKernel, build_host
from tests.tolerances import KERNEL_ATOL, WINDOW_OFF_BY_ONE

pytestmark = pytest.mark.cpu

SQUARE = Sizes(batch=2, heads=4, kv_heads=2, queries=101, keys=101)
LATER = Sizes(batch=1, heads=3, kv_heads=3, queries=50, keys=150)
DECODE = Sizes(batch=2, heads=6, kv_heads=2, queries=1, keys=133)
DATA = ("key_padding", "segments", "sinks", "bias", "alibi_slopes")
CASES = (
    Case(sizes=SQUARE, left=17, right=6),
    Case(sizes=SQUARE, left=UNBOUNDED, right=UNBOUNDED, features=DATA, bshd=True),
    Case(sizes=LATER, left=17, right=200, features=DATA),
    Case(sizes=LATER, left=17, right=6, features=("zeroed", "key_padding"), bshd=True),
    Case(sizes=DECODE, left=40, right=6, features=DATA),
    Case(sizes=DECODE, left=UNBOUNDED, right=0, bshd=True),
)
VARIANTS = ((DType.F32, 36, 20), (DType.F16, 36, 20))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HostedKernel]:
    """Gives a program around a variant, for a target (this machine's best one where not named)."""
    built: dict[tuple[str, KernelVariant], HostedKernel] = {}

    def host(dtype: DType, head_size: int, value_size: int, target_name: str | None = None) -> HostedKernel:
        target = host_targets()[0] if target_name is None else target_named(target_name)
        variant = KernelVariant(dtype=dtype, head_size=head_size, value_size=value_size)
        if (target.name, variant) not in built:
            built[target.name, variant] = build_host(variant, target, tmp_path_factory.mktemp("host"))
        return built[target.name, variant]

    return host


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("place", ["start", "end"])
def test_nothing_beside_the_operands_is_read_or_written(
    hosts: Callable[..., HostedKernel], variant: tuple[DType, int, int], place: str
) -> None:
    """Every operand touches an unreadable page on one side, so that one element too far ends the process."""
    dtype, head_size, value_size = variant
    for case in CASES:
        call = case.call(dtype, head_size, value_size)
        result = hosts(*variant).run(call, place=place, bshd=case.bshd)
        difference = np.abs(result.output.astype(np.float64) - banded_attention(call)).max()
        assert difference < KERNEL_ATOL[dtype], str(case)


def test_the_guard_notices_one_element(hosts: Callable[..., HostedKernel]) -> None:
    """The same program on a query tensor that claims one query more than it has memory for."""
    case = Case(sizes=Sizes(heads=1, queries=64, keys=64), left=3, right=0)
    call = case.call(DType.F32, 36, 20)
    with pytest.raises(AssertionError, match="exited with -11"):
        hosts(DType.F32, 36, 20).run(call, claimed_queries=65)


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_key_before_the_window_is_read(
    hosts: Callable[..., HostedKernel], variant: tuple[DType, int, int], queries: int
) -> None:
    """The first query's window ends at an unreadable page; a key less, and the process dies of reading it."""
    case = Case(sizes=Sizes(heads=4, kv_heads=1, queries=queries, keys=150), left=17, right=0)
    call = case.call(*variant)
    first = call.offset - 17
    result = hosts(*variant).run(call, place="start", first_key=first)
    assert np.abs(result.output.astype(np.float64) - banded_attention(call)).max() < KERNEL_ATOL[variant[0]]
    with pytest.raises(AssertionError, match="exited with -11"):
        hosts(*variant).run(call, place="start", first_key=first + 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_any_number_of_tasks_gives_the_same_bits(
    hosts: Callable[..., HostedKernel], variant: tuple[DType, int, int]
) -> None:
    for case in CASES:
        call = case.call(*variant)
        first, *others = (hosts(*variant).run(call, tasks=tasks, bshd=case.bshd).output for tasks in (1, 2, -3, 7, 64))
        for other in others:
            np.testing.assert_array_equal(other.view(np.uint8), first.view(np.uint8), err_msg=str(case))


@pytest.mark.parametrize("variant", [*VARIANTS, (DType.F32, 128, 128), (DType.F16, 128, 128)], ids=str)
def test_scratch_memory(hosts: Callable[..., HostedKernel], variant: tuple[DType, int, int]) -> None:
    """Tasks run one after the other here, so that the most held is one thread's."""
    case = Case(sizes=Sizes(heads=2, queries=300, keys=300), left=UNBOUNDED, right=0)
    used = hosts(*variant).run(case.call(*variant)).scratch_bytes
    assert 16 * 1024 < used <= SCRATCH_BYTES


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_aarch64(hosts: Callable[..., HostedKernel], dtype: DType) -> None:
    """Under an emulator, so correctness only."""
    host = hosts(dtype, 36, 20, "aarch64_neon")
    for case in CASES:
        call = case.call(dtype, 36, 20)
        expected = banded_attention(call)
        difference = np.abs(host.run(call, bshd=case.bshd).output.astype(np.float64) - expected).max()
        assert difference < KERNEL_ATOL[dtype], str(case)
    narrower = moved_window(CASES[0].call(dtype, 36, 20))
    moved = np.abs(host.run(narrower).output.astype(np.float64) - banded_attention(CASES[0].call(dtype, 36, 20))).max()
    assert moved > WINDOW_OFF_BY_ONE[dtype]
