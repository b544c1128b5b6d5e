"""swacompile::BandedAttention as a model-local ONNX function of standard operators.

A model that carries it runs in any ONNX runtime; where our library is registered, its kernel takes the function's
place. One function serves all nodes of a model, so it is written for the union of what they use: `Body` says which. A
node that lacks one of these features passes the neutral constant of docs/operator.md.

What runs for each pair of query and key and each head is what a dense graph has: MatMul, Add, Softmax, MatMul. The mask
is made for one head, from comparisons of int32, and added as a finite number: in ONNX Runtime 1.32 Where takes four
times as long as Add, and comparing int64 five times as long as int32 (S = T = 2048, two AVX-512 cores, 2026-11).
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
ATTRIBUTES = (
    "layout", "scale", "softcap", "left_window_size", "right_window_size", "alignment", "chunk_size", "kind",
)  # fmt: skip
OPSETS = range(13, 29)
FAR = 2**30
"""Stands for "unbounded". Positions must stay below it, for it is added to them in 32 bits."""
LOWEST: dict[int, float] = {
    TensorProto.FLOAT: -3.4028234e38,
    TensorProto.FLOAT16: -65504.0,
    TensorProto.BFLOAT16: -3.3895313e38,
}
"""What is added to the score of a hidden key, by element type: the lowest finite number."""

_SHAPE_SLICES = 15  # first opset whose Shape takes start and end
_AXES_INPUT = 18  # first opset whose ReduceMax takes axes as an input


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

    Text attributes cannot be tested inside a function, so layout, alignment and kind are the same for all nodes of a
    model; where alignments differ, every node passes an offset. `elem_type` is the TensorProto type of query, key,
    value and output. `grouped`: some node has fewer key heads than query heads.
    """

    opset: int
    elem_type: int
    uses: frozenset[Optional] = frozenset()
    layout: str = "BHSD"
    alignment: str = "top_left"
    kind: str = "hidden"
    grouped: bool = True

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ModelError(
                f"expected opset {OPSETS[0]} to {OPSETS[-1]}, found {self.opset}: no function body is known for it"
            )
        if self.elem_type not in LOWEST:
            raise ModelError(
                f"expected element type float32, float16 or bfloat16, found {TensorProto.DataType.Name(self.elem_type)}"
            )

    @property
    def heads_first(self) -> bool:
        return self.layout == "BHSD"

    @property
    def zeroed(self) -> bool:
        return self.kind == "zeroed"

    def inputs(self) -> tuple[str, ...]:
        """Names of the function's inputs: up to the last that any node uses."""
        last = max((INPUTS.index(name) for name in self.uses if name in INPUTS), default=2)
        return INPUTS[: last + 1]


def banded_attention_function(body: Body) -> onnx.FunctionProto:
    """The function for a model of this opset."""
    writer = _Writer(body)
    parts = (writer.numbers, writer.sizes, writer.window, writer.mask, writer.scores, writer.weights, writer.output)
    lines = "\n".join(line for part in parts for line in part())
    signature = f"{NAME} <{', '.join(ATTRIBUTES)}> ({', '.join(body.inputs())}) => (output)"
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {body.opset}]>'
    return onnx.parser.parse_function(f"{header}\n{signature} {{\n{lines}\n}}")


class _Writer:
    """The body as text, one operation a line. The public methods run in `banded_attention_function`'s order."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def _uses(self, *features: Optional) -> bool:
        return not self.body.uses.isdisjoint(features)

    def _typed(self, name: str, source: str) -> str:
        """float32, bool or integer to the data type of the query."""
        return f"{name} = Cast<to = {self.body.elem_type}>({source})"

    def _size(self, name: str, tensor: str, axis: int) -> Iterator[str]:
        """One extent as a tensor of shape (1,)."""
        if self.body.opset >= _SHAPE_SLICES:
            yield f"{name} = Shape<start = {axis}, end = {axis + 1}>({tensor})"
            return
        yield f"{name}_all = Shape({tensor})"
        yield f"{name}_axis = Constant<value_ints = [{axis}]>()"
        yield f"{name} = Gather({name}_all, {name}_axis)"

    def numbers(self) -> Iterator[str]:
        for name, value in (("zero", 0), ("one", 1), ("far", FAR)):
            yield f"{name} = Constant<value_int = {value}>()"
        for name, values in (("zero_1", [0]), ("one_1", [1]), ("last", [-1]), ("middle_axes", [1, 2])):
            yield f"{name} = Constant<value_ints = {values}>()"
        yield f"lowest_float = Constant<value_float = {LOWEST[self.body.elem_type]:.8e}>()"
        yield self._typed("lowest", "lowest_float")
        if self._uses(Optional.BIAS):
            yield "nothing_float = Constant<value_float = 0.0>()"
            yield self._typed("nothing", "nothing_float")
            yield "minus_infinity = Add(lowest, lowest)"

    def sizes(self) -> Iterator[str]:
        """Extents, (1,) or () each; and query, key, value in the order (B,H,S,D)."""
        head_axis, length_axis = (1, 2) if self.body.heads_first else (2, 1)
        yield from self._size("batch_1", "query", 0)
        yield from self._size("heads_1", "query", head_axis)
        yield from self._size("queries_1", "query", length_axis)
        yield from self._size("keys_1", "key", length_axis)
        yield from self._size("kv_heads_1", "key", head_axis)
        yield from self._size("size_1", "query", 3)
        yield from self._size("value_size_1", "value", 3)
        yield "queries = Squeeze(queries_1)"
        yield "keys = Squeeze(keys_1)"
        for name in ("query", "key", "value"):
            move = "Identity" if self.body.heads_first else "Transpose<perm = [0, 2, 1, 3]>"
            yield f"{name}_4d = {move}({name})"

    def window(self) -> Iterator[str]:
        """`kv_idx` (T,); `first_key` and `last_key` (S,1): what each query may see of them. All int32."""
        if self._uses(Optional.OFFSET):
            yield "offset_or_alignment = Identity(offset)"
        else:
            from_end = self.body.alignment == "bottom_right"
            yield "offset_or_alignment = " + ("Sub(keys, queries)" if from_end else "Identity(zero)")
        yield "end = Add(offset_or_alignment, queries)"
        yield "positions = Range(offset_or_alignment, end, one)"
        for side in ("left", "right"):
            yield f"{side}_size = Constant<value_int: int = @{side}_window_size>()"
            yield f"{side}_open = Less({side}_size, zero)"
            yield f"{side} = Where({side}_open, far, {side}_size)"
        yield "window_start = Sub(positions, left)"
        yield "window_end = Add(positions, right)"
        bounds = ("window_start", "window_end")
        if self._uses(Optional.CHUNKS) and not self.body.zeroed:
            yield from self._chunks(*bounds)
            bounds = ("start_in_chunk", "end_in_chunk")
        for name, bound in zip(("first_key", "last_key"), bounds, strict=True):
            yield f"{name}_row = Cast<to = {TensorProto.INT32}>({bound})"
            yield f"{name} = Unsqueeze({name}_row, last)"
        yield "key_range = Range(zero, keys, one)"
        yield f"kv_idx = Cast<to = {TensorProto.INT32}>(key_range)"

    def _chunks(self, start: str, end: str) -> Iterator[str]:
        """A query sees its own chunk only. Mod rounds down, as negative positions need."""
        yield "chunk = Constant<value_int: int = @chunk_size>()"
        yield "has_chunks = Greater(chunk, zero)"
        yield "divisor = Where(has_chunks, chunk, one)"
        yield "place_in_chunk = Mod(positions, divisor)"
        yield "chunk_start = Sub(positions, place_in_chunk)"
        yield "next_chunk = Add(chunk_start, chunk)"
        yield "chunk_end = Sub(next_chunk, one)"
        yield f"later_start = Max({start}, chunk_start)"
        yield f"earlier_end = Min({end}, chunk_end)"
        yield f"start_in_chunk = Where(has_chunks, later_start, {start})"
        yield f"end_in_chunk = Where(has_chunks, earlier_end, {end})"

    def mask(self) -> Iterator[str]:
        """`outside` (S,T): not in the band. `penalty`, (S,T) to (B,1,S,T): what hides a key, or 0."""
        yield "too_early = Less(kv_idx, first_key)"
        yield "too_late = Greater(kv_idx, last_key)"
        yield "outside = Or(too_early, too_late)"
        hidden = None if self.body.zeroed else "outside"
        if self._uses(Optional.SEGMENTS) and not self.body.zeroed:
            yield from self._segments()
            yield "outside_segment = Or(outside, other_segment)"
            hidden = "outside_segment"
        if self._uses(Optional.KEY_PADDING):
            yield "padding = Not(key_padding)"
            yield "padding_4d = Unsqueeze(padding, middle_axes)"
            yield f"hidden = Or({hidden}, padding_4d)" if hidden else "hidden = Identity(padding_4d)"
            hidden = "hidden"
        if hidden is None:
            return
        if self._uses(Optional.BIAS):
            yield f"penalty = Where({hidden}, minus_infinity, nothing)"  # below any bias
        else:
            yield self._typed("is_hidden", hidden)
            yield "penalty = Mul(is_hidden, lowest)"

    def _segments(self) -> Iterator[str]:
        """`other_segment` (B,1,S,T). A query at no key's position has no segment; one label is the neutral operand."""
        yield "segments_shape = Shape(segments)"
        yield "labels_1 = Gather(segments_shape, one_1)"
        yield "last_label = Sub(labels_1, one_1)"
        yield "labelled = Min(positions, last_label)"
        yield "known = Max(labelled, zero_1)"
        yield "is_known = Equal(known, positions)"
        yield "label_count = Size(segments)"
        yield "is_neutral = Equal(label_count, one)"
        yield "has_label = Or(is_known, is_neutral)"
        yield "no_label = Not(has_label)"
        yield "no_label_column = Unsqueeze(no_label, last)"
        yield "query_labels = Gather<axis = 1>(segments, known)"
        yield "query_label_axes = Constant<value_ints = [1, 3]>()"
        yield "query_labels_4d = Unsqueeze(query_labels, query_label_axes)"
        yield "key_labels_4d = Unsqueeze(segments, middle_axes)"
        yield "same_label = Equal(query_labels_4d, key_labels_4d)"
        yield "other_label = Not(same_label)"
        yield "other_segment = Or(other_label, no_label_column)"

    def scores(self) -> Iterator[str]:
        """`score` (B,H,S,T). Query heads that share a key head are rows of one product, so keys are not repeated."""
        yield "scale_float = Constant<value_float: float = @scale>()"
        yield self._typed("scale_typed", "scale_float")
        rows = "query_4d"
        if self.body.grouped:
            yield "rows_shape = Concat<axis = 0>(zero_1, kv_heads_1, last, size_1)"
            yield "query_rows = Reshape(query_4d, rows_shape)"
            rows = "query_rows"
        yield f"scaled = Mul({rows}, scale_typed)"
        yield "key_t = Transpose<perm = [0, 1, 3, 2]>(key_4d)"
        yield "product_rows = MatMul(scaled, key_t)"
        product = "product_rows"
        if self.body.grouped:
            yield "product_shape = Concat<axis = 0>(zero_1, heads_1, last, keys_1)"
            yield "product = Reshape(product_rows, product_shape)"
            product = "product"
        if self._uses(Optional.SOFTCAP):
            yield from self._softcap(product)
            product = "capped"
        yield f"score = Identity({product})"

    def _softcap(self, product: str) -> Iterator[str]:
        """An If, because runtimes fold one whose condition is constant: nodes without a cap then cost nothing."""
        element = TensorProto.DataType.Name(self.body.elem_type).lower()
        yield "cap_float = Constant<value_float: float = @softcap>()"
        yield "no_cap = Constant<value_float = 0.0>()"
        yield "has_cap = Greater(cap_float, no_cap)"
        yield self._typed("cap", "cap_float")
        yield (
            f"capped = If(has_cap) <then_branch = cap_graph () => ({element}[] bent) {{"
            f" fraction = Div({product}, cap) squashed = Tanh(fraction) bent = Mul(squashed, cap) }},"
            f" else_branch = same_graph () => ({element}[] straight) {{ straight = Identity({product}) }}>"
        )

    def weights(self) -> Iterator[str]:
        """`weight` (B,H,S,T), or (B,H,S,T+1) with sinks: their share is the last column."""
        yield from self._zeroed_logits() if self.body.zeroed else self._hidden_logits()
        logits = "logits"
        if self._uses(Optional.SINKS):
            yield from self._sink_column()
            yield "logits_and_sinks = Concat<axis = -1>(logits, sink_column)"
            logits = "logits_and_sinks"
        yield f"weight = Softmax<axis = -1>({logits})"

    def _hidden_logits(self) -> Iterator[str]:
        total = "penalty"
        if self._uses(Optional.BIAS):
            yield "penalty_and_bias = Add(penalty, bias)"
            total = "penalty_and_bias"
        if self._uses(Optional.ALIBI):
            yield from self._slope_bias()
            yield f"penalty_and_slopes = Add({total}, slope_bias)"
            total = "penalty_and_slopes"
        yield f"logits = Add(score, {total})"

    def _zeroed_logits(self) -> Iterator[str]:
        score = "score"
        if self._uses(Optional.BIAS):
            yield "score_and_bias = Add(score, bias)"
            score = "score_and_bias"
        if self._uses(Optional.ALIBI):
            yield from self._slope_bias()
            yield f"score_and_slopes = Add({score}, slope_bias)"
            score = "score_and_slopes"
        if self._uses(Optional.BIAS):
            yield f"banded = Where(outside, nothing, {score})"  # a bias may be -inf, which times 0 is NaN
        else:
            yield "inside = Not(outside)"
            yield self._typed("is_inside", "inside")
            yield f"banded = Mul({score}, is_inside)"
        yield "logits = Add(banded, penalty)" if self._uses(Optional.KEY_PADDING) else "logits = Identity(banded)"

    def _slope_bias(self) -> Iterator[str]:
        """`slope_bias` (H,S,T)."""
        yield "no_slope = Constant<value_float = 0.0>()"
        yield from self._per_head("slopes", "alibi_slopes", "no_slope")
        yield "slopes_3d = Unsqueeze(slopes, middle_axes)"
        yield f"positions_row = Cast<to = {TensorProto.INT32}>(positions)"
        yield "positions_column = Unsqueeze(positions_row, last)"
        yield "distance = Sub(kv_idx, positions_column)"
        yield f"distance_float = Cast<to = {TensorProto.FLOAT}>(distance)"
        yield "slope_bias_float = Mul(slopes_3d, distance_float)"
        yield self._typed("slope_bias", "slope_bias_float")

    def _sink_column(self) -> Iterator[str]:
        """`sink_column` (B,H,S,1)."""
        yield from self._per_head("sink", "sinks", "lowest")
        yield "sink_axes = Constant<value_ints = [0, 2, 3]>()"
        yield "sink_4d = Unsqueeze(sink, sink_axes)"
        yield "column_shape = Concat<axis = 0>(batch_1, heads_1, queries_1, one_1)"
        yield "sink_column = Expand(sink_4d, column_shape)"

    def _per_head(self, name: str, operand: str, neutral: str) -> Iterator[str]:
        """An operand of shape (H,), or the neutral value for each head where it has shape (0,)."""
        yield f"{name}_neutral = Expand({neutral}, heads_1)"
        yield f"{name}_or_neutral = Concat<axis = 0>({operand}, {name}_neutral)"
        yield f"{name} = Slice({name}_or_neutral, zero_1, heads_1, zero_1)"

    def output(self) -> Iterator[str]:
        value, weight, mixed = "value_4d", "weight", "mixed_rows"
        if self._uses(Optional.SINKS):
            yield "one_row_more = Constant<value_ints = [0, 0, 0, 0, 0, 0, 1, 0]>()"
            yield "value_and_zero = Pad(value_4d, one_row_more)"
            value = "value_and_zero"
        if self.body.grouped:
            columns = "keys_1"
            if self._uses(Optional.SINKS):
                yield "columns_1 = Add(keys_1, one_1)"
                columns = "columns_1"
            yield f"weight_shape = Concat<axis = 0>(zero_1, kv_heads_1, last, {columns})"
            yield "weight_rows = Reshape(weight, weight_shape)"
            weight = "weight_rows"
        yield f"mixed_rows = MatMul({weight}, {value})"
        if self.body.grouped:
            yield "mixed_shape = Concat<axis = 0>(zero_1, heads_1, last, value_size_1)"
            yield "mixed = Reshape(mixed_rows, mixed_shape)"
            mixed = "mixed"
        yield from self._rows_without_keys(mixed)
        yield "output = " + ("Identity(rows)" if self.body.heads_first else "Transpose<perm = [0, 2, 1, 3]>(rows)")

    def _rows_without_keys(self, mixed: str) -> Iterator[str]:
        """`rows` (B,H,S,V): 0 where a query sees no key."""
        if self.body.zeroed and not self._uses(Optional.KEY_PADDING):
            yield f"rows = Identity({mixed})"
            return
        if self._uses(Optional.KEY_PADDING, Optional.SEGMENTS, Optional.BIAS):
            yield from self._row_sees_by_penalty()
        else:
            yield from self._row_sees_by_window()
        if self._uses(Optional.BIAS):
            yield f"rows = Where(row_sees, {mixed}, nothing)"  # the softmax of -inf alone is NaN
        else:
            yield self._typed("row_counts", "row_sees")
            yield f"rows = Mul({mixed}, row_counts)"

    def _row_sees_by_penalty(self) -> Iterator[str]:
        """`row_sees`, (S,1) to (B,H,S,1)."""
        with_bias = self._uses(Optional.BIAS) and not self.body.zeroed
        penalty = "penalty_and_bias" if with_bias else "penalty"
        if self.body.opset >= _AXES_INPUT:
            yield f"mildest = ReduceMax({penalty}, last)"
        else:
            yield f"mildest = ReduceMax<axes = [-1]>({penalty})"
        yield "row_sees = Greater(mildest, lowest)"

    def _row_sees_by_window(self) -> Iterator[str]:
        """`row_sees` (S,1)."""
        yield f"keys_int = Cast<to = {TensorProto.INT32}>(keys_1)"
        yield f"zero_int = Cast<to = {TensorProto.INT32}>(zero)"
        yield "ends_after_start = LessOrEqual(first_key, last_key)"
        yield "starts_in_keys = Less(first_key, keys_int)"
        yield "ends_in_keys = GreaterOrEqual(last_key, zero_int)"
        yield "overlaps = And(starts_in_keys, ends_in_keys)"
        yield "row_sees = And(overlaps, ends_after_start)"
