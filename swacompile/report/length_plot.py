"""What a sliding window buys, measured: time against length for full causal attention with ever fewer key/value heads, and with a window.

The picture is a list of lines, dots and words, which `svg` and `png` write down.
"""

import html
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from swacompile.errors import ArgumentError
from swacompile.report.bench_cpu import Row, bench
from swacompile.report.cpu_cases import Case
from swacompile.target import Target
from swacompile.tuning.database import Database

HEADS = 32
HEAD_SIZE = 128
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
WINDOW = 512
WIDTH, HEIGHT, MARGIN = 720, 440, 64
COLOURS = ("#0066cc", "#cc6600", "#339933", "#990099")
GREY, BLACK = "#dddddd", "#000000"
FONT_SIZE = 12
PIXELS = 2
"""Of a PNG for each unit of length."""


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
    *,
    threads: int,
    lengths: Sequence[int] = LENGTHS,
    window: int = WINDOW,
    seconds: float = 1.0,
    target: Target | None = None,
    database: Database | None = None,
) -> tuple[Series, ...]:
    """Our kernel's time on every point."""
    lines = kinds(lengths, window)
    cases = [case for _, several in lines for case in several]
    rows = list(bench(cases, threads=[threads], seconds=seconds, contenders=(), target=target, database=database))
    return tuple(_series(name, rows[i * len(lengths) : (i + 1) * len(lengths)]) for i, (name, _) in enumerate(lines))


def _series(name: str, rows: Iterable[Row]) -> Series:
    return Series(name=name, points=tuple((row.case.keys, 1e3 * row.median) for row in rows))


def require_format(suffix: str) -> None:
    """Raises ArgumentError for another suffix than .svg and .png, or for .png without Pillow."""
    if suffix not in (".svg", ".png"):
        raise ArgumentError(f"expected a picture's file with suffix .svg or .png, found {suffix!r}")
    if suffix == ".png" and find_spec("PIL") is None:
        raise ArgumentError("a .png is drawn with Pillow, which is not installed: pip install pillow, or name a .svg")


def written(series: Sequence[Series], *, title: str, suffix: str) -> bytes:
    """The picture as a file with this suffix. Raises ArgumentError as `require_format` does."""
    require_format(suffix)
    return png(series, title=title) if suffix == ".png" else svg(series, title=title).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Path:
    points: tuple[tuple[float, float], ...]
    colour: str
    width: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dot:
    x: float
    y: float
    colour: str
    radius: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """`anchor` as SVG spells it; `y` is the base line."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    colour: str = BLACK


_Shape = _Path | _Dot | _Words


def svg(series: Sequence[Series], *, title: str) -> str:
    """Both axes logarithmic: a line's slope is the power of the length that the time grows with."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="{FONT_SIZE}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *map(_svg_shape, _picture(series, title)),
            "</svg>\n",
        ]
    )


def _svg_shape(shape: _Shape) -> str:
    match shape:
        case _Path(points=points, colour=colour, width=width):
            path = " ".join(f"{x},{y}" for x, y in points)
            return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        case _Dot(x=x, y=y, colour=colour, radius=radius):
            return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'
        case _Words(x=x, y=y, text=text, anchor=anchor, colour=colour):
            return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def png(series: Sequence[Series], *, title: str) -> bytes:
    """The same picture as `svg`, drawn with Pillow."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH * PIXELS, HEIGHT * PIXELS), "#ffffff")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT_SIZE * PIXELS)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in _picture(series, title):
        match shape:
            case _Path(points=points, colour=colour, width=width):
                draw.line([(x * PIXELS, y * PIXELS) for x, y in points], fill=colour, width=width * PIXELS)
            case _Dot(x=x, y=y, colour=colour, radius=radius):
                draw.circle((x * PIXELS, y * PIXELS), radius * PIXELS, fill=colour)
            case _Words(x=x, y=y, text=text, anchor=anchor, colour=colour):
                draw.text((x * PIXELS, y * PIXELS), text, fill=colour, font=font, anchor=anchors[anchor])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _picture(series: Sequence[Series], title: str) -> Iterator[_Shape]:
    place = _Place.around([point for line in series for point in line.points])
    yield _Words(x=MARGIN, y=24, text=title)
    yield from _axes(place)
    for line, colour, label in zip(series, COLOURS, _label_places(series, place), strict=False):
        yield from _line(line, colour, place, label)


def _label_places(series: Sequence[Series], place: "_Place") -> list[float]:
    """Base lines of the lines' names, beside their ends but apart from each other."""
    ends = sorted((place.y(line.points[-1][1]), index) for index, line in enumerate(series))
    found = [0.0] * len(series)
    lowest = float(MARGIN)
    for y, index in ends:
        found[index] = lowest = max(y + FONT_SIZE / 3, lowest)
        lowest += FONT_SIZE + 2
    return found


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


def _axes(place: _Place) -> Iterator[_Shape]:
    bottom, right = HEIGHT - MARGIN, place.x(2**place.high_x)
    for power in range(place.low_x, place.high_x + 1):
        x = place.x(2**power)
        yield _Path(points=((x, MARGIN), (x, bottom)), colour=GREY)
        yield _Words(x=x, y=bottom + 18, text=str(2**power), anchor="middle")
    for power in range(place.low_y, place.high_y + 1):
        y = place.y(10.0**power)
        yield _Path(points=((MARGIN, y), (right, y)), colour=GREY)
        yield _Words(x=MARGIN - 8, y=y + 4, text=f"{10.0**power:g}", anchor="end")
    yield _Words(x=(MARGIN + right) / 2, y=bottom + 40, text="length", anchor="middle")
    yield _Words(x=8, y=MARGIN - 12, text="milliseconds")


def _line(line: Series, colour: str, place: _Place, label: float) -> Iterator[_Shape]:
    points = tuple((place.x(length), place.y(time)) for length, time in line.points)
    yield _Path(points=points, colour=colour, width=2)
    yield from (_Dot(x=x, y=y, colour=colour) for x, y in points)
    yield _Words(x=points[-1][0] + 8, y=label, text=line.name, colour=colour)
