"""swacompile::BandedAttention as a model-local ONNX function of standard operators.

A model that carries it runs in any ONNX runtime; where our library is registered, its kernel takes the function's place. One function
serves all nodes of a model, so it is written for the union of what they use: `Body` says which. A node without one of these features
passes the neutral constant of docs/operator.md (for sinks: -inf, for ALiBi slopes: 0, one a head).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import onnx
from onnx import TensorProto

from swacompile.errors import ModelError

DOMAIN = "swacompile"
NAME = "BandedAttention"
VERSION = 1
INPUTS = ("query", "key", "value", "key_padding", "segments", "sinks", "bias", "alibi_slopes", "offset")
ATTRIBUTES = ("layout", "scale", "softcap", "left_window_size", "right_window_size", "alignment", "chunk_size", "kind")
HAS_CAST_LIKE = 15
OPSETS = range(13, 29)


class Optional(StrEnum):
    """Inputs and attributes whose use changes the body."""

    KEY_PADDING = "key_padding"
    SEGMENTS = "segments"
    SINKS = "sinks"
    BIAS = "bias"
    ALIBI = "alibi_slopes"
    OFFSET = "offset"
    SOFTCAP = "softcap"
    CHUNKS = "chunk_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What the nodes of one model have in common, and the union of what they use.

    Text attributes cannot be tested inside a function, so layout, alignment and kind are the same for all nodes of a model.
    `elem_type` is the TensorProto type of query, key, value and output; opsets below 15 need it.
    """

    opset: int
    elem_type: int
    uses: frozenset[Optional] = frozenset()
    layout: str = "BHSD"
    alignment: str = "top_left"
    kind: str = "hidden"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ModelError(f"expected opset {OPSETS[0]} to {OPSETS[-1]}, found {self.opset}: no function body is known for it")

    def inputs(self) -> tuple[str, ...]:
        """Names of the function's inputs: up to the last that any node uses."""
        last = max((INPUTS.index(name) for name in self.uses if name in INPUTS), default=2)
        return INPUTS[: last + 1]


def banded_attention_function(body: Body) -> onnx.FunctionProto:
    """The function for a model of this opset."""
    writer = _Writer(body)
    parts = (writer.sizes, writer.mask, writer.scores, writer.weights, writer.output)
    lines = "\n".join(line for part in parts for line in part())
    signature = f"{NAME} <{', '.join(ATTRIBUTES)}> ({', '.join(body.inputs())}) => (output)"
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {body.opset}]>\n{signature} {{\n{lines}\n}}')


class _Writer:
    """The body as text, one operation a line."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def _uses(self, feature: Optional) -> bool:
        return feature in self.body.uses

    def _like_query(self, name: str, source: str) -> str:
        """A number in the data type of the query."""
        if self.body.opset >= HAS_CAST_LIKE:
            return f"{name} = CastLike({source}, query)"
        return f"{name} = Cast<to = {self.body.elem_type}>({source})"

    def sizes(self) -> Iterator[str]:
        yield "axis_0 = Constant<value_ints = [0]>()"
        yield "axis_1 = Constant<value_ints = [1]>()"
        yield "axis_2 = Constant<value_ints = [2]>()"
        yield "axis_3 = Constant<value_ints = [3]>()"
        yield "last = Constant<value_ints = [-1]>()"
        yield "zero = Constant<value_int = 0>()"
        yield "one = Constant<value_int = 1>()"
        heads_first = self.body.layout == "BHSD"
        for name in ("query", "key", "value"):
            yield f"{name}_4d = Identity({name})" if heads_first else f"{name}_4d = Transpose<perm = [0, 2, 1, 3]>({name})"
        yield "query_shape = Shape(query_4d)"
        yield "key_shape = Shape(key_4d)"
        yield "value_shape = Shape(value_4d)"
        for name, shape, axis in (
            ("batch_1", "query", 0), ("heads_1", "query", 1), ("queries_1", "query", 2), ("size_1", "query", 3), ("kv_heads_1", "key", 1),
            ("keys_1", "key", 2), ("value_size_1", "value", 3),
        ):  # fmt: skip
            yield f"{name} = Gather({shape}_shape, axis_{axis})"
        yield "queries = Squeeze(queries_1)"
        yield "keys = Squeeze(keys_1)"

    def mask(self) -> Iterator[str]:
        """`seen` (broadcast to (B,H,S,T)): which keys count; for the zeroed kind `band` keeps scores and `seen` is the rest."""
        if self._uses(Optional.OFFSET):
            yield "first_position = Identity(offset)"
        else:
            yield "first_position = Sub(keys, queries)" if self.body.alignment == "bottom_right" else "first_position = Identity(zero)"
        yield "q_range = Range(zero, queries, one)"
        yield "positions = Add(q_range, first_position)"
        yield "kv_idx = Range(zero, keys, one)"
        yield "positions_column = Unsqueeze(positions, last)"
        yield "distance = Sub(kv_idx, positions_column)"
        yield "left = Constant<value_int: int = @left_window_size>()"
        yield "right = Constant<value_int: int = @right_window_size>()"
        yield "open_left = Less(left, zero)"
        yield "open_right = Less(right, zero)"
        yield "minus_keys = Neg(keys)"
        yield "minus_queries = Neg(queries)"
        yield "minus_left = Neg(left)"
        yield "far = Constant<value_int = 4611686018427387904>()"
        yield "minus_far = Neg(far)"
        yield "lowest_distance = Where(open_left, minus_far, minus_left)"
        yield "highest_distance = Where(open_right, far, right)"
        yield "not_before = GreaterOrEqual(distance, lowest_distance)"
        yield "not_after = LessOrEqual(distance, highest_distance)"
        yield "in_band = And(not_before, not_after)"
        seen = "in_band"
        if self.body.kind == "zeroed":
            yield "everything = Constant<value = bool[1] {1}>()"
            seen = "everything"
        if self._uses(Optional.CHUNKS):
            yield "chunk = Constant<value_int: int = @chunk_size>()"
            yield "has_chunks = Greater(chunk, zero)"
            yield "divisor = Where(has_chunks, chunk, far)"
            for name in ("positions_column", "kv_idx"):
                yield f"{name}_rest = Mod({name}, divisor)"
                yield f"{name}_start = Sub({name}, {name}_rest)"
            yield "same_chunk = Equal(positions_column_start, kv_idx_start)"
            yield f"seen_chunk = And({seen}, same_chunk)"
            seen = "seen_chunk"
        if self._uses(Optional.SEGMENTS):
            yield "segments_shape = Shape(segments)"
            yield "labels_1 = Gather(segments_shape, axis_1)"
            yield "labels = Squeeze(labels_1)"
            yield "last_label = Sub(labels, one)"
            yield "clamped = Min(positions, last_label)"
            yield "known_positions = Max(clamped, zero)"
            yield "query_labels = Gather<axis = 1>(segments, known_positions)"
            yield "label_axes = Constant<value_ints = [1, 3]>()"
            yield "key_axes = Constant<value_ints = [1, 2]>()"
            yield "query_labels_4d = Unsqueeze(query_labels, label_axes)"
            yield "key_labels_4d = Unsqueeze(segments, key_axes)"
            yield "same_segment = Equal(query_labels_4d, key_labels_4d)"
            yield f"seen_segment = And({seen}, same_segment)"
            seen = "seen_segment"
        if self._uses(Optional.KEY_PADDING):
            yield "padding_axes = Constant<value_ints = [1, 2]>()"
            yield "padding_4d = Unsqueeze(key_padding, padding_axes)"
            yield f"seen_padding = And({seen}, padding_4d)"
            seen = "seen_padding"
        yield f"seen = Identity({seen})"

    def scores(self) -> Iterator[str]:
        """Query heads that share a key head are rows of one product, so that keys are not repeated."""
        yield "scale_number = Constant<value_float: float = @scale>()"
        yield self._like_query("scale_like", "scale_number")
        yield "scaled = Mul(query_4d, scale_like)"
        yield "grouped_shape = Concat<axis = 0>(batch_1, kv_heads_1, last, size_1)"
        yield "grouped = Reshape(scaled, grouped_shape)"
        yield "key_t = Transpose<perm = [0, 1, 3, 2]>(key_4d)"
        yield "grouped_scores = MatMul(grouped, key_t)"
        yield "scores_shape = Concat<axis = 0>(batch_1, heads_1, queries_1, keys_1)"
        yield "product = Reshape(grouped_scores, scores_shape)"
        scores = "product"
        if self._uses(Optional.SOFTCAP):
            yield "cap_number = Constant<value_float: float = @softcap>()"
            yield "no_cap = Constant<value_float = 0.0>()"
            yield "has_cap = Greater(cap_number, no_cap)"
            yield "unit_cap = Constant<value_float = 1.0>()"
            yield "safe_cap_number = Where(has_cap, cap_number, unit_cap)"
            yield self._like_query("cap", "safe_cap_number")
            yield "over_cap = Div(product, cap)"
            yield "bent = Tanh(over_cap)"
            yield "capped = Mul(bent, cap)"
            yield "with_cap = Where(has_cap, capped, product)"
            scores = "with_cap"
        if self._uses(Optional.ALIBI):
            yield "slope_axes = Constant<value_ints = [1, 2]>()"
            yield "slopes_3d = Unsqueeze(alibi_slopes, slope_axes)"
            yield "distance_float = Cast<to = 1>(distance)"
            yield "slope_bias = Mul(slopes_3d, distance_float)"
            yield self._like_query("slope_bias_like", "slope_bias")
            yield f"with_slopes = Add({scores}, slope_bias_like)"
            scores = "with_slopes"
        if self._uses(Optional.BIAS):
            yield f"with_bias = Add({scores}, bias)"
            scores = "with_bias"
        if self.body.kind == "zeroed":
            yield "nothing = Constant<value_float = 0.0>()"
            yield self._like_query("nothing_like", "nothing")
            yield f"kept = Where(in_band, {scores}, nothing_like)"
            scores = "kept"
        yield f"scores = Identity({scores})"

    def weights(self) -> Iterator[str]:
        lowest = -65504.0 if self.body.elem_type == TensorProto.FLOAT16 else -3.38e38
        yield f"lowest_number = Constant<value_float = {lowest:.6e}>()"
        yield self._like_query("lowest", "lowest_number")
        yield "masked = Where(seen, scores, lowest)"
        if not self._uses(Optional.SINKS):
            yield "weights = Softmax<axis = -1>(masked)"
            return
        yield "sink_axes = Constant<value_ints = [0, 2, 3]>()"
        yield "sinks_4d = Unsqueeze(sinks, sink_axes)"
        yield "sink_shape = Concat<axis = 0>(batch_1, heads_1, queries_1, axis_1)"
        yield "sink_column = Expand(sinks_4d, sink_shape)"
        yield "with_sinks = Concat<axis = -1>(masked, sink_column)"
        yield "all_weights = Softmax<axis = -1>(with_sinks)"
        yield "weights = Slice(all_weights, axis_0, keys_1, last)"

    def output(self) -> Iterator[str]:
        """A row that sees no key is 0."""
        yield "weights_shape = Concat<axis = 0>(batch_1, kv_heads_1, last, keys_1)"
        yield "grouped_weights = Reshape(weights, weights_shape)"
        yield "grouped_output = MatMul(grouped_weights, value_4d)"
        yield "output_shape = Concat<axis = 0>(batch_1, heads_1, queries_1, value_size_1)"
        yield "mixed = Reshape(grouped_output, output_shape)"
        yield "seen_number = Cast<to = 1>(seen)"
        yield "seen_keys = ReduceSum<keepdims = 1>(seen_number, last)"
        yield "no_key = Constant<value_float = 0.0>()"
        yield "row_sees = Greater(seen_keys, no_key)"
        yield "nothing_number = Constant<value_float = 0.0>()"
        yield self._like_query("zero_row", "nothing_number")
        yield "rows = Where(row_sees, mixed, zero_row)"
        yield "output = Identity(rows)" if self.body.layout == "BHSD" else "output = Transpose<perm = [0, 2, 1, 3]>(rows)"

