"""Sizes that torch.export knows as symbols, as expressions of the neutral graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from swacompile.index_expr import Expr, Sort, add, apply, floordiv, integer, maximum, minimum, mod, product_of, size


@dataclass(slots=True, kw_only=True)
class Sizes:
    """Translates SymInts; equal symbols become equal expressions.

    `lowest` holds the smallest value that the export allows for a symbol, by name. A symbol without an entry is a size of an example
    input; one that comes from data (`u0`) may be anything.
    """

    lowest: Mapping[str, int]
    _known: dict[Any, Expr] = field(default_factory=dict)

    def of(self, value: "int | torch.SymInt") -> Expr:
        if isinstance(value, int):
            return integer(value)
        expression = value.node.expr
        if expression not in self._known:
            self._known[expression] = self._translate(expression)
        return self._known[expression]

    def shape(self, tensor: torch.Tensor) -> tuple[Expr, ...]:
        return tuple(self.of(extent) for extent in tensor.shape)

    def _translate(self, expression: Any) -> Expr:
        if expression.is_Integer:
            return integer(int(expression))
        if expression.is_Symbol:
            return self._symbol(str(expression))
        args = [self._translate(arg) for arg in expression.args]
        if expression.is_Pow and expression.exp.is_Integer and int(expression.exp) >= 1:
            return product_of([args[0]] * int(expression.exp))
        combine = COMBINATIONS.get(type(expression).__name__)
        return combine(args) if combine else _opaque(str(expression))

    def _symbol(self, name: str) -> Expr:
        lowest = self.lowest.get(name)
        if lowest is None:
            return _opaque(name) if name.startswith("u") else size(name)
        return size(name) if lowest >= 0 else _opaque(name)


def lowest_values(ranges: Mapping[Any, Any]) -> dict[str, int]:
    """Lower bounds of symbols from an exported program's range constraints; symbols that have none are left out."""
    bounds = {str(symbol): values.lower for symbol, values in ranges.items()}
    return {name: int(lower) for name, lower in bounds.items() if lower.is_Integer}


def _opaque(name: str) -> Expr:
    return apply(name, (), Sort.INT)


COMBINATIONS: Mapping[str, Callable[[list[Expr]], Expr]] = {
    "Add": lambda args: add(*args),
    "Mul": product_of,
    "FloorDiv": lambda args: floordiv(args[0], args[1]),
    "CleanDiv": lambda args: floordiv(args[0], args[1]),
    "ModularIndexing": lambda args: mod(floordiv(args[0], args[1]), args[2]),
    "Mod": lambda args: mod(args[0], args[1]),
    "PythonMod": lambda args: mod(args[0], args[1]),
    "Max": lambda args: reduce(maximum, args),
    "Min": lambda args: reduce(minimum, args),
    "Identity": lambda args: args[0],
}
