"""Evaluate formulas at given numbers: single cells with Python integers, whole grids with numpy arrays."""

from collections.abc import Callable, Mapping

import numpy as np

from swacompile.index_expr import Expr, Op, Sort, round_number, sum_parts, wrap_number, wrap_parts

Number = int | bool | np.ndarray
Lookup = Callable[[Expr, list[Number]], Number]


class NotEvaluable(Exception):
    """A real number or an unknown function stands in the formula."""


def evaluate(expr: Expr, values: Mapping[Expr, Number], lookup: Lookup | None = None) -> Number:
    """The formula's value where its symbols have these values; `lookup` gives the elements of data and of constant arrays.

    Raises NotEvaluable.
    """
    done: dict[Expr, Number] = dict(values)

    def visit(node: Expr) -> Number:
        if (known := done.get(node)) is None:
            known = done[node] = _apply(node, [visit(arg) for arg in node.args], lookup)
        return known

    return visit(expr)


def _apply(node: Expr, args: list[Number], lookup: Lookup | None) -> Number:
    match node.op:
        case Op.CONST if node.sort is not Sort.REAL:
            return node.value  # type: ignore[return-value]
        case Op.SUM:
            constant, coefficients = sum_parts(node)
            return sum((c * arg for c, arg in zip(coefficients, args, strict=True)), constant)
        case Op.PRODUCT:
            product: Number = 1
            for arg in args:
                product = product * arg
            return product
        case Op.FLOORDIV:
            return args[0] // args[1]
        case Op.MOD:
            return args[0] % args[1]
        case Op.WRAP:
            bits, signed = wrap_parts(node)
            return wrap_number(args[0], bits, signed)  # type: ignore[arg-type]
        case Op.ROUND:
            if isinstance(args[0], np.ndarray):
                rounded: np.ndarray = np.vectorize(round_number, otypes=[object])(args[0], node.value)
                return rounded
            return round_number(int(args[0]), node.value)  # type: ignore[arg-type]
        case Op.LE0:
            return args[0] <= 0
        case Op.EQ0:
            return args[0] == 0
        case Op.AND | Op.OR:
            result = args[0]
            for arg in args[1:]:
                result = (result & arg) if node.op is Op.AND else (result | arg)
            return result
        case Op.NOT:
            return np.logical_not(args[0]) if isinstance(args[0], np.ndarray) else not args[0]
        case Op.ITE:
            if isinstance(args[0], np.ndarray):
                return np.where(args[0], args[1], args[2])
            return args[1] if args[0] else args[2]
        case Op.APPLY if lookup is not None:
            return lookup(node, args)
    raise NotEvaluable(str(node))
