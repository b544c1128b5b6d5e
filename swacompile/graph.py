"""The neutral graph that detection and proof read: what a model computes, in one vocabulary for every frontend.

A frontend translates each source operator to the op below that has the same meaning; an operator without a counterpart keeps its
source name and is opaque: its result is run-time data. Values are named as in the source model; names are unique.

    sources      iota(start, limit, step), full(shape, fill), shape(x) [start, end], size(x), sizes [values: expressions, scalar]
    elementwise  add sub mul div truncdiv floordiv mod neg abs min max pow sqrt reciprocal exp log tanh floor ceil trunc round sign relu
                 lt le gt ge eq ne and or xor not bit_and bit_or bit_xor where isnan isinf nan_to_num cast [dtype] identity
    views        reshape(x, shape) [allowzero], expand(x, shape), unsqueeze [axes], squeeze [axes or None], transpose [perm, or last_two],
                 slice(x, starts, ends, axes, steps) [exact: the bounds lie inside], flatten [axis], concat [axis], flip [axes],
                 pad(x, amounts, number, axes) [mode]
    lookups      gather(x, indices) [axis], gather_nd(x, indices) [batch_dims], index(x, indices...) [axes], trilu(x, k) [upper], cumsum(x, axis)
    compute      matmul, softmax [axis], attention [see detect_attention], reduce_max, reduce_sum [axes, keepdims] and the like
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from swacompile.index_expr import Expr

FLOATS = ("float16", "bfloat16", "float32", "float64")
# Smallest exponent argument whose exp() is not yet zero, by data type of the softmax: ln of half the smallest subnormal.
EXP_UNDERFLOW = {"float16": -17.4, "bfloat16": -93.0, "float32": -104.0, "float64": -746.0}
# Largest magnitude that scores are taken to have in wide types: two digits short of overflow.
LARGEST_SCORE = {"bfloat16": 1e36, "float32": 1e36, "float64": 1e306}
LOWEST = {"float16": -65504.0, "bfloat16": -3.3895e38, "float32": -3.4028e38, "float64": -1.7976e308}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """Data type and sizes; `dims` is None where the rank is unknown, a dim is None where it is unknown."""

    dtype: str
    dims: tuple[Expr | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """An array stored in the model; `load` reads it only when a rule needs its values."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation. `inputs` holds value names, "" for an absent one; `name` is the source node's, for messages and splicing.

    The attribute `made` says that the results are steps on the way to a source node's result, and no values of the source.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, object] = field(default_factory=dict)

    def input(self, position: int) -> str:
        """Name of an input, "" if it is absent."""
        return self.inputs[position] if position < len(self.inputs) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in execution order. `types` holds what the source says of values: inputs always, others where it knows."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    types: Mapping[str, TensorType]
    producers: Mapping[str, Node] = field(init=False)
    users: Mapping[str, tuple[Node, ...]] = field(init=False)

    def __post_init__(self) -> None:
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                users.setdefault(value, []).append(node)
        object.__setattr__(self, "producers", {out: node for node in self.nodes for out in node.outputs})
        object.__setattr__(self, "users", {value: tuple(nodes) for value, nodes in users.items()})
