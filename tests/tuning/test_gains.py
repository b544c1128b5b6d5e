"""Chosen beside default: ratios, what differs, tables for a document, and which records are still needed."""

from dataclasses import replace

from swacompile.tuning.gains import gains, markdown, needed
from swacompile.tuning.record import Origin, Status
from tests.tuning.records import HERE, config, record

EARLIER = replace(HERE, revision="earlier")


def test_a_choice_beside_its_default():
    default, chosen = record(1500.0, origin=Origin.DEFAULT), record(60.0, of=config(keys=48, row_keys=16))
    (gain,) = gains([record(10.0, rung=0, of=config(keys=24)), default, chosen])
    assert (gain.chosen, gain.default, gain.ratio) == (chosen, default, 25.0)
    assert gain.changes == "keys=48, row_keys=16"
    text = markdown([gain])
    assert f"x86_64_v4: test device, 1 thread, 2026-01-02; kernels {HERE.revision}; swacompile 0\n" in text
    assert "| `f32-d64-v64-g4-w128-n4096` | 1,500 | 60.0 | 25.00 | 1.0% | keys=48, row_keys=16 |" in text


def test_the_default_of_another_round_is_not_beside():
    (gain,) = gains([record(100.0, rung=1, origin=Origin.DEFAULT), record(50.0, of=config(keys=48))])
    assert gain.default is None and gain.ratio is None
    assert f"| 50.0 |  | 1.0% | {config(keys=48)} |" in markdown([gain])


def test_a_default_that_stays():
    (gain,) = gains([record(100.0, origin=Origin.DEFAULT), record(99.5, of=config(keys=48))])
    assert (gain.ratio, gain.changes) == (1.0, "default stays")
    assert gains([record(status=Status.WRONG)]) == []


def test_tables_are_of_one_place():
    other = replace(HERE, device="a GPU", driver="580.1", threads=2)
    rows = [
        record(1.0),
        record(1.0, provenance=EARLIER, workload="f32-d64-v64-g1-w16-n16"),
        record(2.0, provenance=other),
    ]
    text = markdown(gains(rows))
    assert text.count("| workload |") == 2 and "a GPU, driver 580.1, 2 threads," in text
    assert ", ".join(sorted(["earlier", HERE.revision])) in text


def test_needed_are_the_best_and_its_default_of_the_newest_kernels():
    default, chosen = record(100.0, origin=Origin.DEFAULT), record(50.0, of=config(keys=48))
    old = [
        record(1.0, provenance=EARLIER, date="2025-01-01T00:00:00Z"),
        record(70.0, of=config(keys=24)),
        record(1.0, rung=0),
    ]
    assert needed([*old, default, chosen]) == [default, chosen]
    elsewhere = record(3.0, provenance=replace(EARLIER, device="other"))
    assert needed([elsewhere, default]) == [elsewhere, default]
