"""What a rule gets and gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from swacompile.graph import Graph, Node
from swacompile.index_expr import Expr, Index
from swacompile.passes.index_tensor import IndexTensor, Sizes, Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """Shape and element formula of a node's first output; `read` None = run-time data of this shape."""

    shape: Index
    read: Callable[[Index], Expr] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """A node with the tensors that it reads."""

    node: Node
    graph: Graph
    tensors: Mapping[str, IndexTensor]
    sizes: Sizes
    dtype: str

    def tensor(self, position: int) -> IndexTensor:
        """An operand. Raises Unreadable where it is absent or its shape is not known."""
        name = self.node.input(position)
        if name not in self.tensors:
            raise Unreadable(f"operand {position} of {self.node.name} has no known shape")
        return self.tensors[name]

    def optional(self, position: int) -> IndexTensor | None:
        return self.tensor(position) if self.node.input(position) else None

    def integers(self, attribute: str) -> tuple[int, ...]:
        values = self.node.attrs[attribute]
        assert isinstance(values, list | tuple)
        return tuple(int(value) for value in values)

    def integer(self, attribute: str, default: int) -> int:
        value = self.node.attrs.get(attribute, default)
        assert isinstance(value, int)
        return value


Rule = Callable[[Operands], Meaning]
