"""Arithmetic, comparisons and logic, element by element under broadcasting."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from math import ceil, exp, floor, inf, isfinite, isinf, isnan, log, nan, prod, sqrt, trunc

from swacompile.index_expr import (
    ONE,
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
    const_int,
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

MAX_BRANCHES = 64  # Numbers that a choice between constants may take where a function is applied to each.


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


def on_branches(function: Callable[..., Expr], *operands: Expr) -> Expr:
    """A function of constants, on every branch of operands that are choices between constants, and sums and products of such.

    Raises Unreadable where there are more than MAX_BRANCHES of them.
    """
    spread = [_spread(operand) for operand in operands]
    if prod(_count(operand) for operand in spread) > MAX_BRANCHES:
        raise Unreadable("a choice between too many numbers")
    return _on_branches(function, spread)


def _on_branches(function: Callable[..., Expr], operands: Sequence[Expr]) -> Expr:
    for position, operand in enumerate(operands):
        if operand.op is Op.ITE:
            condition, *branches = operand.args
            chosen = ([*operands[:position], branch, *operands[position + 1 :]] for branch in branches)
            return ite(condition, *(_on_branches(function, each) for each in chosen))
    return function(*operands)


def _spread(operand: Expr) -> Expr:
    """A sum or product of choices between constants as one choice; anything else as it is."""
    combine = {Op.REAL_ADD: real_add, Op.REAL_MUL: real_mul}.get(operand.op)
    if combine is None:
        return operand
    parts = [_spread(arg) for arg in operand.args]
    few = prod(_count(part) for part in parts) <= MAX_BRANCHES
    constant = few and all(leaf.is_const for part in parts for leaf in _leaves(part))
    return _on_branches(combine, parts) if constant else operand


def _count(operand: Expr) -> int:
    """Number of an operand's leaves; one more than the limit where there are more."""
    return sum(1 for _ in islice(_leaves(operand), MAX_BRANCHES + 1))


def _leaves(operand: Expr) -> Iterator[Expr]:
    if operand.op is Op.ITE:
        for branch in operand.args[1:]:
            yield from _leaves(branch)
    else:
        yield operand


def numeric(function: Callable[[float], float]) -> Callable[[Expr], Expr]:
    """A function of constant reals."""

    def of_constant(a: Expr) -> Expr:
        value = const_real(a)
        if value is None or isnan(value):
            raise Unreadable("not a constant")
        return real(function(value))

    return lambda a: on_branches(of_constant, a)


def _logarithm(value: float) -> float:
    return log(value) if value > 0 else -inf if value == 0 else nan


def to_whole(function: Callable[[float], int]) -> Callable[[Expr], Expr]:
    """Rounding to an integer: integers, also where they are kept as floating-point numbers, stay as they are."""

    def of_leaf(a: Expr) -> Expr:
        value = const_real(a)
        if value is None and (a.sort is Sort.INT or a.op is Op.TO_REAL):
            return a
        if value is None:
            raise Unreadable("run-time data that is rounded")
        return a if not isfinite(value) else real(float(function(value)))

    return lambda a: on_branches(of_leaf, a)


def _rectified(a: Expr) -> Expr:
    return _real_maximum(a, real(0.0)) if a.sort is Sort.REAL else maximum(to_integer(a), ZERO)


def _sign(a: Expr) -> Expr:
    one, minus_one, none = (real(1.0), real(-1.0), real(0.0)) if a.sort is Sort.REAL else (ONE, neg(ONE), ZERO)
    return ite(lt(ZERO, a), one, ite(lt(a, ZERO), minus_one, none))


def compared(compare: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: compare(_spread(a), _spread(b))


def bitwise(function: Callable[[int, int], int]) -> Callable[[Expr, Expr], Expr]:
    """Bits of integers that are choices between constants."""

    def of_constants(a: Expr, b: Expr) -> Expr:
        left, right = const_int(a), const_int(b)
        if left is None or right is None:
            raise Unreadable("bits of run-time numbers")
        return integer(function(left, right))

    return lambda a, b: on_branches(of_constants, to_integer(a), to_integer(b))


def _negate(a: Expr) -> Expr:
    return real_mul(a, real(-1.0)) if a.sort is Sort.REAL else neg(a)


def _real_sub(a: Expr, b: Expr) -> Expr:
    return real_add(a, real_mul(b, real(-1.0)))


def _power(a: Expr, b: Expr) -> Expr:
    base, exponent = const_real(a), const_real(b)
    if exponent == 2:
        return mul(a, a) if a.sort is Sort.INT else real_mul(a, a)
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


def _lower(a: Expr, b: Expr, compare: Callable[[Expr, Expr], Expr]) -> Expr:
    """The real operand that compares lower: of choices between constants, or of integers kept as floating-point numbers."""

    def of_leaves(this: Expr, that: Expr) -> Expr:
        if any((value := const_real(leaf)) is not None and isnan(value) for leaf in (this, that)):
            raise Unreadable("the smaller of numbers of which one is NaN")
        first = not_(compare(that, this)) if that.is_const else compare(this, that)  # of equals the constant
        return ite(first, this, that)

    return on_branches(of_leaves, to_real(a), to_real(b))


def _real_minimum(a: Expr, b: Expr) -> Expr:
    return _lower(a, b, le)


def _real_maximum(a: Expr, b: Expr) -> Expr:
    return _lower(a, b, lambda x, y: le(y, x))


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
    return a if a.sort is Sort.BOOL else not_(eq(_spread(a), ZERO))


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


def _is_infinite(ops: Operands) -> Meaning:
    """Weights of a softmax are not; other data cannot be told."""
    operand = ops.tensor(0)

    def read(indices: Index) -> Expr:
        element = operand.at(*indices)
        number = const_real(element)
        if number is None and not _is_weight(ops, element):
            raise Unreadable("run-time data")
        return boolean(number is not None and isinf(number))

    return Meaning(shape=operand.shape, read=read)


def _without_nan(ops: Operands) -> Meaning:
    """0 for NaN, and large numbers for infinite ones: of a softmax's weights only the former can be."""
    operand = ops.tensor(0)

    def read(indices: Index) -> Expr:
        element = operand.at(*indices)
        if not _is_weight(ops, element):
            raise Unreadable("NaN replaced in run-time data")
        return element

    return Meaning(shape=operand.shape, read=read)


def _is_weight(ops: Operands, element: Expr) -> bool:
    producer = ops.graph.producers.get(element.name) if element.op is Op.APPLY else None
    return producer is not None and producer.op == "softmax"


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
    "log": elementwise(numeric(_logarithm)),
    "floor": elementwise(to_whole(floor)),
    "ceil": elementwise(to_whole(ceil)),
    "trunc": elementwise(to_whole(trunc)),
    "round": elementwise(to_whole(round)),
    "sign": elementwise(_sign),
    "relu": elementwise(_rectified),
    "bit_and": elementwise(bitwise(lambda a, b: a & b)),
    "bit_or": elementwise(bitwise(lambda a, b: a | b)),
    "bit_xor": elementwise(bitwise(lambda a, b: a ^ b)),
    "tanh": elementwise(real_tanh),
    "lt": elementwise(compared(lt)),
    "le": elementwise(compared(le)),
    "gt": elementwise(compared(lambda a, b: lt(b, a))),
    "ge": elementwise(compared(lambda a, b: le(b, a))),
    "eq": elementwise(compared(eq)),
    "ne": elementwise(compared(lambda a, b: not_(eq(a, b)))),
    "and": elementwise(_both),
    "or": elementwise(_either),
    "xor": elementwise(_exclusive),
    "not": elementwise(lambda a: not_(_truth(a))),
    "where": elementwise(_where),
    "identity": elementwise(lambda a: a),
    "cast": _cast,
    "isnan": _is_nan,
    "isinf": _is_infinite,
    "nan_to_num": _without_nan,
}
