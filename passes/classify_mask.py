"""Masks that are no band: guess what else they are. Every guess is a claim that prove_band puts to the solver.

1. chunked: queries see keys of their own chunk, perhaps within a band. The chunk size is a divisor in the formula.
2. dilated: of a band, every d-th key.
3. prefix, global: a band, or keys that every query sees, or queries that see every key; perhaps all under a causal bound.
4. blocks: a band, or both the query and the key belong to a marked set (a bidirectional prefix, the tokens of an image).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from swacompile.attention import Axes, Kind
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import (
    FALSE,
    TRUE,
    Expr,
    Op,
    Sort,
    add,
    and_,
    const_int,
    eq,
    floordiv,
    integer,
    mod,
    not_,
    or_,
    show,
    sub,
    substitute,
    truncdiv,
    walk,
)
from swacompile.passes.probe_band import Probe, candidate_bands, claim_of
from swacompile.passes.residuals import offset_of, run_time_data

Divide = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A guess: the mask is `claim`. `band` encloses a chunked or dilated mask, and stands beside a prefix or global tokens."""

    kind: Kind
    claim: Expr
    band: BandMask
    words: str


def patterns(mask: Expr, axes: Axes) -> Iterator[Pattern]:
    """Guesses, likelier ones first; none of them is a plain band. `mask` may read run-time data."""
    yield from _chunked(mask, axes)
    yield from _dilated(mask, axes)
    yield from _with_global(mask, axes)
    yield from _with_blocks(mask, axes)


def _alignments(axes: Axes) -> tuple[Alignment, ...]:
    return (Alignment.TOP_LEFT,) if axes.queries == axes.keys else tuple(Alignment)


def _divisors(mask: Expr, ops: Iterable[Op]) -> list[int]:
    found = {const_int(node.args[1]) for node in walk(mask) if node.op in ops}
    return sorted(divisor for divisor in found if divisor is not None and divisor >= 2)


# --------------------------------------------------------------------------------------------------------- 1. chunked


def _chunked(mask: Expr, axes: Axes) -> Iterator[Pattern]:
    for chunk in _divisors(mask, (Op.FLOORDIV, Op.MOD)):
        for alignment in _alignments(axes):
            for shift in _shifts(mask, axes, chunk):
                for divide in (floordiv, truncdiv) if shift != integer(0) else (floordiv,):
                    yield _chunks(mask, axes, chunk, shift, alignment, divide)


def _shifts(mask: Expr, axes: Axes, chunk: int) -> list[Expr]:
    """Where the first chunk may start: what is taken from the key before it is divided."""
    dividends = [
        node.args[0] for node in walk(mask) if node.op in (Op.FLOORDIV, Op.MOD) and const_int(node.args[1]) == chunk
    ]
    shifts = [sub(axes.key, dividend) for dividend in dividends] + [integer(0)]
    shifts += [integer(number % chunk) for number in map(const_int, shifts) if number is not None]
    return list(dict.fromkeys(shift for shift in shifts if not {axes.key, axes.query} & set(walk(shift))))


def _chunks(mask: Expr, axes: Axes, chunk: int, shift: Expr, alignment: Alignment, divide: Divide) -> Pattern:
    """Chunks from `shift` on. Division that rounds toward zero makes one chunk of what lies before it and the first."""
    place = add(axes.query, offset_of(alignment, axes))
    number = integer(chunk)
    same = eq(divide(sub(place, shift), number), divide(sub(axes.key, shift), number))
    left, right = _within_chunk(Probe(mask=mask, axes=axes, alignment=alignment), chunk, shift)
    inner = BandMask(left=left, right=right, alignment=alignment)
    widest = chunk - 1 if divide is floordiv else 2 * chunk - 2
    enclosing = BandMask(
        left=widest if left is None else left, right=widest if right is None else right, alignment=alignment
    )
    words = [f"chunked attention of chunk size {chunk}"]
    words += [f"shifted by {show(shift)}"] if shift != integer(0) else []
    words += ["what lies before counted to the first chunk"] if divide is truncdiv else []
    words += (
        ["causal"] if inner.causal and inner.left is None else [f"within the band {inner}"] if not inner.is_full else []
    )
    return Pattern(kind=Kind.CHUNKED, claim=and_(same, claim_of(inner, axes)), band=enclosing, words=", ".join(words))


def _within_chunk(probe: Probe, chunk: int, shift: Expr) -> tuple[int | None, int | None]:
    """How far the last query of a chunk sees to the left, and the first to the right; None = as far as the chunk goes."""
    moved = probe.value(shift)
    first = (int(moved) if moved is not None else 0) - probe.offset
    middle = first + ((probe.queries // 2 - first) // chunk) * chunk
    start = middle if middle >= 0 else first
    if not (start >= 0 and start + chunk <= probe.queries and probe.shows(start, 0)):
        return None, 0 if probe.shows(0, 1) is False else None
    left = probe.last_shown(start + chunk - 1, -1, 0, chunk)
    right = probe.last_shown(start, 1, 0, chunk)
    return (None if left >= chunk - 1 else left), (None if right >= chunk - 1 else right)


# --------------------------------------------------------------------------------------------------------- 2. dilated


def _dilated(mask: Expr, axes: Axes) -> Iterator[Pattern]:
    for step in _divisors(mask, (Op.MOD, Op.FLOORDIV)):
        for alignment in _alignments(axes):
            probe = Probe(mask=mask, axes=axes, alignment=alignment)
            left, right = _steps(probe, step, -1), _steps(probe, step, 1)
            band = BandMask(left=left, right=right, alignment=alignment)
            distance = sub(axes.key, add(axes.query, offset_of(alignment, axes)))
            claim = and_(claim_of(band, axes), eq(mod(distance, integer(step)), integer(0)))
            yield Pattern(
                kind=Kind.DILATED,
                claim=claim,
                band=band,
                words=f"one key in {step} of the band {band} (dilation {step})",
            )


def _steps(probe: Probe, step: int, sign: int) -> int | None:
    """The farthest visible distance that is a multiple of `step`, None = unbounded."""
    q_idx = probe.queries - 1 if sign < 0 else 0
    edge = (q_idx + probe.offset if sign < 0 else probe.keys - 1 - probe.offset - q_idx) // step
    if edge < 1 or probe.shows(q_idx, sign * step * edge):
        return None
    return step * probe.last_shown(q_idx, sign, 0, edge, step)


# -------------------------------------------------------------------------------------------------- 3. prefix, global


@dataclass(frozen=True, slots=True, kw_only=True)
class _Openers:
    """Conditions on the key alone, or on the query alone, under which all that `outer` allows is visible."""

    keys: tuple[Expr, ...]
    queries: tuple[Expr, ...]
    outer: BandMask


def _with_global(mask: Expr, axes: Axes) -> Iterator[Pattern]:
    for alignment in _alignments(axes):
        for right in (None, 0):
            outer = BandMask(left=None, right=right, alignment=alignment)
            openers = _Openers(
                keys=_opening(mask, axes.key, axes, outer), queries=_opening(mask, axes.query, axes, outer), outer=outer
            )
            if openers.keys or openers.queries:
                yield from _global(mask, axes, openers)


def _opening(mask: Expr, own: Expr, axes: Axes, outer: BandMask) -> tuple[Expr, ...]:
    """The conditions on `own` alone under which the mask is `outer`."""
    wanted = claim_of(outer, axes)
    found = []
    for condition in _conditions_on(mask, own, axes):
        for literal in (condition, not_(condition)):
            if _assuming(mask, literal, True) == wanted:
                found.append(literal)
    return tuple(found)


def _conditions_on(mask: Expr, own: Expr, axes: Axes) -> Iterator[Expr]:
    """The largest conditions in the formula that read `own` and none of query, key and head beside it."""
    others = {axes.query, axes.key, axes.head} - {own}
    covered: set[Expr] = set()
    for node in walk(mask):
        nodes = set(walk(node))
        if node.sort is Sort.BOOL and node not in covered and own in nodes and not others & nodes:
            covered |= nodes
            yield node


def _assuming(mask: Expr, literal: Expr, holds: bool) -> Expr:
    value = TRUE if holds else FALSE
    return substitute(mask, {literal: value, not_(literal): not_(value)})


def _global(mask: Expr, axes: Axes, openers: _Openers) -> Iterator[Pattern]:
    inner = mask
    for literal in (*openers.keys, *openers.queries):
        inner = _assuming(inner, literal, False)
    if run_time_data(inner):
        return
    for band in candidate_bands(inner, axes):
        claim = and_(claim_of(openers.outer, axes), or_(claim_of(band, axes), *openers.keys, *openers.queries))
        kind = _kind(openers, band, axes)
        yield Pattern(kind=kind, claim=claim, band=band, words=_words(openers, band, kind))


def _kind(openers: _Openers, band: BandMask, axes: Axes) -> Kind:
    """A prefix is a run of first keys that queries see although they lie ahead; all else is a set of global tokens."""
    is_run = all(_is_run_of_first(literal, axes) for literal in openers.keys)
    prefix = not openers.queries and openers.outer.right is None and band.right is not None and is_run
    return Kind.PREFIX if prefix else Kind.GLOBAL_PLUS_BAND


def _is_run_of_first(literal: Expr, axes: Axes) -> bool:
    """Whether a condition is key <= something."""
    return literal.op is Op.LE0 and axes.key not in walk(sub(literal.args[0], axes.key))


def _words(openers: _Openers, band: BandMask, kind: Kind) -> str:
    if kind is Kind.PREFIX:
        return f"the band {band} and a prefix that every query sees: {' or '.join(show(key) for key in openers.keys)}"
    parts = [f"keys that every query sees: {' or '.join(show(key) for key in openers.keys)}"] if openers.keys else []
    parts += (
        [f"queries that see every key: {' or '.join(show(query) for query in openers.queries)}"]
        if openers.queries
        else []
    )
    causal = ", all of it causal" if openers.outer.causal else ""
    return f"the band {band} and {' and '.join(parts)}{causal}"


# ---------------------------------------------------------------------------------------------------------- 4. blocks


def _with_blocks(mask: Expr, axes: Axes) -> Iterator[Pattern]:
    for node in walk(mask):
        if node.op is not Op.AND:
            continue
        marks = [arg for arg in node.args if axes.key in walk(arg) and axes.query not in walk(arg)]
        if not any(node == and_(mark, substitute(mark, {axes.key: axes.query})) for mark in marks):
            continue
        inner = substitute(mask, {node: FALSE})
        if run_time_data(inner):
            continue
        for band in candidate_bands(inner, axes):
            words = f"the band {band} and a set of positions that see one another: {show(marks[0])}"
            kind = Kind.PREFIX if _is_run_of_first(marks[0], axes) else Kind.GLOBAL_PLUS_BAND
            yield Pattern(kind=kind, claim=or_(node, claim_of(band, axes)), band=band, words=words)
