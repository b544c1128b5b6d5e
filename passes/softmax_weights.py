"""The way of a softmax's weights to the product with the value.

Weights must arrive unmoved and unscaled. What may happen to them on the way:
1. views, a sink's column cut off;
2. NaN of rows without a visible key becomes 0;
3. weights become 0 under a condition: the mask once more, which `kept` gives, for the caller to compare with what the softmax hid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from swacompile.graph import Graph, Node
from swacompile.index_expr import FALSE, TRUE, Expr, Index, Op, Sort, const_real, index, or_, substitute, walk
from swacompile.passes.logits import UnreadableLogits, cases
from swacompile.passes.read_masks import GIVES_BOOL, Reading
from swacompile.passes.site import NotReadable, same_place

PASSES = (
    "cast", "identity", "where", "slice", "reshape", "expand", "squeeze", "unsqueeze", "transpose", "mul", "nan_to_num",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The product that takes the weights, as its operand number `side`; whether NaN is replaced on the way."""

    product: Node
    side: int
    replaces_nan: bool

    def kept(self, reading: Reading, softmax: Node, at: Index, expected: Index) -> tuple[Expr, bool] | None:
        """(condition under which the weight at `at` is the softmax's at `expected`, and not 0; whether NaN is replaced), else None."""
        weight = reading.sizes.resolve(reading.operands(self.product).tensor(self.side).at(*at))
        name = softmax.outputs[0]
        if any(node.op is Op.APPLY and node.name == name and not _agree(node.args, expected) for node in walk(weight)):
            return None
        nan = {node: FALSE for node in walk(weight) if _asks_for_nan(reading, node)}
        rows = {node: TRUE for node in walk(weight) if _has_visible_key(reading, softmax, node)}
        try:
            found = cases(substitute(weight, nan | rows), score=name)
        except UnreadableLogits:
            return None
        for case in found:
            whole = case.logit.inner == 1.0 and case.logit.outer is None
            nothing = case.logit.inner in (None, 0.0)
            if not (whole or nothing) or case.logit.constant or case.logit.terms:
                return None
        shown = [case.condition for case in found if case.logit.inner == 1.0]
        if not shown:
            return None
        return or_(*shown), bool(self.replaces_nan or nan or rows)


def weights_of(reading: Reading, softmax: Node) -> Weights | None:
    """Where the weights go; None where they meet no product. Raises NotReadable where they go to several places."""
    value, replaces_nan = softmax.outputs[0], False
    while True:
        users = reading.live_users(value)
        passing = [user for user in users if user.op not in GIVES_BOOL]
        if len(passing) > 1 and _product_of(passing, value):
            names = ", ".join(user.name for user in passing)
            raise NotReadable(
                "weights-moved",
                f"the softmax's weights are used by {len(passing)} operations, expected one product: {names}",
            )
        if len(passing) != 1:
            return None
        (user,) = passing
        replaces_nan = replaces_nan or user.op == "nan_to_num" or any(user.op == "isnan" for user in users)
        if user.op == "matmul":
            return Weights(product=user, side=user.inputs.index(value), replaces_nan=replaces_nan)
        if user.op not in PASSES:
            return None
        value = user.outputs[0]


def _product_of(users: Sequence[Node], value: str) -> bool:
    return any(user.op == "matmul" and value in user.inputs for user in users)


def _agree(found: Index, expected: Index) -> bool:
    return all(same_place(place, wanted) for place, wanted in zip(found, expected, strict=True))


def _asks_for_nan(reading: Reading, node: Expr) -> bool:
    producer = reading.graph.producers.get(node.name) if node.op is Op.APPLY and node.sort is Sort.BOOL else None
    return producer is not None and producer.op == "isnan"


def _has_visible_key(reading: Reading, softmax: Node, node: Expr) -> bool:
    """Whether a condition says that not all logits of the row are -inf."""
    if node.op is not Op.APPLY or node.sort is not Sort.BOOL:
        return False
    graph = reading.graph
    chain = _chain(graph, node.name, ("any", "not", "eq"))
    if chain is None:
        return False
    any_key, _, hidden = chain
    last_axis = len(reading.tensors[softmax.inputs[0]].shape) - 1
    along_keys = any_key.attrs.get("axes") in ([-1], [last_axis]) and hidden.inputs[0] == softmax.inputs[0]
    tensor = reading.tensors.get(hidden.inputs[1])
    if tensor is None or not along_keys:
        return False
    anywhere = tuple(index(f"i{axis}", extent) for axis, extent in enumerate(tensor.shape))
    return const_real(tensor.at(*anywhere)) == -inf


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
