"""Which record is used: exact, nearest of the class, same architecture, default; and never one that is slower or failed."""

from dataclasses import replace

import pytest

from swacompile.target import target_named
from swacompile.tuning import database as database_module
from swacompile.tuning.cpu_rule import CpuTilesRule
from swacompile.tuning.database import Database, Level, best
from swacompile.tuning.record import Origin, Status
from swacompile.workload import Workload
from tests.tuning.records import HERE, config, record

TARGET = target_named("x86_64_v4")
RULE = CpuTilesRule()
WANTED = Workload.parse("f32-d64-v64-g4-w128-n4096")


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "SHIPPED", tmp_path / "shipped")
    return Database(folders=(tmp_path / "own",))


def choose(database, workload=WANTED):
    return database.choose(RULE, workload, TARGET)


def test_levels(database):
    assert choose(database).level is Level.DEFAULT
    assert "analytical default" in str(choose(database))
    far = record(1.0, workload="f32-d64-v64-g4-w4096-n4096", of=config(keys=24))
    near = record(9.0, workload="f32-d64-v64-g4-w256-n4096", of=config(keys=48))
    database.add(
        [far, near, record(1.0, workload="f32-d128-v128-g4-w128-n4096"), record(1.0, workload=f"{WANTED}-decode")]
    )
    assert (choose(database).level, choose(database).record) == (Level.NEAREST, near)
    exact = record(50.0, of=config(keys=72))
    database.add([exact])
    assert (choose(database).level, choose(database).config) == (Level.EXACT, config(keys=72))
    assert "test device" in str(choose(database))


def test_same_architecture(database, monkeypatch):
    twin = replace(TARGET, name="x86_64_v4_twin")
    monkeypatch.setattr(database_module, "TARGETS", (TARGET, twin, target_named("x86_64_v3")))
    database.add([record(target="x86_64_v4_twin", of=config(keys=48)), record(target="x86_64_v3", of=config(keys=24))])
    found = choose(database)
    assert (found.level, found.record.target) == (Level.SAME_ARCHITECTURE, "x86_64_v4_twin")


def test_an_impossible_config_is_passed_over(database):
    database.add([record(1.0, of=config(score_keys=24, score_vectors=4)), record(2.0, of=config(row_keys=63))])
    assert choose(database).level is Level.DEFAULT


def test_failures_are_never_chosen(database):
    failed = [record(status=status, of=config(keys=24)) for status in Status if status is not Status.OK]
    database.add(failed)
    assert choose(database).level is Level.DEFAULT


def test_the_default_stays_within_noise():
    default = record(100.0, origin=Origin.DEFAULT)
    assert best([default, record(99.0, of=config(keys=24))]) == default
    assert best([default, record(80.0, of=config(keys=24), spread=0.3)]) == default
    faster = record(80.0, of=config(keys=24))
    assert best([default, faster]) == faster


def test_only_the_longest_measured_round_counts():
    lucky = record(10.0, rung=0, of=config(keys=24))
    assert (
        best([lucky, record(50.0, rung=2, of=config(keys=48)), record(60.0, origin=Origin.DEFAULT)]).median_us == 50.0
    )


def test_times_of_other_machines_and_kernels_are_not_compared():
    elsewhere = record(1.0, provenance=replace(HERE, device="faster"), date="2026-01-01T00:00:00Z", of=config(keys=24))
    older = record(2.0, provenance=replace(HERE, revision="r0"), date="2025-01-01T00:00:00Z", of=config(keys=48))
    here = record(50.0)
    assert best([elsewhere, older, here]) == here
    assert best([elsewhere, older, here], device="faster") == elsewhere
    started = record(40.0, rung=0, date="2027-01-01T00:00:00Z", provenance=replace(HERE, revision="r2"))
    assert best([here, started]) == here, "a search that only began must not hide a finished one"


def test_a_search_begins_where_others_ended(database):
    old = replace(HERE, revision="r0")
    near, far = config(keys=48), config(keys=24)
    database.add(
        [
            record(5.0, of=far, workload="f32-d64-v64-g4-w4096-n4096"),
            record(9.0, of=near, provenance=old),
            record(10.0, of=config(keys=72), provenance=old),
            record(1.0, of=config(score_keys=24, score_vectors=4)),
            record(1.0, of=config(keys=96), workload="f32-d128-v128-g4-w128-n4096"),
        ]
    )
    base = RULE.default(WANTED, TARGET)
    assert database.earlier(RULE, WANTED, TARGET) == [base.replaced({"keys": keys}) for keys in (48, 24)]
    decode = Workload.parse(f"{WANTED}-decode")
    database.add([record(1.0, of=config(keys=48, row_keys=128), workload=str(decode))])
    assert database.earlier(RULE, decode, TARGET) == [RULE.default(decode, TARGET).replaced({"row_keys": 128})]


def test_merge_is_idempotent(database, tmp_path):
    ours, theirs = record(1.0), record(2.0, of=config(keys=24))
    database.add([ours])
    assert database.merge([ours, theirs, theirs]) == 1
    assert database.merge([ours, theirs]) == 0
    assert database.records("x86_64_v4") == (ours, theirs)
    assert Database(folders=(tmp_path / "other",)).merge([ours, theirs]) == 2
