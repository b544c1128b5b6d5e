"""ATen operators that move elements: views, lists of parts, concatenations, and what is written through a view."""

from collections.abc import Callable, Mapping

import torch
from torch import fx

from swacompile.frontends.fx_call import Call, Result, Untranslated, op, operand_node
from swacompile.index_expr import ONE, ZERO, Expr, add, at_least, const_int, integer, mul, sub

END = 2**63 - 1  # torch's "to the end"


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
    starts = start is None or (isinstance(start, int) and start == 0)
    whole = starts and (end is None or (isinstance(end, int) and end >= 2**31 - 1))
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
    if str(whole.target).startswith("aten.meshgrid"):
        return _grid(call)
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


def _grid(call: Call) -> Result:
    """One tensor of a mesh: a vector along its own axis, repeated along the others."""
    whole, position = call.node.args
    assert isinstance(whole, fx.Node) and isinstance(position, int)
    mesh = Call(node=whole, name=call.name, graph=call.graph)
    vectors = [operand_node(vector) for vector in mesh[0]]
    swapped = mesh.get("indexing") == "xy" and len(vectors) > 1 and position < 2
    place = 1 - position if swapped else position
    if call.meta(vectors[position]).dim() != 1:
        raise Untranslated("a mesh of numbers")
    others = [axis for axis in range(len(vectors)) if axis != place]
    wide = call.emit("unsqueeze", call.tensor(vectors[position]), axes=others)
    return op("expand", wide, call.graph.vector(call.meta(call.node).shape))


def _flip(call: Call) -> Result:
    return op("flip", call.tensor(call[0]), axes=[call.axis(call[0], dim) for dim in call.get("dims")])


def _pad(call: Call) -> Result:
    """torch lists pairs from the last axis on."""
    if call.get("mode") not in (None, "constant"):
        raise Untranslated("padding that repeats elements")
    rank = call.meta(call[0]).dim()
    amounts = [call.number(amount) for amount in call.get("pad")]
    axes = [rank - 1 - i for i in range(len(amounts) // 2)]
    vector, fill = call.graph.vector, call.get("value")
    return op(
        "pad",
        call.tensor(call[0]),
        vector([*amounts[::2], *amounts[1::2]]),
        call.operand(0 if fill is None else fill),
        vector(axes),
    )


def _repeat_interleave(call: Call) -> Result:
    """Each row several times: an axis behind it that is repeated, then merged."""
    if call.get("repeats") is None or not call.is_number(call.get("repeats")) or call.get("dim") is None:
        raise Untranslated("repeats that depend on the row")
    axis = call.axis(call[0], call.get("dim"))
    return _repeated(call, {axis + 1: call.number(call.get("repeats"))})


def _repeat(call: Call) -> Result:
    """The whole tensor several times along its axes: an axis before each that is repeated, then merged."""
    lead = len(call.get("repeats")) - call.meta(call[0]).dim()
    places = [axis if axis < lead else lead + 2 * (axis - lead) for axis in range(len(call.get("repeats")))]
    return _repeated(
        call, {place: call.number(count) for place, count in zip(places, call.get("repeats"), strict=True)}
    )


def _repeated(call: Call, places: Mapping[int, "int | torch.SymInt"]) -> Result:
    """Insert axes at these places, repeat them, and merge them into the result's shape."""
    wide = call.emit("unsqueeze", call.tensor(call[0]), axes=list(places))
    extents = iter(call.graph.sizes.shape(call.meta(call[0])))
    rank = call.meta(call[0]).dim() + len(places)
    shape = [call.graph.sizes.of(places[axis]) if axis in places else next(extents) for axis in range(rank)]
    repeated = call.emit("expand", wide, call.graph.vector(shape))
    return op("reshape", repeated, call.shape(), allowzero=1)


def _cat(call: Call) -> Result:
    """torch ignores empty vectors among tensors of more dimensions."""
    parts = [operand_node(part) for part in call[0]]
    rank = max(call.meta(part).dim() for part in parts)
    kept = [part for part in parts if rank == 1 or call.meta(part).dim() > 1 or call.extent(part, 0) != ZERO]
    dim = call.get("dim")
    axis = call.axis(kept[0], 0 if dim is None else dim)
    if len(kept) == 1:
        return op("identity", call.tensor(kept[0]))
    return op("concat", *(call.tensor(part) for part in kept), axis=axis)


def _stack(call: Call) -> Result:
    parts = [operand_node(part) for part in call[0]]
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
        "meshgrid",
    )
)

OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    **dict.fromkeys(
        ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "ravel", "_reshape_alias"), _reshape
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "moveaxis", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("mT", "adjoint"), _last_two),
    "numpy_T": _reversed,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _part,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "stack": _stack,
    "diff": _diff,
    "flip": _flip,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
}
