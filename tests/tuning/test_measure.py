"""Candidates in processes of their own: each kind of failure is contained, named, and harms no other candidate."""

import pytest

from swacompile.errors import TargetError
from swacompile.target import TARGETS, TargetClass, host_targets
from swacompile.tuning import search
from swacompile.tuning.database import Database
from swacompile.tuning.measure import Candidate, Effort, LocalMeasurer, device_here
from swacompile.tuning.problem import problems, write_expected
from swacompile.tuning.record import Origin, Status
from swacompile.tuning.rules import rule_for
from swacompile.tuning.runner import run_contained
from swacompile.tuning.search import Limits
from swacompile.tuning.tune import tune
from swacompile.workload import Feature
from tests.tuning.conftest import WORKLOAD, written

pytestmark = pytest.mark.cpu
QUICK = Effort(rung=0, samples=3, min_ms=1.0)


def candidate(**changes):
    target = host_targets()[0]
    base = rule_for(WORKLOAD, target).default(WORKLOAD, target)
    return Candidate(workload=WORKLOAD, config=base.replaced(changes), origin=Origin.SEARCH)


def test_every_failure_is_contained(bench):
    expected = {
        candidate(row_heads=5, row_keys=64): Status.CRASHED,
        candidate(row_heads=3, row_keys=64): Status.WRONG,
        candidate(row_heads=6, row_keys=64): Status.HUNG,
        candidate(row_heads=8, row_keys=64): Status.BUILD_FAILED,
        candidate(row_heads=1, row_keys=16): Status.BUILD_FAILED,
        candidate(row_heads=1, row_keys=512): Status.BUILD_FAILED,
        candidate(row_heads=1, row_keys=64): Status.OK,
    }
    measurer = LocalMeasurer(bench, run_seconds=4)
    found = {outcome.candidate: outcome for outcome in measurer.measure(list(expected), QUICK)}
    assert {c: outcome.status for c, outcome in found.items()} == expected
    messages = [found[c].message for c in expected]
    for message, words in zip(
        messages,
        [
            "signal",
            "some outputs are not written",
            "no end after 4 s",
            "no such tile",
            "SIGSEGV",
            "no answer in time",
            "",
        ],
        strict=True,
    ):
        assert words in message
    assert all((len(o.samples) == 3) == (o.status is Status.OK) for o in found.values())


def test_candidates_get_ready_beside_each_other(bench):
    """As for a GPU: no outcome is lost or taken for another's, and what hung is run again alone."""
    expected = {
        candidate(row_heads=6, row_keys=64): Status.HUNG,
        candidate(row_heads=5, row_keys=64): Status.CRASHED,
        candidate(row_heads=3, row_keys=64): Status.WRONG,
        candidate(row_heads=8, row_keys=64): Status.BUILD_FAILED,
        candidate(row_heads=1, row_keys=64): Status.OK,
        candidate(row_heads=2, row_keys=64): Status.OK,
    }
    measurer = LocalMeasurer(bench, run_seconds=3, prepared=2)
    found = [(outcome.candidate, outcome.status) for outcome in measurer.measure(list(expected), QUICK)]
    assert dict(found) == expected and len(found) == len(expected)
    assert found[-1] == next(iter(expected.items()))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_off_by_one_is_wrong(bench, place, side):
    """In the small cases and in the timed one."""
    job = bench.job(candidate(row_heads=1, row_keys=64), QUICK)
    bench.build([candidate(row_heads=1, row_keys=64)])
    assert run_contained(job, bench.folder, threads=1, seconds=30)["status"] == "ok"
    job["problems"] = [dict(job["problems"][place])]
    if side == "right" and job["problems"][0]["queries"] == 1:
        job["problems"][0]["offset"] -= 1  # nothing is to the right of the last key
    else:
        job["problems"][0][side] += 1
    result = run_contained(job, bench.folder, threads=1, seconds=30)
    assert result["status"] == "wrong" and "tolerance 0.0001" in result["message"]


def test_tuning_keeps_every_outcome_and_chooses_a_good_one(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROUNDS", 1)
    database = Database(folders=(tmp_path,))
    seen = []
    limits = Limits(trials=12, patience=9)
    tuned = tune(WORKLOAD, LocalMeasurer(bench, run_seconds=4), database, limits, seen.append)
    assert tuned.records == tuple(seen) == written(database)
    assert len({record.config for record in seen}) == 12
    assert tuned.choice.record.status is Status.OK
    assert tuned.choice.config.as_dict()["row_heads"] in (1, 2, 4)
    assert tuned.gain >= 1.0
    again = []
    tune(WORKLOAD, LocalMeasurer(bench, run_seconds=4), database, limits, again.append)
    assert {record.rung for record in again} == {1, 2}, "nothing is screened twice"


def test_an_interrupt_keeps_what_was_measured(bench, tmp_path):
    database, seen = Database(folders=(tmp_path,)), []

    def stop(record):
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    tuned = tune(WORKLOAD, LocalMeasurer(bench, run_seconds=4), database, Limits(trials=12), stop)
    assert tuned.interrupted and tuned.records == tuple(seen)


def test_targets_of_other_machines_are_refused():
    elsewhere = next(t for t in TARGETS if t.target_class is TargetClass.CPU and t not in host_targets())
    with pytest.raises(TargetError, match=f"does not run kernels of {elsewhere.name}.*--export-bundle"):
        device_here(elsewhere)


def test_every_feature_reaches_the_problems(tmp_path):
    """The features a workload names are in its calls: their expected rows differ from those without."""
    from dataclasses import replace

    import numpy as np

    plain = replace(WORKLOAD, features=frozenset())
    cpu = TargetClass.CPU
    written = {feature: write_expected(workload, cpu, tmp_path)[0] for feature, workload in _variants(plain).items()}
    rows = {feature: np.load(tmp_path / document["expected"]) for feature, document in written.items()}
    for feature, found in rows.items():
        if feature is not None:
            assert not np.allclose(found, rows[None], atol=1e-3), feature
    assert all(problem.queries == 1 for problem in problems(WORKLOAD, cpu)[1:])


def _variants(plain):
    from dataclasses import replace

    features = [f for f in Feature if f is not Feature.DECODE]
    return {None: plain} | {f: replace(plain, features=frozenset({f})) for f in features}
