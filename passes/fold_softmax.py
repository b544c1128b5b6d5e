"""A softmax that is written out, as one node again.

    exp(x) / sum(exp(x))                 ->  softmax(x)                      also where the row's maximum is taken off x before
    exp(x) * m / sum(exp(x) * m)         ->  softmax(x + log(m))             m >= 0: log(0) hides
    p * m / sum(p * m), p = softmax(x)   ->  softmax(x + log(m))             the factor of p is the same for the whole row
    where(c, e, 0) / sum(where(c, e, 0)) ->  softmax(where(c, x, -inf))      e = exp(x) or softmax(x)

The sum runs along one axis and is divided by, or multiplied by its reciprocal. A denominator that has more in it is no softmax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from swacompile.graph import Constant, Graph, Node

SAME = ("identity", "cast")


def with_softmaxes(graph: Graph) -> Graph:
    """The graph with written-out softmaxes as nodes, which have the names and outputs of the divisions. Linear in nodes."""
    if not any(node.op == "reduce_sum" for node in graph.nodes):
        return graph
    folding = _Folding(graph=graph)
    nodes = [new for node in graph.nodes for new in (folding.softmax(node) or (node,))]
    if len(nodes) == len(graph.nodes) and not folding.constants:
        changed = any(new is not old for new, old in zip(nodes, graph.nodes, strict=True))
        if not changed:
            return graph
    return replace(graph, nodes=tuple(nodes), constants={**graph.constants, **folding.constants})


@dataclass(slots=True, kw_only=True)
class _Folding:
    graph: Graph
    constants: dict[str, Constant] = field(default_factory=dict)

    def softmax(self, node: Node) -> tuple[Node, ...] | None:
        """What takes the place of a division, None where it is no softmax's."""
        for above, below in self._fractions(node):
            total = self._reduced(below, "reduce_sum")
            if total is None or self._root(total.inputs[0]) != self._root(above):
                continue
            axes = total.attrs.get("axes")
            if not isinstance(axes, Sequence) or len(axes) != 1:
                continue
            logits = self._logarithm(self._root(above), node)
            if logits is not None:
                *more, argument = logits
                return (
                    *_nodes(more),
                    Node(
                        op="softmax",
                        name=node.name,
                        inputs=(self._unshifted(str(argument), axes[0]),),
                        outputs=node.outputs,
                        attrs={"axis": axes[0]},
                    ),
                )
        return None

    def _fractions(self, node: Node) -> Iterator[tuple[str, str]]:
        """(numerator, denominator) where a node is a fraction."""
        if node.op == "div":
            yield node.inputs[0], node.inputs[1]
        elif node.op == "mul":
            for above, inverse in (node.inputs, node.inputs[::-1]):
                found = self.graph.producers.get(self._root(inverse))
                if found is not None and found.op == "reciprocal":
                    yield above, found.inputs[0]

    def _root(self, value: str) -> str:
        """The value that this one is under another name or in another type."""
        while (node := self.graph.producers.get(value)) is not None and node.op in SAME:
            value = node.inputs[0]
        return value

    def _unshifted(self, value: str, axis: object) -> str:
        """x where a value is x less its own maximum along the softmax's axis."""
        node = self.graph.producers.get(self._root(value))
        if node is None or node.op != "sub":
            return value
        largest = self._reduced(node.inputs[1], "reduce_max")
        own = largest is not None and self._root(largest.inputs[0]) == self._root(node.inputs[0])
        return (
            node.inputs[0] if own and largest is not None and largest.attrs.get("axes") in ([axis], (axis,)) else value
        )

    def _reduced(self, value: str, op: str) -> Node | None:
        """The reduction that a value is, repeated along its axis."""
        while (node := self.graph.producers.get(value)) is not None and node.op in (*SAME, "expand", "unsqueeze"):
            value = node.inputs[0]
        return node if node is not None and node.op == op else None

    def _logarithm(self, value: str, place: Node) -> list[object] | None:
        """[nodes on the way ..., the value x] with value = exp(x) up to a factor a row, None where there is none."""
        node = self.graph.producers.get(value)
        if node is None:
            return None
        if node.op in ("exp", "softmax"):
            return [node.inputs[0]]
        if node.op == "mul":
            for weight, factor in (node.inputs, node.inputs[::-1]):
                inner = self._logarithm(self._root(weight), place)
                if inner is not None:
                    return self._times(inner, factor, node, place)
        if node.op == "where":
            return self._chosen(node, place)
        return None

    def _times(self, inner: list[object], factor: str, node: Node, place: Node) -> list[object]:
        *more, argument = inner
        hidden, result = f"{node.outputs[0]}.log of {place.name}", f"{node.outputs[0]}.logits of {place.name}"
        return [
            *more,
            Node(op="log", name=node.name, inputs=(factor,), outputs=(hidden,)),
            Node(op="add", name=node.name, inputs=(str(argument), hidden), outputs=(result,)),
            result,
        ]

    def _chosen(self, node: Node, place: Node) -> list[object] | None:
        condition, *branches = node.inputs
        for position, other in ((0, 1), (1, 0)):
            inner = self._logarithm(self._root(branches[position]), place)
            if inner is None or not self._is_zero(branches[other]):
                continue
            *more, argument = inner
            hidden, result = "-inf of a written-out softmax", f"{node.outputs[0]}.logits of {place.name}"
            self.constants[hidden] = Constant(dtype="float32", shape=(), load=lambda: np.asarray(-np.inf, np.float32))
            chosen = (str(argument), hidden) if position == 0 else (hidden, str(argument))
            return [*more, Node(op="where", name=node.name, inputs=(condition, *chosen), outputs=(result,)), result]
        return None

    def _is_zero(self, value: str) -> bool:
        found = self.graph.constants.get(self._root(value))
        if found is None and (node := self.graph.producers.get(self._root(value))) is not None and node.op == "full":
            found = self.graph.constants.get(node.inputs[1])
        return found is not None and int(np.prod(found.shape)) == 1 and not np.any(found.load())


def _nodes(parts: Sequence[object]) -> list[Node]:
    return [part for part in parts if isinstance(part, Node)]
