"""What tuning gained: of each workload the record that is chosen, beside that of the default."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swacompile.tuning.database import best, groups
from swacompile.tuning.record import TuningRecord
from swacompile.tuning.tune import default_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A chosen record and the default's of the same round; None where the default was not measured in it."""

    chosen: TuningRecord
    default: TuningRecord | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the default the choice is."""
        if self.default is None or not self.default.median_us or not self.chosen.median_us:
            return None
        return self.default.median_us / self.chosen.median_us

    @property
    def changes(self) -> str:
        """The chosen Config's values that are not the default's."""
        if self.default is None:
            return str(self.chosen.config)
        before = self.default.config.as_dict()
        changed = [f"{name}={value}" for name, value in self.chosen.config.values if before.get(name) != value]
        return ", ".join(changed) or "default stays"


def gains(records: Iterable[TuningRecord]) -> list[Gain]:
    """One of each workload, device, number of threads and kernel revision that was measured successfully."""
    found = []
    for group in groups(records):
        chosen, default = best(group), default_of(group)
        if chosen is not None:
            beside = default if default is not None and default.rung == chosen.rung else None
            found.append(Gain(chosen=chosen, default=beside))
    return found


def needed(records: Sequence[TuningRecord]) -> list[TuningRecord]:
    """The records that a choice needs: of each workload, device and number of threads the best one and the default
    beside it, of the newest kernel revision.
    """
    newest: dict[object, list[TuningRecord]] = {}
    for group in groups(records):
        origin = group[0].provenance
        place = (str(group[0].workload), origin.device, origin.threads)
        if best(group) is not None and (place not in newest or group[-1].date >= newest[place][-1].date):
            newest[place] = group
    wanted = {r.line() for group in newest.values() for r in (best(group), default_of(group)) if r is not None}
    return [record for record in records if record.line() in wanted]


def markdown(found: Iterable[Gain]) -> str:
    """Tables for a document, one a target, device and number of threads; each says where it is from."""
    tables: dict[tuple[object, ...], list[Gain]] = {}
    for gain in sorted(found, key=lambda gain: str(gain.chosen.workload)):
        origin = gain.chosen.provenance
        place = (gain.chosen.target, origin.device, origin.driver, origin.threads, origin.versions)
        tables.setdefault(place, []).append(gain)
    return "\n\n".join(f"{_source(rows)}\n\n{_table(rows)}" for rows in tables.values())


def _source(rows: Sequence[Gain]) -> str:
    record = rows[0].chosen
    origin = record.provenance
    days = sorted({row.chosen.date[:10] for row in rows})
    revisions = ", ".join(sorted({row.chosen.provenance.revision for row in rows}))
    driver = f", driver {origin.driver}" if origin.driver else ""
    return (
        f"{record.target}: {origin.device}{driver}, {origin.threads} thread{'s' if origin.threads > 1 else ''}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}; kernels {revisions}; {origin.versions}"
    )


def _table(rows: Sequence[Gain]) -> str:
    lines = ["| workload | default, us | chosen, us | gain | spread | what differs |", "|---|---|---|---|---|---|"]
    for row in rows:
        record, default = row.chosen, row.default.median_us if row.default is not None else None
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        times = f"{_time(default)} | {_time(record.median_us)} | {ratio} | {record.spread or 0:.1%}"
        lines.append(f"| `{record.workload}` | {times} | {row.changes} |")
    return "\n".join(lines)


def _time(median_us: float | None) -> str:
    """Microseconds with three digits or more."""
    if median_us is None:
        return ""
    return f"{median_us:,.0f}" if median_us >= 100 else f"{median_us:.1f}"
