"""Small torch modules that spell sliding windows the way exported models do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD_SIZE, LENGTH, PAST = 2, 4, 9, 20
Mask = Callable[[int, int, Any], torch.Tensor]
LOWEST = torch.finfo(torch.float32).min


def positions(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of queries, (S, 1), and of keys, (1, S)."""
    line = torch.arange(length)
    return line[:, None], line[None, :]


# ------------------------------------------------------------------------------ masks: (length, window, extra) -> bool


def and_of_halves(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    return torch.ones((), dtype=torch.bool) & ((k > q - window) & (k <= q))


def absolute_distance(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    return ((q - k).abs() <= window) & (q >= 0)


def or_of_halves(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    return ((q - k >= 0) & (q - k < window)) | ((q - k < 0) & (-(q - k) < 3))


def union(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    causal = (k > q - window) & (k <= q)
    return torch.zeros((), dtype=torch.bool) | causal | ((q - k).abs() < window)


def triangles(length: int, window: int, _: Any) -> torch.Tensor:
    full = torch.ones(length, length, dtype=torch.bool)
    return torch.tril(full) & torch.triu(full, diagonal=1 - window)


def triangles_apart(length: int, window: int, _: Any) -> torch.Tensor:
    full = torch.ones(length, length, dtype=torch.long)
    return (torch.tril(full) - torch.tril(full, -window)).bool()


def written_in_place(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, :] = k <= q
    mask.masked_fill_(q - k >= window, False)
    return mask


def chunks(length: int, window: int, _: Any) -> torch.Tensor:
    q, k = positions(length)
    return (q // window == k // window) & (k <= q)


def vmapped(length: int, window: int, _: Any) -> torch.Tensor:
    def cell(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q.new_ones((), dtype=torch.bool) & (k > q - window) & (k <= q)

    line = torch.arange(length)
    return torch.vmap(torch.vmap(cell, in_dims=(None, 0)), in_dims=(0, None))(line, line)


def vmapped_lookup(length: int, window: int, _: Any) -> torch.Tensor:
    places = torch.arange(length).expand(2, length)

    def cell(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (torch.ops.aten.index(places, [b, k]) > torch.ops.aten.index(places, [b, q]) - window) & (k <= q)

    line = torch.arange(length)
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        cell = torch.vmap(cell, in_dims=dims)
    return cell(torch.arange(2), line, line)[:1].squeeze(0)


def packed(length: int, window: int, _: Any) -> torch.Tensor:
    """Segments of positions that grow by one: all in one segment, as positions are counted here."""
    return packed_at(torch.arange(length)[None], window)[0]


def packed_at(places: torch.Tensor, window: int) -> torch.Tensor:
    """(B, S) positions -> (B, S, S) mask."""
    segments = torch.cumsum(torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1, -1)
    batch = torch.arange(places.shape[0])[:, None, None]
    q, k = (line[None] for line in positions(places.shape[1]))
    same = segments[batch, q] == segments[batch, k]
    at_q, at_k = places[batch, q], places[batch, k]
    return same & (at_k > at_q - window) & (at_k <= at_q)


def without_gradients(length: int, window: int, _: Any) -> torch.Tensor:
    with torch.no_grad():
        mask = and_of_halves(length, window, None)
    return mask


# -------------------------------------------------------------------------------------------------------------- modules


class Attend(torch.nn.Module):
    """Attention over a mask that is spelled by a function; the mask's second argument is the window."""

    def __init__(self, mask: Mask, window: int) -> None:
        super().__init__()
        self.mask, self.window = mask, window

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask(query.shape[2], self.window, None))


class Eager(Attend):
    """Scores, softcap and sinks in the open, as transformers' eager attention has them, with repeated keys and values."""

    def __init__(self, mask: Mask, window: int, *, softcap: float | None = None, sinks: bool = False) -> None:
        super().__init__(mask, window)
        self.softcap = softcap
        self.sinks = torch.nn.Parameter(torch.tensor([0.5, -1.0])) if sinks else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = query.shape
        key, value = (
            t[:, :1, None].expand(batch, 1, heads, length, size).reshape(batch, heads, length, size)
            for t in (key, value)
        )
        scores = torch.matmul(query, key.transpose(2, 3)) * size**-0.5
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        bias = torch.where(self.mask(length, self.window, None), 0.0, LOWEST)
        scores = scores + bias[None, None][:, :, :, : key.shape[-2]]
        if self.sinks is not None:
            column = self.sinks.reshape(1, -1, 1, 1).expand(batch, -1, length, -1)
            scores = torch.cat([scores, column], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if self.sinks is not None:
            weights = weights[..., :-1]
        return torch.matmul(torch.nn.functional.dropout(weights, 0.0, training=False), value)


class Einsum(Attend):
    """(batch, length, heads, size) operands and contractions by name."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.5
        scores = scores.masked_fill(~self.mask(query.shape[1], self.window, None), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


class Padded(Attend):
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        batch, length = padding.shape
        q, k = (line[None, None] for line in positions(length))
        seen = padding.bool()[torch.arange(batch)[:, None, None, None], k]
        mask = (k > q - self.window) & (k <= q) & seen
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Noisy(Attend):
    """A window, and a condition on data of every cell."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mask = self.mask(query.shape[2], self.window, None) & (noise > 0)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Positioned(Attend):
    """Packed sequences whose positions are an input."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=packed_at(places, self.window)[:, None])


class Decode(torch.nn.Module):
    """One token after a cache that grows."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> torch.Tensor:
        past = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        q, k = torch.arange(query.shape[2])[:, None] + past, torch.arange(key.shape[2])[None]
        return scaled_dot_product_attention(query, key, value, attn_mask=(k > q - self.window) & (k <= q))


class StaticCache(torch.nn.Module):
    """Tokens written into buffers at a position that is an input, as transformers' static cache does."""

    def __init__(self, window: int, capacity: int = 32) -> None:
        super().__init__()
        self.window = window
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, capacity, HEAD_SIZE))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        self.length.copy_(position[0])
        places = torch.arange(query.shape[2]) + self.length
        self.keys.index_copy_(2, places, key)
        self.values.index_copy_(2, places, value)
        q, k = places[:, None], torch.arange(self.keys.shape[2])[None]
        return scaled_dot_product_attention(query, self.keys, self.values, attn_mask=(k > q - self.window) & (k <= q))


class ConstantMasks(torch.nn.Module):
    """A window in a buffer, cut to the length, and a second causal mask that is added."""

    def __init__(self, window: int, capacity: int = 24) -> None:
        super().__init__()
        causal = torch.tril(torch.ones(capacity, capacity, dtype=torch.bool))
        self.register_buffer(
            "window", (causal ^ torch.tril(causal, -window)).view(1, 1, capacity, capacity), persistent=False
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length = query.shape[2]
        q, k = positions(length)
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = torch.where(self.window[:, :, :length, :length], scores, torch.tensor(LOWEST))
        weights = torch.softmax(scores + torch.where(k <= q, 0.0, LOWEST), dim=-1)
        return torch.matmul(weights, value)


def operands(length: int = LENGTH, queries: int | None = None, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    lengths = (length if queries is None else queries, length, length)
    return tuple(torch.randn(batch, HEADS, size, HEAD_SIZE, generator=generator) for size in lengths)
