"""Arithmetic, comparisons and logic, element by element under broadcasting."""

from collections.abc import Callable, Mapping
from functools import reduce
from math import exp, isnan, sqrt

from swacompile.index_expr import (
    ZERO,
    Expr,
    Index,
    NotInteger,
    Op,
    Sort,
    absolute,
    add,
    and_,
    boolean,
    const_real,
    divides_safely,
    eq,
    floordiv,
    integer,
    ite,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    not_,
    or_,
    real,
    real_add,
    real_div,
    real_mul,
    real_tanh,
    sub,
    to_integer,
    to_real,
    truncdiv,
)
from swacompile.passes.index_tensor import Unreadable, broadcast_index, kept, sort_of
from swacompile.passes.rules.rule import Meaning, Operands, Rule


def elementwise(combine: Callable[..., Expr]) -> Rule:
    """The rule of an operation that combines the elements at one index of the result."""

    def rule(ops: Operands) -> Meaning:
        operands = [ops.tensor(i) for i in range(len(ops.node.inputs))]

        def read(indices: Index) -> Expr:
            try:
                element = combine(*(operand.at(*broadcast_index(indices, operand.shape)) for operand in operands))
            except (NotInteger, ArithmeticError, ValueError) as error:
                raise Unreadable(str(error)) from error
            return kept(element, ops.dtype)

        return Meaning(shape=ops.sizes.broadcast(*(operand.shape for operand in operands)), read=read)

    return rule


def by_sort(integers: Callable[[Expr, Expr], Expr], reals: Callable[[Expr, Expr], Expr] | None) -> Callable[..., Expr]:
    """One meaning for integers, one for reals. Of more than two operands (ONNX Min and Max) the first two are combined first."""

    def combine(*operands: Expr) -> Expr:
        return reduce(pair, operands)

    def pair(a: Expr, b: Expr) -> Expr:
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
        if value is None or isnan(value):
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
    if base < 0 and not exponent.is_integer():
        raise Unreadable("a power that is not a real number")
    if a.sort is Sort.INT:
        power = int(base) ** int(exponent) if exponent.is_integer() and 0 <= exponent < 64 else None
        if power is None:
            raise Unreadable("an integer power that is not a small integer")
        return integer(power)
    return real(base**exponent)


def _division(divide: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """Division of integers by something that is known to be at least 1."""

    def combine(a: Expr, b: Expr) -> Expr:
        if not divides_safely(b):
            raise Unreadable(f"a division by {b}, which may be 0 or negative")
        return divide(a, b)

    return combine


def _truncated_remainder(a: Expr, b: Expr) -> Expr:
    return sub(a, mul(b, truncdiv(a, b)))


def _remainder(ops: Operands) -> Meaning:
    """The remainder has the divisor's sign, or the dividend's where `fmod`."""
    return elementwise(by_sort(_division(_truncated_remainder if ops.integer("fmod", 0) else mod), None))(ops)


def _by_branch(a: Expr, b: Expr, compare: Callable[[Expr, Expr], Expr]) -> Expr:
    """The operand that compares lower, for constants in two-way choices: masks put together by Min or Max."""
    for this, that, flip in ((a, b, False), (b, a, True)):
        if this.op is Op.ITE:
            condition, then, otherwise = this.args
            pairs = ((that, branch) if flip else (branch, that) for branch in (then, otherwise))
            return ite(condition, *(_by_branch(x, y, compare) for x, y in pairs))
    if any(value is None or isnan(value) for value in (const_real(a), const_real(b))):
        raise Unreadable("the smaller of run-time numbers")
    return ite(compare(a, b), a, b)


def _real_minimum(a: Expr, b: Expr) -> Expr:
    return _by_branch(to_real(a), to_real(b), le)


def _real_maximum(a: Expr, b: Expr) -> Expr:
    return _by_branch(to_real(a), to_real(b), lambda x, y: le(y, x))


def _magnitude(a: Expr) -> Expr:
    return to_real(absolute(to_integer(a))) if a.sort is Sort.REAL else absolute(to_integer(a))


def _exclusive(a: Expr, b: Expr) -> Expr:
    return or_(and_(a, not_(b)), and_(not_(a), b))


def _either(a: Expr, b: Expr) -> Expr:
    return to_condition(or_, a, b)


def _both(a: Expr, b: Expr) -> Expr:
    return to_condition(and_, a, b)


def to_condition(junction: Callable[..., Expr], a: Expr, b: Expr) -> Expr:
    """Logic on conditions. On integers the same names mean bitwise logic, which has no formula here."""
    if a.sort is not Sort.BOOL or b.sort is not Sort.BOOL:
        raise Unreadable("bitwise logic on numbers")
    return junction(a, b)


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
            return kept(to_integer(element) if sort is Sort.INT else to_real(element), ops.dtype)
        except NotInteger as error:
            raise Unreadable(str(error)) from error

    return Meaning(shape=operand.shape, read=read)


def _is_nan(ops: Operands) -> Meaning:
    """Data cannot be told: only softmax results are tested so, which detection handles."""
    operand = ops.tensor(0)

    def read(indices: Index) -> Expr:
        number = const_real(operand.at(*indices))
        if number is None:
            raise Unreadable("run-time data")
        return boolean(isnan(number))

    return Meaning(shape=operand.shape, read=read)


RULES: Mapping[str, Rule] = {
    "add": elementwise(by_sort(add, real_add)),
    "sub": elementwise(by_sort(sub, _real_sub)),
    "mul": elementwise(by_sort(mul, real_mul)),
    "div": elementwise(by_sort(_division(truncdiv), real_div)),
    "floordiv": elementwise(by_sort(_division(floordiv), None)),
    "mod": _remainder,
    "neg": elementwise(_negate),
    "abs": elementwise(_magnitude),
    "min": elementwise(by_sort(minimum, _real_minimum)),
    "max": elementwise(by_sort(maximum, _real_maximum)),
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
