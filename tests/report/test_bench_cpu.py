"""The CPU benchmark's arithmetic, its contenders and tables, and small runs of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from swacompile.errors import ArgumentError
from swacompile.report import bench_cpu, cpu_cases, cpu_table, length_plot
from swacompile.report.bench_cpu import Machine, Row, bench, to_json
from swacompile.report.cpu_cases import Case, cases_named
from swacompile.report.cpu_contenders import PEERS, Contender, Problem, Run, UnavailableError, ort_dense
from swacompile.target import host_targets
from swacompile.workload import DType, Feature, Workload

CASE = Case(heads=4, kv_heads=2, head_size=16, queries=20, keys=50, window=8)
TWO_SIDED = Case(heads=4, kv_heads=2, head_size=16, value_size=8, queries=33, keys=33, window=7, right=2)


@pytest.mark.parametrize("case", [CASE, TWO_SIDED])
def test_flops_and_bytes_count_what_the_band_shows(case: Case) -> None:
    assert case.pairs == case.mask().sum()
    assert case.flops == 2 * (16 + case.columns) * 4 * case.mask().sum()
    assert case.bytes == 4 * 2 * (16 + case.columns) * case.mask().any(axis=0).sum()


def test_the_mask_is_the_band() -> None:
    keys = np.flatnonzero(TWO_SIDED.mask()[10])
    assert list(keys) == list(range(6, 13))
    assert TWO_SIDED.seen(10) == (6, 13)
    assert list(np.flatnonzero(CASE.mask()[0])) == list(range(23, 31))


def test_cases_of_workloads() -> None:
    text = "f16-d64-v32-g4-w128-n1024-two_sided-sinks-softcap"
    case = Case.of(Workload.parse(text))
    assert (case.heads, case.kv_heads, case.queries, case.left, case.right) == (32, 8, 1024, 64, 63)
    assert (case.dtype, case.columns, case.sinks) == (DType.F16, 32, True) and case.softcap > 0
    assert str(case.workload) == text
    decode = Case.of(Workload.parse("f32-d64-v64-g1-wall-n512-decode"), length=700)
    assert (decode.queries, decode.keys, decode.window) == (1, 700, 700)
    assert Feature.DECODE in decode.workload.features
    with pytest.raises(ArgumentError, match="no peers for alibi"):
        Case.of(Workload.parse("f32-d64-v64-g1-w128-n512-alibi"))


def test_cases_of_a_model_have_its_own_heads_and_window(corpus) -> None:
    cases = cases_named(str(corpus / "gpt_oss" / "onnx-sdpa-dyn-pad.onnx"), length=100)
    assert {(c.heads, c.kv_heads, c.left, c.right, c.keys) for c in cases} == {(4, 2, 5, 0, 100)}
    assert all(c.sinks and c.padded for c in cases) and sorted(c.queries for c in cases) == [1, 100]


def test_sets_hold_the_table_of_performance_md() -> None:
    assert {(c.heads, c.keys, c.window) for c in cpu_cases.SETS["prefill"]} >= {(8, 16384, 128), (32, 512, 512)}
    assert len(cpu_cases.SETS["prefill"]) == 22


def test_refused_cases() -> None:
    with pytest.raises(ValueError, match="divide"):
        replace(CASE, kv_heads=3)
    empty = np.zeros(0, np.float32)
    large = Problem(
        case=replace(CASE, queries=20000, keys=20000), threads=1, library=None, query=empty, key=empty, value=empty,
        sinks=None,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(UnavailableError, match="6 GB of scores"):
        large.refuse_if_dense_is_too_much(stores_scores=True)
    with pytest.raises(UnavailableError, match="has no value size"):
        large.refuse(value_size=True)


@pytest.mark.cpu
def test_a_run_reports_results_and_refusals() -> None:
    def refuses(problem: Problem) -> Run:
        raise UnavailableError("not today")

    def missing(problem: Problem) -> Run:
        raise ModuleNotFoundError(name="fish")

    def wrong(problem: Problem) -> Run:
        return lambda: np.zeros((1, 4, 20, 16), dtype=np.float32)

    contenders = [
        Contender(name="dense", prepare=ort_dense),
        Contender(name="refuses", prepare=refuses),
        Contender(name="missing", prepare=missing),
        Contender(name="wrong", prepare=wrong),
    ]
    ours, dense, refused, absent, incorrect = bench([CASE], seconds=0.05, contenders=contenders)
    assert ours.contender == "swacompile" and ours.ratio == 1 and ours.error < 1e-5 and "cpu_tiles" in ours.tuning
    assert dense.rounds == ours.rounds >= 3 and dense.low <= dense.median <= dense.high
    assert ours.gflops == pytest.approx(1e-9 * CASE.flops / ours.median)
    assert 0 < ours.of_product < 1
    assert refused.refused == "not today" and incorrect.refused.startswith("wrong by")
    assert absent.refused == "fish is not installed"
    parsed = json.loads(to_json(Machine.here(host_targets()[0]), [ours, refused]))
    assert parsed["version"] == bench_cpu.JSON_VERSION
    assert [row["refused"] for row in parsed["rows"]] == ["", "not today"]
    assert cpu_table.from_json(json.dumps(parsed)) == [ours, refused]


@pytest.mark.cpu
@pytest.mark.torch
def test_contenders_compute_the_cases() -> None:
    """Each is checked against the float64 reference by the benchmark itself; here that none fails on what it should know."""
    pytest.importorskip("torch")
    plain = Case(heads=4, kv_heads=2, head_size=16, queries=40, keys=40, window=8)
    cases = {
        replace(plain, softcap=5.0, padded=True): {"ORT dense", "ORT GQA"},
        replace(plain, sinks=True): {"ORT dense", "ORT GQA"},
        replace(plain, queries=1): {"ORT dense", "torch SDPA + mask", "torch chunked", "ORT Attention-25"},
        replace(plain, right=3): {"ORT dense", "torch SDPA + mask", "torch chunked"},
    }
    rows = list(bench(list(cases), seconds=0, contenders=[peer for peer in PEERS if peer.name != "flex_attention"]))
    for group in cpu_table.by_case(rows):
        case = group["swacompile"].case
        refused = {name: row.refused for name, row in group.items()}
        assert all(not refused[name] for name in cases[case]), refused
        assert ("has no sinks" in refused.values()) == case.sinks
    assert all(row.of_read > 0 for row in rows if row.case.queries == 1 and not row.refused)


@pytest.mark.cpu
def test_half_precision() -> None:
    ours, dense = bench([replace(TWO_SIDED, dtype=DType.F16)], seconds=0, contenders=[PEERS[3]])
    assert not (ours.refused or dense.refused) and 1e-5 < ours.error < 1e-2


ROW = Row(
    case=CASE,
    contender="swacompile",
    threads=2,
    median=0.002,
    low=0.001,
    high=0.003,
    ratio=1,
    gflops=30,
    of_product=0.5,
)
PEER = replace(ROW, contender="ORT dense", ratio=1.7)


def test_details_have_a_line_per_row() -> None:
    table = cpu_table.details([PEER, replace(ROW, contender="ORT GQA", refused="too large")]).splitlines()
    assert len(table) == 4
    assert table[2] == (
        "| 4/2 heads, D 16, 20 x 50, window 8 | 2 | ORT dense | 2 (1-3) | 1.70 | 30 GFLOP/s | 50 % | 0.0 |"
    )
    assert "too large" in table[3]


def test_overview_has_a_line_per_case() -> None:
    refused = replace(ROW, contender="ORT GQA", refused="too large")
    rows = [ROW, PEER, replace(PEER, contender="torch chunked", ratio=1.5), refused, replace(ROW, threads=1)]
    table = cpu_table.overview(rows).splitlines()
    assert table[0].endswith("| torch chunked | ORT dense | ORT GQA |")
    assert table[2].endswith("| 2 (1-3) | 50 % | **1.50** | 1.70 | - |")
    assert len(table) == 4
    assert list(cpu_table.reasons(rows)) == ["ORT GQA: too large"]


LINE = length_plot.Series(name="a < b", points=((256, 1.0), (512, 2.0), (1024, 4.0)))


def test_plot_places_a_slope() -> None:
    """Time that doubles with the length is a straight line upwards."""
    picture = length_plot.svg([LINE], title="t")
    points = re.search(r'points="([^"]*)" fill="none" stroke="#0066cc"', picture)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 and "a &lt; b" in picture


def test_names_of_lines_that_end_together_stay_apart() -> None:
    picture = length_plot.svg([LINE, replace(LINE, name="other")], title="t")
    places = [re.search(rf'y="([0-9.]*)"[^>]*>{name}<', picture) for name in ("a &lt; b", "other")]
    first, second = (float(place[1]) for place in places if place)
    assert abs(first - second) >= length_plot.FONT_SIZE


def test_plot_as_png() -> None:
    pytest.importorskip("PIL")
    from io import BytesIO

    from PIL import Image

    data = length_plot.written([LINE], title="t", suffix=".png")
    image = Image.open(BytesIO(data))
    assert image.size == (length_plot.WIDTH * length_plot.PIXELS, length_plot.HEIGHT * length_plot.PIXELS)
    colours = {colour for _, colour in image.getcolors(1 << 20) or ()}
    assert (0x00, 0x66, 0xCC) in colours


def test_plot_has_four_kinds_of_attention() -> None:
    names = [name for name, _ in length_plot.kinds((256, 512), 64)]
    assert names == ["MHA", "GQA", "MQA", "GQA, window 64"]
