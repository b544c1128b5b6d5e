"""Random masks whose band is known by construction: many spellings of one band, and mutations that spoil it."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from swacompile.band import Alignment, BandMask
from tests.passes.masks import MaskModel, band_cells

Option = TypeVar("Option")
TILE = 64
BOUNDS = (0, 1, 2, 3, 4, 7, 15, TILE - 1, TILE, 1000)
HUGE = (2**31 - 2, 2**31 - 1, 2**31, 2**40)
LENGTHS = ((1, 1), (1, 9), (2, 2), (5, 5), (6, 9), (9, 6), (16, 16), (17, 23))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with a mask, and the band that it is (None after a mutation: whatever the cells say)."""

    model: MaskModel
    band: BandMask | None
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """Random choices with names, so that spellings read well."""

    source: random.Random

    def maybe(self, chance: float = 0.5) -> bool:
        return self.source.random() < chance

    def one(self, *options: Option) -> Option:
        return self.source.choice(options)

    def of(self, options: Sequence[Option]) -> Option:
        return self.source.choice(options)

    def below(self, end: int) -> int:
        return self.source.randrange(end)

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return self.source.randint(low, high)


@dataclass(slots=True, kw_only=True)
class Text:
    """Lines of an ONNX text model under construction."""

    draw: Draw
    lines: list[str] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)

    def node(self, operation: str, *operands: str, attributes: str = "") -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {operation}{f'<{attributes}>' if attributes else ''}({', '.join(operands)})")
        return name

    def number(self, value: int | float | str, sort: str = "int64") -> str:
        name = f"c{len(self.constants)}"
        self.constants[f"{sort} {name}"] = str(value)
        return name


def true_case(draw: Draw) -> Case:
    """A spelling of a band that is drawn at random, with the band."""
    queries, keys = _sizes(draw)
    band = _band(draw, queries, keys)
    while queries.isdigit() and not band_cells(band, int(queries), int(keys) if keys.isdigit() else 3000).any():
        band = _band(draw, queries, keys)
    text = Text(draw=draw)
    position = position_text(text, band.alignment)
    seen = band_text(text, band, position)
    seen = moved(text, seen)
    padded = keys != "1" and draw.maybe(0.2)
    if padded:
        shaped = text.node("Unsqueeze", text.node("Unsqueeze", "pad", "axis1"), "axis1")
        seen = text.node("And", seen, shaped)
    result, form = applied(text, seen)
    model = MaskModel(
        body="\n".join(text.lines), result=result, form=form, constants=text.constants, queries=queries, keys=keys,
        inputs=f"bool[B,{keys}] pad" if padded else "",
    )  # fmt: skip
    return Case(model=model, band=band, padded=padded)


def _sizes(draw: Draw) -> tuple[str, str]:
    if draw.maybe(0.25):
        queries, keys = draw.of(LENGTHS)
        return str(queries), str(keys)
    return draw.one(("S", "T"), ("S", "T"), ("S", "S"), ("1", "T"))


def _band(draw: Draw, queries: str, keys: str) -> BandMask:
    near = [
        *BOUNDS,
        *(int(n) + step for n in (queries, keys) if n.isdigit() for step in (-1, 0, 1) if int(n) + step >= 0),
    ]
    side: Callable[[], int | None] = lambda: draw.one(None, *[draw.of(near) for _ in range(6)], draw.of(HUGE), 0)  # noqa: E731
    left, right = side(), side()
    if draw.maybe(0.15) and right is not None:
        left, right = right + draw.below(4), -draw.below(right + 1)
    elif draw.maybe(0.15) and left is not None:
        left, right = -draw.below(left + 1), left + draw.below(4)
    return BandMask(left=left, right=right, alignment=draw.of(tuple(Alignment)))


# ---------------------------------------------------------------------------------------------------------- spellings


def position_text(text: Text, alignment: Alignment) -> str:
    """The query's position among the keys, (S,1)."""
    if alignment is Alignment.TOP_LEFT:
        return text.draw.one("q", text.node("Identity", "q"))
    past = text.node("Sub", "T", "S")
    return text.draw.one(
        lambda: text.node("Add", "q", past),
        lambda: text.node("Sub", "T", text.node("Sub", "S", "q")),
        lambda: text.node("Unsqueeze", text.node("Range", past, "T", "i1"), "axis1"),
    )()


def band_text(text: Text, band: BandMask, position: str) -> str:
    """The band as a bool (S,T)."""
    if band.left is None and band.right is None:
        return text.node("GreaterOrEqual", text.node("Add", "k", "q"), text.number(-5))
    if band.left is None or band.right is None:
        return _below(text, position, band.right) if band.left is None else _above(text, position, band.left)
    ways = [_conjunction, _conjunction, _conjunction, _centred, _difference]
    if band.left + band.right >= 1:
        ways.append(_union)
    return text.draw.of(ways)(text, band, position)


def _conjunction(text: Text, band: BandMask, position: str) -> str:
    assert band.left is not None and band.right is not None
    above, below = _above(text, position, band.left), _below(text, position, band.right)
    return _all(text, *text.draw.one((above, below), (below, above)))


def _all(text: Text, a: str, b: str) -> str:
    def cast(value: str) -> str:
        return text.node("Cast", value, attributes="to = 7")

    return text.draw.one(
        lambda: text.node("And", a, b),
        lambda: text.node("And", a, b),
        lambda: text.node("And", text.node("And", "yes", a), b),
        lambda: text.node("Not", text.node("Or", text.node("Not", a), text.node("Not", b))),
        lambda: text.node("Where", a, b, "no"),
        lambda: text.node("Cast", text.node("Mul", cast(a), cast(b)), attributes="to = 9"),
        lambda: text.node("Equal", text.node("Add", cast(a), cast(b)), "i2"),
        lambda: text.node("Greater", text.node("Min", cast(a), cast(b)), "i0"),
    )()


def _centred(text: Text, band: BandMask, position: str) -> str:
    """abs(2 (k - p) + left - right) <= left + right."""
    assert band.left is not None and band.right is not None
    distance = text.node("Sub", "k", position)
    if band.left == band.right:
        return text.node("LessOrEqual", text.node("Abs", distance), text.number(band.left))
    doubled = text.node("Add", text.node("Mul", distance, "i2"), text.number(band.left - band.right))
    return text.node("Less", text.node("Abs", doubled), text.number(band.left + band.right + 1))


def _difference(text: Text, band: BandMask, position: str) -> str:
    """Cells below the upper edge and not below the lower."""
    assert band.left is not None
    return text.node("Xor", _below(text, position, band.right), _below(text, position, -band.left - 1))


def _union(text: Text, band: BandMask, position: str) -> str:
    """Two bands that overlap or touch."""
    assert band.left is not None and band.right is not None
    cut = text.draw.between(-band.left, band.right - 1)
    first = BandMask(left=band.left, right=min(band.right, cut + text.draw.below(2)), alignment=band.alignment)
    second = BandMask(left=-cut - 1, right=band.right, alignment=band.alignment)
    bands = text.draw.one((first, second), (second, first))
    one, other = (_conjunction(text, part, position) for part in bands)
    return text.node("Or", text.node("Or", "no", one), other)


def _above(text: Text, position: str, left: int) -> str:
    """k - p >= -left."""
    draw = text.draw
    behind = lambda: text.node("Sub", position, "k")  # noqa: E731
    factor = draw.between(2, 5)
    ways: list[Callable[[], str]] = [
        lambda: text.node("GreaterOrEqual", "k", text.node("Sub", position, text.number(left))),
        lambda: text.node("Greater", "k", text.node("Sub", position, text.number(left + 1))),
        lambda: text.node("Less", behind(), text.number(left + 1)),
        lambda: text.node("Not", text.node("Less", "k", text.node("Add", position, text.number(-left)))),
        lambda: text.node(
            "Less",
            text.node("Mul", behind(), text.number(factor)),
            text.number(factor * (left + 1) - draw.below(factor)),
        ),
        lambda: text.node("Equal", text.node("Max", behind(), text.number(left)), text.number(left)),
        lambda: (
            text.node("LessOrEqual", text.node("Div", text.node("Max", behind(), "i0"), text.number(left + 1)), "i0")
            if left >= 0
            else ways[0]()
        ),
        lambda: _as_float(text, behind(), "Less", left + 0.5) if abs(left) < 1 << 20 else ways[0](),
        lambda: _as_int32(text, behind(), "LessOrEqual", left) if abs(left) < 1 << 20 else ways[0](),
        lambda: text.node("Where", text.node("Greater", behind(), text.number(left)), "no", "yes"),
    ]
    return draw.of(ways)()


def _below(text: Text, position: str, right: int | None) -> str:
    """k - p <= right."""
    assert right is not None
    draw = text.draw
    ahead = lambda: text.node("Sub", "k", position)  # noqa: E731
    ways: list[Callable[[], str]] = [
        lambda: text.node("LessOrEqual", "k", text.node("Add", position, text.number(right))),
        lambda: text.node("LessOrEqual", ahead(), text.number(right)),
        lambda: text.node("Greater", text.number(right + 1), ahead()),
        lambda: text.node("Not", text.node("Greater", ahead(), text.number(right))),
        lambda: text.node("GreaterOrEqual", text.node("Neg", ahead()), text.number(-right)),
        lambda: text.node("Equal", text.node("Min", ahead(), text.number(right)), ahead()),
        lambda: _triangle(text, position, right),
        lambda: _as_float(text, ahead(), "LessOrEqual", right + 0.25) if abs(right) < 1 << 20 else ways[0](),
    ]
    return draw.of(ways)()


def _as_float(text: Text, value: str, compare: str, bound: float) -> str:
    return text.node(compare, text.node("Cast", value, attributes="to = 1"), text.number(bound, "float"))


def _as_int32(text: Text, value: str, compare: str, bound: int) -> str:
    return text.node(compare, text.node("Cast", value, attributes="to = 6"), text.number(bound, "int32"))


def _triangle(text: Text, position: str, right: int) -> str:
    """A lower triangle, where positions start at 0."""
    if position != "q" or abs(right) > 1 << 40:
        return text.node("LessOrEqual", "k", text.node("Add", position, text.number(right)))
    shape = text.node(
        "Concat", text.node("Unsqueeze", "S", "axis0"), text.node("Unsqueeze", "T", "axis0"), attributes="axis = 0"
    )
    ones = text.node("Expand", text.node("Cast", "yes", attributes="to = 7"), shape)
    cut = text.node("Trilu", ones, text.number(right), attributes="upper = 0")
    return text.node("Cast", cut, attributes="to = 9")


def moved(text: Text, seen: str) -> str:
    """The same cells after views that cancel out."""
    draw = text.draw
    return draw.one(
        lambda: seen,
        lambda: seen,
        lambda: text.node(
            "Transpose", text.node("Transpose", seen, attributes="perm = [1, 0]"), attributes="perm = [1, 0]"
        ),
        lambda: text.node("Unsqueeze", text.node("Unsqueeze", seen, "axis0"), "axis0"),
        lambda: text.node("Slice", seen, text.number(0, "int64[1]"), text.number(2**63 - 1, "int64[1]"), "axis1"),
        lambda: text.node("Gather", seen, "q_line", attributes="axis = 0"),
        lambda: text.node("Not", text.node("Not", seen)),
    )()


def applied(text: Text, seen: str) -> tuple[str, str]:
    """(result, form): how the mask reaches the scores."""
    draw = text.draw
    hidden = draw.one("lowest", "minus_inf")
    float_of_hidden = lambda: text.node("Cast", text.node("Not", seen), attributes="to = 1")  # noqa: E731
    return draw.one(
        lambda: (seen, "seen"),
        lambda: (seen, "seen"),
        lambda: (text.node("Where", seen, "zero", hidden), "added"),
        lambda: (text.node("Where", text.node("Not", seen), hidden, "zero"), "added"),
        lambda: (text.node("Mul", float_of_hidden(), "lowest"), "added"),
        lambda: (text.node("Where", seen, "scores", hidden), "scores"),
    )()


# ---------------------------------------------------------------------------------------------------------- mutations


def mutant(draw: Draw) -> Case:
    """A true case with one thing changed in its text."""
    case = true_case(draw)
    lines = case.model.body.split("\n")
    for _ in range(20):
        changed = draw.of(MUTATIONS)(draw, lines, dict(case.model.constants))
        if changed is not None:
            body, constants = changed
            return replace(case, model=replace(case.model, body="\n".join(body), constants=constants), band=None)
    return replace(case, band=None)


Mutation = Callable[[Draw, Sequence[str], dict[str, str]], tuple[list[str], dict[str, str]] | None]


def _swap_operation(
    draw: Draw, lines: Sequence[str], constants: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    swaps = {
        "Greater": "GreaterOrEqual", "GreaterOrEqual": "Greater", "Less": "LessOrEqual", "LessOrEqual": "Less", "And": "Or", "Or": "And",
        "Add": "Sub", "Sub": "Add", "Xor": "Or", "Max": "Min", "Min": "Max",
    }  # fmt: skip
    places = [i for i, line in enumerate(lines) if _operation(line) in swaps]
    if not places:
        return None
    at = draw.of(places)
    operation = _operation(lines[at])
    return [*lines[:at], lines[at].replace(f"= {operation}", f"= {swaps[operation]}"), *lines[at + 1 :]], constants


def _operation(line: str) -> str:
    return re.match(r"\w+ = (\w+)", line).group(1)  # type: ignore[union-attr]


def _shift_constant(
    draw: Draw, lines: Sequence[str], constants: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    names = [
        name
        for name in constants
        if name.startswith("int64 ") and any(re.search(rf"\b{name[6:]}\b", line) for line in lines)
    ]
    if not names:
        return None
    name = draw.of(names)
    return list(lines), constants | {name: str(int(constants[name]) + draw.one(-1, 1))}


def _drop_conjunct(
    draw: Draw, lines: Sequence[str], constants: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    places = [i for i, line in enumerate(lines) if _operation(line) in ("And", "Or", "Not")]
    if not places:
        return None
    at = draw.of(places)
    name, operands = re.match(r"(\w+) = \w+\((.*)\)", lines[at]).groups()  # type: ignore[union-attr]
    return [*lines[:at], f"{name} = Identity({draw.of(operands.split(', '))})", *lines[at + 1 :]], constants


def _swap_operands(
    draw: Draw, lines: Sequence[str], constants: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    places = [
        i
        for i, line in enumerate(lines)
        if _operation(line) in ("Sub", "Greater", "Less", "LessOrEqual", "GreaterOrEqual")
    ]
    if not places:
        return None
    at = draw.of(places)
    head, first, second = re.match(r"(\w+ = \w+)\((\w+), (\w+)\)", lines[at]).groups()  # type: ignore[union-attr]
    return [*lines[:at], f"{head}({second}, {first})", *lines[at + 1 :]], constants


MUTATIONS: tuple[Mutation, ...] = (_swap_operation, _shift_constant, _drop_conjunct, _swap_operands)


# ------------------------------------------------------------------------------------------------------------- arrays


def array_case(draw: Draw, *, flipped: bool) -> Case:
    """A mask that is a constant array; `flipped`: with one cell the other way round."""
    queries, keys = draw.of([lengths for lengths in LENGTHS if min(lengths) > 1])
    left, right = (draw.one(None, *range(max(queries, keys))) for _ in range(2))
    band = BandMask(left=left, right=right)
    cells = band_cells(band, queries, keys)
    if flipped:
        cells[draw.below(queries), draw.below(keys)] ^= True
    lead = draw.one((), (1, 1), (2,), (1, 2))
    array = np.broadcast_to(cells, (*lead, queries, keys)).copy()
    form = draw.one("seen", "added")
    if form == "added":
        array = np.where(array, np.float32(0), np.float32(draw.one(np.finfo(np.float32).min, -np.inf)))
    model = MaskModel(
        body=f"result = Identity({'array'})",
        result="result",
        form=form,
        arrays={"array": array},
        queries=str(queries),
        keys=str(keys),
    )
    return Case(model=model, band=None if flipped else band)
