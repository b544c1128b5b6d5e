"""ATen operators that compute: products, softmax, attention, reductions."""

from collections.abc import Callable, Mapping

from swacompile.frontends.einsum import contraction
from swacompile.frontends.fx_call import Call, Result, Untranslated, aligned, op, operand_node


def _matmul(call: Call) -> Result:
    return op("matmul", call.tensor(call[0]), call.tensor(call[1]))


def _linear(call: Call) -> Result:
    weight = call.emit("transpose", call.tensor(call[1]), perm=[1, 0])
    if call.meta(call[0]).dim() < 2 or call.meta(call[1]).dim() != 2:
        raise Untranslated("a projection of a vector")
    if call[2] is None:
        return op("matmul", call.tensor(call[0]), weight)
    return op("add", call.emit("matmul", call.tensor(call[0]), weight), call.tensor(call[2]))


def _biased_matmul(call: Call) -> Result:
    """beta * bias + alpha * (left @ right)."""
    product = call.emit("matmul", call.tensor(call[1]), call.tensor(call[2]))
    alpha, beta = call.get("alpha"), call.get("beta")
    if alpha != 1:
        product = call.emit("mul", product, call.operand(alpha))
    if beta == 0:
        return op("identity", product)
    bias = call.tensor(call[0]) if beta == 1 else call.emit("mul", call.tensor(call[0]), call.operand(beta))
    return op("add", product, bias)


def _einsum(call: Call) -> Result:
    """Two operands as a product between views; other sums keep their name."""
    operands = [operand_node(operand) for operand in call[1]]
    steps = contraction(str(call[0]), tuple(call.meta(operand).dim() for operand in operands))
    if steps is None:
        raise Untranslated("another form of einsum")
    values = [call.tensor(operand) for operand in operands]
    for step in steps[:-1]:
        values.append(call.emit(step.op, *(values[i] for i in step.inputs), known=None, **step.attrs))
    return Result(op=steps[-1].op, inputs=tuple(values[i] for i in steps[-1].inputs), attrs=steps[-1].attrs)


def _softmax(call: Call) -> Result:
    return op("softmax", _wide(call), axis=call.axis(call[0], call.get("dim")))


def _safe_softmax(call: Call) -> Result:
    """Rows without a visible key give 0 where softmax gives NaN."""
    known = call.type_like(call.dtype(call.node))
    weights = call.emit("softmax", _wide(call), known=known, axis=call.axis(call[0], call.get("dim")))
    return op("where", call.emit("isnan", weights), call.graph.number(0.0), weights)


def _wide(call: Call) -> str:
    """The operand of a softmax in the data type that the softmax computes in."""
    dtype = call.dtype(call.node)
    value = call.tensor(call[0])
    return value if call.dtype(call[0]) == dtype else call.emit("cast", value, known=call.type_like(dtype), dtype=dtype)


def _attention(call: Call) -> Result:
    """scaled_dot_product_attention and the fused operators it becomes. is_causal counts from the top left."""
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    inputs = [call.tensor(call[i]) for i in range(3)] + ([call.tensor(mask)] if mask is not None else [])
    attrs: dict[str, object] = {"is_causal": int(bool(call.get("is_causal")))}
    if call.get("scale") is not None:
        attrs["scale"] = float(call.number(call.get("scale")))
    if call.get("dropout_p"):
        attrs["dropout"] = float(call.get("dropout_p"))
    return Result(op="attention", inputs=tuple(inputs), attrs=attrs)


def _reduce(name: str) -> Callable[[Call], Result]:
    def rule(call: Call) -> Result:
        if call.get("other") is not None:
            return aligned(call, "max" if name == "reduce_max" else "min", (call[0], call[1]))
        dims = call.get("dim") if call.get("dim") is not None else call.get("axis")
        rank = call.meta(call[0]).dim()
        chosen = list(range(rank)) if dims in (None, [], ()) else dims if isinstance(dims, list | tuple) else [dims]
        axes = [call.axis(call[0], dim) for dim in chosen]
        return op(name, call.tensor(call[0]), axes=axes, keepdims=int(bool(call.get("keepdim"))))

    return rule


def _like_first(name: str) -> Callable[[Call], Result]:
    """An operation whose first output has the shape of its first operand."""
    return lambda call: op(name, call.tensor(call[0]))


FUSED_ATTENTION = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip

OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _biased_matmul),
    **dict.fromkeys(("softmax", "_softmax", "special_softmax"), _softmax),
    **dict.fromkeys(FUSED_ATTENTION, _attention),
    **dict.fromkeys(("convolution", "conv1d", "conv2d"), _like_first("Conv")),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm"),
        _like_first("normalize"),
    ),
    **dict.fromkeys(
        ("mean", "prod", "amin", "var", "std", "linalg_vector_norm", "norm", "argmax", "argmin", "min", "all"),
        _reduce("reduce"),
    ),
    **dict.fromkeys(("amax", "max"), _reduce("reduce_max")),
    "sum": _reduce("reduce_sum"),
    "any": _reduce("any"),
    "linear": _linear,
    "einsum": _einsum,
    "_safe_softmax": _safe_softmax,
    "topk": _like_first("top_k"),
}
