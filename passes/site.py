"""What both forms of an attention have in common: where its operands are read, and what its mask's cases say."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from swacompile.attention import Attention, Axes, Layout, MaskedRows, Operand
from swacompile.index_expr import (
    FALSE,
    ONE,
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
    mul,
    nonempty,
    or_,
    real,
    real_add,
    walk,
)
from swacompile.passes.binary_padding import integers_that_hide
from swacompile.passes.index_tensor import IndexTensor, substitute_sizes
from swacompile.passes.logits import HUGE, Case
from swacompile.passes.packed_positions import with_indices_for_positions
from swacompile.passes.read_masks import Reading
from swacompile.passes.residuals import factor_out, run_time_data
from swacompile.passes.size_conditions import simplest
from swacompile.passes.smt import is_possible
from swacompile.passes.trace import Source, trace


class NotReadable(Exception):
    """This is an attention, but not one whose operands or mask can be read."""

    def __init__(self, code: str, reason: str, node: str | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.node = code, reason, node


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An operand and the constant factor between it and what the product reads."""

    operand: Operand
    tensor: IndexTensor
    scale: float
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    query: Placed
    key: Placed
    value: Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What the cases of the logits say: when a key is visible, when its score is zeroed, what the visible score is, and what is added to it."""

    visible: Expr
    zeroed: Expr
    scale: float
    softcap: float | None
    bias: Expr | None


def split(found: tuple[Case, ...], scores_dtype: str, weights_dtype: str, *, scored: bool) -> Split:
    """Raises NotReadable where a masked score may still count, or visible scores come in several forms."""
    visible, zeroed = FALSE, FALSE
    scores: set[tuple[float, float | None]] = set()
    added: list[tuple[Expr, Expr]] = []
    for case in found:
        logit = case.logit
        if logit.hides(scores_dtype, weights_dtype):
            continue
        hidden_in_part = logit.constant != 0 or (scored and logit.inner is None)
        if (hidden_in_part or logit.terms) and _never(case.condition):
            continue
        if hidden_in_part:
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
    return Split(visible=visible, zeroed=zeroed, scale=scale, softcap=softcap, bias=_bias(added, scores_dtype))


def _never(condition: Expr) -> bool:
    """Whether no cell is such a case: two parts of a mask that exclude one another."""
    return not is_possible(condition)


def _bias(added: list[tuple[Expr, Expr]], scores_dtype: str) -> Expr | None:
    """What is added to visible scores, from (condition, sum of terms) a case; None for nothing."""
    *others, (_, bias) = added
    for condition, term in reversed(others):
        bias = ite(condition, term, bias)
    huge = (
        node for node in walk(bias) if node.is_const and node.sort is Sort.REAL and abs(const_real(node) or 0.0) >= HUGE
    )
    if (number := next(huge, None)) is not None and integers_that_hide(bias, scores_dtype) is None:
        raise NotReadable(
            "unreadable-mask",
            f"{number} is multiplied by something that is no choice between numbers, and added to the scores",
        )
    return None if bias == real(0.0) else bias


# ------------------------------------------------------------------------------------------------------------ axes


def known_size(reading: Reading, extent: Expr, what: str) -> int:
    value = const_int(reading.sizes.resolve(extent))
    if value is None:
        raise NotReadable("dynamic-heads", f"the {what} is not constant: {extent}")
    return value


def axes_of(reading: Reading, batch: Expr, heads: int, queries: Expr, keys: Expr) -> Axes:
    resolve = reading.sizes.resolve
    return Axes(
        batch=index("b", resolve(batch)),
        head=index("h", integer(heads)),
        query=index("q", resolve(queries)),
        key=index("k", resolve(keys)),
    )


def merged_index(axes: Axes, heads: int, head: Expr) -> Expr:
    """The index of (batch, head) on one axis with that many heads a batch; 0 is the only batch of an extent of 1."""
    batch = ZERO if axes.batch.args == (ONE,) else axes.batch
    return add(mul(batch, integer(heads)), head)


def same_place(found: Expr, expected: Expr) -> bool:
    """Whether two indices agree; 0 is the only index of an axis of extent 1."""
    return found == expected or (found == ZERO and expected.op is Op.SYMBOL and expected.args == (ONE,))


# -------------------------------------------------------------------------------------------------------- operands


def place_operand(
    reading: Reading, axes: Axes, value: str, indices: Index, role: str, *, narrow: str | None = None
) -> Placed:
    """The tensor furthest up that the product reads element by element, in a known order of axes; one of four axes where there is one.

    `narrow`: a data type from which the product's may have been widened: numbers are the same.
    """
    resolved = tuple(reading.sizes.resolve(i) for i in indices)
    sequence = axes.query if role == "query" else axes.key
    best: dict[tuple[Layout, bool], Placed] = {}
    for source in trace(reading, value, resolved, narrow=narrow):
        producer = reading.graph.producers.get(source.value)
        if producer is not None and producer.attrs.get("made"):
            continue
        for placed in _places(reading, axes, sequence, source):
            best[placed.operand.layout, placed.operand.merged] = placed
    for form in ((Layout.BHSD, False), (Layout.BSHD, False), (Layout.BHSD, True), (Layout.BSHD, True)):
        if form in best:
            return best[form]
    raise NotReadable(
        "operand-layout",
        f"the {role} is not read in the order (batch, heads, sequence, size) or (batch, sequence, heads, size)",
    )


def _places(reading: Reading, axes: Axes, sequence: Expr, source: Source) -> Iterator[Placed]:
    tensor, last = reading.tensors[source.value], source.indices[-1] if source.indices else ZERO
    if last.op is not Op.SYMBOL or last.name not in ("d", "v"):
        return
    total = const_int(axes.head.args[0]) or 1
    for heads in _divisors(total):
        grouped = floordiv(axes.head, integer(total // heads))
        merged = merged_index(axes, heads, grouped)
        orders = {(Layout.BHSD, False): (axes.batch, grouped, sequence), (Layout.BSHD, False): (axes.batch, sequence, grouped),
                  (Layout.BHSD, True): (merged, sequence), (Layout.BSHD, True): (sequence, merged)}  # fmt: skip
        for (layout, is_merged), order in orders.items():
            if tensor.rank != len(order) + 1:
                continue
            head_axis = {Layout.BHSD: 1, Layout.BSHD: 2}[layout]
            if not is_merged and const_int(reading.sizes.resolve(tensor.shape[head_axis])) != heads:
                continue
            if all(same_place(found, expected) for found, expected in zip(source.indices, order, strict=False)):
                operand = Operand(value=source.value, layout=layout, merged_heads=heads if is_merged else 0)
                yield Placed(operand=operand, tensor=tensor, scale=source.scale, heads=heads)


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


# ------------------------------------------------------------------------------------------------------- the whole


def attention(
    reading: Reading, *, node: str, form: str, mask_form: str, found: Operands, axes: Axes, heads: int, output: Operand,
    visible: Expr, zeroed: Expr, scale: float, softcap: float | None, sinks: str | float | None, masked_rows: MaskedRows,
    bias: Expr | None,
) -> Attention:  # fmt: skip
    """The site, with all that is known of sizes put in."""
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
    _refuse_unread(reading, visible, axes)
    return Attention(
        node=node, form=form, mask_form=mask_form, query=found.query.operand, key=found.key.operand, value=found.value.operand, output=output.value,
        merged_output=output.merged, output_layout=output.layout, flat_output=output.flat, axes=axes, visible=visible, zeroed=refined(zeroed), heads=heads, kv_heads=found.key.heads,
        head_size=const_int(resolve(found.query.tensor.shape[-1])), value_head_size=const_int(resolve(found.value.tensor.shape[-1])),
        dtype=dtypes.pop(), scale=scale * found.query.scale * found.key.scale, softcap=softcap, sinks=sinks, masked_rows=masked_rows,
        assumptions=tuple(sorted(simplest(gone, stays)[1] for gone, stays in assumed)), bias=None if bias is None else refined(bias),
    )  # fmt: skip


def _refuse_unread(reading: Reading, visible: Expr, axes: Axes) -> None:
    """Numbers that no input has a part in, and no rule could read, are a gap of ours: unless they are a factor like padding, say so."""
    producers = {name: reading.graph.producers.get(name) for name in run_time_data(visible)}
    unread = {name: node for name, node in producers.items() if node and not reading.depends_on_inputs(name)}
    if not unread:
        return
    _, rest = factor_out(visible, axes)
    for name in sorted(run_time_data(rest) & unread.keys()):
        node = unread[name]
        raise NotReadable(
            "unreadable-mask",
            f"the mask is computed from positions by {node.op} (node {node.name}), in a form that is not read",
        )
