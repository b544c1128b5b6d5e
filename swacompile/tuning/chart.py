"""A page with a chart of each search and one of tuned against default, as HTML with inline SVG: no script, nothing to load."""

import html
import math
from collections.abc import Iterator, Sequence

from swacompile.tuning.record import Origin, Status, TuningRecord
from swacompile.tuning.tune import Tuned

WIDTH, HEIGHT, MARGIN = 760, 260, 56
BAR = 22
_STYLE = """body{font:14px sans-serif;margin:2em;max-width:52em}svg{background:#fff}text{font:12px sans-serif;fill:#333}
.axis{stroke:#888}.best{fill:none;stroke:#06c;stroke-width:2}.trial{fill:#999}.default{fill:#c60}.failed{fill:#c00}
.bar{fill:#06c}.base{fill:#c60}"""


def page(results: Sequence[Tuned]) -> str:
    """The whole page."""
    parts = [_gains(results), *(_search(tuned) for tuned in results)]
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Tuning</title><style>{_STYLE}</style>'
        f"<h1>Tuning</h1>{''.join(parts)}</html>\n"
    )


def _gains(results: Sequence[Tuned]) -> str:
    """Bars: the chosen Config's time as a share of the default's, which is 1."""
    rows = [(tuned, tuned.gain) for tuned in results]
    bars = "".join(_bar(i, str(tuned.workload), gain) for i, (tuned, gain) in enumerate(rows) if gain is not None)
    height = BAR * 2 * len(rows) + 10
    return (
        "<h2>Tuned against default</h2><p>Time of a call; the default's is the orange bar, the chosen Config's the blue one.</p>"
        f'<svg width="{WIDTH}" height="{height}" role="img" aria-label="time of tuned kernels relative to the default">{bars}</svg>'
    )


def _bar(row: int, name: str, gain: float) -> str:
    top, whole = row * 2 * BAR + 4, WIDTH - 420
    return (
        f'<text x="0" y="{top + 20}">{html.escape(name)}</text>'
        f'<rect class="base" x="340" y="{top}" width="{whole}" height="12"/>'
        f'<rect class="bar" x="340" y="{top + 14}" width="{whole / gain:.1f}" height="12"/>'
        f'<text x="{WIDTH - 70}" y="{top + 20}">{gain:.2f} times</text>'
    )


def _search(tuned: Tuned) -> str:
    """Time of each candidate in the order of measuring (logarithmic), with the best so far as a line."""
    first = min((record.rung for record in tuned.records), default=0)
    screened = [record for record in tuned.records if record.rung == first]
    times = [record.median_us for record in screened if record.median_us is not None]
    title = f"<h2>{html.escape(str(tuned.workload))}</h2><p>{html.escape(str(tuned.choice))}</p>"
    if not times:
        return title + "<p>Nothing was measured successfully.</p>"
    low, high = math.log(min(times)), math.log(max(times) * 1.02)
    place = _Place(len(screened), low - 0.02, high)
    marks = "".join(_marks(screened, place))
    labels = "".join(
        f'<text x="4" y="{place.y(value):.0f}">{value:,.0f} us</text>' for value in sorted({min(times), max(times)})
    )
    axes = (
        f'<line class="axis" x1="{MARGIN + 20}" y1="{HEIGHT - 20}" x2="{WIDTH}" y2="{HEIGHT - 20}"/>'
        f'<text x="{WIDTH - 190}" y="{HEIGHT - 4}">candidates, in order of measuring</text>'
    )
    return f'{title}<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="search">{axes}{labels}{marks}</svg>'


class _Place:
    """From a candidate's number and time to a point."""

    def __init__(self, count: int, low: float, high: float) -> None:
        self._count, self._low, self._high = max(count - 1, 1), low, high

    def x(self, number: int) -> float:
        return MARGIN + 30 + (WIDTH - MARGIN - 40) * number / self._count

    def y(self, time_us: float) -> float:
        return HEIGHT - 30 - (HEIGHT - 50) * (math.log(time_us) - self._low) / (self._high - self._low)


def _marks(records: Sequence[TuningRecord], place: _Place) -> Iterator[str]:
    best, line = math.inf, []
    for number, record in enumerate(records):
        x, label = place.x(number), html.escape(f"{record.config} {record.status} {record.message}")
        if record.status is not Status.OK or record.median_us is None:
            yield f'<rect class="failed" x="{x - 3:.0f}" y="6" width="6" height="6"><title>{label}</title></rect>'
            continue
        best = min(best, record.median_us)
        line.append(f"{x:.1f},{place.y(best):.1f}")
        kind = "default" if record.origin is Origin.DEFAULT else "trial"
        shown = f"{label} {record.median_us:.1f} us"
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{place.y(record.median_us):.1f}" r="4"><title>{shown}</title></circle>'
    yield f'<polyline class="best" points="{" ".join(line)}"/>'
