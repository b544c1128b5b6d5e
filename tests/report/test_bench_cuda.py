import pytest

from swacompile.report.bench_cuda import CASES, Case, Ceilings
from swacompile.report.cuda_table import BEGIN, END, replace_table


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


def test_the_table_is_replaced_between_its_marks() -> None:
    assert replace_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="around the table"):
        replace_table(f"a {END} b", "new")
