"""Walk an FX graph in execution order and write it in the neutral vocabulary.

1. Submodules that only carry a setting (gradients, autocast) are inlined.
2. Writes to memory become new values: the node that was written, everything it is a view of, and every view of those read the new
   value from then on. Where a write cannot be followed, the values it may reach become run-time data.
3. Axes that vmap hides lead the tensor's own axes.
4. An operation that is not known keeps its name; its result is run-time data.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from swacompile.frontends.fx_alias import Share, View, base_name, view_of, written_operands
from swacompile.frontends.fx_call import Call, Result, Untranslated, Value, dtype_name
from swacompile.frontends.fx_sizes import Sizes
from swacompile.graph import Constant, Node, TensorType
from swacompile.index_expr import Expr, const_int

INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap", "invoke_subgraph", "tag_activation_checkpoint", "wrap_activation_checkpoint", "hints_wrapper")  # fmt: skip
LOOKS_LIKE_ATTENTION = ("softmax", "_softmax", "scaled_dot_product_attention")


@dataclass(slots=True, kw_only=True)
class Translation:
    """The neutral graph under construction, and what each FX node stands for at this point of the execution.

    `operators` gives the rule of an operator by its name without overload, `write_back` the rule that puts a written view back into what it is
    a view of, `parts` the operators that cut a tensor into a list. `stored` holds parameters and buffers; those that the model writes are state, and move to `state`.
    """

    sizes: Sizes
    operators: Mapping[str, Callable[[Call], Result]]
    write_back: Mapping[str, Callable[[Call, str], Result]]
    parts: frozenset[str]
    prefix: str = ""
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    stored: dict[str, Constant] = field(default_factory=dict)
    state: set[str] = field(default_factory=set)
    level_extents: dict[int, Expr] = field(default_factory=dict)
    _values: dict[fx.Node, Value] = field(default_factory=dict)
    _items: dict[tuple[fx.Node, int], Value] = field(default_factory=dict)
    _results: dict[fx.Node, Sequence[object]] = field(default_factory=dict)
    _modules: dict[fx.Node, fx.GraphModule] = field(default_factory=dict)
    _inlined: set[int] = field(default_factory=set)
    _views: dict[fx.Node, View] = field(default_factory=dict)
    _viewers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    _stale: set[fx.Node] = field(default_factory=set)
    _names: dict[fx.Node, str] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------------ the walk

    def run(self, graph: fx.Graph, module: torch.nn.Module) -> tuple[object, ...]:
        """Translate every node; the graph's results, flattened. Placeholders that are not bound yet become values of their own."""
        for node in graph.nodes:
            if node.op == "output":
                return tuple(_flat(node.args[0]))
            self._visit(node, module)
        return ()

    def _visit(self, node: fx.Node, module: torch.nn.Module) -> None:
        if node.op == "placeholder":
            if node not in self._values:
                self.bind(node)
        elif node.op == "get_attr":
            self._attribute(node, module)
        elif node.op == "call_function":
            self._call(node)

    def bind(self, node: fx.Node) -> str:
        """A value for a node that nothing computes."""
        name = self._fresh(node)
        self._note_type(name, node.meta.get("val"))
        self._values[node] = Value(name=name)
        return name

    def _attribute(self, node: fx.Node, module: torch.nn.Module) -> None:
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if isinstance(found, fx.GraphModule):
            self._modules[node] = found
        elif isinstance(found, torch.Tensor):
            self.stored[self.bind(node)] = tensor_constant(found)

    def _call(self, node: fx.Node) -> None:
        name = base_name(node.target)
        if node.target is operator.getitem:
            self._item(node)
        elif name in INLINED and (found := self._submodule(node)):
            self._inline(node, *found)
        elif written := written_operands(node):
            self._mutate(node, written)
        elif not _gives_nothing(node) and name not in self.parts:
            self._values[node] = self._translated(node)
            self._relate(node, view_of(node))

    def _translated(self, node: fx.Node) -> Value:
        """The node's value, by its operator's rule if there is one."""
        call = Call(node=node, name=self._fresh(node), graph=self)
        name = base_name(node.target)
        translate = self.operators.get(name) or self.operators.get(name.removesuffix("_"))
        try:
            if translate is None:
                raise Untranslated(str(node.target))
            result = translate(call)
        except Untranslated:
            result = self._opaque(node)
        return self._emit_result(node, call.name, result)

    def _opaque(self, node: fx.Node) -> Result:
        sources = [
            operand
            for source in node.all_input_nodes
            for operand in ([source] if source in self._values else source.all_input_nodes)
        ]
        operands = [self.read(operand) for operand in sources if operand in self._values]
        levels = sorted({level for operand in operands for level in operand.levels})
        target = node.target
        name = str(target) if isinstance(target, torch._ops.OpOverload) else base_name(target)
        inside = tuple(f"{self.prefix}{found}" for module in self._graphs_of(node) for found in _attentions_in(module))
        attrs = {"attentions_inside": inside} if inside else {}
        return Result(op=name, inputs=tuple(operand.name for operand in operands), levels=tuple(levels), attrs=attrs)

    def _graphs_of(self, node: fx.Node) -> Iterable[fx.GraphModule]:
        return (self._modules[operand] for operand in node.all_input_nodes if operand in self._modules)

    def _emit_result(self, node: fx.Node, name: str, result: Result) -> Value:
        outputs = self._output_names(node, name)
        found = node.meta.get("val")
        for output, part in zip(outputs, found if isinstance(found, list | tuple) else (found,), strict=True):
            self._note_type(output, part, result.levels)
        self.nodes.append(Node(op=result.op, name=name, inputs=result.inputs, outputs=outputs, attrs=result.attrs))
        for position, output in enumerate(outputs):
            self._items[node, position] = Value(name=output, levels=result.levels)
        return Value(name=outputs[0], levels=result.levels)

    def _output_names(self, node: fx.Node, name: str) -> tuple[str, ...]:
        """One name an output: a tuple's parts are called as the nodes that take them out."""
        found = node.meta.get("val")
        if not isinstance(found, list | tuple):
            return (name,)
        takers = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        return tuple(self._fresh(takers[i]) if i in takers else f"{name}.{i}" for i in range(len(found)))

    def _item(self, node: fx.Node) -> None:
        source, position = node.args
        assert isinstance(source, fx.Node) and isinstance(position, int)
        if source in self._results:
            result = self._results[source][position]
            if isinstance(result, fx.Node):
                self._relate(node, View(source=result, share=Share.SAME))
        elif (source, position) in self._items:
            self._values[node] = self._items[source, position]
        else:  # a part of a list
            self._values[node] = self._translated(node)
            whole = view_of(source)
            self._relate(node, whole and View(source=whole.source, share=Share.VIEW))

    # -------------------------------------------------------------------------------------------------- 1. submodules

    def _submodule(self, node: fx.Node) -> tuple[fx.GraphModule, list[object]] | None:
        """(the submodule, its operands) of a call that carries one."""
        for position, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument in self._modules:
                rest: list[object] = list(node.args[position + 1 :])
                if base_name(node.target) == "invoke_subgraph":
                    rest = rest[1:]  # its identifier
                if base_name(node.target) == "hints_wrapper":
                    rest = list(_flat(rest[:1]))
                return self._modules[argument], rest
        return None

    def _inline(self, node: fx.Node, module: fx.GraphModule, operands: Sequence[object]) -> None:
        graph = module.graph
        if id(graph) in self._inlined:  # called before: each call needs nodes of its own
            graph = fx.Graph()
            copied: dict[fx.Node, fx.Node] = {}
            results = graph.graph_copy(module.graph, copied)
            graph.output(results)
        self._inlined.add(id(graph))
        outer, self.prefix = self.prefix, f"{self.prefix}{node.name}."
        places = [inner for inner in graph.nodes if inner.op == "placeholder"]
        for place, operand in zip(places, operands, strict=False):
            if isinstance(operand, fx.Node) and operand in self._values:
                self._relate(place, View(source=operand, share=Share.SAME))
        self._results[node] = self.run(graph, module)
        self.prefix = outer

    # ------------------------------------------------------------------------------------------------------ 2. writes

    def read(self, node: fx.Node) -> Value:
        """What a node stands for now."""
        if node in self._stale:
            self._stale.discard(node)
            view = self._views[node]
            self._values[node] = self.read(view.source) if view.share is Share.SAME else self._translated(node)
        if node not in self._values:
            raise Untranslated(f"{node.name} is no tensor")
        return self._values[node]

    def _relate(self, node: fx.Node, view: View | None) -> None:
        if view is None or view.source not in self._values:
            return
        self._views[node] = view
        self._viewers.setdefault(view.source, []).append(node)
        if view.share is Share.SAME and node not in self._values:
            self._values[node] = self.read(view.source)

    def _mutate(self, node: fx.Node, written: Sequence[fx.Node]) -> None:
        """A node that writes. Only an operand that it also returns (`add_`, `out=`) is known to hold its result then."""
        value = self._translated(node) if not _gives_nothing(node) else None
        view = view_of(node)
        returned = view.source if view and view.share is Share.SAME else None
        for target in written:
            if target in self._values:
                self._write(target, value if value and target is returned else self._unknown(target))
        if value:
            self._values[node] = value
            self._relate(node, view)

    def _write(self, node: fx.Node, value: Value) -> None:
        """The node's memory holds this value now."""
        self._values[node] = value
        self._stale.discard(node)
        self._outdate(node, but=None)
        while view := self._views.get(node):
            value = value if view.share is Share.SAME else self._written_back(node, view, value)
            self._values[view.source] = value
            self._stale.discard(view.source)
            self._outdate(view.source, but=node)
            node = view.source
        if node.op in ("placeholder", "get_attr"):
            self.state.add(self._names[node])

    def _outdate(self, node: fx.Node, but: fx.Node | None) -> None:
        """Every other view of the node shows something new."""
        for viewer in self._viewers.get(node, ()):
            if viewer is but:
                continue
            if self._views[viewer].share is Share.MAYBE:
                self._values[viewer] = self._unknown(viewer)
                self._stale.discard(viewer)
            else:
                self._stale.add(viewer)
            self._outdate(viewer, but=None)

    def _written_back(self, node: fx.Node, view: View, value: Value) -> Value:
        """The viewed tensor after its view was written."""
        restore = self.write_back.get(base_name(node.target)) if view.share is Share.VIEW else None
        call = Call(node=node, name=self._fresh(node), graph=self)
        if restore is not None and not value.levels:
            try:
                result = restore(call, value.name)
            except Untranslated:
                return self._unknown(view.source)
            self._note_type(call.name, view.source.meta.get("val"))
            self.nodes.append(
                Node(op=result.op, name=call.name, inputs=result.inputs, outputs=(call.name,), attrs=result.attrs)
            )
            return Value(name=call.name)
        return self._unknown(view.source)

    def _unknown(self, node: fx.Node) -> Value:
        name = self._fresh(node)
        self._note_type(name, node.meta.get("val"))
        self.nodes.append(Node(op="overwritten", name=name, inputs=(), outputs=(name,)))
        return Value(name=name)

    # --------------------------------------------------------------------------------------------------------- values

    def emit(self, name: str, op: str, *inputs: str, known: TensorType | None = None, **attrs: object) -> str:
        """One more operation; its output's name."""
        self.nodes.append(Node(op=op, name=name, inputs=inputs, outputs=(name,), attrs=attrs))
        if known is not None:
            self.types[name] = known
        return name

    def number(self, value: "bool | int | float | torch.SymInt") -> str:
        """A scalar value."""
        if isinstance(value, torch.SymInt):
            return self._sizes((self.sizes.of(value),), scalar=True)
        return self._constant(np.asarray(value))

    def scalar(self, expr: Expr) -> str:
        """A scalar value of integers."""
        known = const_int(expr)
        return self._sizes((expr,), scalar=True) if known is None else self._constant(np.asarray(known))

    def vector(self, values: "Iterable[int | torch.SymInt | Expr]") -> str:
        """A 1-D value of integers."""
        exprs = tuple(value if isinstance(value, Expr) else self.sizes.of(value) for value in values)
        known = [const_int(expr) for expr in exprs]
        if all(value is not None for value in known):
            return self._constant(np.asarray(known, dtype=np.int64))
        return self._sizes(exprs, scalar=False)

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant {array.dtype} {array.tolist()}"
        self.constants[name] = Constant(dtype=str(array.dtype), shape=array.shape, load=lambda: array)
        return name

    def _sizes(self, exprs: tuple[Expr, ...], *, scalar: bool) -> str:
        name = f"size {exprs[0]}" if scalar else f"sizes [{', '.join(map(str, exprs))}]"
        if name not in self.types:
            self.types[name] = TensorType(dtype="int64", dims=() if scalar else (self.sizes.of(len(exprs)),))
            self.emit(name, "sizes", values=exprs, scalar=scalar)
        return name

    def name_of(self, node: fx.Node) -> str:
        return self._values[node].name

    def has(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node in self._values

    def _fresh(self, node: fx.Node) -> str:
        """The node's name, numbered where it stands for more than one value."""
        base = self._names.get(node, f"{self.prefix}{node.name}")
        self._names.setdefault(node, base)
        count = self._used[base] = self._used.get(base, -1) + 1
        return f"{base}.{count}" if count else base

    def _note_type(self, name: str, found: object, levels: Sequence[int] = ()) -> None:
        if isinstance(found, torch.Tensor):
            hidden = tuple(self.level_extents[level] for level in levels)
            self.types[name] = TensorType(dtype=dtype_name(found.dtype), dims=(*hidden, *self.sizes.shape(found)))
        elif isinstance(found, float | torch.SymFloat | torch.SymBool):
            self.types[name] = TensorType(dtype="bool" if isinstance(found, torch.SymBool) else "float64", dims=())


def tensor_constant(tensor: torch.Tensor) -> Constant:
    """A stored tensor; its data are converted when they are asked for. numpy has no bfloat16: float32 holds it exactly."""

    def load() -> np.ndarray:
        data = tensor.detach().cpu()
        return np.asarray(data.float() if data.dtype is torch.bfloat16 else data)

    return Constant(dtype=dtype_name(tensor.dtype), shape=tuple(int(extent) for extent in tensor.shape), load=load)


def _flat(results: object) -> Iterable[object]:
    if isinstance(results, list | tuple):
        for result in results:
            yield from _flat(result)
    elif isinstance(results, dict):
        yield from _flat(list(results.values()))
    else:
        yield results


def _attentions_in(module: fx.GraphModule) -> Iterable[str]:
    """Names of nodes in a branch's or loop's graph that are attentions by their looks."""
    return (node.name for node in module.graph.nodes if base_name(node.target) in LOOKS_LIKE_ATTENTION)


def _gives_nothing(node: fx.Node) -> bool:
    """Whether a node has no result (an assertion), or one that its users read from the metadata (a size)."""
    found = node.meta.get("val")
    return found is None or isinstance(found, bool | int | torch.SymInt)
