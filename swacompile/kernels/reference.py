"""BandedAttention in float64 numpy: the whole operator, written as docs/operator.md defines it. Slow and dense on purpose."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNBOUNDED = 2**31 - 1
"""A window side that hides nothing, as the CPU kernel's arguments spell it."""

Array = npt.NDArray[np.generic]
Doubles = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One call of the operator, BHSD. Every array may have any strides; None = absent.

    query (B,H,S,D), key (B,K,T,D), value (B,K,T,V), key_padding (B,T) true = visible, segments (B,T) integers, sinks (H,),
    bias broadcast to (B,H,S,T), alibi_slopes (H,). `offset` is the key position of query 0.
    """

    query: Array
    key: Array
    value: Array
    key_padding: Array | None = None
    segments: Array | None = None
    sinks: Array | None = None
    bias: Array | None = None
    alibi_slopes: Array | None = None
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    offset: int = 0
    chunk_size: int = 0
    zeroed: bool = False
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Key position p of every query, (S,)."""
        return np.arange(self.query.shape[2], dtype=np.int64) + self.offset

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        return np.arange(self.key.shape[2], dtype=np.int64)


def banded_attention(call: Call) -> Doubles:
    """Output (B,H,S,V) in float64. NaN and infinities propagate as IEEE arithmetic has it, but never from a hidden key."""
    raw = scores(call)
    counted = countable(call)
    if call.zeroed:
        raw = np.where(in_band(call), raw, 0.0)
    weights = _softmax(np.where(counted, raw, -np.inf), call.sinks)
    return _weighted_sum(weights, counted, _per_query_head(call.value, call))


def scores(call: Call) -> Doubles:
    """Scores of all pairs, (B,H,S,T), before any is hidden."""
    with np.errstate(invalid="ignore", over="ignore"):
        raw: Doubles = np.matmul(_float64(call.query), _per_query_head(call.key, call).swapaxes(-1, -2)) * call.scale
        if call.softcap != 0.0:
            raw = call.softcap * np.tanh(raw / call.softcap)
        if call.alibi_slopes is not None:
            raw = raw + _float64(call.alibi_slopes)[None, :, None, None] * _distance(call)
        if call.bias is not None:
            raw = raw + _float64(call.bias)
    return raw


def in_band(call: Call) -> Booleans:
    """(S,T): key within left and right of the query."""
    distance = _distance(call)
    return (distance >= -call.left) & (distance <= call.right)


def countable(call: Call) -> Booleans:
    """(B,H,S,T): pairs that take part in the softmax."""
    batch, heads, queries, _ = call.query.shape
    seen = np.ones((batch, heads, queries, call.key.shape[2]), dtype=np.bool_)
    if call.key_padding is not None:
        seen &= (call.key_padding != 0)[:, None, None, :]
    if call.zeroed:
        return seen
    seen &= in_band(call)
    if call.segments is not None:
        seen &= _same_segment(call.segments, call.positions)[:, None]
    if call.chunk_size > 0:
        seen &= call.positions[:, None] // call.chunk_size == call.keys[None, :] // call.chunk_size
    return seen


def _distance(call: Call) -> npt.NDArray[np.int64]:
    """(S,T): key position less query position."""
    return call.keys[None, :] - call.positions[:, None]


def _same_segment(segments: Array, positions: npt.NDArray[np.int64]) -> Booleans:
    """(B,S,T). A query whose position is no key has no segment and sees nothing."""
    keys = segments.shape[1]
    exists = (positions >= 0) & (positions < keys)
    of_query = (
        segments[:, np.clip(positions, 0, max(keys - 1, 0))] if keys else np.zeros((len(segments), len(positions)))
    )
    same: Booleans = (of_query[:, :, None] == segments[:, None, :]) & exists[None, :, None]
    return same


def _softmax(visible: Doubles, sinks: Array | None) -> Doubles:
    """Weights of scores whose hidden entries are -inf; a row of nothing but -inf gives zeros."""
    logits = visible
    if sinks is not None:
        column = np.broadcast_to(_float64(sinks)[None, :, None, None], (*visible.shape[:3], 1))
        logits = np.concatenate([visible, column], axis=-1)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        powers = np.exp(logits - np.where(np.isneginf(highest), 0.0, highest))
        total = powers.sum(axis=-1, keepdims=True)
        weights = np.where(total == 0.0, 0.0, powers / total)
    return weights[..., : visible.shape[-1]]


def _weighted_sum(weights: Doubles, counted: Booleans, value: Doubles) -> Doubles:
    """Sum over counted keys only, so that a NaN or infinity in a hidden value does not matter (0 * inf would be NaN)."""
    with np.errstate(invalid="ignore", over="ignore"):
        total: Doubles
        if np.isfinite(value).all():
            total = np.matmul(np.where(counted, weights, 0.0), value)
        else:
            total = np.where(counted[..., None], weights[..., None] * value[:, :, None], 0.0).sum(axis=-2)
    return total


def _per_query_head(tensor: Array, call: Call) -> Doubles:
    """(B,K,T,X) repeated to (B,H,T,X)."""
    return np.repeat(_float64(tensor), call.query.shape[1] // tensor.shape[1], axis=1)


def _float64(array: Array) -> Doubles:
    return np.asarray(array).astype(np.float64)
