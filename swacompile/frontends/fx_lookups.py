"""ATen operators that look elements up, cut triangles or sum along an axis; and the axes that vmap hides."""

from collections.abc import Callable, Mapping

from torch import fx

from swacompile.frontends.fx_call import Call, Result, Untranslated, aligned, op, operand_node


def _index(call: Call) -> Result:
    """x[i, :, j]: index tensors for some axes, which are looked up together."""
    return _looked_up(
        call, call[0], {axis: operand_node(index) for axis, index in enumerate(call[1]) if index is not None}
    )


def _flat_apply(call: Call) -> Result:
    """x[i, j] in a vmapped function, as torch's TransformGetItemToIndex records it: (call, structure, name, x, i, j)."""
    name, *operands = call.node.args[2:]
    if not str(name).endswith(".ModIndex"):
        raise Untranslated(f"a call of {name}")
    return _looked_up(call, operands[0], {axis: operand_node(index) for axis, index in enumerate(operands[1:])})


def _written(call: Call) -> Result:
    """x[condition] = number."""
    chosen = [operand_node(index) for index in call[1] if index is not None]
    if len(call[1]) != 1 or len(chosen) != 1 or call.dtype(chosen[0]) != "bool" or call.get("accumulate"):
        raise Untranslated("elements written at positions")
    if any(extent != 1 for extent in call.meta(call[2]).shape):
        raise Untranslated("rows written where a condition holds")
    condition = call.tensor(chosen[0])
    behind = list(range(call.meta(chosen[0]).dim(), call.meta(call[0]).dim()))
    if behind:
        condition = call.emit("unsqueeze", condition, axes=behind)
    return op("where", condition, call.tensor(call[2]), call.tensor(call[0]))


def _looked_up(call: Call, data: object, indices: Mapping[int, fx.Node]) -> Result:
    if any(call.dtype(index) in ("bool", "uint8") for index in indices.values()):
        raise Untranslated("rows chosen by a condition")
    source = call.graph.read(operand_node(data))
    if source.levels:
        raise Untranslated("a lookup in hidden axes")
    axes = list(indices)
    found = aligned(call, "index", list(indices.values()), axes=axes)
    if found.levels and axes[0] != 0:
        raise Untranslated("a lookup by hidden axes behind others")
    return op("index", source.name, *found.inputs, levels=found.levels, axes=axes)


def _embedding(call: Call) -> Result:
    return op("gather", call.tensor(call[0]), call.tensor(call[1]), axis=0)


def _index_select(call: Call) -> Result:
    return op("gather", call.tensor(call[0]), call.tensor(call[2]), axis=call.axis(call[0], call[1]))


def _gather(call: Call) -> Result:
    return op("gather_elements", call.tensor(call[0]), call.tensor(call[2]), axis=call.axis(call[0], call[1]))


def _triangle(upper: int) -> Callable[[Call], Result]:
    def rule(call: Call) -> Result:
        diagonal = call.get("diagonal")
        return op("trilu", call.tensor(call[0]), call.operand(0 if diagonal is None else diagonal), upper=upper)

    return rule


def _cumsum(call: Call) -> Result:
    return op(
        "cumsum",
        call.tensor(call[0]),
        call.graph.vector([call.axis(call[0], call.get("dim"))]),
        dtype=call.dtype(call.node),
    )


# ------------------------------------------------------------------------------------------------------------------ vmap


def _add_batch_dim(call: Call) -> Result:
    """Hide an axis: it moves among the leading ones."""
    source, dim, level = call.node.args[:3]
    assert isinstance(level, int)
    value = call.graph.read(operand_node(source))
    axis = call.axis(source, dim)
    call.graph.level_extents[level] = call.extent(source, axis)
    levels = tuple(sorted((*value.levels, level)))
    order = list(range(len(value.levels) + call.meta(source).dim()))
    order.remove(len(value.levels) + axis)
    order.insert(levels.index(level), len(value.levels) + axis)
    return op("transpose", value.name, levels=levels, perm=order)


def _remove_batch_dim(call: Call) -> Result:
    """Show a hidden axis again; a tensor that does not vary along it is repeated."""
    source, level, _, dim = call.node.args
    assert isinstance(level, int)
    value = call.graph.read(operand_node(source))
    shown = call.axis(source, dim, extra=1)
    if level not in value.levels:
        extents = [call.graph.level_extents[other] for other in value.levels] + list(
            call.graph.sizes.shape(call.meta(call.node))
        )
        wide = call.emit("unsqueeze", value.name, axes=[len(value.levels) + shown])
        return op("expand", wide, call.graph.vector(extents), levels=value.levels)
    levels = tuple(other for other in value.levels if other != level)
    place = value.levels.index(level)
    order = list(range(len(value.levels) + call.meta(source).dim()))
    order.remove(place)
    order.insert(len(levels) + shown, place)
    return op("transpose", value.name, levels=levels, perm=order)


OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    "index": _index,
    "index_put": _written,
    "flat_apply": _flat_apply,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "tril": _triangle(0),
    "triu": _triangle(1),
    "cumsum": _cumsum,
    "_add_batch_dim": _add_batch_dim,
    "_remove_batch_dim": _remove_batch_dim,
}
