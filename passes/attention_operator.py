"""Attention operators: ONNX Attention, scaled_dot_product_attention. Their window and mask are attributes and operands."""

from math import inf, sqrt

from swacompile.attention import Attention, Axes, Layout, MaskedRows, Operand
from swacompile.graph import Node
from swacompile.index_expr import (
    FALSE,
    ONE,
    TRUE,
    Expr,
    Sort,
    and_,
    const_int,
    floordiv,
    index,
    integer,
    le,
    neg,
    sub,
)
from swacompile.passes.index_tensor import IndexTensor, broadcast_index
from swacompile.passes.logits import cases
from swacompile.passes.read_masks import Reading
from swacompile.passes.site import NotReadable, Operands, Placed, attention, axes_of, known_size, place_operand, split


def read_operator(reading: Reading, node: Node) -> Attention:
    """Raises NotReadable, Unreadable, UnreadableLogits."""
    ops = reading.operands(node)
    query, key, value = (ops.tensor(i) for i in range(3))
    if all(tensor.rank == 3 for tensor in (query, key, value)):
        return _flat_operator(reading, node, query, key, value)
    if any(tensor.rank != 4 for tensor in (query, key, value)):
        raise NotReadable(
            "rank", f"expected 4-D query, key and value, found ranks {query.rank}, {key.rank}, {value.rank}"
        )
    batches = [reading.sizes.resolve(tensor.shape[0]) for tensor in (query, key, value)]
    if ONE in batches and any(batch != ONE for batch in batches):
        listed = ", ".join(map(str, batches))
        raise NotReadable("batch", f"query, key and value have batches {listed}, of which 1 is broadcast: expected one")
    heads = known_size(reading, query.shape[1], "number of query heads")
    axes = axes_of(reading, query.shape[0], heads, query.shape[2], key.shape[2])
    group = floordiv(axes.head, integer(heads // (const_int(reading.sizes.resolve(key.shape[1])) or heads)))
    depth = index("d", query.shape[3])
    found = Operands(
        query=place_operand(reading, axes, query.name, (axes.batch, axes.head, axes.query, depth), "query"),
        key=place_operand(reading, axes, key.name, (axes.batch, group, axes.key, depth), "key"),
        value=place_operand(
            reading, axes, value.name, (axes.batch, group, axes.key, index("v", value.shape[3])), "value"
        ),
    )
    return _site(reading, node, axes, heads, found, query.shape[3])


def _flat_operator(reading: Reading, node: Node, query: IndexTensor, key: IndexTensor, value: IndexTensor) -> Attention:
    """Operands (batch, sequence, heads * size), the number of heads in attributes."""
    heads, kv_heads = (node.attrs.get(name) for name in ("q_num_heads", "kv_num_heads"))
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise NotReadable("rank", "expected q_num_heads and kv_num_heads beside 3-D query, key and value")
    axes = axes_of(reading, query.shape[0], heads, query.shape[1], key.shape[1])
    found = Operands(query=_unfolded(query, heads), key=_unfolded(key, kv_heads), value=_unfolded(value, kv_heads))
    return _site(reading, node, axes, heads, found, found.query.tensor.shape[3])


def _unfolded(tensor: IndexTensor, heads: int) -> Placed:
    """A 3-D operand as if it were (batch, sequence, heads, size)."""
    batch, sequence, width = tensor.shape
    size = floordiv(width, integer(heads))
    view = IndexTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=(batch, sequence, integer(heads), size),
        read=tensor.data,
        depth=tensor.depth,
    )
    return Placed(
        operand=Operand(value=tensor.name, layout=Layout.BSHD, flat=True), tensor=view, scale=1.0, heads=heads
    )


def _site(reading: Reading, node: Node, axes: Axes, heads: int, found: Operands, size: Expr) -> Attention:
    if (
        node.input(4)
        or node.input(5)
        or node.input(6)
        or any(reading.graph.users.get(extra) for extra in node.outputs[1:])
    ):
        raise NotReadable("cache", "the operator keeps a key-value cache or returns its scores")
    if node.attrs.get("dropout"):
        raise NotReadable("dropout", "the operator drops weights at random: the model was exported in training mode")
    mask = reading.operands(node).optional(3)
    visible, mask_form, bias, masked_rows = _mask(reading, node, axes, mask)
    head_size = const_int(reading.sizes.resolve(size))
    scale = node.attrs.get("scale")
    if not scale and head_size is None:
        raise NotReadable("head-size", "the scale depends on a head size that is not constant")
    base = float(scale) if isinstance(scale, float | int) and scale else 1 / sqrt(head_size or 1)
    softcap = node.attrs.get("softcap")
    return attention(
        reading, node=node.name, form="operator", mask_form=mask_form, found=found, axes=axes, heads=heads,
        output=Operand(value=node.outputs[0], layout=Layout.BHSD), visible=visible, zeroed=FALSE, scale=base,
        softcap=float(softcap) if isinstance(softcap, float | int) and softcap else None, sinks=None, masked_rows=masked_rows, bias=bias,
    )  # fmt: skip


def _mask(
    reading: Reading, node: Node, axes: Axes, mask: IndexTensor | None
) -> tuple[Expr, str, Expr | None, MaskedRows]:
    distance = sub(axes.key, axes.query)
    visible = le(distance, integer(0)) if node.attrs.get("is_causal") else TRUE
    form = "is_causal" if node.attrs.get("is_causal") else "none"
    for side, sign in (("left_window_size", neg), ("right_window_size", lambda e: e)):
        bound = node.attrs.get(side, -1)
        if isinstance(bound, int) and bound >= 0:
            visible, form = and_(visible, le(sign(distance), integer(bound))), "window attributes"
    if mask is None:
        return visible, form, None, MaskedRows.ZERO
    reading.sizes.broadcast(mask.shape, (axes.batch.args[0], integer(1), axes.queries, axes.keys)[-mask.rank :])
    element = reading.sizes.resolve(
        mask.at(*broadcast_index((axes.batch, axes.head, axes.query, axes.key), mask.shape))
    )
    if element.sort is Sort.BOOL:
        return and_(visible, element), "bool mask operand", None, MaskedRows.ZERO
    found_cases = cases(element, score="")
    said = split(found_cases, mask.dtype, mask.dtype, scored=False)
    finite = any(-inf < case.logit.constant < 0 for case in found_cases)
    return (
        and_(visible, said.visible),
        "float mask operand",
        said.bias,
        MaskedRows.UNIFORM if finite else MaskedRows.ZERO,
    )
