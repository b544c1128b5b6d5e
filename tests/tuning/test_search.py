"""The search on a made-up cost: it finds what is good, stops in time, and repeats nothing."""

import random
from dataclasses import replace

from swacompile.target import target_named
from swacompile.tuning.cpu_rule import CpuTilesRule
from swacompile.tuning.measure import Outcome
from swacompile.tuning.record import Origin, Status
from swacompile.tuning.search import BATCH, FINALS, SCREEN, SEEDS, Limits, Search
from swacompile.workload import Workload
from tests.tuning.records import record

TARGET = target_named("x86_64_v4")
WORKLOAD = Workload.parse("f32-d64-v64-g4-w128-n4096")
SPACE = CpuTilesRule().space(WORKLOAD, TARGET)


def cost(config):
    """Smooth, with its minimum at keys=48, queries=96."""
    values = config.as_dict()
    return 100 + abs(values["keys"] - 48) + abs(values["queries"] - 96) + 5 * abs(values["score_keys"] - 6)


class Bench:
    """Measures by formula, with noise; `seconds` pass with each candidate."""

    def __init__(self, noise=0.0, seconds=1.0, broken=lambda config: None):
        self.noise, self.seconds, self.broken = noise, seconds, broken
        self.now, self.log, self.rng = 0.0, [], random.Random(3)

    def measure(self, candidates, effort):
        for candidate in candidates:
            self.now += self.seconds
            self.log.append((candidate, effort))
            status = self.broken(candidate.config)
            if status is not None:
                yield Outcome(candidate=candidate, status=status, message="broken")
                continue
            times = [cost(candidate.config) * (1 + self.noise * self.rng.random()) for _ in range(effort.samples)]
            yield Outcome(candidate=candidate, status=Status.OK, samples=tuple(times))

    def run(self, limits, known=(), seeds=()):
        search = Search(WORKLOAD, SPACE, self.measure, limits, known, seeds, clock=lambda: self.now)
        return list(search.run())

    @property
    def screened(self):
        return [candidate.config for candidate, effort in self.log if effort == SCREEN]


def winner(outcomes):
    last = [outcome for outcome, effort in outcomes if effort == FINALS[-1].effort and outcome.samples]
    return min(last, key=lambda outcome: sum(outcome.samples) / len(outcome.samples)).candidate


def test_finds_the_minimum():
    bench = Bench(noise=0.02)
    found = winner(bench.run(Limits(trials=200, patience=50)))
    assert cost(found.config) <= 105 < cost(SPACE.base)
    assert len(set(bench.screened)) == len(bench.screened)


def test_the_default_comes_first_and_stays_to_the_end():
    outcomes = Bench().run(Limits(trials=24))
    assert outcomes[0][0].candidate.origin is Origin.DEFAULT
    for final in FINALS:
        rung = [outcome.candidate for outcome, effort in outcomes if effort == final.effort]
        assert [c.config for c in rung if c.origin is Origin.DEFAULT] == [SPACE.base]
        assert 2 <= len(rung) <= final.keep + 1
    assert all(len(outcome.samples) == 3 * effort.samples for outcome, effort in outcomes if effort != SCREEN)


def test_what_was_best_before_comes_after_the_default():
    seeds = [SPACE.base, *(SPACE.base.replaced({"keys": keys}) for keys in (24, 48, 72, 96, 120))]
    bench = Bench()
    bench.run(Limits(trials=8), seeds=seeds)
    expected = [config for config in seeds if config != SPACE.base][:SEEDS]
    assert bench.screened[: 1 + SEEDS] == [SPACE.base, *expected]
    assert len(set(bench.screened)) == 8


def test_trials_and_budget_are_kept():
    assert len(set((bench := Bench()).run(Limits(trials=10)) and bench.screened)) == 10
    bench = Bench(seconds=2.0)
    bench.run(Limits(trials=10_000, seconds=60, patience=10_000))
    assert len(bench.screened) > 10 and bench.now < 60 + 2 * BATCH + 15
    bench = Bench(seconds=2.0)
    outcomes = bench.run(Limits(trials=12, seconds=24))
    assert [len(outcome.samples) for outcome, effort in outcomes if effort == FINALS[1].effort] == [
        FINALS[1].effort.samples
    ] * 3
    assert bench.now < 24 + 24, "a spent budget leaves one round of each final"


def test_stops_when_nothing_improves():
    bench = Bench()
    bench.run(Limits(trials=5000, patience=3))
    assert len(bench.screened) < 500


def test_a_second_run_continues():
    first = Bench()
    outcomes = first.run(Limits(trials=12))
    known = [
        replace(record(sum(o.samples) / len(o.samples), rung=0, of=o.candidate.config), samples=5)
        for o, effort in outcomes
        if effort == SCREEN
    ]
    second = Bench()
    second.run(Limits(trials=20), known)
    assert len(second.screened) == 8
    assert not set(first.screened) & set(second.screened)


def test_broken_candidates_are_never_finalists():
    kinds = [Status.WRONG, Status.CRASHED, Status.HUNG, Status.BUILD_FAILED]
    bench = Bench(broken=lambda config: kinds[config.as_dict()["keys"] % 4] if config.as_dict()["keys"] < 96 else None)
    outcomes = bench.run(Limits(trials=60, patience=20))
    finals = [outcome for outcome, effort in outcomes if effort != SCREEN]
    assert finals and all(outcome.status is Status.OK for outcome in finals)
    assert any(outcome.status is not Status.OK for outcome, _ in outcomes)
    bench = Bench(broken=lambda config: Status.WRONG if config == SPACE.base else None)
    finals = [outcome.candidate for outcome, effort in bench.run(Limits(trials=12)) if effort != SCREEN]
    assert finals and SPACE.base not in [candidate.config for candidate in finals], "nor is a broken default"
