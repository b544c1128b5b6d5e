"""The one internal form of a sliding window, and the tables that translate it to other dialects.

Tools disagree on what a window of W means: W keys or W + 1, counted to the left only or on both sides, aligned at the first
or the last query. Everything inside swacompile is a BandMask; dialects appear only in this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Alignment(StrEnum):
    """Where query 0 stands among the keys: at key 0, or so that the last query meets the last key."""

    TOP_LEFT = "top_left"
    BOTTOM_RIGHT = "bottom_right"


@dataclass(frozen=True, slots=True, kw_only=True)
class BandMask:
    """Key k is visible to query q iff -left <= k - (q + offset) <= right; None = unbounded on that side.

    `left` and `right` are inclusive and may be negative (a band that excludes the diagonal). `offset` is 0 for TOP_LEFT and
    T - S for BOTTOM_RIGHT, with S queries and T keys.
    Raises ValueError where no key could ever be visible (left + right < 0).
    """

    left: int | None
    right: int | None
    alignment: Alignment = Alignment.TOP_LEFT

    def __post_init__(self) -> None:
        if self.left is not None and self.right is not None and self.left + self.right < 0:
            raise ValueError(f"an empty band: left {self.left} + right {self.right} < 0")

    @property
    def is_full(self) -> bool:
        """Whether the band never hides a key for being too far away: bidirectional or plain causal attention."""
        return self.left is None and self.right in (None, 0)

    @property
    def causal(self) -> bool:
        return self.right == 0

    def offset(self, queries: int, keys: int) -> int:
        return keys - queries if self.alignment is Alignment.BOTTOM_RIGHT else 0

    def shows(self, q_idx: int, kv_idx: int, *, queries: int, keys: int) -> bool:
        distance = kv_idx - (q_idx + self.offset(queries, keys))
        return (self.left is None or -self.left <= distance) and (self.right is None or distance <= self.right)

    @property
    def aligned_text(self) -> str:
        """The band with its alignment, where that is not the usual one."""
        return f"{self} bottom-right" if self.alignment is Alignment.BOTTOM_RIGHT else str(self)

    def __str__(self) -> str:
        def side(bound: int | None) -> str:
            return "unbounded" if bound is None else str(bound)

        return f"({side(self.left)}, {side(self.right)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one tool spells a window. `spell` gives None where the tool has no words for the band."""

    name: str
    source: str
    spell: Callable[[BandMask], str | None]


def _hugging_face(band: BandMask) -> str | None:
    if band.is_full:
        return "sliding_window=None"
    if band.causal and band.left is not None:
        return f"sliding_window={band.left + 1}"
    if band.left == band.right and band.left is not None and band.left >= 0:
        return f"bidirectional, abs(q-k) <= {band.left}"
    return None


def _flash_attention(band: BandMask) -> str | None:
    sides = tuple(-1 if side is None else side for side in (band.left, band.right))
    if any(side is not None and side < 0 for side in (band.left, band.right)):
        return None
    return f"window_size=({sides[0]}, {sides[1]})"


def _ort_gqa(band: BandMask) -> str | None:
    if not band.causal or (band.left is not None and band.left < 0):
        return None
    return f"local_window_size={-1 if band.left is None else band.left + 1}"


def _onnx_attention(band: BandMask) -> str | None:
    if any(side is not None and side < 0 for side in (band.left, band.right)):
        return None
    left, right = (-1 if side is None else side for side in (band.left, band.right))
    return f"left_window_size={left}, right_window_size={right}"


DIALECTS = (
    Dialect(
        name="hf", source="transformers masking_utils: k > q - W and k <= q, or abs(q - k) <= W", spell=_hugging_face
    ),
    Dialect(
        name="flash_attention",
        source="flash_attn window_size: left and right inclusive, -1 unbounded",
        spell=_flash_attention,
    ),
    Dialect(
        name="ort",
        source="com.microsoft.GroupQueryAttention local_window_size: W keys with the query's own",
        spell=_ort_gqa,
    ),
    Dialect(name="onnx", source="ONNX Attention-25: inclusive, -1 unbounded", spell=_onnx_attention),
)


def spellings(band: BandMask) -> dict[str, str | None]:
    """The band in every dialect's words, by dialect name."""
    return {dialect.name: dialect.spell(band) for dialect in DIALECTS}
