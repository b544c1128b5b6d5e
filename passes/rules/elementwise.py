"""Arithmetic, comparisons and logic, element by element under broadcasting."""

from collections.abc import Callable, Mapping
from math import exp, sqrt

from swacompile.index_expr import FALSE, NotInteger, ONE, ZERO, Expr, Index, Sort
from swacompile.index_expr import absolute, add, and_, const_int, const_real, eq, floordiv, ite, le, lt, maximum, minimum, mod, mul, neg
from swacompile.index_expr import not_, or_, real, real_add, real_div, real_mul, real_tanh, sub, to_integer, to_real, truncdiv
from swacompile.passes.index_tensor import Unreadable, broadcast_index, sort_of
from swacompile.passes.rules.rule import Meaning, Operands, Rule


def elementwise(combine: Callable[..., Expr]) -> Rule:
    """The rule of an operation that combines the elements at one index of the result."""

    def rule(ops: Operands) -> Meaning:
        operands = [ops.tensor(i) for i in range(len(ops.node.inputs))]

        def read(indices: Index) -> Expr:
            try:
                return combine(*(operand.at(*broadcast_index(indices, operand.shape)) for operand in operands))
            except NotInteger as error:
                raise Unreadable(str(error)) from error

        return Meaning(shape=ops.sizes.broadcast(*(operand.shape for operand in operands)), read=read)

    return rule


def by_sort(integers: Callable[[Expr, Expr], Expr], reals: Callable[[Expr, Expr], Expr] | None) -> Callable[[Expr, Expr], Expr]:
    def combine(a: Expr, b: Expr) -> Expr:
        if Sort.REAL in (a.sort, b.sort):
            if reals is None:
                raise Unreadable("no rule for real operands")
            return reals(a, b)
        return integers(to_integer(a), to_integer(b))

    return combine


def numeric(function: Callable[[float], float]) -> Callable[[Expr], Expr]:
    """A function of one constant real."""

    def combine(a: Expr) -> Expr:
        value = const_real(a)
        if value is None:
            raise Unreadable("not a constant")
        return real(function(value))

    return combine


def _negate(a: Expr) -> Expr:
    return real_mul(a, real(-1.0)) if a.sort is Sort.REAL else neg(a)


def _real_sub(a: Expr, b: Expr) -> Expr:
    return real_add(a, real_mul(b, real(-1.0)))


def _power(a: Expr, b: Expr) -> Expr:
    base, exponent = const_real(a), const_real(b)
    if base is None or exponent is None:
        raise Unreadable("a power of run-time data")
    if a.sort is Sort.INT and b.sort is Sort.INT and exponent >= 0:
        return mul(ONE, to_integer(real(base**exponent)))
    return real(base**exponent)


def _ratio(a: Expr, b: Expr) -> Expr:
    """Division as ONNX Div: toward zero between integers."""
    divisor = const_int(b)
    if divisor is not None and divisor <= 0:
        raise Unreadable("division by a constant below 1")
    return truncdiv(a, b)


def _floor_ratio(a: Expr, b: Expr) -> Expr:
    if (divisor := const_int(b)) is not None and divisor <= 0:
        raise Unreadable("division by a constant below 1")
    return floordiv(a, b)


def _remainder(a: Expr, b: Expr) -> Expr:
    if (divisor := const_int(b)) is not None and divisor <= 0:
        raise Unreadable("remainder by a constant below 1")
    return mod(a, b)


def _exclusive(a: Expr, b: Expr) -> Expr:
    return or_(and_(a, not_(b)), and_(not_(a), b))


def _either(a: Expr, b: Expr) -> Expr:
    return or_(_truth(a), _truth(b))


def _both(a: Expr, b: Expr) -> Expr:
    return and_(_truth(a), _truth(b))


def _truth(a: Expr) -> Expr:
    """A number as a condition."""
    return a if a.sort is Sort.BOOL else not_(eq(a, ZERO))


def _where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    if then.sort is not otherwise.sort:
        then, otherwise = to_real(then), to_real(otherwise)
    return ite(_truth(condition), then, otherwise)


def _cast(ops: Operands) -> Meaning:
    operand = ops.tensor(0)
    sort = sort_of(ops.dtype)

    def read(indices: Index) -> Expr:
        element = operand.at(*indices)
        try:
            if sort is Sort.BOOL:
                return _truth(element)
            return to_integer(element) if sort is Sort.INT else to_real(element)
        except NotInteger as error:
            raise Unreadable(str(error)) from error

    return Meaning(shape=operand.shape, read=read)


def _is_nan(ops: Operands) -> Meaning:
    """Constants are never NaN here, and data cannot be told: only softmax results are tested so, which detection handles."""
    operand = ops.tensor(0)

    def read(indices: Index) -> Expr:
        if const_real(operand.at(*indices)) is None:
            raise Unreadable("run-time data")
        return FALSE

    return Meaning(shape=operand.shape, read=read)


RULES: Mapping[str, Rule] = {
    "add": elementwise(by_sort(add, real_add)),
    "sub": elementwise(by_sort(sub, _real_sub)),
    "mul": elementwise(by_sort(mul, real_mul)),
    "div": elementwise(by_sort(_ratio, real_div)),
    "floordiv": elementwise(by_sort(_floor_ratio, None)),
    "mod": elementwise(by_sort(_remainder, None)),
    "neg": elementwise(_negate),
    "abs": elementwise(lambda a: absolute(to_integer(a))),
    "min": elementwise(by_sort(minimum, None)),
    "max": elementwise(by_sort(maximum, None)),
    "pow": elementwise(_power),
    "sqrt": elementwise(numeric(sqrt)),
    "reciprocal": elementwise(numeric(lambda value: 1.0 / value)),
    "exp": elementwise(numeric(exp)),
    "tanh": elementwise(real_tanh),
    "lt": elementwise(lt),
    "le": elementwise(le),
    "gt": elementwise(lambda a, b: lt(b, a)),
    "ge": elementwise(lambda a, b: le(b, a)),
    "eq": elementwise(eq),
    "ne": elementwise(lambda a, b: not_(eq(a, b))),
    "and": elementwise(_both),
    "or": elementwise(_either),
    "xor": elementwise(_exclusive),
    "not": elementwise(lambda a: not_(_truth(a))),
    "where": elementwise(_where),
    "identity": elementwise(lambda a: a),
    "cast": _cast,
    "isnan": _is_nan,
}
