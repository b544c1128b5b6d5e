"""Tune workloads: search, record every outcome at once, and say what was gained."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swacompile.tuning.database import Choice, Database, Level, best, comparable, latest_rung
from swacompile.tuning.measure import Effort, Measurer, Outcome
from swacompile.tuning.record import Origin, Provenance, Status, TuningRecord
from swacompile.tuning.rules import rule_for
from swacompile.tuning.runner import summary
from swacompile.tuning.search import Limits, Search
from swacompile.workload import Workload

OnRecord = Callable[[TuningRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a search found.

    `records` are all that can be compared, from this run and earlier ones, in the order of measuring.
    """

    workload: Workload
    choice: Choice
    default: TuningRecord | None
    records: tuple[TuningRecord, ...]
    interrupted: bool

    @property
    def gain(self) -> float | None:
        """How many times faster the chosen Config is than the default; None where one of them was not measured."""
        chosen = self.choice.record
        if chosen is None or self.default is None or not chosen.median_us or not self.default.median_us:
            return None
        return self.default.median_us / chosen.median_us


def tune(
    workload: Workload, measurer: Measurer, database: Database, limits: Limits, on_record: OnRecord = lambda _: None
) -> Tuned:
    """Search the best Config of a workload. Every outcome is in the database before the next is measured.

    What earlier runs measured with the same kernels on the same device is not measured again. An interrupt (Ctrl-C)
    ends the search and keeps what was measured. Raises OutputError, TargetError.
    """
    target, provenance = measurer.target, measurer.provenance
    rule = rule_for(workload, target)
    known = comparable(database.records(target.name), workload, provenance)
    seeds = database.earlier(rule, workload, target)
    search = Search(workload, rule.space(workload, target), measurer.measure, limits, known, seeds)
    interrupted = False
    try:
        for outcome, effort in search.run():
            record = record_of(outcome, effort, target.name, provenance)
            database.add([record])
            on_record(record)
    except KeyboardInterrupt:
        interrupted = True
    return tuned_so_far(workload, measurer, database, interrupted=interrupted)


def tuned_so_far(workload: Workload, measurer: Measurer, database: Database, *, interrupted: bool = False) -> Tuned:
    """What the database holds for a workload of this measurer's device and kernels."""
    target, provenance = measurer.target, measurer.provenance
    records = comparable(database.records(target.name), workload, provenance)
    chosen = best(records)
    base = rule_for(workload, target).default(workload, target)
    level = Level.DEFAULT if chosen is None else Level.EXACT
    choice = Choice(workload=workload, config=chosen.config if chosen else base, level=level, record=chosen)
    return Tuned(
        workload=workload,
        choice=choice,
        default=default_of(records),
        records=tuple(records),
        interrupted=interrupted,
    )


def tuned_elsewhere(records: Sequence[TuningRecord]) -> Tuned:
    """What records of one workload, device and kernel revision say, as a bundle's runner wrote them: at least one."""
    chosen = best(records)
    config = (chosen or default_of(list(records)) or records[0]).config
    level = Level.DEFAULT if chosen is None else Level.EXACT
    choice = Choice(workload=records[0].workload, config=config, level=level, record=chosen)
    return Tuned(
        workload=choice.workload,
        choice=choice,
        default=default_of(list(records)),
        records=tuple(records),
        interrupted=False,
    )


def default_of(records: list[TuningRecord]) -> TuningRecord | None:
    """The default's record that stands beside the best one: of the highest rung."""
    timed = [record for record in records if record.status is Status.OK]
    if not timed:
        return None
    return next((record for record in latest_rung(timed) if record.origin is Origin.DEFAULT), None)


def record_of(outcome: Outcome, effort: Effort, target: str, provenance: Provenance) -> TuningRecord:
    """An outcome as it is kept."""
    timed = summary(outcome.samples) if outcome.status is Status.OK else (None, None)
    return TuningRecord(
        target=target,
        workload=outcome.candidate.workload,
        config=outcome.candidate.config,
        status=outcome.status,
        origin=outcome.candidate.origin,
        rung=effort.rung,
        samples=len(outcome.samples),
        median_us=timed[0],
        spread=timed[1],
        provenance=provenance,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        message=outcome.message,
    )
