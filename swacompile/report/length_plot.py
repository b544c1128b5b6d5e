"""What a sliding window buys, measured: time against length for full causal attention with ever fewer key/value heads, and with a window."""

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from swacompile.report.bench_cpu import Row, bench
from swacompile.report.cpu_contenders import Case

HEADS = 32
HEAD_SIZE = 128
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
WINDOW = 512
WIDTH, HEIGHT, MARGIN = 720, 440, 64
COLOURS = ("#06c", "#c60", "#393", "#909")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: milliseconds by length."""

    name: str
    points: tuple[tuple[int, float], ...]


def kinds(lengths: Sequence[int], window: int) -> tuple[tuple[str, tuple[Case, ...]], ...]:
    """The four lines as cases: MHA, GQA with 4 query heads to a key/value head, MQA, and GQA with the window."""
    rows = (
        ("MHA", HEADS, None),
        ("GQA", HEADS // 4, None),
        ("MQA", 1, None),
        (f"GQA, window {window}", HEADS // 4, window),
    )
    return tuple(
        (
            name,
            tuple(
                Case(
                    heads=HEADS,
                    kv_heads=kv_heads,
                    head_size=HEAD_SIZE,
                    queries=length,
                    keys=length,
                    window=length if width is None else min(width, length),
                )
                for length in lengths
            ),
        )
        for name, kv_heads, width in rows
    )


def measure(
    *, threads: int, lengths: Sequence[int] = LENGTHS, window: int = WINDOW, seconds: float = 1.0
) -> tuple[Series, ...]:
    """Our kernel's time on every point."""
    lines = kinds(lengths, window)
    rows = list(bench([case for _, cases in lines for case in cases], threads=threads, seconds=seconds, contenders=()))
    return tuple(_series(name, rows[i * len(lengths) : (i + 1) * len(lengths)]) for i, (name, _) in enumerate(lines))


def _series(name: str, rows: Iterable[Row]) -> Series:
    return Series(name=name, points=tuple((row.case.keys, 1e3 * row.median) for row in rows))


def svg(series: Sequence[Series], *, title: str) -> str:
    """Both axes logarithmic: a line's slope is the power of the length that the time grows with."""
    place = _Place.around([point for line in series for point in line.points])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">{html.escape(title)}</text>',
        *_axes(place),
    ]
    for line, colour in zip(series, COLOURS, strict=False):
        parts.extend(_line(line, colour, place))
    return "".join([*parts, "</svg>\n"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """From data to the picture. Bounds are powers of 2 of lengths and powers of 10 of milliseconds."""

    low_x: int
    high_x: int
    low_y: int
    high_y: int

    @classmethod
    def around(cls, points: Sequence[tuple[int, float]]) -> "_Place":
        lengths, times = [math.log2(x) for x, _ in points], [math.log10(y) for _, y in points]
        low_x, low_y = math.floor(min(lengths)), math.floor(min(times))
        return cls(
            low_x=low_x,
            high_x=max(math.ceil(max(lengths)), low_x + 1),
            low_y=low_y,
            high_y=max(math.ceil(max(times)), low_y + 1),
        )

    def x(self, length: float) -> float:
        share = (math.log2(length) - self.low_x) / (self.high_x - self.low_x)
        return round(MARGIN + share * (WIDTH - 3 * MARGIN), 1)

    def y(self, milliseconds: float) -> float:
        share = (math.log10(milliseconds) - self.low_y) / (self.high_y - self.low_y)
        return round(HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN), 1)


def _axes(place: _Place) -> Iterator[str]:
    bottom, right = HEIGHT - MARGIN, place.x(2**place.high_x)
    for power in range(place.low_x, place.high_x + 1):
        x = place.x(2**power)
        yield f'<path d="M{x} {MARGIN}V{bottom}" stroke="#ddd"/><text x="{x}" y="{bottom + 18}" text-anchor="middle">{2**power}</text>'
    for power in range(place.low_y, place.high_y + 1):
        y = place.y(10.0**power)
        yield f'<path d="M{MARGIN} {y}H{right}" stroke="#ddd"/><text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>'
    yield f'<text x="{(MARGIN + right) / 2}" y="{bottom + 40}" text-anchor="middle">length</text>'
    yield f'<text x="8" y="{MARGIN - 12}">milliseconds</text>'


def _line(line: Series, colour: str, place: _Place) -> Iterator[str]:
    points = [(place.x(length), place.y(time)) for length, time in line.points]
    path = " ".join(f"{x},{y}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)
    x, y = points[-1]
    yield f'<text x="{x + 8}" y="{y + 4}" fill="{colour}">{html.escape(line.name)}</text>'
