"""Conditions on sizes as assertions of an FX graph.

An exported program checks the sizes of its inputs, and torch knows which sizes follow from which; so most conditions hold there for
certain and are left out. An FX graph that is no exported program checks nothing.
"""

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swacompile.index_expr import Expr, Op, maximum, minimum, sum_parts
from swacompile.passes.guards import Guards, Role

aten = torch.ops.aten
Nodes = Callable[["str | Role"], fx.Node]


def write_guards(graph: fx.Graph, guards: Guards, nodes: Nodes, *, sizes_checked: bool) -> None:
    """Assertions at the graph's place of insertion. `sizes_checked`: no other sizes come than the metadata say.

    Raises NotImplementedError where a condition has a form that torch has no words for.
    """
    known = {extent.symbol: nodes(extent.value).meta["val"].shape[extent.axis] for extent in guards.extents}
    wanted = [
        guard
        for guard in guards.conditions
        if not (sizes_checked and statically_known_true(_value(guard.condition, known)))
    ]
    sizes: dict[Expr, Any] = {}
    for guard in wanted:
        for extent in guards.extents:
            if extent.symbol in _symbols(guard.condition) and extent.symbol not in sizes:
                size = graph.call_function(aten.sym_size.int, (nodes(extent.value), extent.axis))
                size.meta["val"] = known[extent.symbol]
                sizes[extent.symbol] = fx.Proxy(size)
        holds = _value(guard.condition, sizes)
        _add_values(holds.node)
        graph.call_function(aten._assert_scalar.default, (holds.node, f"swacompile expects {guard.words}")).meta[
            "val"
        ] = None


def _symbols(condition: Expr) -> set[Expr]:
    return {condition} if condition.op is Op.SYMBOL else {symbol for arg in condition.args for symbol in _symbols(arg)}


def _value(expr: Expr, sizes: Mapping[Expr, Any]) -> Any:
    """A condition or a size, from sizes that are numbers, torch's symbols or proxies of nodes."""
    if expr.op is Op.SYMBOL:
        return sizes[expr]
    if expr.op is Op.CONST:
        return expr.value
    if expr.op is Op.ITE:
        _, then, otherwise = expr.args
        choices: list[tuple[Any, Any]] = [(minimum, torch.sym_min), (maximum, torch.sym_max)]
        for pick, choose in choices:
            if expr in (pick(then, otherwise), pick(otherwise, then)):
                return choose(_value(then, sizes), _value(otherwise, sizes))
        raise NotImplementedError(f"a size with a condition: {expr}")
    args = [_value(arg, sizes) for arg in expr.args]
    match expr.op:
        case Op.EQ0:
            return args[0] == 0
        case Op.LE0:
            return args[0] <= 0
        case Op.SUM:
            constant, coefficients = sum_parts(expr)
            return sum((c * arg for c, arg in zip(coefficients, args, strict=True)), constant)
        case Op.PRODUCT:
            return reduce(operator.mul, args)
        case Op.FLOORDIV:
            return args[0] // args[1]
        case Op.MOD:
            return args[0] % args[1]
    raise NotImplementedError(f"a condition on sizes: {expr}")


def _add_values(node: fx.Node) -> None:
    """What a node of arithmetic computes, as metadata, and the nodes above it."""
    if "val" in node.meta:
        return
    for above in node.all_input_nodes:
        _add_values(above)
    assert callable(node.target)
    node.meta["val"] = node.target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args))
