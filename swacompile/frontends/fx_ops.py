"""ATen operators in the neutral vocabulary: one rule an operator, whichever overload, in place or not."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from swacompile.frontends.fx_call import Call, Result, Untranslated, op
from swacompile.graph import FLOATS
from swacompile.index_expr import ONE, ZERO, Expr, add, at_least, const_int, integer, mul, sub

END = 2**63 - 1

# ---------------------------------------------------------------------------------------------------- element by element


def elementwise(name: str, operands: int) -> Callable[[Call], Result]:
    def rule(call: Call) -> Result:
        return aligned(call, name, [call[i] for i in range(operands)])

    return rule


def aligned(call: Call, name: str, operands: Sequence[object], **attrs: object) -> Result:
    """An operation under broadcasting, also over axes that vmap hides: each level gets its axis in every operand."""
    values = [None if call.is_number(operand) else call.graph.read(_node(operand)) for operand in operands]
    levels = tuple(sorted({level for value in values if value for level in value.levels}))
    if not levels:
        return Result(op=name, inputs=tuple(call.operand(operand) for operand in operands), attrs=attrs)
    rank = max(call.meta(operand).dim() for operand, value in zip(operands, values, strict=True) if value)
    names = []
    for operand, value in zip(operands, values, strict=True):
        if value is None:
            names.append(call.operand(operand))
            continue
        own = call.meta(operand).dim()
        missing = [i for i, level in enumerate(levels) if level not in value.levels]
        missing += [len(levels) + i for i in range(rank - own)]
        names.append(call.emit("unsqueeze", value.name, axes=missing) if missing else value.name)
    return Result(op=name, inputs=tuple(names), attrs=attrs, levels=levels)


def _node(argument: object) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise Untranslated(f"expected a tensor, found {argument!r}")
    return argument


def _add(call: Call) -> Result:
    if call.dtype(call.node) == "bool":
        return aligned(call, "or", (call[0], call[1]))
    return _with_alpha(call, "add", call[0], call[1])


def _sub(call: Call) -> Result:
    return _with_alpha(call, "sub", call[0], call[1])


def _rsub(call: Call) -> Result:
    return _with_alpha(call, "sub", call[1], call[0])


def _with_alpha(call: Call, name: str, left: object, right: object) -> Result:
    if call.get("alpha") in (1, None):
        return aligned(call, name, (left, right))
    scaled = call.emit("mul", call.operand(right), call.operand(call.get("alpha")), dtype=call.dtype(call.node))
    return op(name, call.operand(left), scaled)


def _mul(call: Call) -> Result:
    return aligned(call, "and" if call.dtype(call.node) == "bool" else "mul", (call[0], call[1]))


def _div(call: Call) -> Result:
    """torch divides integers exactly where no rounding is asked for; the neutral `div` of integers rounds toward zero."""
    rounding = call.get("rounding_mode")
    integers = call.dtype(call.node) not in FLOATS
    if rounding == "floor":
        return aligned(call, "floordiv", (call[0], call[1]))
    if rounding == "trunc":
        if not integers:
            raise Untranslated("a rounded division of reals")
        return aligned(call, "div", (call[0], call[1]))
    if all(call.is_number(operand) or call.dtype(operand) in FLOATS for operand in (call[0], call[1])):
        return aligned(call, "div", (call[0], call[1]))
    dtype = call.dtype(call.node)
    return op("div", *(_as_real(call, operand, dtype) for operand in (call[0], call[1])))


def _as_real(call: Call, operand: object, dtype: str) -> str:
    if call.is_number(operand):
        number = call.number(operand)
        return (
            call.graph.number(float(number))
            if not isinstance(number, torch.SymInt)
            else call.emit("cast", call.graph.number(number), dtype=dtype)
        )
    return call.emit("cast", call.tensor(operand), dtype=dtype)


def _logical(name: str) -> Callable[[Call], Result]:
    """Bitwise operators are logic where they work on conditions."""

    def rule(call: Call) -> Result:
        if call.dtype(call.node) != "bool":
            raise Untranslated("bits of integers")
        return aligned(call, name, [call[i] for i in range(1 if name == "not" else 2)])

    return rule


def _condition(name: str) -> Callable[[Call], Result]:
    """Logic on numbers asks whether they are 0."""

    def rule(call: Call) -> Result:
        operands = [call[i] for i in range(1 if name == "not" else 2)]
        if all(call.dtype(operand) == "bool" for operand in operands):
            return aligned(call, name, operands)
        return op(name, *(call.emit("cast", call.tensor(operand), dtype="bool") for operand in operands))

    return rule


def _where(call: Call) -> Result:
    if call[1] is None:
        raise Untranslated("the positions of a condition")
    return aligned(call, "where", (call[0], call[1], call[2]))


def _masked_fill(call: Call) -> Result:
    return aligned(call, "where", (call[1], call[2], call[0]))


def _clamp(call: Call) -> Result:
    value, low, high = call.tensor(call[0]), call.get("min"), call.get("max")
    known = call.type_like(call.dtype(call.node))
    if low is not None:
        value = call.emit("max", value, call.operand(low), known=known)
    if high is not None:
        value = call.emit("min", value, call.operand(high), known=known)
    return op("identity", value)


def _rsqrt(call: Call) -> Result:
    return op("reciprocal", call.emit("sqrt", call.tensor(call[0])))


def _convert(call: Call) -> Result:
    """Any change of data type, device or memory."""
    before, after = call.dtype(call[0]), call.dtype(call.node)
    if before == after:
        return aligned(call, "identity", (call[0],))
    return aligned(call, "cast", (call[0],), dtype=after)


def _copy(call: Call) -> Result:
    """The second operand in the first one's shape and type."""
    value = call.operand(call[1])
    if not call.is_number(call[1]) and call.dtype(call[1]) != call.dtype(call[0]):
        value = call.emit("cast", value, dtype=call.dtype(call[0]))
    return op("expand", value, call.graph.vector(call.meta(call[0]).shape))


def _dropout(call: Call) -> Result:
    if call[2] is not False and call[1] != 0.0:
        raise Untranslated("dropout in training")
    return aligned(call, "identity", (call[0],))


# --------------------------------------------------------------------------------------------------------------- sources


def _arange(call: Call) -> Result:
    start, step = call.get("start"), call.get("step")
    bounds = (0 if start is None else start, call.get("end"), 1 if step is None else step)
    return op("iota", *(call.operand(bound) for bound in bounds), dtype=call.dtype(call.node))


def _filled(value: object) -> Callable[[Call], Result]:
    """A tensor of one number; `value` is the number, or the name of the argument that gives it."""

    def rule(call: Call) -> Result:
        fill, dtype = call.get(value) if isinstance(value, str) else value, call.dtype(call.node)
        if isinstance(fill, bool | int | float):
            fill = bool(fill) if dtype == "bool" else float(fill) if dtype in FLOATS else int(fill)
        return op("full", call.shape(), call.operand(fill), dtype=dtype)

    return rule


# ----------------------------------------------------------------------------------------------------------------- views


def _reshape(call: Call) -> Result:
    """The metadata hold the result's shape, with every -1 worked out."""
    return op("reshape", call.tensor(call[0]), call.shape(), allowzero=1)


def _expand(call: Call) -> Result:
    return op("expand", call.tensor(call[0]), call.shape())


def _unsqueeze(call: Call) -> Result:
    return op("unsqueeze", call.tensor(call[0]), axes=[call.axis(call[0], call.get("dim"), extra=1)])


def _squeeze(call: Call) -> Result:
    dims = call.get("dim")
    shape = call.meta(call[0]).shape
    asked = (
        range(len(shape))
        if dims is None
        else [call.axis(call[0], dim) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    )
    return op("squeeze", call.tensor(call[0]), axes=[axis for axis in asked if call.extent(call[0], axis) == ONE])


def _permutation(call: Call) -> list[int]:
    """Which axis of the operand each axis of the result is."""
    rank = call.meta(call[0]).dim()
    axes = list(range(rank))
    if call.get("dims") is not None:
        return [call.axis(call[0], dim) for dim in call.get("dims")]
    if call.get("source") is not None:
        return _moved(call, rank)
    pair = [call.get(name) for name in ("dim0", "dim1", "axis0", "axis1") if call.get(name) is not None] or [
        0,
        rank - 1,
    ][: max(rank, 1)]
    first, second = call.axis(call[0], pair[0]), call.axis(call[0], pair[-1])
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _moved(call: Call, rank: int) -> list[int]:
    """movedim: some axes get new places, the others keep their order."""
    pairs = [call.get(name) for name in ("source", "destination")]
    sources, destinations = (
        [call.axis(call[0], dim) for dim in (dims if isinstance(dims, list | tuple) else [dims])] for dims in pairs
    )
    placed = dict(zip(destinations, sources, strict=True))
    rest = iter(axis for axis in range(rank) if axis not in sources)
    return [placed[axis] if axis in placed else next(rest) for axis in range(rank)]


def _transpose(call: Call) -> Result:
    return op("transpose", call.tensor(call[0]), perm=_permutation(call))


def _reversed(call: Call) -> Result:
    return op("transpose", call.tensor(call[0]), perm=list(range(call.meta(call[0]).dim()))[::-1])


def _last_two(call: Call) -> Result:
    rank = call.meta(call[0]).dim()
    return op("transpose", call.tensor(call[0]), perm=[*range(rank - 2), rank - 1, rank - 2])


def _slice(call: Call) -> Result:
    step = call.integer(call.get("step") if call.get("step") is not None else 1)
    start, end = (call.number(bound) if bound is not None else None for bound in (call.get("start"), call.get("end")))
    return _cut(call, call[0], call.axis(call[0], call.get("dim")), start, end, step)


def _cut(
    call: Call,
    source: object,
    axis: int,
    start: "int | torch.SymInt | None",
    end: "int | torch.SymInt | None",
    step: int,
) -> Result:
    value = call.tensor(source)
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**31 - 1))
    if whole and step == 1:
        return op("identity", value)
    vector = call.graph.vector
    first = call.graph.sizes.of(0 if start is None else start)
    if at_least(first, 0):  # a slice that has rows starts inside, and the metadata hold their number
        last = add(first, mul(integer(step), sub(call.extent(call.node, axis), ONE)), ONE)
        return op("slice", value, vector([first]), vector([last]), vector([axis]), vector([step]), exact=1)
    return op("slice", value, vector([first]), vector([END if end is None else end]), vector([axis]), vector([step]))


def _narrow(call: Call) -> Result:
    start = _position(call, call.get("start"), call.axis(call[0], call.get("dim")))
    end = add(start, call.graph.sizes.of(call.number(call.get("length"))))
    vector = call.graph.vector
    return op(
        "slice",
        call.tensor(call[0]),
        vector([start]),
        vector([end]),
        vector([call.axis(call[0], call.get("dim"))]),
        vector([1]),
        exact=1,
    )


def _select(call: Call) -> Result:
    axis = call.axis(call[0], call.get("dim"))
    start = _position(call, call.get("index"), axis)
    return _take(call, call[0], axis, start)


def _take(call: Call, source: object, axis: int, position: Expr) -> Result:
    vector = call.graph.vector
    row = call.emit(
        "slice",
        call.tensor(source),
        vector([position]),
        vector([add(position, ONE)]),
        vector([axis]),
        vector([1]),
        exact=1,
    )
    return op("squeeze", row, axes=[axis])


def _position(call: Call, position: object, axis: int) -> Expr:
    """An index of an axis, counted from its start."""
    found = call.graph.sizes.of(call.number(position))
    if at_least(found, 0):
        return found
    if const_int(found) is None:
        raise Untranslated("a position of unknown sign")
    return add(call.extent(call[0], axis), found)


def _part(call: Call) -> Result:
    """One tensor of a list that split, chunk or unbind makes."""
    whole, position = call.node.args
    assert isinstance(whole, fx.Node) and isinstance(position, int)
    cut = Call(node=whole, name=call.name, graph=call.graph)
    dim = cut.get("dim")
    axis = cut.axis(cut[0], 0 if dim is None else dim)
    if str(whole.target).startswith("aten.unbind"):
        return _take(call, cut[0], axis, integer(position))
    pieces = whole.meta["val"]
    start = add(*(call.graph.sizes.of(piece.shape[axis]) for piece in pieces[:position])) if position else ZERO
    end = add(start, call.graph.sizes.of(pieces[position].shape[axis]))
    vector = call.graph.vector
    return op("slice", call.tensor(cut[0]), vector([start]), vector([end]), vector([axis]), vector([1]), exact=1)


def _repeat_interleave(call: Call) -> Result:
    """Each row several times: an axis behind it that is repeated, then merged."""
    if call.get("repeats") is None or not call.is_number(call.get("repeats")) or call.get("dim") is None:
        raise Untranslated("repeats that depend on the row")
    axis = call.axis(call[0], call.get("dim"))
    return _repeated(call, {axis + 1: call.number(call.get("repeats"))})


def _repeat(call: Call) -> Result:
    """The whole tensor several times along its axes: an axis before each that is repeated, then merged."""
    rank, repeats = call.meta(call[0]).dim(), [call.number(count) for count in call.get("repeats")]
    lead = len(repeats) - rank
    axes = {
        axis if axis < lead else lead + 2 * (axis - lead): count
        for axis, count in enumerate(repeats)
        if axis < lead or count != 1
    }
    inserted = 0
    places: dict[int, int | torch.SymInt] = {}
    for axis, count in enumerate(repeats):
        if axis < lead or count != 1:
            places[axis + inserted] = count
            inserted += axis >= lead
    return _repeated(call, places) if axes else op("identity", call.tensor(call[0]))


def _repeated(call: Call, places: Mapping[int, "int | torch.SymInt"]) -> Result:
    """Insert axes at these places, repeat them, and merge them into the result's shape."""
    wide = call.emit("unsqueeze", call.tensor(call[0]), axes=list(places))
    extents = iter(call.graph.sizes.shape(call.meta(call[0])))
    rank = call.meta(call[0]).dim() + len(places)
    shape = [call.graph.sizes.of(places[axis]) if axis in places else next(extents) for axis in range(rank)]
    repeated = call.emit("expand", wide, call.graph.vector(shape))
    return op("reshape", repeated, call.shape(), allowzero=1)


def _cat(call: Call) -> Result:
    parts = [_node(part) for part in call[0]]
    rank = max(call.meta(part).dim() for part in parts)
    kept = [
        part for part in parts if rank == 1 or tuple(call.meta(part).shape) != (0,)
    ]  # torch ignores empty vectors here
    dim = call.get("dim")
    axis = call.axis(kept[0], 0 if dim is None else dim)
    if len(kept) == 1:
        return op("identity", call.tensor(kept[0]))
    return op("concat", *(call.tensor(part) for part in kept), axis=axis)


def _stack(call: Call) -> Result:
    parts = [_node(part) for part in call[0]]
    axis = call.axis(parts[0], call.get("dim"), extra=1)
    return op("concat", *(call.emit("unsqueeze", call.tensor(part), axes=[axis]) for part in parts), axis=axis)


def _diff(call: Call) -> Result:
    """Each element less the one before it."""
    if call.get("n") not in (1, None) or call.dtype(call.node) == "bool":
        raise Untranslated("a difference of another kind")
    axis = call.axis(call[0], call.get("dim"))
    given = [part for part in (call.get("prepend"), call[0], call.get("append")) if part is not None]
    whole = (
        call.emit("concat", *(call.tensor(part) for part in given), axis=axis)
        if len(given) > 1
        else call.tensor(call[0])
    )
    length = add(*(call.extent(part, axis) for part in given))
    vector = call.graph.vector
    later = call.emit("slice", whole, vector([1]), vector([length]), vector([axis]), vector([1]), exact=1)
    earlier = call.emit("slice", whole, vector([0]), vector([sub(length, ONE)]), vector([axis]), vector([1]), exact=1)
    return op("sub", later, earlier)


def _slice_scatter(call: Call) -> Result:
    axis = call.axis(call[0], call.get("dim"))
    if call.get("step") not in (1, None):
        raise Untranslated("a slice with steps that is written")
    start = _position(call, 0 if call.get("start") is None else call.get("start"), axis)
    return _replaced(call, call[0], call.tensor(call[1]), call.extent(call[1], axis), axis, start)


def _select_scatter(call: Call) -> Result:
    axis = call.axis(call[0], call.get("dim"))
    row = call.emit("unsqueeze", call.tensor(call[1]), axes=[axis])
    return _replaced(call, call[0], row, ONE, axis, _position(call, call.get("index"), axis))


def _replaced(call: Call, base: object, part: str, length: Expr, axis: int, start: Expr) -> Result:
    """The base with `length` rows from `start` replaced by a part."""
    value, extent, vector = call.tensor(base), call.extent(base, axis), call.graph.vector
    end = add(start, length)
    pieces = [part]
    if start != ZERO:
        pieces.insert(0, call.emit("slice", value, vector([0]), vector([start]), vector([axis]), vector([1]), exact=1))
    if end != extent:
        pieces.append(call.emit("slice", value, vector([end]), vector([extent]), vector([axis]), vector([1]), exact=1))
    return op("concat", *pieces, axis=axis) if len(pieces) > 1 else op("identity", part)


# --------------------------------------------------------------------------------------------------------------- lookups


def _index(call: Call) -> Result:
    """x[i, :, j]: index tensors for some axes, which are looked up together."""
    return _looked_up(call, call[0], {axis: _node(index) for axis, index in enumerate(call[1]) if index is not None})


def _flat_apply(call: Call) -> Result:
    """x[i, j] in a vmapped function, as torch's TransformGetItemToIndex records it: (call, structure, name, x, i, j)."""
    name, *operands = call.node.args[2:]
    if not str(name).endswith(".ModIndex"):
        raise Untranslated(f"a call of {name}")
    return _looked_up(call, operands[0], {axis: _node(index) for axis, index in enumerate(operands[1:])})


def _looked_up(call: Call, data: object, indices: Mapping[int, fx.Node]) -> Result:
    if any(call.dtype(index) in ("bool", "uint8") for index in indices.values()):
        raise Untranslated("rows chosen by a condition")
    source = call.graph.read(_node(data))
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


# --------------------------------------------------------------------------------------------------------------- compute


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
    """Two operands, one axis summed, one axis of each left: a matmul between transposes. Other sums keep their name."""
    operands = [_node(operand) for operand in call[1]]
    terms, _, result = str(call[0]).replace(" ", "").partition("->")
    names = terms.split(",")
    if len(operands) != 2 or not result or any(len(set(term)) != len(term) or "." in term for term in (*names, result)):
        raise Untranslated("another form of einsum")
    left, right = names
    summed = [axis for axis in left if axis in right and axis not in result]
    batch = [axis for axis in result if axis in left and axis in right]
    own = [[axis for axis in term if axis not in summed and axis not in batch] for term in names]
    if len(summed) != 1 or any(len(axes) != 1 or axes[0] not in result for axes in own):
        raise Untranslated("another form of einsum")
    first = _ordered(call, call.tensor(operands[0]), left, [*batch, *own[0], *summed])
    second = _ordered(call, call.tensor(operands[1]), right, [*batch, *summed, *own[1]])
    natural = [*batch, *own[0], *own[1]]
    if "".join(natural) == result:
        return op("matmul", first, second)
    return op("transpose", call.emit("matmul", first, second), perm=[natural.index(axis) for axis in result])


def _ordered(call: Call, value: str, axes: str, wanted: Sequence[str]) -> str:
    perm = [axes.index(axis) for axis in wanted]
    return value if perm == sorted(perm) else call.emit("transpose", value, perm=perm)


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
    def rule(call: Call) -> Result:
        return aligned(call, name, (call[0],)) if name == "activation" else op(name, call.tensor(call[0]))

    return rule


# ------------------------------------------------------------------------------------------------------------------ vmap


def _add_batch_dim(call: Call) -> Result:
    """Hide an axis: it moves among the leading ones."""
    source, dim, level = call.node.args[:3]
    assert isinstance(level, int)
    value = call.graph.read(_node(source))
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
    value = call.graph.read(_node(source))
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


# ------------------------------------------------------------------------------------------------- written views, put back


def _reshape_back(call: Call, written: str) -> Result:
    return op("reshape", written, call.graph.vector(call.meta(call[0]).shape), allowzero=1)


def _transpose_back(call: Call, written: str) -> Result:
    perm = _permutation(call)
    return op("transpose", written, perm=[perm.index(axis) for axis in range(len(perm))])


def _slice_back(call: Call, written: str) -> Result:
    axis = call.axis(call[0], call.get("dim"))
    if call.get("step") not in (1, None):
        raise Untranslated("a slice with steps that is written")
    start = _position(call, 0 if call.get("start") is None else call.get("start"), axis)
    return _replaced(call, call[0], written, call.extent(call.node, axis), axis, start)


def _select_back(call: Call, written: str) -> Result:
    axis = call.axis(call[0], call.get("dim"))
    row = call.emit("unsqueeze", written, axes=[axis])
    return _replaced(call, call[0], row, ONE, axis, _position(call, call.get("index"), axis))


WRITE_BACK: Mapping[str, Callable[[Call, str], Result]] = {
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "_unsafe_view", "unflatten"), _reshape_back),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "swapaxes"), _transpose_back),
    **dict.fromkeys(("slice", "narrow"), _slice_back),
    "select": _select_back,
}

PARTS = frozenset(
    (
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "unsafe_chunk",
        "tensor_split",
    )
)

UNARY = ("neg", "abs", "exp", "tanh", "sqrt", "reciprocal", "isnan")
BINARY = {
    "pow": "pow", "maximum": "max", "minimum": "min", "remainder": "mod", "floor_divide": "floordiv", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "eq": "eq", "ne": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne",
    "clamp_min": "max", "clamp_max": "min",
}  # fmt: skip
LOGIC = {
    "bitwise_and": "and", "__and__": "and", "__iand__": "and", "bitwise_or": "or", "__or__": "or", "__ior__": "or", "bitwise_xor": "xor",
    "__xor__": "xor", "__ixor__": "xor", "bitwise_not": "not",
}  # fmt: skip
SAME = (
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "to",
    "_to_copy",
    "type_as",
    "_to_dtype",
    "positive",
)
ACTIVATIONS = (
    "sigmoid", "relu", "gelu", "silu", "mish", "elu", "leaky_relu", "softplus", "hardtanh", "hardswish", "hardsigmoid", "erf", "sin", "cos", "log",
    "log1p", "log2", "log_softmax", "_log_softmax", "floor", "ceil", "round", "trunc", "sign", "square", "relu6", "celu", "selu",
)  # fmt: skip
FUSED_ATTENTION = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip

OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    **{name: elementwise(name, 1) for name in UNARY},
    **{name: elementwise(meaning, 2) for name, meaning in BINARY.items()},
    **{name: _logical(meaning) for name, meaning in LOGIC.items()},
    **dict.fromkeys(SAME, _convert),
    **dict.fromkeys(ACTIVATIONS, _like_first("activation")),
    **dict.fromkeys(FUSED_ATTENTION, _attention),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm"),
        _like_first("normalize"),
    ),
    **dict.fromkeys(
        ("sum", "mean", "prod", "amin", "var", "std", "linalg_vector_norm", "norm", "argmax", "argmin", "min"),
        _reduce("reduce"),
    ),
    **dict.fromkeys(("amax", "max"), _reduce("reduce_max")),
    "any": _reduce("any"),
    "all": _reduce("reduce"),
    **dict.fromkeys(
        ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "ravel", "_reshape_alias"), _reshape
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "moveaxis", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _biased_matmul),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), _filled(0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _filled(1)),
    **dict.fromkeys(("full", "new_full", "full_like"), _filled("fill_value")),
    **dict.fromkeys(("fill",), _filled("value")),
    **dict.fromkeys(("dropout", "native_dropout"), _dropout),
    **dict.fromkeys(("add", "__iadd__"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("softmax", "_softmax", "special_softmax"), _softmax),
    "scalar_tensor": _filled("s"),
    "rsub": _rsub,
    **{f"logical_{name}": _condition(name) for name in ("and", "or", "xor", "not")},
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clip": _clamp,
    "rsqrt": _rsqrt,
    "copy": _copy,
    "arange": _arange,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "numpy_T": _reversed,
    "mT": _last_two,
    "adjoint": _last_two,
    "getitem": _part,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "diff": _diff,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "index": _index,
    "flat_apply": _flat_apply,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "tril": _triangle(0),
    "triu": _triangle(1),
    "cumsum": _cumsum,
    "linear": _linear,
    "einsum": _einsum,
    "_safe_softmax": _safe_softmax,
    "topk": _like_first("top_k"),
    "convolution": _like_first("Conv"),
    "conv1d": _like_first("Conv"),
    "conv2d": _like_first("Conv"),
    "_add_batch_dim": _add_batch_dim,
    "_remove_batch_dim": _remove_batch_dim,
}
