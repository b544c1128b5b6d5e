"""A softmax between two products: scores = query @ key^T go in, its result multiplies value.

What lies between may scale, cap, mask, add sinks, move axes, reshape, expand heads or replace NaN; it is read as formulas, so its
spelling does not matter. Which axis of the scores is which follows from how they are read:
1. the key's is the softmax's axis; the product's operand that has it is the key;
2. the query's is one that the other operand has, and the key has not; where heads are like that, too, it is the one that the mask speaks of;
3. the first of the others is the batch, the rest are heads: one axis, or two (groups). Three axes in all: batch and heads are merged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf

from swacompile.attention import Attention, Axes, Layout, MaskedRows, Operand
from swacompile.graph import Graph, Node
from swacompile.index_expr import (
    ONE,
    TRUE,
    ZERO,
    Expr,
    Index,
    Op,
    add,
    const_int,
    const_real,
    floordiv,
    index,
    integer,
    mod,
    mul,
    not_,
    or_,
    product_of,
    sub,
    walk,
)
from swacompile.passes.arrays import PREFIX
from swacompile.passes.index_tensor import IndexTensor, broadcast_index, normal_axis
from swacompile.passes.logits import Case, Logit, cases
from swacompile.passes.read_masks import Reading
from swacompile.passes.rules.views import INDEX_MAPS
from swacompile.passes.site import (
    NotReadable,
    Operands,
    attention,
    axes_of,
    known_size,
    merged_index,
    place_operand,
    same_place,
    split,
)
from swacompile.passes.smt import is_valid
from swacompile.passes.softmax_weights import Weights, weights_of
from swacompile.passes.trace import trace

MAX_BETWEEN = 2000  # Operations between a softmax and its products, at most: hand-written block attention has many.
MAX_MOVES = 6  # Views between the second product and a value in a known order of axes, at most.
RANKS = (3, 4, 5)
ENDS_SEARCH = (
    "softmax", "shape", "gemm", "normalize", "activation", "attention", "top_k", "gather", "Conv", "relu", "log", "floor", "ceil", "trunc",
    "round", "sign",
)  # fmt: skip


def read_softmax(reading: Reading, node: Node) -> Attention | None:
    """None where a softmax is no part of an attention. Raises NotReadable, Unreadable, UnreadableLogits."""
    logits = reading.tensors.get(node.inputs[0])
    if not _between_products(reading.graph, node):
        return None
    weights = weights_of(reading, node)
    if weights is None:
        raise NotReadable("no-product", "the softmax's weights do not reach a plain query-key-value product: attention that is already cut into "
                          "blocks, or of a form that is not known")  # fmt: skip
    if logits is None:
        raise NotReadable("unknown-shape", "the rank of the scores is not known")
    if logits.rank not in RANKS:
        raise NotReadable("rank", f"expected scores of rank 3, 4 or 5, found rank {logits.rank}")
    key_axis = normal_axis(int(str(node.attrs.get("axis", -1))), logits.rank)
    score = _score(reading, logits)
    if score is None and number(reading, logits.name) is not None:
        raise NotReadable("all-hidden", "no key is visible: every score is hidden")
    if score is None:
        return None
    failed: NotReadable | None = None
    for form in _forms(reading, logits, key_axis, score):
        try:
            return _site(reading, node, form, weights)
        except NotReadable as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return None


# ---------------------------------------------------------------------------------------------------- which softmax


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


def number(reading: Reading, value: str) -> float | None:
    """The number that all elements of a value are, None if there is none."""
    tensor = reading.tensors.get(value)
    anywhere = tuple(index(f"i{axis}", extent) for axis, extent in enumerate(tensor.shape)) if tensor else ()
    return const_real(tensor.at(*anywhere)) if tensor else None


# --------------------------------------------------------------------------------------------------- which axis is what


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A reading of the logits' axes. `here` is the logit of (batch, head, query, key), `at_score` its score's place in the product.

    `keys_right` says whether the key is the product's right operand.
    """

    logits: IndexTensor
    score: Node
    key_axis: int
    axes: Axes
    heads: int
    lead: Index
    here: Index
    at_score: Index
    keys_right: bool
    sink_column: Expr


def _score(reading: Reading, logits: IndexTensor) -> Node | None:
    """The matmul whose product the logits are made of, None if there is none."""
    names = {node.name for node in walk(logits.at(*_anywhere(logits))) if node.op is Op.APPLY}
    products = [reading.graph.producers[name] for name in names if name in reading.graph.producers]
    products = [product for product in products if product.op == "matmul"]
    if len(products) > 1:
        raise NotReadable(
            "several-products", f"the softmax takes a sum of {len(products)} matmuls, expected one query-key product"
        )
    return products[0] if products else None


def _anywhere(tensor: IndexTensor) -> Index:
    return tuple(index(f"i{axis}", extent) for axis, extent in enumerate(tensor.shape))


def _forms(reading: Reading, logits: IndexTensor, key_axis: int, score: Node) -> Iterator[_Form]:
    """The readings that are possible, the usual one first."""
    product = reading.tensors[score.outputs[0]]
    if product.rank not in RANKS:
        raise NotReadable(
            "rank", f"expected a query-key product of rank 3, 4 or 5, found rank {product.rank}", score.name
        )
    anywhere = tuple(reading.sizes.resolve(i) for i in _anywhere(logits))
    place = _score_index(reading, logits, anywhere, score.outputs[0])
    only_key = logits.shape[key_axis] == ONE  # read at 0, which is no walk along the axis
    keys_right = only_key or anywhere[key_axis] in walk(place[-1])
    column = place[-1 if keys_right else -2]
    ahead = 0 if only_key else const_int(sub(anywhere[key_axis], column))  # 1 where a sink's column comes first
    if ahead not in (0, 1):
        raise NotReadable(
            "score-place", f"the softmax is over an axis on which scores stand at {column}, expected one a key"
        )
    others = [axis for axis in range(logits.rank) if axis != key_axis]
    possible = _query_axes(reading, logits, score, anywhere, place, key_axis, keys_right=keys_right)
    if not possible:
        raise NotReadable("score-place", "no axis of the scores is the query's")
    keys = product.shape[-1 if keys_right else -2]
    for query_axis in possible:
        leads = [axis for axis in others if axis != query_axis]
        extents = [logits.shape[axis] for axis in leads]
        operand = reading.operands(score).tensor(0 if keys_right else 1)
        try:
            heads, batch = _heads(reading, extents, operand, swapped=not keys_right)
        except NotReadable:
            if query_axis == possible[0]:
                raise
            continue
        axes = axes_of(reading, batch, heads, logits.shape[query_axis], keys)
        lead = _lead(axes, heads, [reading.sizes.resolve(extent) for extent in extents])
        by_axis = dict(zip(leads, lead, strict=True)) | {
            query_axis: axes.query,
            key_axis: add(axes.key, integer(ahead)),
        }
        here = tuple(by_axis[axis] for axis in range(logits.rank))
        sink_column = ZERO if ahead else axes.keys
        yield _Form(
            logits=logits, score=score, key_axis=key_axis, axes=axes, heads=heads, lead=lead, here=here, keys_right=keys_right,
            at_score=_score_index(reading, logits, here, score.outputs[0]), sink_column=sink_column,
        )  # fmt: skip


def _query_axes(
    reading: Reading,
    logits: IndexTensor,
    score: Node,
    anywhere: Index,
    place: Index,
    key_axis: int,
    *,
    keys_right: bool,
) -> list[int]:
    """The axes of the logits that the query is read along and the key is not: those that the mask speaks of first, then the last one."""
    left, right = (reading.operands(score).tensor(side) for side in (0, 1))
    places = (
        (*broadcast_index(place[:-2], left.shape[:-2]), place[-2]),
        (*broadcast_index(place[:-2], right.shape[:-2]), place[-1]),
    )
    along = [{node for position in at for node in walk(position)} for at in places]
    of_query, of_key = along if keys_right else along[::-1]
    told = {node for part in walk(logits.at(*anywhere)) if part.op in (Op.LE0, Op.EQ0) for node in walk(part)}
    possible = [
        axis
        for axis, i in enumerate(anywhere)
        if axis != key_axis and ((i in of_query and i not in of_key) or i.args == (ONE,))
    ]
    return sorted(possible, key=lambda axis: (anywhere[axis] not in told, -axis))


def _score_index(reading: Reading, logits: IndexTensor, here: Index, score: str) -> Index:
    """Where in the query-key product the logit at `here` is read. Raises NotReadable where that is not one place."""
    formula = reading.sizes.resolve(logits.at(*here))
    places = {node.args for node in walk(formula) if node.op is Op.APPLY and node.name == score}
    if len(places) != 1:
        raise NotReadable("score-place", f"a logit depends on {len(places)} scores, expected one")
    return places.pop()


def _heads(reading: Reading, extents: Sequence[Expr], query: IndexTensor, *, swapped: bool) -> tuple[int, Expr]:
    """(heads, batch) of the logits' leading axes: one axis is both."""
    if len(extents) > 1:
        return known_size(reading, product_of(extents[1:]), "number of heads"), extents[0]
    merged = index("n", extents[0])
    inner = (index("q", query.shape[-1 if swapped else -2]), index("d", query.shape[-2 if swapped else -1]))
    probe = broadcast_index((merged,), query.shape[:-2]) + (inner[::-1] if swapped else inner)
    for source in trace(reading, query.name, probe):
        for position in source.indices:
            for node in walk(position):
                if node.op is Op.MOD and merged in node.args and (heads := const_int(node.args[1])):
                    return heads, floordiv(extents[0], integer(heads))
    raise NotReadable("merged-heads", "batch and heads are merged in one axis, and the split cannot be found")


def _lead(axes: Axes, heads: int, extents: Sequence[Expr]) -> Index:
    """The index of (batch, head) along the leading axes."""
    if len(extents) == 1:
        return (merged_index(axes, heads, axes.head),)
    if len(extents) == 2:
        return (axes.batch, axes.head)
    return (axes.batch, floordiv(axes.head, extents[2]), mod(axes.head, extents[2]))


# ----------------------------------------------------------------------------------------------------------- the site


def _site(reading: Reading, node: Node, form: _Form, weights: Weights) -> Attention:
    axes, logits = form.axes, form.logits
    product = reading.tensors[form.score.outputs[0]]
    found_cases = cases(reading.sizes.resolve(logits.at(*form.here)), form.score.outputs[0])
    said = split(_without_row_terms(reading, found_cases, axes), product.dtype, logits.dtype, scored=True)
    at_weights, kept, replaces_nan = _weights_index(reading, node, form, weights)
    if kept != TRUE and not is_valid(or_(not_(reading.sizes.resolve(said.visible)), kept)):
        raise NotReadable(
            "weights-moved",
            f"weights that are not hidden become 0 after the softmax: expected that only where {not_(kept)} hides",
        )
    value, output = reading.operands(weights.product).tensor(1 - weights.side), weights.product.outputs[0]
    column = index("v", value.shape[-1 if weights.side == 0 else -2])
    at_value, at_output = _value_places(at_weights, axes, value, column, weights.side)
    placed_output = _output(reading, axes, form.heads, output, at_output, column)
    masked_rows = _masked_rows(found_cases, replaces_nan or kept != TRUE)
    return attention(
        reading, node=node.name, form="softmax", mask_form=_mask_form(found_cases), found=_operands(reading, form, value.name, at_value), axes=axes,
        heads=form.heads, output=placed_output, visible=said.visible, zeroed=said.zeroed, scale=said.scale, softcap=said.softcap,
        sinks=_sinks(reading, form), masked_rows=masked_rows, bias=said.bias,
    )  # fmt: skip


def _operands(reading: Reading, form: _Form, value: str, at_value: Index) -> Operands:
    ops = reading.operands(form.score)
    sides = (0, 1) if form.keys_right else (1, 0)
    placed_value = place_operand(reading, form.axes, value, at_value, "value")
    found = {}
    for role, side in (("query", sides[0]), ("key", sides[1])):
        operand = ops.tensor(side)
        depth = index("d", operand.shape[-1 if side == 0 else -2])
        row = form.at_score[-2 if side == 0 else -1]
        inner = (row, depth) if side == 0 else (depth, row)
        at = (*broadcast_index(form.at_score[:-2], operand.shape[:-2]), *inner)
        # Scores are sums in float32 in any case: those of widened queries and keys are what the operator computes.
        found[role] = place_operand(reading, form.axes, operand.name, at, role, narrow=placed_value.tensor.dtype)
    return Operands(query=found["query"], key=found["key"], value=placed_value)


def _weights_index(reading: Reading, softmax: Node, form: _Form, weights: Weights) -> tuple[Index, Expr, bool]:
    """(place of the weight of (batch, head, query, key) in the second product's operand, where weights are kept, whether NaN is replaced).

    Raises NotReadable where the weights do not reach it unmoved and unscaled.
    """
    tensor = reading.operands(weights.product).tensor(weights.side)
    for at in _orders(reading, form, tensor, weights.side):
        kept = weights.kept(reading, softmax, at, form.here)
        if kept is not None:
            return at, *kept
    raise NotReadable("weights-moved", "the softmax's weights are moved or scaled before they multiply the value")


def _orders(reading: Reading, form: _Form, tensor: IndexTensor, side: int) -> Iterator[Index]:
    """Every order in which a tensor may hold (batch, head, query), with the keys where the product sums."""
    axes, heads = form.axes, form.heads
    merged = (merged_index(axes, heads, axes.head),)
    leads: list[Index] = [form.lead, (axes.batch, axes.head), merged]
    for extent in (const_int(reading.sizes.resolve(size)) for size in tensor.shape[:-1]):
        if extent and extent > 1 and heads % extent == 0:
            group = integer(heads // extent)
            head, rest = floordiv(axes.head, group), mod(axes.head, group)
            leads += [
                (axes.batch, head, rest),
                (axes.batch, floordiv(axes.head, integer(extent)), mod(axes.head, integer(extent))),
            ]
            rows = add(mul(rest, axes.queries), axes.query)
            if tensor.rank == 4:
                yield _with_keys((axes.batch, head, rows), axes.key, side)
    for lead in dict.fromkeys(leads):
        if len(lead) + 2 == tensor.rank:
            for order in permutations((*lead[1:], axes.query)):
                yield _with_keys((lead[0], *order), axes.key, side)
                if len(lead) == 1:
                    break


def _with_keys(rows: Index, key: Expr, side: int) -> Index:
    return (*rows, key) if side == 0 else (*rows[:-1], key, rows[-1])


def _value_places(at_weights: Index, axes: Axes, value: IndexTensor, column: Expr, side: int) -> tuple[Index, Index]:
    """Where the second product reads the value, and where it puts the result."""
    lead = at_weights[:-2]
    row = at_weights[-2 if side == 0 else -1]
    at_value = (*broadcast_index(lead, value.shape[:-2]), *((axes.key, column) if side == 0 else (column, axes.key)))
    return at_value, (*lead, *((row, column) if side == 0 else (column, row)))


def _output(reading: Reading, axes: Axes, heads: int, value: str, at: Index, column: Expr) -> Operand:
    """The attention's result: the second product, or the nearest view of it in a known order of axes that is a value of the source."""
    merged = merged_index(axes, heads, axes.head)
    orders = (
        (Layout.BHSD, 0, (axes.batch, axes.head, axes.query, column)),
        (Layout.BHSD, heads, (merged, axes.query, column)),
        (Layout.BSHD, 0, (axes.batch, axes.query, axes.head, column)),
        (Layout.BSHD, 0, (axes.batch, axes.query, add(mul(axes.head, column.args[0]), column))),
    )
    current = [value]
    for _ in range(MAX_MOVES):
        for name in current:
            for layout, merged_heads, order in orders:
                if _is_view(reading, name, order, value, at):
                    flat = len(order) == 3 and not merged_heads
                    return Operand(value=name, layout=layout, merged_heads=merged_heads, flat=flat)
        users = [user for name in current for user in reading.live_users(name) if user.op in INDEX_MAPS]
        current = [user.outputs[0] for user in users]
    raise NotReadable(
        "operand-layout",
        "the result is not read in the order (batch, heads, sequence, size) or (batch, sequence, heads, size) behind the second product",
    )


def _is_view(reading: Reading, view: str, order: Index, value: str, at: Index) -> bool:
    tensor, producer = reading.tensors.get(view), reading.graph.producers.get(view)
    if tensor is None or tensor.rank != len(order) or producer is None or producer.attrs.get("made"):
        return False
    sources = (source for source in trace(reading, view, order) if source.value == value)
    return any(_agree(source.indices, at) and source.scale == 1.0 for source in sources)


def _agree(found: Index, expected: Index) -> bool:
    return len(found) == len(expected) and all(same_place(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------- the logits


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


def _sinks(reading: Reading, form: _Form) -> str | float | None:
    """The extra column of the logits, if there is one: a value of shape (heads,), or one number."""
    axes, logits = form.axes, form.logits
    width = reading.sizes.resolve(sub(logits.shape[form.key_axis], axes.keys))
    if width == integer(0):
        return None
    if width != ONE:
        raise NotReadable(
            "extra-columns", f"the softmax is {width} columns wider than the product, expected 0 or 1 (a sink)"
        )
    at = tuple(form.sink_column if axis == form.key_axis else i for axis, i in enumerate(form.here))
    case, *more = _without_row_terms(reading, cases(reading.sizes.resolve(logits.at(*at)), score=""), axes)
    if more:
        raise NotReadable("sink-form", f"expected one sink logit a head, found {1 + len(more)} cases of it")
    if not case.logit.terms:
        return case.logit.constant
    (term,) = case.logit.terms
    if term.op is not Op.APPLY or [i for i in term.args if i != ZERO] != [axes.head] or case.logit.constant:
        raise NotReadable("sink-form", f"expected one sink logit a head, found {term}")
    return term.name.removeprefix(PREFIX)


def _masked_rows(found: tuple[Case, ...], replaced: bool) -> MaskedRows:
    if replaced:
        return MaskedRows.ZERO
    return MaskedRows.NAN if any(case.logit.constant == -inf for case in found) else MaskedRows.UNIFORM


def _mask_form(found: tuple[Case, ...]) -> str:
    if len(found) == 1:
        return "none"
    if any(case.logit.inner == 0 for case in found):
        return "multiplied"
    return "where" if any(case.logit.inner is None for case in found) else "additive"
