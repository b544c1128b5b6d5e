"""The tuning database: one file of records a target, and the choice of a Config for a workload."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from swacompile.target import TARGETS, Target
from swacompile.tuning import store
from swacompile.tuning.config import Config
from swacompile.tuning.record import Origin, Provenance, Status, TuningRecord
from swacompile.tuning.space import TunableRule
from swacompile.workload import Feature, Workload

SHIPPED = Path(__file__).parents[1] / "schedules" / "records"
MARGIN = 0.02
"""A tuned Config must beat the default by this share, or by the spread where that is greater.

Within noise the default stays.
"""
LARGE_GAIN = 1.1
"""Times as fast as the default: a record that says so outlives a change of the default."""


class Level(StrEnum):
    """Where a Config came from, best first."""

    EXACT = "exact"
    NEAREST = "nearest"
    SAME_ARCHITECTURE = "same-architecture"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The Config for a workload; `record` is None for the analytical default. `outdated`: it was measured with other
    sources of the kernel than those here.
    """

    workload: Workload
    config: Config
    level: Level
    record: TuningRecord | None
    outdated: bool = False

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.workload}: analytical default, {self.config}"
        origin = self.record.provenance
        source = f"tuned on {origin.device}, {self.record.date[:10]}"
        if self.level is not Level.EXACT:
            source = f"{self.level} record {self.record.workload} of {self.record.target}, {source}"
        if self.outdated:
            source += f" with other kernel sources ({origin.revision})"
        return f"{self.workload}: {source}, {self.config}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """Folders of record files; new records go to the first. Without `folders` only what is shipped is read."""

    folders: tuple[Path, ...] = ()

    def path(self, target: str) -> Path:
        """The file that new records of a target go to."""
        if not self.folders:
            raise ValueError("a database without a folder cannot be written")
        return self.folders[0] / f"{target}{store.SUFFIX}"

    def records(self, target: str) -> tuple[TuningRecord, ...]:
        """Every record of a target, shipped ones first, each once. Bad lines are logged and skipped."""
        found: dict[str, TuningRecord] = {}
        for folder in (SHIPPED, *reversed(self.folders)):
            contents = store.read(folder / f"{target}{store.SUFFIX}")
            found |= {record.line(): record for record in contents.records if record.target == target}
        return tuple(found.values())

    def add(self, records: Sequence[TuningRecord]) -> None:
        """Append records to their targets' files. Raises OutputError."""
        for target in dict.fromkeys(record.target for record in records):
            store.append(self.path(target), [record for record in records if record.target == target])

    def merge(self, records: Iterable[TuningRecord]) -> int:
        """Add the records that are not there yet; gives their number."""
        fresh = {record.line(): record for record in records}
        for target in {record.target for record in fresh.values()}:
            for known in self.records(target):
                fresh.pop(known.line(), None)
        self.add(tuple(fresh.values()))
        return len(fresh)

    def choose(self, rule: TunableRule, workload: Workload, target: Target, *, device: str | None = None) -> Choice:
        """The best known Config: of this workload, of the nearest of its class, of a target of the same architecture,
        or the default.

        A record whose Config the rule refuses for this workload is passed over, and so is one of a workload with another
        default: that its Config is better there says nothing here. `device` prefers records of that device. Records of
        earlier kernel sources step back behind today's of the same workload from a sibling of the target. One that was
        compared with another default than today's counts only if its gain was large: where such records are all that
        there is of this workload, the default is today's.
        """
        space, revision = rule.space(workload, target), rule.revision()

        def usable(record: TuningRecord) -> bool:
            config = rule.completed(record.config)
            if record.status is not Status.OK or config is None or space.refusal(config) is not None:
                return False
            return rule.default(record.workload, target) == space.base

        for level, candidates in self._levels(rule, workload, target):
            good = list(filter(usable, candidates))
            record = best((r for r in good if _holds_still(r, candidates, rule, target, revision)), device, revision)
            config = rule.completed(record.config) if record is not None else None
            if record is not None and config is not None:
                outdated = record.provenance.revision != revision
                return Choice(workload=workload, config=config, level=level, record=record, outdated=outdated)
            if level is Level.EXACT and good:
                break
        return Choice(workload=workload, config=space.base, level=Level.DEFAULT, record=None)

    def earlier(self, rule: TunableRule, workload: Workload, target: Target) -> list[Config]:
        """Where a search may begin: the best Configs that records have, of whatever kernel sources, as points of today's
        space. First those of the workload, then of others of its class, nearest first, on the target and on its siblings.
        """
        places = (target, *self._siblings(target))
        records = [record for place in places for record in self.records(place.name)]
        space = rule.space(workload, target)
        names = [parameter.name for parameter in space.parameters]
        found: dict[Config, None] = {}
        for group in _by_distance(records, rule, workload, target):
            for record in filter(None, map(best, groups(group))):
                values = (rule.completed(record.config) or space.base).as_dict()
                config = space.base.replaced({name: values[name] for name in names})
                if space.refusal(config) is None:
                    found[config] = None
        return list(found)

    @staticmethod
    def _siblings(target: Target) -> list[Target]:
        return [other for other in TARGETS if other != target and same_architecture(other, target)]

    def _levels(
        self, rule: TunableRule, workload: Workload, target: Target
    ) -> Iterator[tuple[Level, list[TuningRecord]]]:
        own, revision = self.records(target.name), rule.revision()
        others = [record for other in self._siblings(target) for record in self.records(other.name)]
        exact = [record for record in own if record.workload == workload]
        nearest = _by_distance(own, rule, workload, target)
        for level, group in ((Level.EXACT, exact), *((Level.NEAREST, group) for group in nearest)):
            if group and all(record.provenance.revision != revision for record in group):
                yield Level.SAME_ARCHITECTURE, _of_today(others, group[0].workload, revision)
            yield level, group
        yield from ((Level.SAME_ARCHITECTURE, group) for group in _by_distance(others, rule, workload, target))


def _holds_still(
    record: TuningRecord, beside: Sequence[TuningRecord], rule: TunableRule, target: Target, revision: str
) -> bool:
    """Whether a record still counts: if it was compared with what is the default today, or was measured with the kernel
    sources of today and not compared. Where the default is another by now, it most likely beats what beat the old one
    by less than LARGE_GAIN.
    """
    if not rule.applies(record.workload, target):
        return False
    defaults = [
        other
        for other in beside
        if other.origin is Origin.DEFAULT
        and other.status is Status.OK
        and other.workload == record.workload
        and other.provenance.comparable(record.provenance)
    ]
    if not defaults:
        return record.provenance.revision == revision
    if rule.default(record.workload, target) in [rule.completed(other.config) for other in defaults]:
        return True
    return _median(record) * LARGE_GAIN < min(map(_median, defaults))


def best(
    records: Iterable[TuningRecord], device: str | None = None, revision: str | None = None
) -> TuningRecord | None:
    """The record to use of one workload's: the fastest of the longest-measured round, or the default's unless beaten
    beyond noise.

    Only times that can be compared are: records of one device, number of threads and kernel revision. Of several such
    sets one of `device` counts, else one of `revision`, else the newest whose search was finished. None where nothing
    was measured successfully.
    """
    timed = [record for record in records if record.status is Status.OK]
    if not timed:
        return None

    def preference(record: TuningRecord) -> tuple[bool, bool, bool, str]:
        origin = record.provenance
        return origin.device == device, origin.revision == revision, record.rung > 0, record.date

    newest = max(timed, key=preference)
    peers = [record for record in timed if record.provenance.comparable(newest.provenance)]
    last = latest_rung(peers)
    winner = min(last, key=_median)
    default = min((record for record in last if record.origin is Origin.DEFAULT), key=_median, default=None)
    return winner if default is None or beats(winner, default) else default


def groups(records: Iterable[TuningRecord]) -> list[list[TuningRecord]]:
    """Records that can be compared with each other."""
    found: dict[object, list[TuningRecord]] = {}
    for record in records:
        found.setdefault((record.workload, record.provenance.setting), []).append(record)
    return list(found.values())


def latest_rung(records: Sequence[TuningRecord]) -> list[TuningRecord]:
    """The newest record of each Config in the highest rung."""
    rung = max(record.rung for record in records)
    newest = {record.config: record for record in records if record.rung == rung}
    return list(newest.values())


def beats(candidate: TuningRecord, default: TuningRecord) -> bool:
    """Whether a candidate is faster than the default beyond noise."""
    noise = max(MARGIN, candidate.spread or 0.0, default.spread or 0.0)
    return _median(candidate) < _median(default) * (1 - noise)


def same_class(a: Workload, b: Workload, rule: TunableRule, target: Target) -> bool:
    """Whether a Config of one is a fair guess for the other: same kernel, and both prefill or both decode."""
    decode = (Feature.DECODE in a.features) == (Feature.DECODE in b.features)
    return decode and rule.function_name(a, target) == rule.function_name(b, target)


def distance(a: Workload, b: Workload) -> float:
    """How far apart two workloads of one class are: doublings of keys seen, length and group, plus one a feature."""
    seen = [math.log2(min(w.window or w.length, w.length)) for w in (a, b)]
    lengths = abs(math.log2(a.length / b.length)) / 2
    groups = abs(math.log2(a.group / b.group)) / 2
    return abs(seen[0] - seen[1]) + lengths + groups + len(a.features ^ b.features)


def same_architecture(a: Target, b: Target) -> bool:
    """Whether code for one is code for the other: the same GPU architecture, or the same CPU instruction set."""
    return all(a.tvm.get(key) == b.tvm.get(key) for key in ("kind", "arch", "mcpu", "mtriple"))


def _by_distance(
    records: Iterable[TuningRecord], rule: TunableRule, workload: Workload, target: Target
) -> Iterator[list[TuningRecord]]:
    """Records of the workload's class in groups of one workload, nearest first."""
    groups: dict[Workload, list[TuningRecord]] = {}
    for record in records:
        if rule.applies(record.workload, target) and same_class(record.workload, workload, rule, target):
            groups.setdefault(record.workload, []).append(record)
    nearest = sorted(groups, key=lambda other: (distance(other, workload), str(other)))
    yield from (groups[other] for other in nearest)


def _of_today(records: Iterable[TuningRecord], workload: Workload, revision: str) -> list[TuningRecord]:
    return [record for record in records if record.workload == workload and record.provenance.revision == revision]


def comparable(records: Iterable[TuningRecord], workload: Workload, provenance: Provenance) -> list[TuningRecord]:
    """A workload's records whose times can stand beside new ones."""
    return [record for record in records if record.workload == workload and record.provenance.comparable(provenance)]


def _median(record: TuningRecord) -> float:
    return record.median_us if record.median_us is not None else math.inf
