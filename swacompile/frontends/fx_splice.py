"""Put banded_attention calls into a torch program or FX graph. The source is not changed; weights are shared with the result.

1. Each replaced attention's result is read from the operator instead; its memory has the order of axes that it had before.
2. What nothing reads any more is removed, with the assertions about its metadata: masks, scores, the expansion of key heads.
   Assertions about sizes and inputs, random numbers and writes stay.
3. Signature, buffers, ranges of sizes and guards are the source's.
"""

import copy
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true

import swacompile.torch as swacompile_torch
from swacompile.attention import Kind, Layout, Operand, Refutation
from swacompile.band import Alignment
from swacompile.frontends.fx import FxModel
from swacompile.frontends.fx_alias import base_name, view_of, written_operands
from swacompile.frontends.fx_guards import write_guards
from swacompile.passes.guards import Guards, Role
from swacompile.passes.operands import Bias, Position, RunTimeOperand, Slopes
from swacompile.passes.plan_rewrite import Replacement

log = logging.getLogger(__name__)

aten = torch.ops.aten
KEPT_META = ("stack_trace", "nn_module_stack", "custom", "torch_fn", "from_node", "seq_nr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    """The rewritten program, of the source's type, and what became of each attention."""

    program: ExportedProgram | fx.GraphModule
    outcomes: tuple[Replacement | Refutation, ...]


class _Refused(Exception):
    """An attention cannot be replaced in this graph: (code, reason)."""


def splice(source: FxModel, outcomes: tuple[Replacement | Refutation, ...], *, sizes_checked: bool = False) -> Spliced:
    """Put the operator in the place of every Replacement that the graph allows, and refuse the others.

    `sizes_checked`: whoever calls the graph checks sizes itself, as an exported program does.
    """
    graph = copy.deepcopy(source.module.graph)
    splicer = _Splicer(graph, sizes_checked=sizes_checked or source.program is not None)
    done = tuple(splicer.replaced(outcome) if isinstance(outcome, Replacement) else outcome for outcome in outcomes)
    if splicer.renamed:
        _remove_dead(graph)
    graph.lint()
    module = fx.GraphModule(source.module, graph)
    module.meta.update(source.module.meta)
    if source.program is None:
        return Spliced(program=module, outcomes=done)
    return Spliced(program=_program(source.program, module, splicer.renamed), outcomes=done)


def _program(source: ExportedProgram, module: fx.GraphModule, renamed: dict[str, str]) -> ExportedProgram:
    signature = copy.deepcopy(source.graph_signature)
    for old, new in renamed.items():
        signature.replace_all_uses(old, new)
    program: ExportedProgram = source._update(module, signature)
    guards = getattr(source, "_guards_code", None)
    if guards is not None:
        program._guards_code = guards
    return program


class _Splicer:
    """Edits one graph. `renamed` says which node took whose place."""

    def __init__(self, graph: fx.Graph, *, sizes_checked: bool) -> None:
        self.graph = graph
        self.sizes_checked = sizes_checked
        self.renamed: dict[str, str] = {}
        self._nodes = {node.name: node for node in graph.nodes}
        self._place = {node: place for place, node in enumerate(graph.nodes)}

    def replaced(self, outcome: Replacement) -> Replacement | Refutation:
        site, proof = outcome.site, outcome.proof
        try:
            old = self._node(site.output, "output")
            with self.graph.inserting_before(old):
                self._replace(old, outcome)
        except _Refused as refused:
            code, reason = refused.args
            return Refutation(code=code, reason=reason, node=site.node, kind=proof.kind, band=proof.mask)
        return outcome

    def _replace(self, old: fx.Node, outcome: Replacement) -> None:
        site = outcome.site
        query, key, value = (self._operand(old, operand) for operand in (site.query, site.key, site.value))
        self._guard(old, outcome.guards, {Role.QUERY: query, Role.KEY: key, Role.VALUE: value})
        per_key = [self._per_key(old, key, operand) for operand in (outcome.key_padding, outcome.segments)]
        dtype = _val(query).dtype
        sinks = None if site.sinks is None else self._per_head(old, query, site.sinks, site.heads, dtype)
        bias = self._bias(old, query, key, outcome.bias)
        slopes = self._slopes(old, query, outcome.alibi_slopes, site.heads)
        offset = self._offset(old, outcome.offset)
        options: dict[str, object] = {
            "scale": float(site.scale),
            "softcap": float(site.softcap or 0.0),
            "left_window_size": outcome.left_window_size,
            "right_window_size": outcome.right_window_size,
            "bottom_right": outcome.proof.mask.alignment is Alignment.BOTTOM_RIGHT,
            "zeroed": outcome.proof.kind is Kind.ZEROED,
            "bshd_output": _heads_inside(old) or site.output_layout is Layout.BSHD,
        }
        operands = (query, key, value, *per_key, sinks, bias, slopes, offset)
        new = self._call(old, swacompile_torch.overload(), *_without_defaults(operands, options))
        if site.merged_output:
            new = self._call(old, aten.reshape.default, (new, [-1, self._size(old, query, 2), _val(value).shape[3]]))
        elif site.output_layout is Layout.BSHD:
            new = self._call(old, aten.transpose.int, (new, 1, 2))
            if site.flat_output:
                new = self._call(
                    old, aten.reshape.default, (new, [-1, self._size(old, query, 2), site.heads * _val(value).shape[3]])
                )
        old.replace_all_uses_with(new)
        self.renamed[old.name] = new.name

    def _guard(self, old: fx.Node, guards: Guards, operands: dict[Role, fx.Node]) -> None:
        def node(value: str | Role) -> fx.Node:
            return operands[value] if isinstance(value, Role) else self._readable(old, value)

        try:
            write_guards(self.graph, guards, node, sizes_checked=self.sizes_checked)
            for value in guards.zero_or_one:
                self._assert_zero_or_one(old, value)
        except NotImplementedError as error:
            raise _Refused(
                "guarded", f"the band holds for some sizes only, and this graph cannot check that: {error}"
            ) from error

    def _assert_zero_or_one(self, old: fx.Node, value: str) -> None:
        node = self._readable(old, value)
        flags = self._converted(old, self._call(old, aten.ne.Scalar, (node, 0)), _val(node).dtype)
        same = self._call(old, aten.all.default, (self._call(old, aten.eq.Tensor, (node, flags)),))
        self._call(old, aten._assert_async.msg, (same, f"swacompile expects {value} in {{0, 1}}"))

    # operands

    def _node(self, value: str, role: str) -> fx.Node:
        node: fx.Node | None = self._nodes.get(value)
        if node is None or not isinstance(node.meta.get("val"), Tensor):
            raise _Refused(
                "no-node",
                f"the {role} {value} is no node of the graph: it lies in a submodule, or in memory that is written",
            )
        return node

    def _operand(self, old: fx.Node, operand: Operand) -> fx.Node:
        """(batch, heads, length, size)."""
        node = self._readable(old, operand.value)
        if operand.merged:
            node = node if operand.layout is Layout.BHSD else self._call(old, aten.transpose.int, (node, 0, 1))
            shape = [-1, operand.merged_heads, self._size(old, node, 1), self._size(old, node, 2)]
            return self._call(old, aten.reshape.default, (node, shape))
        return node if operand.layout is Layout.BHSD else self._call(old, aten.transpose.int, (node, 1, 2))

    def _readable(self, old: fx.Node, value: str) -> fx.Node:
        """The value's node, where what it holds at its place is what it still holds at the attention."""
        node = self._node(value, "operand")
        if self._place[node] > self._place[old]:
            raise _Refused("order", f"the operand {value} is computed after the attention")
        memory = _memory(node)
        for writer in self._between(node, old):
            if any(_memory(written) is memory for written in written_operands(writer)):
                raise _Refused("overwritten", f"{writer.name} writes to the operand {value} before the attention")
        return node

    def _between(self, first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
        node = first.next
        while node is not last:
            yield node
            node = node.next

    def _per_key(self, old: fx.Node, key: fx.Node, operand: RunTimeOperand | None) -> fx.Node | None:
        """(batch, keys)."""
        if operand is None:
            return None
        node = self._readable(old, operand.value)
        for _ in range(operand.rank - 2):
            node = self._call(old, aten.select.int, (node, 1, 0))
        if statically_known_true(_val(node).shape[0] == 1):
            node = self._call(old, aten.expand.default, (node, [self._size(old, key, 0), -1]))
        for axis, key_axis in ((0, 0), (1, 2)):
            if not statically_known_true(_val(node).shape[axis] == _val(key).shape[key_axis]):
                # The source reads only the elements of batches and keys that there are.
                node = self._call(old, aten.slice.Tensor, (node, axis, 0, self._size(old, key, key_axis)))
        if operand.nonzero:
            return self._call(old, aten.ne.Scalar, (node, 0))
        is_condition = _val(node).dtype == torch.bool
        return node if is_condition else self._converted(old, node, torch.int64)

    def _per_head(self, old: fx.Node, query: fx.Node, value: str | float, heads: int, dtype: torch.dtype) -> fx.Node:
        """(heads,), of this data type."""
        if isinstance(value, float):
            device = _val(query).device
            return self._call(old, aten.full.default, ([heads], value), {"dtype": dtype, "device": device})
        node = self._readable(old, value)
        for axis in reversed(range(_val(node).dim())):
            if _val(node).dim() > 1 and _val(node).shape[axis] != heads:
                node = self._call(old, aten.select.int, (node, axis, 0))
        while _val(node).dim() > 1:  # one head
            node = self._call(old, aten.select.int, (node, 0, 0))
        if tuple(_val(node).shape) != (heads,):
            raise _Refused("sink-form", f"expected {heads} numbers in {value}, found shape {tuple(_val(node).shape)}")
        return self._converted(old, node, dtype)

    def _slopes(self, old: fx.Node, query: fx.Node, slopes: Slopes | None, heads: int) -> fx.Node | None:
        """(heads,), float32."""
        if slopes is None:
            return None
        value = slopes.factor if slopes.value is None else slopes.value
        node = self._per_head(old, query, value, heads, torch.float32)
        return node if slopes.value is None or slopes.factor == 1.0 else self._call(old, aten.neg.default, (node,))

    def _bias(self, old: fx.Node, query: fx.Node, key: fx.Node, bias: Bias | None) -> fx.Node | None:
        """(1 or batch, 1 or heads, queries, keys)."""
        if bias is None:
            return None
        node = self._readable(old, bias.value)
        missing = 4 - _val(node).dim()
        for axis, (operand, place) in enumerate(((query, 0), (query, 1), (query, 2), (key, 2))[missing:]):
            extent, wanted = _val(node).shape[axis], _val(operand).shape[place]
            if not (statically_known_true(extent == 1) or statically_known_true(extent == wanted)):
                node = self._call(old, aten.slice.Tensor, (node, axis, 0, self._size(old, operand, place)))
        leading = [self._size(old, node, axis - missing) if axis >= missing else 1 for axis in (0, 1)]
        shape = [*leading, self._size(old, query, 2), self._size(old, key, 2)]
        return self._call(old, aten.expand.default, (node, shape))

    def _offset(self, old: fx.Node, position: Position | None) -> fx.Node | None:
        """(), int64."""
        if position is None:
            return None
        node = self._readable(old, position.value)
        for place in reversed(position.index):
            node = self._call(old, aten.select.int, (node, -1, place))
        return self._converted(old, node, torch.int64)

    def _converted(self, old: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if _val(node).dtype == dtype:
            return node
        return self._call(old, aten._to_copy.default, (node,), {"dtype": dtype})

    def _size(self, old: fx.Node, node: fx.Node, axis: int) -> fx.Node | int:
        extent = _val(node).shape[axis]
        return extent if isinstance(extent, int) else self._call(old, aten.sym_size.int, (node, axis))

    def _call(
        self,
        old: fx.Node,
        target: torch._ops.OpOverload,
        args: tuple[object, ...],
        kwargs: dict[str, object] | None = None,
    ) -> fx.Node:
        """One more node, whose metadata say what it computes and which source it stands for."""
        node = self.graph.call_function(target, args, kwargs or {})  # type: ignore[arg-type]  # fx's Argument is recursive
        node.meta.update({name: old.meta[name] for name in KEPT_META if name in old.meta})
        given: Any = (args, kwargs or {})
        mode = _val(old).fake_mode  # type: ignore[attr-defined]  # a FakeTensor
        values = fx.node.map_arg(given, lambda arg: _in_mode(arg.meta["val"], mode))
        with mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node


def _without_defaults(
    operands: tuple[fx.Node | None, ...], options: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of a call that must be given: torch reads each of them anew whenever the program runs."""
    given = max(place for place, operand in enumerate(operands) if operand is not None) + 1
    default = {argument.name: argument.default_value for argument in swacompile_torch.overload()._schema.arguments}
    return operands[:given], {name: value for name, value in options.items() if value != default[name]}


def _val(node: fx.Node) -> Tensor:
    found: Tensor = node.meta["val"]
    return found


def _in_mode(val: Any, mode: Any) -> Any:
    """The metadata of a node for a fake mode: a graph that was traced on real tensors has one mode a node."""
    if not isinstance(val, Tensor) or val.fake_mode is mode:  # type: ignore[attr-defined]  # a FakeTensor
        return val
    with mode:
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows."""
    while view := view_of(node):
        node = view.source
    return node


def _heads_inside(old: fx.Node) -> bool:
    """Whether the result's memory has the order (batch, length, heads, size)."""
    val = _val(old)
    return val.dim() == 4 and not statically_known_true(val.stride(2) == val.shape[3])


def _remove_dead(graph: fx.Graph) -> None:
    live = _live(graph)
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the results or an effect need. An assertion about a value's metadata needs the value to be live."""
    live: set[fx.Node] = set()
    frontier = [node for node in graph.nodes if _has_effect(node)]
    while frontier:
        node = frontier.pop()
        if node not in live:
            live.add(node)
            frontier += node.all_input_nodes
            frontier += [user for user in node.users if base_name(user.target) == "_assert_tensor_metadata"]
    return live


def _has_effect(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function":
        return node.op != "get_attr"
    if not isinstance(target, torch._ops.OpOverload):
        return not (target is operator.getitem or _is_arithmetic(target))
    if base_name(target) == "_assert_tensor_metadata":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return not _draws_nothing(node)
    return target._schema.is_mutable or not target._schema.returns


def _is_arithmetic(target: object) -> bool:
    """Python's own functions, as graphs apply them to sizes: operator.mul, math.ceil, torch.sym_max."""
    return getattr(target, "__module__", None) in ("_operator", "math") or base_name(target).startswith("sym_")


def _draws_nothing(node: fx.Node) -> bool:
    """Whether the operator could drop elements but does not, and so draws no random numbers."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if "dropout" not in base_name(target) and "scaled_dot_product" not in base_name(target):
        return False
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False)) | node.kwargs
    return given.get("dropout_p", given.get("p")) in (0, None) or given.get("train") is False
