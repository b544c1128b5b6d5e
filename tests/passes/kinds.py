"""Random masks of the kinds beside a band, and their cells from the definition."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from swacompile.attention import Kind
from swacompile.band import Alignment, BandMask
from tests.passes.grammar import Case, Draw, Text, applied, band_text, moved, position_text
from tests.passes.masks import MaskModel


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCase:
    """A model, the kind of its mask, and the mask's cells for (positions of queries (S,1), keys (1,T))."""

    case: Case
    kind: Kind
    cells: Callable[[np.ndarray, np.ndarray], np.ndarray]
    alignment: Alignment


Written = tuple[str, Kind, Callable[[np.ndarray, np.ndarray], np.ndarray]]


def kind_case(draw: Draw) -> KindCase:
    queries, keys = draw.one(("S", "T"), ("S", "T"), ("S", "S"))
    alignment = draw.of(tuple(Alignment))
    text = Text(draw=draw)
    position = position_text(text, alignment)
    write = draw.one(_chunked, _dilated, _prefix, _global)
    seen, kind, cells = write(text, position, alignment)
    result, form = applied(text, moved(text, seen))
    model = MaskModel(
        body="\n".join(text.lines), result=result, form=form, constants=text.constants, queries=queries, keys=keys
    )
    return KindCase(case=Case(model=model, band=None), kind=kind, cells=cells, alignment=alignment)


def _in_band(place: np.ndarray, key: np.ndarray, left: int | None, right: int | None) -> np.ndarray:
    low, high = -np.inf if left is None else -left, np.inf if right is None else right
    return np.asarray((key - place >= low) & (key - place <= high))


def _chunked(text: Text, position: str, alignment: Alignment) -> Written:
    draw = text.draw
    size, shift = draw.between(2, 9), draw.one(0, 0, 1, 3)
    left, right = draw.one((None, 0), (None, 0), (None, None), (1, 0), (1, 1))

    def remainder(value: str) -> str:
        moved_to = text.node("Sub", value, text.number(shift)) if shift else value
        return text.node("Mod", moved_to, text.number(size))

    def start(value: str) -> str:
        return text.node("Sub", value, remainder(value))

    def number(value: str) -> str:
        divided = text.node("Sub", start(value), text.number(shift)) if shift else value
        return text.node("Div", divided, text.number(size))

    if alignment is Alignment.BOTTOM_RIGHT or shift:  # Div rounds toward zero, and positions may be negative
        same = text.node("Equal", start(position), start("k"))
    else:
        same = text.node("Equal", number(position), number("k"))
    band = band_text(text, BandMask(left=left, right=right, alignment=alignment), position)
    seen = text.node("And", *draw.one((same, band), (band, same)))

    def cells(place: np.ndarray, key: np.ndarray) -> np.ndarray:
        return ((place - shift) // size == (key - shift) // size) & _in_band(place, key, left, right)

    return seen, Kind.CHUNKED, cells


def _dilated(text: Text, position: str, alignment: Alignment) -> Written:
    draw = text.draw
    step = draw.between(2, 5)
    left, right = step * draw.between(1, 4), step * draw.between(0, 2)
    distance = draw.one(lambda: text.node("Sub", "k", position), lambda: text.node("Sub", position, "k"))()
    hit = draw.one(
        lambda: text.node("Equal", text.node("Mod", distance, text.number(step)), "i0"),
        lambda: text.node("Not", text.node("Cast", text.node("Mod", distance, text.number(step)), attributes="to = 9")),
    )()
    slack = draw.below(step)  # between two visible keys the band's end makes no difference
    band = band_text(text, BandMask(left=left + slack, right=right, alignment=alignment), position)

    def cells(place: np.ndarray, key: np.ndarray) -> np.ndarray:
        return ((key - place) % step == 0) & _in_band(place, key, left, right)

    return text.node("And", hit, band), Kind.DILATED, cells


def _prefix(text: Text, position: str, alignment: Alignment) -> Written:
    count, left = text.draw.between(2, 7), text.draw.one(None, 0, 1, 4)
    band = band_text(text, BandMask(left=left, right=0, alignment=alignment), position)
    first = text.draw.one(
        lambda: text.node("Less", "k", text.number(count)),
        lambda: text.node("Not", text.node("Greater", "k", text.number(count - 1))),
    )()

    def cells(place: np.ndarray, key: np.ndarray) -> np.ndarray:
        return (key < count) | _in_band(place, key, left, 0)

    return text.node("Or", *text.draw.one((band, first), (first, band))), Kind.PREFIX, cells


def _global(text: Text, position: str, alignment: Alignment) -> Written:
    keys, queries, side = text.draw.between(1, 4), text.draw.between(1, 4), text.draw.between(1, 4)
    band = band_text(text, BandMask(left=side, right=side, alignment=alignment), position)
    key = text.node("Less", "k", text.number(keys))
    query = text.node("Less", "q", text.number(queries))

    def cells(place: np.ndarray, kv_idx: np.ndarray) -> np.ndarray:
        first = np.arange(place.shape[0])[:, None] < queries
        return (kv_idx < keys) | first | _in_band(place, kv_idx, side, side)

    return text.node("Or", text.node("Or", band, key), query), Kind.GLOBAL_PLUS_BAND, cells
