"""Calls of BandedAttention for the CPU kernels: sizes, window and features by name, with operands drawn so that every key matters."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from swacompile.kernels.cpu_call import element_type
from swacompile.kernels.reference import UNBOUNDED, Array, Call
from swacompile.workload import DType

LOGIT_SPREAD = 3.0
"""Standard deviation of the scores. Attention is then so uneven that hiding one key moves some output by far more than the tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """batch, query heads, key/value heads, queries, keys."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int
    keys: int

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-K{self.kv_heads}-S{self.queries}-T{self.keys}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`features` are fields of Call by the names of FEATURES. The last query meets the last key unless `offset` says otherwise."""

    sizes: Sizes
    left: int
    right: int
    features: tuple[str, ...] = ()
    offset: int | None = None
    bshd: bool = False

    def __str__(self) -> str:
        sides = ("all" if side == UNBOUNDED else str(side) for side in (self.left, self.right))
        place = [] if self.offset is None else [f"offset{self.offset}"]
        return "-".join([str(self.sizes), "_".join(sides), *self.features, *place, *(["bshd"] if self.bshd else [])])

    def call(self, dtype: DType, head_size: int, value_size: int) -> Call:
        """Operands of the element type."""
        sizes = self.sizes
        draw = np.random.default_rng(zlib.crc32(str(self).encode()))
        element = element_type(dtype)

        def tensor(heads: int, length: int, size: int) -> Array:
            values = draw.standard_normal((sizes.batch, length, heads, size)).astype(element)
            moved = values.transpose(0, 2, 1, 3)
            return moved if self.bshd else np.ascontiguousarray(moved)

        plain = Call(
            query=tensor(sizes.heads, sizes.queries, head_size),
            key=tensor(sizes.kv_heads, sizes.keys, head_size),
            value=tensor(sizes.kv_heads, sizes.keys, value_size),
            left=self.left,
            right=self.right,
            offset=sizes.keys - sizes.queries if self.offset is None else self.offset,
            scale=LOGIT_SPREAD * head_size**-0.5,
        )
        changes: dict[str, Any] = {}
        for feature in self.features:
            changes |= _feature(feature, sizes, draw, element)
        return replace(plain, **changes)


FEATURES = (
    "key_padding",
    "segments",
    "chunk_size",
    "sinks",
    "bias",
    "bias_per_batch",
    "alibi_slopes",
    "softcap",
    "zeroed",
)


def _feature(name: str, sizes: Sizes, draw: np.random.Generator, element: "np.dtype[Any]") -> dict[str, Any]:
    batch, keys = sizes.batch, sizes.keys
    match name:
        case "key_padding":
            return {"key_padding": (draw.random((batch, keys)) < 0.8).astype(np.uint8)}
        case "segments":
            return {"segments": np.sort(draw.integers(0, 3, (batch, keys)), axis=1) * 2**40}
        case "chunk_size":
            return {"chunk_size": 70}
        case "sinks":
            return {"sinks": draw.standard_normal(sizes.heads).astype(element)}
        case "bias":
            return {"bias": draw.standard_normal((1, sizes.heads, sizes.queries, keys)).astype(element)}
        case "bias_per_batch":
            return {"bias": draw.standard_normal((batch, 1, sizes.queries, keys)).astype(element)}
        case "alibi_slopes":
            return {"alibi_slopes": (2.0 ** -np.arange(1, sizes.heads + 1)).astype(np.float32)}
        case "softcap":
            return {"softcap": 5.0}
        case "zeroed":
            return {"zeroed": True}
    raise ValueError(f"unknown feature {name!r}")


def moved_window(call: Call) -> Call:
    """The call with its window one key narrower where that is felt: on the left where bounded, else on the right, else at the first key."""
    last_position = call.offset + call.query.shape[2] - 1
    if call.left != UNBOUNDED or call.right == UNBOUNDED:
        return replace(call, left=min(call.left, last_position) - 1)
    return replace(call, right=min(call.right, call.key.shape[2] - 1 - call.offset) - 1)
