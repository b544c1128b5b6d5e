"""Constant masks that are no band: find out from their cells what else they are. The answer is exact, as every cell is compared."""

from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

from swacompile.attention import Kind
from swacompile.band import Alignment, BandMask
from swacompile.passes.arrays import band_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CellPattern:
    """What a constant mask is; `band` as in classify_mask.Pattern."""

    kind: Kind
    band: BandMask
    words: str


def classify_cells(shown: np.ndarray) -> CellPattern | None:
    """The pattern of a boolean mask (queries, keys), None where it is none that has a name."""
    return _dilated(shown) or _chunked(shown) or _with_global(shown)


def _distances(shown: np.ndarray) -> np.ndarray:
    return np.arange(shown.shape[1])[None, :] - np.arange(shown.shape[0])[:, None]


def _dilated(shown: np.ndarray) -> CellPattern | None:
    distance = _distances(shown)
    seen = np.unique(distance[shown])
    step = gcd(*(int(d) for d in seen)) if seen.size else 0
    if step < 2 or not np.array_equal(
        shown, (distance % step == 0) & (distance >= seen.min()) & (distance <= seen.max())
    ):
        return None
    band = BandMask(left=-int(seen.min()), right=int(seen.max()))
    return CellPattern(kind=Kind.DILATED, band=band, words=f"one key in {step} of the band {band} (dilation {step})")


def _chunked(shown: np.ndarray) -> CellPattern | None:
    queries, keys = shown.shape
    for alignment in (Alignment.TOP_LEFT, Alignment.BOTTOM_RIGHT) if queries != keys else (Alignment.TOP_LEFT,):
        offset = keys - queries if alignment is Alignment.BOTTOM_RIGHT else 0
        cuts = _cuts(shown, offset)
        sizes = {b - a for a, b in pairwise(cuts)} or {max(cut, keys - cut) for cut in cuts}
        if len(sizes) != 1:
            continue
        (size,) = sizes
        shift = cuts[0] % size
        place = np.arange(queries)[:, None] + offset
        same = (place - shift) // size == (np.arange(keys)[None, :] - shift) // size
        distance = _distances(shown) - offset
        seen = distance[shown]
        if np.array_equal(shown, same & (distance >= seen.min()) & (distance <= seen.max())):
            words = f"chunked attention of chunk size {size}" + (f", shifted by {shift}" if shift else "")
            words += ", causal" if seen.max() == 0 else ""
            band = BandMask(left=-int(seen.min()), right=int(seen.max()), alignment=alignment)
            return CellPattern(kind=Kind.CHUNKED, band=band, words=words)
    return None


def _cuts(shown: np.ndarray, offset: int) -> list[int]:
    """The keys before which a new chunk starts: no query on either side sees a key on the other."""
    queries, keys = shown.shape
    if not shown.any():
        return []
    first = np.where(shown.any(1), shown.argmax(1), keys)
    last = np.where(shown.any(1), keys - 1 - shown[:, ::-1].argmax(1), -1)
    cuts = []
    for cut in range(1, keys):
        row = min(max(cut - offset, 0), queries)
        if first[row:].min(initial=keys) >= cut and last[:row].max(initial=-1) < cut:
            cuts.append(cut)
    return cuts


def _with_global(shown: np.ndarray) -> CellPattern | None:
    distance = _distances(shown)
    for outer, right in ((np.ones_like(shown), None), (distance <= 0, 0)):
        all_keys = (shown | ~outer).all(0) & outer.any(0)
        all_queries = (shown | ~outer).all(1) & outer.any(1)
        inner = shown & ~all_keys[None, :] & ~all_queries[:, None]
        seen = distance[inner]
        if not (all_keys.any() or all_queries.any()) or not seen.size:
            continue
        near = (distance >= seen.min()) & (distance <= seen.max())
        if np.array_equal(shown, outer & (near | all_keys[None, :] | all_queries[:, None])):
            band = BandMask(left=-int(seen.min()), right=int(seen.max()))
            far = outer & ~near
            keys = all_keys & far.any(0)
            queries = all_queries & (far & ~keys[None, :]).any(1)
            return _named(band, _true_at(keys), _true_at(queries), right)
    return None


def _true_at(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(flags))


def _named(band: BandMask, keys: tuple[int, ...], queries: tuple[int, ...], right: int | None) -> CellPattern:
    if right is None and keys == tuple(range(len(keys))) and not queries and band.causal:
        words = f"the band {band} and a prefix of {len(keys)} keys that every query sees"
        return CellPattern(kind=Kind.PREFIX, band=band, words=words)
    words = (
        f"the band {band}, keys that every query sees: {_listed(keys)}, queries that see every key: {_listed(queries)}"
    )
    return CellPattern(kind=Kind.GLOBAL_PLUS_BAND, band=band, words=words)


def _listed(positions: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"{shown} and {len(positions) - 8} more" if len(positions) > 8 else shown or "none"


__all__ = ["CellPattern", "band_of", "classify_cells"]
