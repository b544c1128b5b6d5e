"""Find every attention of a graph, and bring each into one form.

An attention is
1. an attention operator (ONNX Attention, scaled_dot_product_attention), or
2. a softmax over the last axis between two matmuls: scores = query @ key^T go in, its result multiplies value. What lies between
   may scale, cap, mask, add sinks, reshape, expand heads or replace NaN; it is read as formulas, so its spelling does not matter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf, sqrt

from swacompile.attention import Attention, Axes, Finding, Layout, MaskedRows, Operand, Refutation
from swacompile.graph import Graph, Node
from swacompile.index_expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Expr,
    Index,
    Op,
    Sort,
    add,
    and_,
    const_int,
    const_real,
    eq,
    floordiv,
    index,
    integer,
    ite,
    le,
    mul,
    neg,
    nonempty,
    or_,
    real,
    real_add,
    sub,
    substitute,
    walk,
)
from swacompile.passes.arrays import PREFIX
from swacompile.passes.index_tensor import IndexTensor, Unreadable, broadcast_index, equality_text, substitute_sizes
from swacompile.passes.logits import Case, Logit, UnreadableLogits, cases
from swacompile.passes.packed_positions import with_indices_for_positions
from swacompile.passes.read_masks import Reading
from swacompile.passes.trace import Source, trace

MAX_BETWEEN = 2000  # Operations between a softmax and its products, at most: hand-written block attention has many.
ENDS_SEARCH = ("softmax", "shape", "gemm", "normalize", "activation", "attention", "top_k", "gather", "Conv")


class NotReadable(Exception):
    """This is an attention, but not one whose operands or mask can be read."""

    def __init__(self, code: str, reason: str, node: str | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.node = code, reason, node


def detect_attention(reading: Reading) -> tuple[Attention | Refutation, ...]:
    """Every attention in execution order; a Refutation stands for one whose form cannot be read."""
    return tuple(_detect(reading))


def _detect(reading: Reading) -> Iterator[Attention | Refutation]:
    for node in reading.graph.nodes:
        read = {"attention": _operator, "softmax": _softmax}.get(node.op)
        if read is None:
            continue
        try:
            site = read(reading, node)
        except NotReadable as error:
            yield Refutation(code=error.code, reason=error.reason, node=error.node or node.name)
        except (Unreadable, UnreadableLogits) as error:
            yield Refutation(code="unreadable-mask", reason=f"the mask cannot be read: {error}", node=node.name)
        else:
            if site is not None:
                yield site


# ------------------------------------------------------------------------------------------ 1. attention operators


def _operator(reading: Reading, node: Node) -> Attention:
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
    heads = _known(reading, query.shape[1], "number of query heads")
    axes = _axes(reading, query.shape[0], heads, query.shape[2], key.shape[2])
    group = floordiv(axes.head, integer(heads // (const_int(reading.sizes.resolve(key.shape[1])) or heads)))
    depth = index("d", query.shape[3])
    found = _Operands(
        query=_operand(reading, axes, query.name, (axes.batch, axes.head, axes.query, depth), "query"),
        key=_operand(reading, axes, key.name, (axes.batch, group, axes.key, depth), "key"),
        value=_operand(reading, axes, value.name, (axes.batch, group, axes.key, index("v", value.shape[3])), "value"),
    )
    return _operator_site(reading, node, axes, heads, found, query.shape[3])


def _flat_operator(reading: Reading, node: Node, query: IndexTensor, key: IndexTensor, value: IndexTensor) -> Attention:
    """Operands (batch, sequence, heads * size), the number of heads in attributes."""
    heads, kv_heads = (node.attrs.get(name) for name in ("q_num_heads", "kv_num_heads"))
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise NotReadable("rank", "expected q_num_heads and kv_num_heads beside 3-D query, key and value")
    axes = _axes(reading, query.shape[0], heads, query.shape[1], key.shape[1])
    found = _Operands(query=_unfolded(query, heads), key=_unfolded(key, kv_heads), value=_unfolded(value, kv_heads))
    return _operator_site(reading, node, axes, heads, found, found.query.tensor.shape[3])


def _unfolded(tensor: IndexTensor, heads: int) -> "_Placed":
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
    return _Placed(
        operand=Operand(value=tensor.name, layout=Layout.BSHD, flat=True), tensor=view, scale=1.0, heads=heads
    )


def _operator_site(reading: Reading, node: Node, axes: Axes, heads: int, found: "_Operands", size: Expr) -> Attention:
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
    visible, mask_form, bias, masked_rows = _operator_mask(reading, node, axes, mask)
    head_size = const_int(reading.sizes.resolve(size))
    scale = node.attrs.get("scale")
    if not scale and head_size is None:
        raise NotReadable("head-size", "the scale depends on a head size that is not constant")
    base = float(scale) if isinstance(scale, float | int) and scale else 1 / sqrt(head_size or 1)
    softcap = node.attrs.get("softcap")
    return _attention(
        reading, node, form="operator", mask_form=mask_form, found=found, axes=axes, heads=heads,
        output=node.outputs[0], merged=False, visible=visible, zeroed=FALSE, scale=base,
        softcap=float(softcap) if isinstance(softcap, float | int) and softcap else None, sinks=None, masked_rows=masked_rows, bias=bias,
    )  # fmt: skip


def _operator_mask(
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
    split = _split(found_cases, mask.dtype, mask.dtype, scored=False)
    finite = any(-inf < case.logit.constant < 0 for case in found_cases)
    return (
        and_(visible, split.visible),
        "float mask operand",
        split.bias,
        MaskedRows.UNIFORM if finite else MaskedRows.ZERO,
    )


# -------------------------------------------------------------------------------------- 2. softmax between matmuls


def _softmax(reading: Reading, node: Node) -> Attention | None:
    logits = reading.tensors.get(node.inputs[0])
    if not _between_products(reading.graph, node):
        return None
    weighted = _weighted_sum(reading.graph, node)
    if weighted is None:
        raise NotReadable("no-product", "the softmax's weights do not reach a plain query-key-value product: attention that is already cut into "
                          "blocks, or of a form that is not known")  # fmt: skip
    if logits is None:
        raise NotReadable("unknown-shape", "the rank of the scores is not known")
    if node.attrs.get("axis", -1) not in (-1, logits.rank - 1):
        return None
    if logits.rank not in (3, 4):
        raise NotReadable("rank", f"expected scores of rank 3 or 4, found rank {logits.rank}")
    score = _score(reading, logits)
    if score is None and _number(reading, logits.name) is not None:
        raise NotReadable("all-hidden", "no key is visible: every score is hidden")
    if score is None:
        return None
    return _between(reading, node, logits, score, *weighted)


def _between_products(graph: Graph, node: Node) -> bool:
    """Whether a softmax stands between two products of run-time data, so that it is an attention of some form and not a router or a head."""
    above = _nearest_products(
        graph, node.inputs[0], lambda value: [graph.producers[value]] if value in graph.producers else [], upwards=True
    )
    below = _nearest_products(graph, node.outputs[0], lambda value: graph.users.get(value, ()), upwards=False)
    return above and below


def _nearest_products(graph: Graph, value: str, neighbours: Callable[[str], Sequence[Node]], *, upwards: bool) -> bool:
    """Whether a product of two run-time values is reached before other products, within a short distance."""
    frontier, seen = [value], set[str]()
    while frontier and len(seen) < MAX_BETWEEN:
        for found in neighbours(frontier.pop(0)):
            if found.outputs[0] in seen:
                continue
            seen.add(found.outputs[0])
            if found.op in ("matmul", "Einsum"):
                if all(_is_run_time(graph, operand) for operand in found.inputs):
                    return True
            elif found.op not in ENDS_SEARCH:
                frontier.extend(found.inputs if upwards else found.outputs)
    return False


def _is_run_time(graph: Graph, value: str) -> bool:
    """Whether a value is not just a stored weight in some view."""
    while value in graph.producers and graph.producers[value].op in (
        "transpose",
        "reshape",
        "identity",
        "cast",
        "unsqueeze",
    ):
        value = graph.producers[value].inputs[0]
    return value not in graph.constants


def _weighted_sum(graph: Graph, node: Node) -> tuple[Node, bool] | None:
    """(the matmul that takes the weights, whether NaN is replaced on the way), None if there is none."""
    value, replaces_nan = node.outputs[0], False
    while True:
        users = graph.users.get(value, ())
        passing = [user for user in users if user.op != "isnan"]
        if len(passing) != 1:
            return None
        (user,) = passing
        replaces_nan = replaces_nan or len(passing) < len(users) or user.op == "where"
        if user.op == "matmul":
            return (user, replaces_nan) if user.inputs[0] == value else None
        if user.op not in (
            "cast",
            "identity",
            "where",
            "slice",
            "reshape",
            "expand",
            "squeeze",
            "unsqueeze",
            "transpose",
        ):
            return None
        value = user.outputs[0]


def _score(reading: Reading, logits: IndexTensor) -> Node | None:
    """The matmul whose product the logits are made of, None if there is none."""
    probe = tuple(index(f"i{axis}", extent) for axis, extent in enumerate(logits.shape))
    names = {node.name for node in walk(logits.at(*probe)) if node.op is Op.APPLY}
    products = [reading.graph.producers[name] for name in names if name in reading.graph.producers]
    products = [product for product in products if product.op == "matmul"]
    if len(products) > 1:
        raise NotReadable(
            "several-products", f"the softmax takes a sum of {len(products)} matmuls, expected one query-key product"
        )
    return products[0] if products else None


def _between(
    reading: Reading, node: Node, logits: IndexTensor, score: Node, weighted: Node, replaces_nan: bool
) -> Attention:
    product = reading.tensors[score.outputs[0]]
    ops = reading.operands(score)
    if product.rank not in (3, 4):
        raise NotReadable("rank", f"expected a query-key product of rank 3 or 4, found rank {product.rank}", score.name)
    axes, heads, lead = _lead(reading, logits, product, ops.tensor(0))
    here = (*lead, axes.query, axes.key)
    found_cases = cases(reading.sizes.resolve(logits.at(*here)), score.outputs[0])
    at_score = _score_index(reading, logits, here, score.outputs[0])
    split = _split(_without_row_terms(reading, found_cases, axes), product.dtype, logits.dtype, scored=True)
    depth = index("d", ops.tensor(0).shape[-1])
    value_tensor = reading.operands(weighted).tensor(1)
    weights = reading.operands(weighted).tensor(0)
    weight_lead = (
        lead
        if weights.rank == len(lead) + 2
        else _merged(axes, heads)
        if weights.rank == 3
        else (axes.batch, axes.head)
    )
    _check_weights(reading, node, weights, (*weight_lead, axes.query, axes.key), here)
    value_size = index("v", value_tensor.shape[-1])
    found = _Operands(
        query=_operand(
            reading, axes, ops.tensor(0).name, _matmul_index(at_score[:-2], ops.tensor(0), at_score[-2], depth), "query"
        ),
        key=_operand(
            reading, axes, ops.tensor(1).name, _matmul_index(at_score[:-2], ops.tensor(1), depth, at_score[-1]), "key"
        ),
        value=_operand(
            reading, axes, value_tensor.name, _matmul_index(weight_lead, value_tensor, axes.key, value_size), "value"
        ),
    )
    return _attention(
        reading, node, form="softmax", mask_form=_mask_form(found_cases), found=found, axes=axes, heads=heads, output=weighted.outputs[0],
        merged=weights.rank == 3, visible=split.visible, zeroed=split.zeroed, scale=split.scale, softcap=split.softcap,
        sinks=_sinks(reading, logits, lead, axes), masked_rows=_masked_rows(found_cases, replaces_nan), bias=split.bias,
    )  # fmt: skip


def _lead(reading: Reading, logits: IndexTensor, product: IndexTensor, query: IndexTensor) -> tuple[Axes, int, Index]:
    """Axes of the site, its number of heads, and the indices of the logits' leading axes."""
    queries, keys = logits.shape[-2], product.shape[-1]
    if logits.rank == 4:
        heads = _known(reading, logits.shape[1], "number of heads")
        axes = _axes(reading, logits.shape[0], heads, queries, keys)
        return axes, heads, (axes.batch, axes.head)
    heads, batch = _split_heads(reading, logits, query)
    axes = _axes(reading, batch, heads, queries, keys)
    return axes, heads, _merged(axes, heads)


def _merged(axes: Axes, heads: int) -> Index:
    return (add(mul(axes.batch, integer(heads)), axes.head),)


def _split_heads(reading: Reading, logits: IndexTensor, query: IndexTensor) -> tuple[int, Expr]:
    """(heads, batch) behind a merged leading axis: the 4-D tensor that the query is a view of tells."""
    merged = index("n", logits.shape[0])
    probe = (merged, index("q", query.shape[1]), index("d", query.shape[2]))
    for source in trace(reading, query.name, probe):
        if len(source.indices) == 4:
            for axis, position in enumerate(source.indices):
                extent = reading.tensors[source.value].shape[axis]
                if position.op is Op.MOD and (heads := const_int(extent)):
                    return heads, floordiv(logits.shape[0], integer(heads))
    raise NotReadable("merged-heads", "batch and heads are merged in one axis, and the split cannot be found")


def _matmul_index(lead: Index, operand: IndexTensor, row: Expr, column: Expr) -> Index:
    return (*broadcast_index(lead, operand.shape[:-2]), row, column)


def _score_index(reading: Reading, logits: IndexTensor, here: Index, score: str) -> Index:
    """Where in the query-key product the logit at `here` is read. Raises NotReadable where that is not one place."""
    formula = reading.sizes.resolve(logits.at(*here))
    places = {node.args for node in walk(formula) if node.op is Op.APPLY and node.name == score}
    if len(places) != 1:
        raise NotReadable("score-place", f"a logit depends on {len(places)} scores, expected one")
    return places.pop()


def _check_weights(reading: Reading, node: Node, weights: IndexTensor, asked: Index, expected: Index) -> None:
    """The weights must reach the second matmul unmoved (a sink's column cut off, NaN replaced)."""
    for source in _through_nan(reading, node, weights.name, asked):
        if source.value == node.outputs[0]:
            unmoved = all(_same_place(found, place) for found, place in zip(source.indices, expected, strict=True))
            if unmoved and source.scale == 1.0:
                return
            break
    raise NotReadable("weights-moved", "the softmax's weights are moved or scaled before they multiply the value")


def _through_nan(reading: Reading, softmax: Node, value: str, indices: Index) -> Iterator[Source]:
    while True:
        last = None
        for last in trace(reading, value, indices):
            yield last
        node = reading.graph.producers.get(last.value) if last else None
        if last is None or node is None:
            return
        if node.op == "where" and _without_value(reading, softmax, node):
            value, indices = node.inputs[2], last.indices
        elif node.op == "cast":
            value, indices = node.inputs[0], last.indices
        else:
            return


def _without_value(reading: Reading, softmax: Node, node: Node) -> bool:
    """Whether a `where` only puts 0 in place of weights that have no value: NaN, or those of a row whose logits are all -inf."""
    graph = reading.graph
    if (condition := graph.producers.get(node.inputs[0])) and condition.op == "isnan":
        return True
    chain = _chain(graph, node.inputs[0], ("not", "any", "not", "eq"))
    if chain is None:
        return False
    _, any_key, _, hidden = chain
    last_axis = len(reading.tensors[softmax.inputs[0]].shape) - 1
    along_keys = any_key.attrs.get("axes") in ([-1], [last_axis]) and hidden.inputs[0] == softmax.inputs[0]
    return along_keys and _number(reading, node.inputs[1]) == 0.0 and _number(reading, hidden.inputs[1]) == -inf


def _chain(graph: Graph, value: str, ops: Sequence[str]) -> list[Node] | None:
    """The producers of a value, of its first operand and so on, where they are these operations."""
    found: list[Node] = []
    for op in ops:
        node = graph.producers.get(value)
        if node is None or node.op != op:
            return None
        found.append(node)
        value = node.inputs[0]
    return found


def _number(reading: Reading, value: str) -> float | None:
    """The number that all elements of a value are, None if there is none."""
    tensor = reading.tensors.get(value)
    anywhere = tuple(index(f"i{axis}", extent) for axis, extent in enumerate(tensor.shape)) if tensor else ()
    return const_real(tensor.at(*anywhere)) if tensor else None


def _without_row_terms(reading: Reading, found: tuple[Case, ...], axes: Axes) -> tuple[Case, ...]:
    """Softmax does not change when a number that is the same for the whole row is taken off: the row's maximum."""

    def is_row_maximum(term: Expr) -> bool:
        data = [node for node in walk(term) if node.op is Op.APPLY]
        producers = [reading.graph.producers.get(node.name) for node in data]
        return axes.key not in walk(term) and all(
            producer is not None and producer.op == "reduce_max" for producer in producers
        )

    def kept(logit: Logit) -> Logit:
        terms = tuple(term for term in logit.terms if not is_row_maximum(term))
        return Logit(inner=logit.inner, outer=logit.outer, constant=logit.constant, terms=terms)

    return tuple(Case(condition=case.condition, logit=kept(case.logit)) for case in found)


def _sinks(reading: Reading, logits: IndexTensor, lead: Index, axes: Axes) -> str | float | None:
    """The extra column of the logits, if there is one: a value of shape (heads,), or one number."""
    width = reading.sizes.resolve(sub(logits.shape[-1], axes.keys))
    if width == integer(0):
        return None
    if width != ONE:
        raise NotReadable(
            "extra-columns", f"the softmax is {width} columns wider than the product, expected 0 or 1 (a sink)"
        )
    column = reading.sizes.resolve(logits.at(*lead, axes.query, axes.keys))
    case, *more = _without_row_terms(reading, cases(column, score=""), axes)
    if more:
        raise NotReadable("sink-form", f"expected one sink logit a head, found {1 + len(more)} cases of it")
    if not case.logit.terms:
        return case.logit.constant
    (term,) = case.logit.terms
    if term.op is not Op.APPLY or [i for i in term.args if i != ZERO] != [axes.head] or case.logit.constant:
        raise NotReadable("sink-form", f"expected one sink logit a head, found {term}")
    return term.name.removeprefix(PREFIX)


def _masked_rows(found: tuple[Case, ...], replaces_nan: bool) -> MaskedRows:
    if replaces_nan:
        return MaskedRows.ZERO
    return MaskedRows.NAN if any(case.logit.constant == -inf for case in found) else MaskedRows.UNIFORM


def _mask_form(found: tuple[Case, ...]) -> str:
    if len(found) == 1:
        return "none"
    if any(case.logit.inner == 0 for case in found):
        return "multiplied"
    return "where" if any(case.logit.inner is None for case in found) else "additive"


# --------------------------------------------------------------------------------------------------------- shared


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """An operand and the constant factor between it and what the product reads."""

    operand: Operand
    tensor: IndexTensor
    scale: float
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operands:
    query: _Placed
    key: _Placed
    value: _Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """What the cases of the logits say: when a key is visible, when its score is zeroed, what the visible score is, and what is added to it."""

    visible: Expr
    zeroed: Expr
    scale: float
    softcap: float | None
    bias: Expr | None


def _split(found: tuple[Case, ...], scores_dtype: str, weights_dtype: str, *, scored: bool) -> _Split:
    visible, zeroed = FALSE, FALSE
    scores: set[tuple[float, float | None]] = set()
    added: list[tuple[Expr, Expr]] = []
    for case in found:
        logit = case.logit
        if logit.hides(scores_dtype, weights_dtype):
            continue
        if logit.constant != 0 or (scored and logit.inner is None):
            raise NotReadable("not-hiding", f"a masked score becomes {logit.constant:g}, which does not hide it for certain: expected -inf or the "
                              f"lowest {scores_dtype}; its weight may be above zero")  # fmt: skip
        if scored and logit.inner == 0:
            zeroed = or_(zeroed, case.condition)
            continue
        visible = or_(visible, case.condition)
        scores.add((logit.scale if scored else 1.0, logit.softcap))
        added.append((case.condition, reduce(real_add, logit.terms, real(0.0))))
    if not scores:
        raise NotReadable("all-hidden", "no key is visible: every score is hidden or zeroed")
    if len(scores) > 1:
        raise NotReadable("several-scores", f"visible scores come in {len(scores)} forms, expected one")
    ((scale, softcap),) = scores
    return _Split(visible=visible, zeroed=zeroed, scale=scale, softcap=softcap, bias=_bias(added))


def _bias(added: list[tuple[Expr, Expr]]) -> Expr | None:
    """What is added to visible scores, from (condition, sum of terms) a case; None for nothing."""
    *others, (_, bias) = added
    for condition, term in reversed(others):
        bias = ite(condition, term, bias)
    return None if bias == real(0.0) else bias


def _known(reading: Reading, extent: Expr, what: str) -> int:
    value = const_int(reading.sizes.resolve(extent))
    if value is None:
        raise NotReadable("dynamic-heads", f"the {what} is not constant: {extent}")
    return value


def _axes(reading: Reading, batch: Expr, heads: int, queries: Expr, keys: Expr) -> Axes:
    resolve = reading.sizes.resolve
    return Axes(
        batch=index("b", resolve(batch)),
        head=index("h", integer(heads)),
        query=index("q", resolve(queries)),
        key=index("k", resolve(keys)),
    )


def _operand(reading: Reading, axes: Axes, value: str, indices: Index, role: str) -> _Placed:
    """The tensor furthest up that the product reads element by element, in a known order of axes."""
    resolved = tuple(reading.sizes.resolve(i) for i in indices)
    sequence = axes.query if role == "query" else axes.key
    best: dict[Layout, _Placed] = {}
    for source in trace(reading, value, resolved):
        tensor = reading.tensors[source.value]
        layout = _layout(reading, axes, sequence, source, tensor)
        if layout is not None:
            heads = const_int(reading.sizes.resolve(tensor.shape[1 if layout is Layout.BHSD else 2]))
            best[layout] = _Placed(
                operand=Operand(value=source.value, layout=layout), tensor=tensor, scale=source.scale, heads=heads or 0
            )
    if not best:
        raise NotReadable(
            "operand-layout",
            f"the {role} is not read in the order (batch, heads, sequence, size) or (batch, sequence, heads, size)",
        )
    return best.get(Layout.BHSD) or best[Layout.BSHD]


def _layout(reading: Reading, axes: Axes, sequence: Expr, source: Source, tensor: IndexTensor) -> Layout | None:
    if tensor.rank != 4:
        return None
    heads_total = const_int(axes.head.args[0]) or 1
    for layout, head_axis, sequence_axis in ((Layout.BHSD, 1, 2), (Layout.BSHD, 2, 1)):
        heads = const_int(reading.sizes.resolve(tensor.shape[head_axis]))
        if not heads or heads_total % heads:
            continue
        grouped = floordiv(axes.head, integer(heads_total // heads))
        last = source.indices[3]
        expected = {0: axes.batch, head_axis: grouped, sequence_axis: sequence}
        placed = all(_same_place(source.indices[axis], at) for axis, at in expected.items())
        if placed and last.op is Op.SYMBOL and last.name in ("d", "v"):
            return layout
    return None


def _same_place(found: Expr, expected: Expr) -> bool:
    """Whether two indices agree; 0 is the only index of an axis of extent 1."""
    return found == expected or (found == ZERO and expected.op is Op.SYMBOL and expected.args == (ONE,))


def _attention(
    reading: Reading, node: Node, *, form: str, mask_form: str, found: _Operands, axes: Axes, heads: int, output: str, merged: bool,
    visible: Expr, zeroed: Expr, scale: float, softcap: float | None, sinks: str | float | None, masked_rows: MaskedRows,
    bias: Expr | None,
) -> Attention:  # fmt: skip
    if found.key.heads != found.value.heads:
        raise NotReadable("kv-heads", f"key has {found.key.heads} heads and value {found.value.heads}")
    if found.value.scale != 1.0:
        raise NotReadable("scaled-value", f"the value is multiplied by {found.value.scale:g}")
    dtypes = {placed.tensor.dtype for placed in (found.query, found.key, found.value)}
    if len(dtypes) != 1:
        raise NotReadable("mixed-dtypes", f"query, key and value have data types {sorted(dtypes)}, expected one")
    resolve = reading.sizes.resolve
    known = {
        extent: nonempty(extent) for extent in (axes.batch.args[0], axes.queries, axes.keys)
    }  # for a cell to exist

    def refined(formula: Expr) -> Expr:
        return substitute_sizes(resolve(formula), known)

    assumed = reading.assumptions(known)
    given = and_(*(eq(gone, stays) for gone, stays in assumed))
    axes = Axes(
        batch=refined(axes.batch), head=axes.head, query=refined(axes.query), key=refined(axes.key), given=given
    )
    visible = with_indices_for_positions(refined(visible), axes, reading, known)
    return Attention(
        node=node.name, form=form, mask_form=mask_form, query=found.query.operand, key=found.key.operand, value=found.value.operand, output=output,
        merged_output=merged, axes=axes, visible=visible, zeroed=refined(zeroed), heads=heads, kv_heads=found.key.heads,
        head_size=const_int(resolve(found.query.tensor.shape[3])), value_head_size=const_int(resolve(found.value.tensor.shape[3])),
        dtype=dtypes.pop(), scale=scale * found.query.scale * found.key.scale, softcap=softcap, sinks=sinks, masked_rows=masked_rows,
        assumptions=tuple(sorted(equality_text(gone, stays) for gone, stays in assumed)), bias=None if bias is None else refined(bias),
    )  # fmt: skip


__all__ = ["Finding", "detect_attention", "substitute"]
