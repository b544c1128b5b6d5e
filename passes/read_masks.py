"""Read a graph as formulas: every value becomes a tensor with a shape and a formula for its elements."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from swacompile.graph import Constant, Graph, Node, TensorType
from swacompile.index_expr import Expr, Index, Sort, apply, integer, size
from swacompile.passes.arrays import ArrayReader
from swacompile.passes.fold_softmax import with_softmaxes
from swacompile.passes.index_tensor import Depth, IndexTensor, Sizes, Unreadable, sort_of
from swacompile.passes.rules import compute, elementwise, lookups, sources, views
from swacompile.passes.rules.rule import Meaning, Operands, Rule

FAMILIES = (sources, elementwise, views, lookups, compute)
RULES: Mapping[str, Rule] = {op: rule for family in FAMILIES for op, rule in family.RULES.items()}
GIVES_BOOL = ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "isnan", "isinf", "any")


@dataclass(slots=True, kw_only=True)
class Reading:
    """A graph with all that is known of its values. `tensors` lacks a value whose rank is unknown."""

    graph: Graph
    tensors: dict[str, IndexTensor] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    arrays: ArrayReader = field(default_factory=ArrayReader)
    depth: Depth = field(default_factory=Depth)
    _run_time: set[str] = field(default_factory=set)
    _live: set[str] = field(default_factory=set)

    def operands(self, node: Node) -> Operands:
        dtype = _dtype(node, self)
        return Operands(node=node, graph=self.graph, tensors=self.tensors, sizes=self.sizes, dtype=dtype)

    def assumptions(self, known: dict[Expr, Expr]) -> tuple[tuple[Expr, Expr], ...]:
        """Equalities between sizes of the model's inputs that it needs to run; broadcasting one of them from 1 is the other way out.

        `known` has more precise sizes in place of some.
        """
        given = (self.graph.types[name].dims or () for name in self.graph.inputs if name in self.graph.types)
        dims = {dim for dims in given for dim in dims if dim is not None}
        return self.sizes.equalities(dims, known)

    def depends_on_inputs(self, value: str) -> bool:
        """Whether the elements of an input have a part in a value; sizes do not count."""
        if not self._run_time:
            self._run_time.update(self.graph.inputs)
            for node in self.graph.nodes:
                random = not node.inputs and node.op not in ("sizes", "iota", "full")
                if node.op not in ("shape", "size") and (random or not self._run_time.isdisjoint(node.inputs)):
                    self._run_time.update(node.outputs)
        return value in self._run_time

    def live_users(self, value: str) -> tuple[Node, ...]:
        """The nodes that take a value and have a part in the model's outputs."""
        if not self._live:
            self._live.update(self.graph.outputs)
            for node in reversed(self.graph.nodes):
                if not self._live.isdisjoint(node.outputs):
                    self._live.update(node.inputs)
        users = self.graph.users.get(value, ())
        return tuple(user for user in users if not self._live.isdisjoint(user.outputs)) if self._live else users

    def extents(self, value: str) -> Index | None:
        """Shape of a value after all that is known of sizes, None where the rank is unknown."""
        tensor = self.tensors.get(value)
        return tuple(self.sizes.resolve(extent) for extent in tensor.shape) if tensor else None


def read_masks(graph: Graph) -> Reading:
    """Walk the graph once in execution order. Cost is linear in its nodes; formulas are made only when asked for."""
    graph = with_softmaxes(graph)
    reading = Reading(graph=graph)
    for name, constant in graph.constants.items():
        reading.tensors[name] = _constant(name, constant, reading)
    for name in graph.inputs:
        _add_data(reading, name, graph.types.get(name))
    for node in graph.nodes:
        _add_node(reading, node)
    return reading


def _add_node(reading: Reading, node: Node) -> None:
    first, *others = node.outputs
    rule = RULES.get(node.op)
    meaning: Meaning | None = None
    if rule is not None:
        try:
            meaning = rule(reading.operands(node))
        except Unreadable:
            meaning = None
    if meaning is None:
        _add_data(reading, first, reading.graph.types.get(first))
    else:
        dtype = _dtype(node, reading)
        data = _data(first, sort_of(dtype))
        reading.tensors[first] = IndexTensor(
            name=first,
            dtype=dtype,
            shape=meaning.shape,
            read=meaning.read or data,
            opaque=meaning.read is None,
            depth=reading.depth,
        )
    for name in others:
        known = reading.graph.types.get(name)
        if known is None and meaning is not None and node.op == "top_k":
            known = TensorType(dtype="int64", dims=meaning.shape)
        _add_data(reading, name, known)


def _add_data(reading: Reading, name: str, known: TensorType | None) -> None:
    """A value that is run-time data, if its rank is known. An unknown extent becomes a size of its own."""
    if not name or known is None or known.dims is None:
        return
    shape = tuple(size(f"{name}.{axis}") if dim is None else dim for axis, dim in enumerate(known.dims))
    read = _data(name, sort_of(known.dtype))
    reading.tensors[name] = IndexTensor(
        name=name, dtype=known.dtype, shape=shape, read=read, opaque=True, depth=reading.depth
    )


def _data(name: str, sort: Sort) -> Callable[[Index], Expr]:
    def read(indices: Index) -> Expr:
        return apply(name, indices, sort)

    return read


def _constant(name: str, constant: Constant, reading: Reading) -> IndexTensor:
    shape = tuple(integer(extent) for extent in constant.shape)

    def read(indices: Index) -> Expr:
        return reading.arrays.element(name, constant, indices)

    return IndexTensor(name=name, dtype=constant.dtype, shape=shape, read=read, depth=reading.depth)


def _dtype(node: Node, reading: Reading) -> str:
    """Data type of a node's first output."""
    if node.op in GIVES_BOOL:
        return "bool"
    if node.op in ("shape", "size"):
        return "int64"
    if isinstance(given := node.attrs.get("dtype"), str):
        return given
    known = reading.graph.types.get(node.outputs[0])
    if known is not None:
        return known.dtype
    position = 1 if node.op in ("where", "full") else 0
    operand = reading.tensors.get(node.input(position))
    return operand.dtype if operand else "float32"
