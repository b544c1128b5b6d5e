"""The gradient of BandedAttention: a block of queries at a time, dense within the block's keys.

O(n * window) work and memory. Weights are computed again from the operands, half precision in float32. A zeroed band
has a weight for every key, so its blocks reach over all keys: O(n^2) work, still one block's memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = (64, 1024)
BLOCK_SCORES = 2**23
"""Scores of one block, over batch and heads: 32 MB each for weights and their gradients."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """The operands of one call (docs/operator.md). Window sizes: -1 = unbounded. `offset`: key position of query 0."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding: Tensor | None
    segments: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    offset: int
    scale: float
    softcap: float
    left: int
    right: int
    chunk_size: int
    zeroed: bool

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Queries [first, stop) with the keys [low, high) that they may see, heads split into (K, H / K)."""

    first: int
    stop: int
    low: int
    high: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Sums so far, float32: query (B,K,G,S,D), key (B,K,T,D), value (B,K,T,V), sinks and slopes (K,G), bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor


def backward(problem: Problem, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, sinks, bias and alibi_slopes; one without elements where not `wanted`."""
    with torch.no_grad():
        sums = _zero(problem, wants_bias=wanted[4])
        for block in _blocks(problem):
            _add_block(problem, block, _grouped(grad, problem), sums)
        operands = (problem.query, problem.key, problem.value, problem.sinks, problem.bias, problem.alibi_slopes)
        found = (sums.query, sums.key, sums.value, sums.sinks, sums.bias, sums.alibi_slopes)
        return tuple(
            total.reshape(operand.shape).to(operand.dtype)
            if want and operand is not None and total is not None
            else problem.query.new_empty(0)
            for operand, total, want in zip(operands, found, wanted, strict=True)
        )


def _blocks(problem: Problem) -> Iterator[Block]:
    """Blocks of as many rows as fit BLOCK_SCORES."""
    batch, heads = problem.query.shape[:2]
    span = problem.keys if problem.zeroed or problem.left < 0 or problem.right < 0 else problem.left + problem.right
    rows = BLOCK_SCORES // max(1, batch * heads * min(problem.keys, span + BLOCK_ROWS[0]))
    rows = min(max(rows, BLOCK_ROWS[0]), BLOCK_ROWS[1])
    for first in range(0, problem.queries, rows):
        yield _block(problem, first, min(first + rows, problem.queries))


def _block(problem: Problem, first: int, stop: int) -> Block:
    low, high = 0, problem.keys
    if not problem.zeroed and problem.left >= 0:
        low = min(max(first + problem.offset - problem.left, 0), problem.keys)
    if not problem.zeroed and problem.right >= 0:
        high = min(max(stop + problem.offset + problem.right, low), problem.keys)
    return Block(first=first, stop=stop, low=low, high=high)


def _zero(problem: Problem, *, wants_bias: bool) -> Gradients:
    batch, heads, queries, size = problem.query.shape
    kv_heads = problem.key.shape[1]
    zeros = torch.float32, problem.query.device

    def zero(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=zeros[0], device=zeros[1])

    return Gradients(
        query=zero(batch, kv_heads, problem.group, queries, size),
        key=zero(*problem.key.shape),
        value=zero(*problem.value.shape),
        sinks=zero(kv_heads, heads // kv_heads),
        bias=zero(*problem.bias.shape) if wants_bias and problem.bias is not None else None,
        alibi_slopes=zero(kv_heads, heads // kv_heads),
    )


def _grouped(tensor: Tensor, problem: Problem) -> Tensor:
    """(B,H,...) as (B,K,G,...), where a bias may have one head for all: (B,1,1,...)."""
    heads = problem.key.shape[1] if tensor.shape[1] != 1 or problem.query.shape[1] == 1 else 1
    batch, per_query_head, *rest = tensor.shape
    return tensor.reshape(batch, heads, per_query_head // heads, *rest)


def _add_block(problem: Problem, block: Block, grad: Tensor, sums: Gradients) -> None:
    query = _grouped(problem.query, problem)[:, :, :, block.queries].float()
    key = problem.key[:, :, None, block.keys].float()
    value = problem.value[:, :, None, block.keys].float()
    out_grad = grad[:, :, :, block.queries].float()
    scores, slope = _scores(problem, block, query, key)
    weights, sink_weight = _softmax(problem, block, scores)
    sums.value[:, :, block.keys] += (weights.transpose(-1, -2) @ out_grad).sum(2)
    weight_grad = out_grad @ value.transpose(-1, -2)
    mean = (weights * weight_grad).sum(-1, keepdim=True)
    score_grad = weights * (weight_grad - mean)
    if sink_weight is not None:
        sums.sinks.sub_((sink_weight * mean).sum((0, 3, 4)))
    if problem.zeroed:
        score_grad = score_grad * _in_band(problem, block)
    _add_additive(problem, block, score_grad, sums)
    dot_grad = score_grad * slope * problem.scale if slope is not None else score_grad * problem.scale
    sums.query[:, :, :, block.queries] = dot_grad @ key
    sums.key[:, :, block.keys] += (dot_grad.transpose(-1, -2) @ query).sum(2)


def _scores(problem: Problem, block: Block, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores (B,K,G,rows,keys) before any is hidden, and the softcap's derivative, None where there is no softcap."""
    scores = (query @ key.transpose(-1, -2)) * problem.scale
    slope = None
    if problem.softcap != 0.0:
        bent = torch.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * bent, 1 - bent * bent
    if problem.alibi_slopes is not None:
        scores = scores + _grouped_heads(problem.alibi_slopes, problem) * _distance(problem, block)
    if problem.bias is not None:
        scores = scores + _grouped(problem.bias, problem)[:, :, :, _bias_rows(problem.bias, block), block.keys].float()
    return scores, slope


def _softmax(problem: Problem, block: Block, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights of the visible keys and of the sink (B,K,G,rows,1); 0 in a row that sees nothing."""
    counted = _counted(problem, block)
    if problem.zeroed:
        scores = scores * _in_band(problem, block)
    scores = scores.masked_fill(~counted, -torch.inf)
    highest = (
        scores.amax(-1, keepdim=True)
        if block.low < block.high
        else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    )
    sink = None if problem.sinks is None else _grouped_heads(problem.sinks, problem)
    if sink is not None:
        highest = torch.maximum(highest, sink)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    powers = torch.exp(scores - highest)
    total = powers.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - highest)
    total = total.masked_fill(total == 0.0, 1.0)
    return powers / total, None if sink is None else torch.exp(sink - highest) / total


def _grouped_heads(per_head: Tensor, problem: Problem) -> Tensor:
    """(H,) as (K,G,1,1)."""
    return per_head.float().view(problem.key.shape[1], -1, 1, 1)


def _distance(problem: Problem, block: Block) -> Tensor:
    """(rows, keys): key position less query position."""
    device = problem.query.device
    positions = torch.arange(block.first, block.stop, device=device) + problem.offset
    return torch.arange(block.low, block.high, device=device) - positions[:, None]


def _in_band(problem: Problem, block: Block) -> Tensor:
    distance = _distance(problem, block)
    inside = torch.ones_like(distance, dtype=torch.bool)
    if problem.left >= 0:
        inside &= distance >= -problem.left
    if problem.right >= 0:
        inside &= distance <= problem.right
    return inside


def _counted(problem: Problem, block: Block) -> Tensor:
    """Keys that take part in the softmax, broadcast over (B,K,G,rows,keys)."""
    seen = torch.ones((), dtype=torch.bool, device=problem.query.device) if problem.zeroed else _in_band(problem, block)
    if problem.key_padding is not None:
        seen = seen & problem.key_padding[:, None, None, None, block.keys]
    if problem.zeroed:
        return seen
    positions = torch.arange(block.first, block.stop, device=problem.query.device) + problem.offset
    if problem.segments is not None:
        seen = seen & _same_segment(problem.segments, positions, block)
    if problem.chunk_size > 0:
        keys = torch.arange(block.low, block.high, device=problem.query.device)
        chunk = positions.div(problem.chunk_size, rounding_mode="floor")
        seen = seen & (chunk[:, None] == keys.div(problem.chunk_size, rounding_mode="floor"))
    return seen


def _same_segment(segments: Tensor, positions: Tensor, block: Block) -> Tensor:
    """(B,1,1,rows,keys). A query whose position is no key has no segment and sees nothing."""
    exists = (positions >= 0) & (positions < segments.shape[1])
    own = segments[:, positions.clamp(0, segments.shape[1] - 1)]
    same = (own[:, :, None] == segments[:, None, block.keys]) & exists[:, None]
    return same[:, None, None]


def _add_additive(problem: Problem, block: Block, score_grad: Tensor, sums: Gradients) -> None:
    """Gradients of what is added to the scores."""
    if problem.alibi_slopes is not None:
        sums.alibi_slopes.add_((score_grad * _distance(problem, block)).sum((0, 3, 4)))
    if sums.bias is not None:
        by_head = score_grad.flatten(1, 2)
        part = sums.bias[:, :, _bias_rows(sums.bias, block), block.keys]
        part += by_head.sum_to_size(part.shape)


def _bias_rows(bias: Tensor, block: Block) -> slice:
    """A bias may have one row for all queries."""
    return block.queries if bias.shape[2] != 1 else slice(None)
