"""swacompile::BandedAttention as a model-local ONNX function of standard operators.

A model that carries it runs in any ONNX runtime; where our library is registered, its kernel takes the function's
place. One function serves all nodes of a model, so it is written for the union of what they use: `Body` says which. A
node that lacks one of these features passes the neutral constant of docs/operator.md.

Where the window is short beside the keys, queries are cut into N blocks of C, and each block meets only the L keys that
some query of it may see, and reads only those cells of a bias: cost O(S * window) in any runtime. Otherwise there is one
block with all keys.

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
FARTHEST_OFFSET = 2**29
"""Offsets beyond this count as this: a query there stands before or behind all keys, and stays below FAR."""
LOWEST: dict[int, float] = {
    TensorProto.FLOAT: -3.4028234e38,
    TensorProto.FLOAT16: -65504.0,
    TensorProto.BFLOAT16: -3.3895313e38,
}
"""What is added to the score of a hidden key, by element type: the lowest finite number."""

SMALLEST_BLOCK = 64
"""Queries of a block, at least: below, a product is too small to be fast."""

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

    @property
    def blocked(self) -> bool:
        """Whether blocks of queries read their own keys only. A zeroed key counts in every row."""
        return not self.zeroed

    def inputs(self) -> tuple[str, ...]:
        """Names of the function's inputs: up to the last that any node uses."""
        last = max((INPUTS.index(name) for name in self.uses if name in INPUTS), default=2)
        return INPUTS[: last + 1]


def banded_attention_function(body: Body) -> onnx.FunctionProto:
    """The function for a model of this opset."""
    writer = _Writer(body)
    parts = (
        writer.numbers, writer.sizes, writer.reach, writer.blocks, writer.window, writer.mask, writer.scores,
        writer.weights, writer.output,
    )  # fmt: skip
    lines = "\n".join(line for part in parts for line in part())
    signature = f"{NAME} <{', '.join(ATTRIBUTES)}> ({', '.join(body.inputs())}) => (output)"
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {body.opset}]>'
    function = onnx.parser.parse_function(f"{header}\n{signature} {{\n{lines}\n}}")
    _drop_unused(function)
    return function


def _drop_unused(function: onnx.FunctionProto) -> None:
    """Remove nodes that no output depends on: ONNX Runtime would run them."""
    needed = set(function.output)
    kept = []
    for node in reversed(function.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        branches = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        needed.update(node.input, *(inner.input for branch in branches for inner in branch.node))
    del function.node[:]
    function.node.extend(reversed(kept))


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

    def _int(self, name: str, source: str) -> str:
        return f"{name} = Cast<to = {TensorProto.INT32}>({source})"

    def numbers(self) -> Iterator[str]:
        for name, value in (("zero", 0), ("one", 1), ("far", FAR)):
            yield f"{name}_long = Constant<value_int = {value}>()"
            yield self._int(name, f"{name}_long")
        for name, values in (("zero_1", [0]), ("one_1", [1]), ("last", [-1]), ("length_axis", [2])):
            yield f"{name} = Constant<value_ints = {values}>()"
        yield f"lowest_float = Constant<value_float = {LOWEST[self.body.elem_type]:.8e}>()"
        yield self._typed("lowest", "lowest_float")
        yield "nothing_float = Constant<value_float = 0.0>()"
        yield self._typed("nothing", "nothing_float")
        yield "minus_infinity = Add(lowest, lowest)"

    def sizes(self) -> Iterator[str]:
        """Extents; and query, key, value in the order (B,H,S,D)."""
        head_axis, length_axis = (1, 2) if self.body.heads_first else (2, 1)
        yield from self._size("batch_1", "query", 0)
        yield from self._size("heads_1", "query", head_axis)
        yield from self._size("queries_1", "query", length_axis)
        yield from self._size("keys_1", "key", length_axis)
        yield from self._size("kv_heads_1", "key", head_axis)
        yield from self._size("size_1", "query", 3)
        yield from self._size("value_size_1", "value", 3)
        for name in ("queries", "keys"):
            yield f"{name}_long = Squeeze({name}_1)"
            yield self._int(name, f"{name}_long")
        for name in ("query", "key", "value"):
            move = "Identity" if self.body.heads_first else "Transpose<perm = [0, 2, 1, 3]>"
            yield f"{name}_4d = {move}({name})"

    def reach(self) -> Iterator[str]:
        """How far a query sees: `left` and `right`, int32, FAR where unbounded."""
        for side in ("left", "right"):
            yield f"{side}_attribute = Constant<value_int: int = @{side}_window_size>()"
            yield f"{side}_is_open = Less({side}_attribute, zero_long)"
            yield f"{side}_at_most = Min({side}_attribute, far_long)"
            yield f"{side}_long = Where({side}_is_open, far_long, {side}_at_most)"
            yield self._int(side, f"{side}_long")

    def blocks(self) -> Iterator[str]:
        """`blocks` N of `block` C queries, which meet `width` L keys each: int32, and int64 of shape (1,).

        C is a quarter of the window: smaller blocks waste fewer pairs and copy more keys. It was the fastest of 1/8 to 2 windows
        in ONNX Runtime 1.32 (S = T = 256 to 4096, windows 64 to 2048). Blocks must save a quarter of the keys to be worth their copies.
        """
        if self.body.blocked:
            for name, value in (("quarter", 4), ("keys_share", 3), ("smallest_block", SMALLEST_BLOCK)):
                yield f"{name} = Constant<value_int = {value}>()"
            yield "reach_long = Add(left_long, right_long)"
            yield "reach_quarter = Div(reach_long, quarter)"
            yield "preferred_block = Max(reach_quarter, smallest_block)"
            yield "smaller_block = Min(preferred_block, queries_long)"
            yield "span = Add(smaller_block, reach_long)"
            yield "four_spans = Mul(span, quarter)"
            yield "three_quarters = Mul(keys_long, keys_share)"
            yield "is_narrow = Less(four_spans, three_quarters)"
            yield "block_or_none = Where(is_narrow, smaller_block, queries_long)"
            yield "width_long = Where(is_narrow, span, keys_long)"
        else:
            yield "block_or_none = Identity(queries_long)"
            yield "width_long = Identity(keys_long)"
        yield "block_long = Max(block_or_none, one_long)"
        yield "before_block = Sub(block_long, one_long)"
        yield "rounded_up = Add(queries_long, before_block)"
        yield "blocks_long = Div(rounded_up, block_long)"
        for name in ("block", "width", "blocks"):
            yield f"{name}_1 = Unsqueeze({name}_long, zero_1)"
            yield self._int(name, f"{name}_long")

    def window(self) -> Iterator[str]:
        """`query_idx` (N,C), `kv_idx` (N,L); `position`, `first_key`, `last_key` (N,C,1): a query's place and what it may see. All int32."""
        yield "block_shape = Concat<axis = 0>(blocks_1, block_1)"
        yield "rows_and_rest = Mul(blocks, block)"
        yield "row_numbers = Range(zero, rows_and_rest, one)"
        yield "row_idx = Reshape(row_numbers, block_shape)"
        yield "last_query = Sub(queries, one)"
        yield "query_idx = Min(row_idx, last_query)"  # what fills up the last block is cut off at the end
        positions = "row_idx"
        if self._uses(Optional.OFFSET):
            yield f"farthest = Constant<value_int = {FARTHEST_OFFSET}>()"
            yield "farthest_back = Neg(farthest)"
            yield "offset_from = Max(offset, farthest_back)"
            yield "first_position_long = Min(offset_from, farthest)"
            yield self._int("first_position", "first_position_long")
            positions = "positions"
        elif self.body.alignment == "bottom_right":
            yield "first_position = Sub(keys, queries)"
            positions = "positions"
        if positions == "positions":
            yield "positions = Add(row_idx, first_position)"
        yield f"position = Unsqueeze({positions}, last)"
        chunks = self._uses(Optional.CHUNKS) and not self.body.zeroed
        yield ("window_start" if chunks else "first_key") + " = Sub(position, left)"
        yield ("window_end" if chunks else "last_key") + " = Add(position, right)"
        yield from self._keys_of_blocks(positions)
        if chunks:
            yield from self._chunks()

    def _keys_of_blocks(self, positions: str) -> Iterator[str]:
        """A block's keys start at the first that its first query may see, moved so that all L exist."""
        yield f"block_position = Slice({positions}, zero_1, one_1, one_1)"  # (N,1)
        yield "block_start = Sub(block_position, left)"
        yield "last_start = Sub(keys, width)"
        yield "earliest = Max(block_start, zero)"
        yield "start_key = Min(earliest, last_start)"
        yield "columns = Range(zero, width, one)"
        yield "kv_idx = Add(start_key, columns)"
        yield "kv_row = Unsqueeze(kv_idx, one_1)"  # (N,1,L)

    def _chunks(self) -> Iterator[str]:
        """A query sees its own chunk only. Mod rounds down, as negative positions need."""
        yield "chunk_long = Constant<value_int: int = @chunk_size>()"
        yield self._int("chunk", "chunk_long")
        yield "has_chunks = Greater(chunk, zero)"
        yield "divisor = Where(has_chunks, chunk, one)"
        yield "place_in_chunk = Mod(position, divisor)"
        yield "chunk_start = Sub(position, place_in_chunk)"
        yield "next_chunk = Add(chunk_start, chunk)"
        yield "chunk_end = Sub(next_chunk, one)"
        yield "later_start = Max(window_start, chunk_start)"
        yield "earlier_end = Min(window_end, chunk_end)"
        yield "first_key = Where(has_chunks, later_start, window_start)"
        yield "last_key = Where(has_chunks, earlier_end, window_end)"

    def mask(self) -> Iterator[str]:
        """`outside` (N,C,L): not in the band. `penalty`, (N,C,L) to (B,1,N,C,L): what hides a key, or 0."""
        yield "too_early = Less(kv_row, first_key)"
        yield "too_late = Greater(kv_row, last_key)"
        yield "outside = Or(too_early, too_late)"
        hidden = None if self.body.zeroed else "outside"
        if self._uses(Optional.SEGMENTS) and not self.body.zeroed:
            yield from self._segments()
            yield "outside_segment = Or(outside, other_segment)"
            hidden = "outside_segment"
        if self._uses(Optional.KEY_PADDING):
            yield from self._gather_keys("visible", "key_padding")
            yield "padding = Not(visible)"
            yield "padding_axes = Constant<value_ints = [1, 3]>()"
            yield "padding_5d = Unsqueeze(padding, padding_axes)"
            yield f"hidden = Or({hidden}, padding_5d)" if hidden else "hidden = Identity(padding_5d)"
            hidden = "hidden"
        if hidden is None:
            return
        if self._uses(Optional.BIAS):
            yield f"penalty = Where({hidden}, minus_infinity, nothing)"  # below any bias
        else:
            yield self._typed("is_hidden", hidden)
            yield "penalty = Mul(is_hidden, lowest)"

    def _gather_keys(self, name: str, operand: str) -> Iterator[str]:
        """(B,T) to (B,N,L): what each key of each block has. The neutral operand has one column, for all keys."""
        yield from self._size(f"{operand}_columns_1", operand, 1)
        yield self._int(f"{operand}_columns", f"{operand}_columns_1")
        yield f"{operand}_last = Sub({operand}_columns, one)"
        yield f"{operand}_idx = Min(kv_idx, {operand}_last)"
        yield f"{name} = Gather<axis = 1>({operand}, {operand}_idx)"

    def _segments(self) -> Iterator[str]:
        """`other_segment` (B,1,N,C,L). A query at no key's position has no segment; one label is the neutral operand."""
        yield from self._gather_keys("key_labels", "segments")
        yield "places = Squeeze(position, last)"
        yield "not_after = Min(places, segments_last)"
        yield "labelled = Max(not_after, zero)"
        yield "is_labelled = Equal(labelled, places)"
        yield "label_count = Size(segments)"
        yield "is_neutral = Equal(label_count, one_long)"
        yield "has_label = Or(is_labelled, is_neutral)"
        yield "no_label = Not(has_label)"
        yield "no_label_column = Unsqueeze(no_label, last)"
        yield "query_labels = Gather<axis = 1>(segments, labelled)"
        yield "query_label_axes = Constant<value_ints = [1, 4]>()"
        yield "query_labels_5d = Unsqueeze(query_labels, query_label_axes)"
        yield "key_label_axes = Constant<value_ints = [1, 3]>()"
        yield "key_labels_5d = Unsqueeze(key_labels, key_label_axes)"
        yield "same_label = Equal(query_labels_5d, key_labels_5d)"
        yield "other_label = Not(same_label)"
        yield "other_segment = Or(other_label, no_label_column)"

    def scores(self) -> Iterator[str]:
        """`score` (B,H,N,C,L). The product has (B,K,H/K,N,C,L) with grouped heads, so that keys are broadcast and not repeated."""
        yield from self._scale()
        yield "query_blocks = Gather<axis = 2>(query_4d, query_idx)"
        yield "key_blocks = Gather<axis = 2>(key_4d, kv_idx)"
        query, key, order = "query_blocks", "key_blocks", "0, 1, 2, 4, 3"
        if self.body.grouped:
            yield "query_shape = Concat<axis = 0>(zero_1, kv_heads_1, last, blocks_1, block_1, size_1)"
            yield "query_6d = Reshape(query_blocks, query_shape)"
            yield "group_axis = Constant<value_ints = [2]>()"
            yield "key_6d = Unsqueeze(key_blocks, group_axis)"
            query, key, order = "query_6d", "key_6d", "0, 1, 2, 3, 5, 4"
        yield f"key_t = Transpose<perm = [{order}]>({key})"
        # ONNX Runtime joins a product of float32 and the Mul after it into one kernel, and only that.
        if self.body.elem_type == TensorProto.FLOAT:
            yield f"product = MatMul({query}, key_t)"
            yield "scaled = Mul(product, inner_scale)"
        else:
            yield f"scaled_query = Mul({query}, inner_scale)"
            yield "scaled = MatMul(scaled_query, key_t)"
        scaled = "scaled"
        if self.body.grouped:
            yield "score_shape = Concat<axis = 0>(zero_1, heads_1, blocks_1, block_1, width_1)"
            yield "scaled_5d = Reshape(scaled, score_shape)"
            scaled = "scaled_5d"
        if self._uses(Optional.SOFTCAP):
            yield from self._softcap(scaled)
        else:
            yield f"score = Identity({scaled})"

    def _scale(self) -> Iterator[str]:
        """`inner_scale`: what the product is multiplied by, inside of tanh where there is a cap."""
        yield "scale = Constant<value_float: float = @scale>()"
        if not self._uses(Optional.SOFTCAP):
            yield self._typed("inner_scale", "scale")
            return
        yield "cap_float = Constant<value_float: float = @softcap>()"
        yield "has_cap = Greater(cap_float, nothing_float)"
        yield "scale_in_cap = Div(scale, cap_float)"
        yield "inner_scale_float = Where(has_cap, scale_in_cap, scale)"
        yield self._typed("inner_scale", "inner_scale_float")
        yield self._typed("cap", "cap_float")

    def _softcap(self, scaled: str) -> Iterator[str]:
        """An If, because runtimes fold one whose condition is constant: nodes without a cap then cost nothing."""
        element = TensorProto.DataType.Name(self.body.elem_type).lower()
        yield (
            f"score = If(has_cap) <then_branch = cap () => ({element}[] bent) {{"
            f" squashed = Tanh({scaled}) bent = Mul(squashed, cap) }},"
            f" else_branch = same () => ({element}[] straight) {{ straight = Identity({scaled}) }}>"
        )

    def weights(self) -> Iterator[str]:
        """`weight` (B,H,N,C,L), or (B,H,N,C,L+1) with sinks: their share is the last column."""
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
            yield from self._bias_of_blocks()
            yield "penalty_and_bias = Add(penalty, bias_5d)"
            total = "penalty_and_bias"
        if self._uses(Optional.ALIBI):
            yield from self._slope_bias()
            yield f"penalty_and_slopes = Add({total}, slope_bias)"
            total = "penalty_and_slopes"
        yield f"logits = Add(score, {total})"

    def _bias_of_blocks(self) -> Iterator[str]:
        """`bias_5d` (1 or B, 1 or H, N, 1 or C, L): the cells that the blocks read, by their places in the bias as one row a head."""
        yield from self._size("bias_rows_1", "bias", 2)
        yield from self._size("bias_columns_1", "bias", 3)
        yield f"query_idx_long = Cast<to = {TensorProto.INT64}>(query_idx)"
        yield f"kv_idx_long = Cast<to = {TensorProto.INT64}>(kv_idx)"
        yield "bias_row = Slice(query_idx_long, zero_1, bias_rows_1, one_1)"  # one of each block where all queries share a row
        yield "last_bias_row = Sub(bias_rows_1, one_1)"
        yield "bias_row_idx = Min(bias_row, last_bias_row)"
        yield "bias_row_start = Mul(bias_row_idx, bias_columns_1)"
        yield "bias_row_3d = Unsqueeze(bias_row_start, last)"
        yield "last_bias_column = Sub(bias_columns_1, one_1)"
        yield "bias_column = Min(kv_idx_long, last_bias_column)"
        yield "bias_column_3d = Unsqueeze(bias_column, one_1)"
        yield "bias_cell = Add(bias_row_3d, bias_column_3d)"
        yield "bias_flat_shape = Constant<value_ints = [0, 0, -1]>()"
        yield "bias_flat = Reshape(bias, bias_flat_shape)"
        yield "bias_5d = Gather<axis = 2>(bias_flat, bias_cell)"

    def _zeroed_logits(self) -> Iterator[str]:
        score = "score"
        if self._uses(Optional.BIAS):
            yield "bias_5d = Unsqueeze(bias, length_axis)"
            yield "score_and_bias = Add(score, bias_5d)"
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
        """`slope_bias` (H,N,C,L)."""
        yield from self._per_head("slopes", "alibi_slopes", "nothing_float")
        yield "slope_axes = Constant<value_ints = [1, 2, 3]>()"
        yield "slopes_4d = Unsqueeze(slopes, slope_axes)"
        yield "distance = Sub(kv_row, position)"
        yield f"distance_float = Cast<to = {TensorProto.FLOAT}>(distance)"
        yield "slope_bias_float = Mul(slopes_4d, distance_float)"
        yield self._typed("slope_bias", "slope_bias_float")

    def _sink_column(self) -> Iterator[str]:
        """`sink_column` (B,H,N,C,1)."""
        yield from self._per_head("sink", "sinks", "lowest")
        yield "sink_axes = Constant<value_ints = [0, 2, 3, 4]>()"
        yield "sink_5d = Unsqueeze(sink, sink_axes)"
        yield "column_shape = Concat<axis = 0>(batch_1, heads_1, blocks_1, block_1, one_1)"
        yield "sink_column = Expand(sink_5d, column_shape)"

    def _per_head(self, name: str, operand: str, neutral: str) -> Iterator[str]:
        """An operand of shape (H,), or the neutral value for each head where it has shape (0,)."""
        yield f"{name}_neutral = Expand({neutral}, heads_1)"
        yield f"{name}_or_neutral = Concat<axis = 0>({operand}, {name}_neutral)"
        yield f"{name} = Slice({name}_or_neutral, zero_1, heads_1, zero_1)"

    def output(self) -> Iterator[str]:
        yield "value_blocks = Gather<axis = 2>(value_4d, kv_idx)"
        value, weight, columns = "value_blocks", "weight", "width_1"
        if self._uses(Optional.SINKS):
            # Not Pad: inside a function, ONNX Runtime 1.19 to 1.24 refuses its second input.
            yield "zero_row_shape = Concat<axis = 0>(batch_1, kv_heads_1, blocks_1, one_1, value_size_1)"
            yield "zero_row = Expand(nothing, zero_row_shape)"
            yield "value_and_zero = Concat<axis = 3>(value_blocks, zero_row)"
            yield "columns_1 = Add(width_1, one_1)"
            value, columns = "value_and_zero", "columns_1"
        if self.body.grouped:
            yield f"weight_shape = Concat<axis = 0>(zero_1, kv_heads_1, last, blocks_1, block_1, {columns})"
            yield "weight_6d = Reshape(weight, weight_shape)"
            yield f"value_6d = Unsqueeze({value}, group_axis)"
            yield "mixed_6d = MatMul(weight_6d, value_6d)"
            yield "mixed_shape = Concat<axis = 0>(zero_1, heads_1, blocks_1, block_1, value_size_1)"
            yield "mixed = Reshape(mixed_6d, mixed_shape)"
        else:
            yield f"mixed = MatMul({weight}, {value})"
        yield from self._rows_without_keys()
        yield "rows_shape = Concat<axis = 0>(zero_1, heads_1, last, value_size_1)"
        yield "rows_4d = Reshape(rows, rows_shape)"
        yield "all_rows = Slice(rows_4d, zero_1, queries_1, length_axis)"
        move = "Identity" if self.body.heads_first else "Transpose<perm = [0, 2, 1, 3]>"
        yield f"output = {move}(all_rows)"

    def _rows_without_keys(self) -> Iterator[str]:
        """`rows` (B,H,N,C,V): 0 where a query sees no key."""
        if self.body.zeroed and not self._uses(Optional.KEY_PADDING):
            yield "rows = Identity(mixed)"
            return
        if self._uses(Optional.KEY_PADDING, Optional.SEGMENTS, Optional.BIAS):
            yield from self._row_sees_by_penalty()
        else:
            yield "starts_in_keys = Less(first_key, keys)"
            yield "ends_in_keys = GreaterOrEqual(last_key, zero)"
            yield "row_sees = And(starts_in_keys, ends_in_keys)"
        if self._uses(Optional.BIAS):
            yield "rows = Where(row_sees, mixed, nothing)"  # the softmax of -inf alone is NaN
        else:
            yield self._typed("row_counts", "row_sees")
            yield "rows = Mul(mixed, row_counts)"

    def _row_sees_by_penalty(self) -> Iterator[str]:
        """`row_sees`, (N,C,1) to (B,H,N,C,1)."""
        with_bias = self._uses(Optional.BIAS) and not self.body.zeroed
        penalty = "penalty_and_bias" if with_bias else "penalty"
        if self.body.opset >= _AXES_INPUT:
            yield f"mildest = ReduceMax({penalty}, last)"
        else:
            yield f"mildest = ReduceMax<axes = [-1]>({penalty})"
        hides = "minus_infinity" if self._uses(Optional.BIAS) else "lowest"
        yield f"row_sees = Greater(mildest, {hides})"
