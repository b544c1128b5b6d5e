"""Which candidates to measure, and for how long: the default first, then the best of earlier records, then random ones, then
neighbours of the best.

Everything is measured briefly (rung 0). The best few and the default are measured again, longer and in turns (rungs 1
and 2), so that a lucky sample or a drifting clock does not decide.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from swacompile.tuning.config import Config
from swacompile.tuning.measure import Candidate, Effort, Outcome
from swacompile.tuning.record import Origin, Status, TuningRecord
from swacompile.tuning.runner import summary
from swacompile.tuning.space import Space
from swacompile.workload import Workload

BATCH = 4
SEEDS = 3
"""Configs of earlier records that are tried after the default."""
RANDOM_SHARE = 0.25
"""Of a batch that looks around the best."""
ELITE = 3
"""Configs whose neighbours are tried."""
IMPROVEMENT = 0.01
"""A smaller gain does not count as progress."""
FINAL_SHARE = 0.3
"""Of the budget, kept for the final rungs."""
SCREEN = Effort(rung=0, samples=5, min_ms=5.0)
ROUNDS = 3

Measure = Callable[[Sequence[Candidate], Effort], Iterator[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop.

    `trials` candidates (those known from earlier runs count), `seconds` in all, `patience` batches without
    progress.
    """

    trials: int = 48
    seconds: float | None = None
    patience: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """One of the final rungs: the best `keep` and the default."""

    keep: int
    effort: Effort


FINALS = (
    Final(keep=4, effort=Effort(rung=1, samples=5, min_ms=10.0)),
    Final(keep=2, effort=Effort(rung=2, samples=9, min_ms=20.0)),
)


class Search:
    """One search. `run` yields every outcome as it becomes known; final ones carry the samples of all their rounds."""

    def __init__(
        self, workload: Workload, space: Space, measure: Measure, limits: Limits, known: Sequence[TuningRecord] = (),
        seeds: Sequence[Config] = (), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._workload, self._space, self._measure, self._limits = workload, space, measure, limits
        self._seeds = [config for config in seeds if config != space.base][:SEEDS]
        self._clock, self._start = clock, clock()
        self._rng = random.Random(limits.seed + len(known))
        self._medians: dict[Config, float] = {}
        for record in known:
            if record.rung == SCREEN.rung:
                self._note(record.config, record.median_us)

    @property
    def tried(self) -> int:
        return len(self._medians)

    def run(self) -> Iterator[tuple[Outcome, Effort]]:
        yield from self._screen()
        for final in FINALS:
            yield from self._final(final)

    def _screen(self) -> Iterator[tuple[Outcome, Effort]]:
        stale, best = 0, self._best()
        while stale < self._limits.patience and not self._is_over():
            batch = self._next_batch()
            if not batch:
                return
            for outcome in self._measure(batch, SCREEN):
                self._note(outcome.candidate.config, median(outcome))
                yield outcome, SCREEN
            stale = 0 if self._best() < best * (1 - IMPROVEMENT) else stale + 1
            best = min(best, self._best())

    def _is_over(self) -> bool:
        return self.tried >= self._limits.trials or (self._spent(1 - FINAL_SHARE) and self.tried > 0)

    def _spent(self, share: float) -> bool:
        """Whether this share of the budget is spent."""
        seconds = self._limits.seconds
        return seconds is not None and self._clock() - self._start > seconds * share

    def _next_batch(self) -> list[Candidate]:
        room = min(BATCH, self._limits.trials - self.tried)
        chosen: list[Config] = []
        for first in (self._space.base, *self._seeds):
            if first not in self._medians and len(chosen) < room:
                chosen.append(first)
        around = self._around_the_best() if self.tried >= 2 * BATCH else iter(())
        seen = set(self._medians) | set(chosen)
        while len(chosen) < room:
            config = None if self._rng.random() < RANDOM_SHARE else next((c for c in around if c not in seen), None)
            config = config or self._space.sample(self._rng, seen)
            if config is None:
                break
            chosen.append(config)
            seen.add(config)
        return [self._candidate(config) for config in chosen]

    def _around_the_best(self) -> Iterator[Config]:
        """Neighbours of the best Configs, in turns."""
        rings = [list(self._space.neighbours(config)) for config in self._ranked()[:ELITE]]
        for ring in rings:
            self._rng.shuffle(ring)
        for place in range(max(map(len, rings), default=0)):
            yield from (ring[place] for ring in rings if place < len(ring))

    def _final(self, final: Final) -> Iterator[tuple[Outcome, Effort]]:
        """Candidates take turns within each of ROUNDS rounds, so that a slow moment does not hit one of them alone. Where the
        budget is spent, a single round has to do.
        """
        configs = dict.fromkeys((self._space.base, *self._ranked()[: final.keep]))
        candidates = [self._candidate(config) for config in configs if self._medians.get(config, math.inf) < math.inf]
        gathered: dict[Candidate, list[Outcome]] = {candidate: [] for candidate in candidates}
        for number in range(ROUNDS):
            if number > 0 and self._spent(1):
                break
            for outcome in self._measure(candidates, final.effort):
                gathered[outcome.candidate].append(outcome)
        for outcomes in gathered.values():
            merged = merge(outcomes)
            self._medians[merged.candidate.config] = median(merged) or math.inf
            yield merged, final.effort

    def _note(self, config: Config, measured: float | None) -> None:
        self._medians[config] = math.inf if measured is None else measured

    def _best(self) -> float:
        return min(self._medians.values(), default=math.inf)

    def _ranked(self) -> list[Config]:
        good = [config for config, time_us in self._medians.items() if math.isfinite(time_us)]
        return sorted(good, key=lambda config: self._medians[config])

    def _candidate(self, config: Config) -> Candidate:
        origin = Origin.DEFAULT if config == self._space.base else Origin.SEARCH
        return Candidate(workload=self._workload, config=config, origin=origin)


def median(outcome: Outcome) -> float | None:
    """Median microseconds a call; None where nothing was timed."""
    return summary(outcome.samples)[0] if outcome.status is Status.OK else None


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of one candidate as one: any failure decides."""
    failed = next((outcome for outcome in outcomes if outcome.status is not Status.OK), None)
    if failed is not None:
        return failed
    samples = tuple(sample for outcome in outcomes for sample in outcome.samples)
    return Outcome(candidate=outcomes[0].candidate, status=Status.OK, samples=samples)
