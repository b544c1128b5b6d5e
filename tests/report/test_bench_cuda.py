import math
from collections.abc import Callable

import pytest

from swacompile.report import bench_cuda
from swacompile.report.bench_cuda import CASES, OURS, Case, Ceilings, Row, choice_of, compare, workload_of
from swacompile.report.cuda_table import BEGIN, END, replace_table
from swacompile.target import target_named
from swacompile.tuning.database import Database


def case(**changes: object) -> Case:
    values: dict[str, object] = dict(name="c", batch=2, heads=4, kv_heads=2, head_size=8, keys=10, left=3)
    return Case(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, 1 + 2 + 3 + 7 * 4),
        ({"left": None}, 55),
        ({"left": None, "right": None}, 100),
        ({"left": 1, "right": 1}, 2 + 8 * 3 + 2),
        ({"queries": 1}, 4),
    ],
)
def test_pairs_are_those_that_the_band_shows(changes: dict[str, object], pairs: int) -> None:
    assert case(**changes).pairs == pairs
    assert case(**changes).flops == 4 * 2 * 4 * 8 * pairs


def test_decoding_counts_only_the_window_of_the_cache() -> None:
    assert case(queries=1).bytes == 2 * 2 * 8 * (2 * 4 * 1 + 2 * 2 * 4)


def test_the_floor_is_the_slower_of_products_and_copies() -> None:
    one = case()
    assert Ceilings(product=one.flops, copy=one.bytes * 2).floor_ms(one) == 1000
    assert Ceilings(product=one.flops * 4, copy=one.bytes * 2).floor_ms(one) == 500


def test_cases_have_names_of_their_own() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


def test_each_case_is_a_workload_that_hopper_has_a_kernel_for() -> None:
    target, none = target_named("nvidia/nvidia-h200"), Database(folders=())
    kernels = {c.name: choice_of(c, target, none).kernel for c in CASES}
    assert {kernel.family for kernel in kernels.values()} == {"wgmma"}
    assert kernels["gptoss-32k-w128-sinks"].spec.features.names == ("sinks",)
    assert kernels["decode-64x32k-w4096"].spec.features.names == ("split",)
    assert str(workload_of(CASES[5])) == "bf16-d64-v64-g1-w256-n8192-two_sided"


def test_contenders_take_turns_and_wrong_ones_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {OURS: iter((1.0, 2.0, 4.0, 3.0, 9.0)), "peer": iter((2.0, 2.0, 8.0, 9.0, 9.0))}

    class Checked:
        case = case()

        def checked(self, peer: str, run: object) -> Row:
            return Row(case="c", peer=peer, error=0.0, failure="wrong result" if peer == "bad" else "")

    def clock(run: Callable[[], str]) -> float:
        order.append(run())
        return next(seconds[order[-1]])

    monkeypatch.setattr(bench_cuda, "time_ms", clock)
    runs = {OURS: lambda: OURS, "bad": lambda: "bad", "peer": lambda: "peer"}
    rows = list(compare(Checked(), runs, Ceilings(product=case().flops, copy=1e30)))  # type: ignore[arg-type]
    assert order == [OURS, "peer"] * 5
    assert [(row.peer, row.milliseconds, row.ratio) for row in rows if not row.failure] == [
        (OURS, 3, 1),
        ("peer", 8, 2),
    ]
    assert rows[0].floor_share == 1000 / 3
    assert rows[1].failure == "wrong result" and math.isnan(rows[1].milliseconds)


def test_the_table_is_replaced_between_its_marks() -> None:
    assert replace_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="around the table"):
        replace_table(f"a {END} b", "new")
