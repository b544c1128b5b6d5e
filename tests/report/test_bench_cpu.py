"""The CPU benchmark's arithmetic, its report, and one small run of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from swacompile.report import bench_cpu, length_plot
from swacompile.report.bench_cpu import Machine, Row, bench, markdown, to_json
from swacompile.report.cpu_contenders import Case, Contender, Problem, Run, UnavailableError, ort_dense
from swacompile.target import host_targets

CASE = Case(heads=4, kv_heads=2, head_size=16, queries=20, keys=50, window=8)


def test_flops_and_bytes_count_what_the_band_shows() -> None:
    assert CASE.flops == 4 * 16 * 4 * CASE.mask().sum()
    assert CASE.bytes == 4 * 2 * 2 * 16 * CASE.mask().any(axis=0).sum()
    full = replace(CASE, queries=50, window=50)
    assert full.flops == 4 * 16 * 4 * 50 * 51 / 2


def test_refused_cases() -> None:
    with pytest.raises(ValueError, match="divide"):
        replace(CASE, kv_heads=3)
    with pytest.raises(UnavailableError, match="GB of scores"):
        replace(CASE, queries=20000, keys=20000).refuse_if_dense_is_too_much(stores_scores=True)


@pytest.mark.cpu
def test_a_run_reports_results_and_refusals() -> None:
    def refuses(problem: Problem) -> Run:
        raise UnavailableError("not today")

    def wrong(problem: Problem) -> Run:
        return lambda: np.zeros((1, 4, 20, 16), dtype=np.float32)

    contenders = [
        Contender(name="dense", prepare=ort_dense),
        Contender(name="refuses", prepare=refuses),
        Contender(name="wrong", prepare=wrong),
    ]
    ours, dense, refused, incorrect = bench([CASE], threads=1, seconds=0.05, contenders=contenders)
    assert ours.contender == "swacompile" and ours.ratio == 1 and ours.error < 1e-5
    assert dense.rounds == ours.rounds >= 3 and dense.low <= dense.median <= dense.high
    assert ours.gflops == pytest.approx(CASE.flops / ours.median / 1e9)
    assert refused.refused == "not today" and incorrect.refused.startswith("wrong by")
    parsed = json.loads(to_json(Machine.here(host_targets()[0]), [ours, refused]))
    assert parsed["version"] == bench_cpu.JSON_VERSION
    assert [row["refused"] for row in parsed["rows"]] == ["", "not today"]


def test_table_has_a_line_per_row() -> None:
    row = Row(
        case=CASE, contender="x", threads=1, median=0.002, low=0.001, high=0.003, ratio=1.7, gflops=30, of_product=0.5
    )
    table = markdown([row, replace(row, contender="y", refused="too large")]).splitlines()
    assert len(table) == 4
    assert table[2] == "| 4/2 | 16 | 20 x 50 | 8 | x | 2 (1-3) | 1.70 | 30 | 50 % | 0.0 |"
    assert "too large" in table[3]


def test_plot_places_a_slope() -> None:
    """Time that doubles with the length is a straight line upwards."""
    line = length_plot.Series(name="a < b", points=((256, 1.0), (512, 2.0), (1024, 4.0)))
    picture = length_plot.svg([line], title="t")
    points = re.search(r'points="([^"]*)"', picture)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 and "a &lt; b" in picture


def test_plot_has_four_kinds_of_attention() -> None:
    names = [name for name, _ in length_plot.kinds((256, 512), 64)]
    assert names == ["MHA", "GQA", "MQA", "GQA, window 64"]
