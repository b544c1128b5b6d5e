"""Formulas over integer indices: the language in which masks are read and proven.

An Expr is an immutable expression of one of three sorts. Integers are kept as polynomials (a constant plus coefficients times
products of atoms), comparisons as `polynomial <= 0` and `polynomial == 0`, so that the many spellings of one mask meet in one form.
Symbols carry bounds: an index i of an axis of extent n has 0 <= i < n, a size has n >= 0. The constructors fold what these
bounds decide; they never guess.

Machine numbers are not the integers: WRAP is an integer as a type of so many bits keeps it, ROUND an integer as a floating-point type
keeps it. Both vanish where no value that the indices can take is out of range, for sizes up to MAX_SIZE.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from math import floor, gcd, isfinite, isnan, tanh


class Sort(StrEnum):
    INT = "int"
    BOOL = "bool"
    REAL = "real"


class Op(StrEnum):
    CONST = "const"
    SYMBOL = "symbol"  # value: name; args: (extent,) for an index, () for a size
    APPLY = "apply"  # value: function name; run-time data, or a constant array
    SUM = "sum"  # value: (constant, coefficients); args: monomials
    PRODUCT = "product"
    FLOORDIV = "floordiv"
    MOD = "mod"
    WRAP = "wrap"  # value: (bits, signed)
    ROUND = "round"  # value: the largest magnitude up to which every integer is kept
    LE0 = "le0"  # args[0] <= 0
    EQ0 = "eq0"
    AND = "and"
    OR = "or"
    NOT = "not"
    ITE = "ite"
    TO_REAL = "to_real"
    REAL_ADD = "real_add"
    REAL_MUL = "real_mul"
    REAL_DIV = "real_div"
    TANH = "tanh"


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """One node of a formula. Equal formulas have equal digests, so equality and hashing cost nothing."""

    op: Op
    sort: Sort
    args: tuple["Expr", ...] = ()
    value: object = None
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        state = hashlib.blake2b(f"{self.op}|{self.sort}|{self.value!r}".encode(), digest_size=16)
        for arg in self.args:
            state.update(arg.digest)
        object.__setattr__(self, "digest", state.digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return show(self)

    @property
    def is_const(self) -> bool:
        return self.op is Op.CONST

    @property
    def name(self) -> str:
        """Name of a SYMBOL or of an APPLY's function."""
        return str(self.value)


Index = tuple[Expr, ...]

MAX_SIZE = 2**31 - 1  # No tensor has a longer axis. Overflow is judged for sizes up to here.
MAX_DATA = 2**60  # Integers in run-time data (positions, lengths, labels) are taken to be smaller than this.


# ---------------------------------------------------------------------------------------------------------- leaves


def integer(value: int) -> Expr:
    return Expr(Op.CONST, Sort.INT, (), int(value))


def boolean(value: bool) -> Expr:
    return Expr(Op.CONST, Sort.BOOL, (), bool(value))


def real(value: float) -> Expr:
    return Expr(Op.CONST, Sort.REAL, (), float(value))


ZERO, ONE = integer(0), integer(1)
TRUE, FALSE = boolean(True), boolean(False)


def size(name: str) -> Expr:
    """A size known only at run time, at least 0: a cache may be empty."""
    return Expr(Op.SYMBOL, Sort.INT, (), name)


class _Nonempty(str):
    """Name of a size that is known to be at least 1."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{super().__repr__()} >= 1"


def nonempty(extent: Expr) -> Expr:
    """The same size, known to be at least 1: there is an element along its axis. Anything but a plain size is given back."""
    plain = extent.op is Op.SYMBOL and not extent.args
    return Expr(Op.SYMBOL, Sort.INT, (), _Nonempty(extent.name)) if plain else extent


def index(name: str, extent: Expr) -> Expr:
    """An index with 0 <= name < extent."""
    return Expr(Op.SYMBOL, Sort.INT, (extent,), name)


def apply(function: str, args: Index, sort: Sort) -> Expr:
    """The element of run-time data (or of a constant array) at these indices."""
    return Expr(Op.APPLY, sort, args, function)


def const_int(expr: Expr) -> int | None:
    """The value of a constant integer, else None."""
    return expr.value if expr.is_const and expr.sort is Sort.INT and isinstance(expr.value, int) else None


def const_real(expr: Expr) -> float | None:
    """The value of a constant number of any sort, else None."""
    if expr.op is Op.TO_REAL:
        return const_real(expr.args[0])
    return float(expr.value) if expr.is_const and isinstance(expr.value, int | float) else None


def sum_parts(expr: Expr) -> tuple[int, tuple[int, ...]]:
    """(constant, coefficients of the monomials) of a SUM."""
    assert expr.op is Op.SUM and isinstance(expr.value, tuple)
    constant, coefficients = expr.value
    return constant, coefficients


def wrap_parts(expr: Expr) -> tuple[int, bool]:
    """(bits, whether signed) of a WRAP."""
    assert expr.op is Op.WRAP and isinstance(expr.value, tuple)
    bits, signed = expr.value
    return bits, signed


# -------------------------------------------------------------------------------------------------------- integers

_Monomial = tuple[Expr, ...]
_Poly = dict[_Monomial, int]


def _poly(expr: Expr) -> _Poly:
    """Polynomial of an integer expression: monomial (a sorted tuple of atoms, () the constant) -> coefficient."""
    if expr.is_const:
        return {(): int(expr.value)} if expr.value else {}  # type: ignore[call-overload]
    if expr.op is Op.SUM:
        constant, coefficients = sum_parts(expr)
        poly: _Poly = {_atoms(arg): c for arg, c in zip(expr.args, coefficients, strict=True)}
        if constant:
            poly[()] = constant
        return poly
    return {_atoms(expr): 1}


def _atoms(expr: Expr) -> _Monomial:
    return expr.args if expr.op is Op.PRODUCT else (expr,)


def _from_poly(poly: _Poly) -> Expr:
    poly = _with_whole_numbers(poly)
    terms = sorted(
        ((m, c) for m, c in poly.items() if m and c), key=lambda term: tuple(atom.digest for atom in term[0])
    )
    constant = poly.get((), 0)
    if not terms:
        return integer(constant)
    monomials = tuple(m[0] if len(m) == 1 else Expr(Op.PRODUCT, Sort.INT, m) for m, _ in terms)
    if len(terms) == 1 and not constant and terms[0][1] == 1:
        return monomials[0]
    return Expr(Op.SUM, Sort.INT, monomials, (constant, tuple(c for _, c in terms)))


def _with_whole_numbers(poly: _Poly) -> _Poly:
    """The polynomial with `a` in place of `b * (a // b) + a % b`."""
    for monomial, coefficient in poly.items():
        if len(monomial) != 1 or monomial[0].op is not Op.MOD or not coefficient:
            continue
        number, divisor = monomial[0].args
        multiple = _poly(mul(divisor, Expr(Op.FLOORDIV, Sort.INT, (number, divisor))))
        if all(poly.get(part) == coefficient * c for part, c in multiple.items()):
            rest = {m: c for m, c in poly.items() if m != monomial and m not in multiple}
            for part, c in _poly(number).items():
                rest[part] = rest.get(part, 0) + coefficient * c
            return _with_whole_numbers(rest)
    return poly


def add(*terms: Expr) -> Expr:
    total: _Poly = {}
    for term in terms:
        for monomial, coefficient in _poly(term).items():
            total[monomial] = total.get(monomial, 0) + coefficient
    return _from_poly(total)


def neg(expr: Expr) -> Expr:
    return _from_poly({m: -c for m, c in _poly(expr).items()})


def sub(a: Expr, b: Expr) -> Expr:
    return add(a, neg(b))


def mul(a: Expr, b: Expr) -> Expr:
    product: _Poly = {}
    for ma, ca in _poly(a).items():
        for mb, cb in _poly(b).items():
            monomial = tuple(sorted(ma + mb, key=lambda atom: atom.digest))
            product[monomial] = product.get(monomial, 0) + ca * cb
    return _from_poly(product)


def product_of(factors: Iterable[Expr]) -> Expr:
    return reduce(mul, factors, ONE)


def exact_div(a: Expr, b: Expr) -> Expr | None:
    """a / b where b divides a as a polynomial with integer coefficients, else None."""
    divisor, rest = _poly(b), dict(_poly(a))
    if not divisor:
        return None
    variables = sorted(
        {atom for poly in (divisor, rest) for monomial in poly for atom in monomial}, key=lambda atom: atom.digest
    )

    def leading(poly: _Poly) -> _Monomial:  # in lexicographic order, which makes the division below end
        return max(poly, key=lambda monomial: tuple(monomial.count(variable) for variable in variables))

    head = leading(divisor)
    quotient: _Poly = {}
    while rest:
        top = leading(rest)
        factor = list(top)
        for atom in head:
            if atom not in factor:
                return None
            factor.remove(atom)
        if rest[top] % divisor[head]:
            return None
        part = {tuple(factor): rest[top] // divisor[head]}
        quotient |= part
        rest = {m: c for m, c in _poly(sub(_from_poly(rest), mul(_from_poly(part), b))).items() if c}
    return _from_poly(quotient)


def _split_multiples(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(quotient, rest) with a = quotient * b + rest, taking out the terms that b divides."""
    quotient, rest = ZERO, ZERO
    divisor = const_int(b)
    for monomial, coefficient in _poly(a).items():
        term = _from_poly({monomial: coefficient})
        if divisor is not None:
            whole = coefficient // divisor if not monomial or coefficient > 0 else -(-coefficient // divisor)
            quotient = add(quotient, _from_poly({monomial: whole}))
            rest = add(rest, _from_poly({monomial: coefficient - whole * divisor}))
        elif (part := exact_div(term, b)) is not None:
            quotient = add(quotient, part)
        else:
            rest = add(rest, term)
    return quotient, rest


def divides_safely(b: Expr) -> bool:
    """Whether b is positive wherever a model may divide by it.

    A product of sizes is: were one of them 0, the tensor would have no elements, or the division would have no result.
    """
    factors_of_sizes = all(
        c > 0 and all(atom.op is Op.SYMBOL and not atom.args for atom in m) for m, c in _poly(b).items()
    )
    return at_least(b, 1) or (factors_of_sizes and b != ZERO)


def floordiv(a: Expr, b: Expr) -> Expr:
    """Floor of a / b for b >= 1. A divisor that is not known to be positive stays symbolic."""
    if not divides_safely(b):
        return Expr(Op.FLOORDIV, Sort.INT, (a, b))
    quotient, rest = _split_multiples(a, b)
    if at_least(rest, 0) and at_least(sub(b, rest), 1):
        return quotient
    if (coarser := _in_steps(rest, b)) is not None:
        steps, divisor, _, _ = coarser
        return add(quotient, floordiv(steps, divisor))
    return add(quotient, Expr(Op.FLOORDIV, Sort.INT, (rest, b)))


def mod(a: Expr, b: Expr) -> Expr:
    """a - b * floor(a / b)."""
    if not divides_safely(b):
        return Expr(Op.MOD, Sort.INT, (a, b))
    _, rest = _split_multiples(a, b)
    if at_least(rest, 0) and at_least(sub(b, rest), 1):
        return rest
    if (coarser := _in_steps(rest, b)) is not None:
        steps, divisor, step, left = coarser
        return add(mul(integer(step), mod(steps, divisor)), left)
    return Expr(Op.MOD, Sort.INT, (rest, b))


def _in_steps(a: Expr, b: Expr) -> tuple[Expr, Expr, int, Expr] | None:
    """(a', b', step, rest) with a = step * a' + rest, b = step * b' and 0 <= rest < step > 1: a // b is a' // b' then."""
    divisor = const_int(b)
    if divisor is None:
        return None
    poly = _poly(a)
    for step in sorted({gcd(coefficient, divisor) for coefficient in poly.values()} - {1, divisor}, reverse=True):
        rest = _from_poly({m: c for m, c in poly.items() if c % step})
        if at_least(rest, 0) and at_least(sub(integer(step), rest), 1):
            steps = _from_poly({m: c // step for m, c in poly.items() if not c % step})
            return steps, integer(divisor // step), step, rest
    return None


def truncdiv(a: Expr, b: Expr) -> Expr:
    """Division that rounds toward zero, as ONNX Div and C do."""
    if at_least(a, 0):
        return floordiv(a, b)
    return ite(le(ZERO, a), floordiv(a, b), neg(floordiv(neg(a), b)))


def minimum(a: Expr, b: Expr) -> Expr:
    """Where the operands are equal it is the constant one, so that fewer cells depend on the other."""
    return ite(le(b, a), b, a) if b.is_const else ite(le(a, b), a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return ite(le(b, a), a, b) if a.is_const else ite(le(a, b), b, a)


def absolute(a: Expr) -> Expr:
    return ite(le(ZERO, a), a, neg(a))


# ---------------------------------------------------------------------------------------------------------- bounds


def at_least(expr: Expr, bound: int) -> bool:
    """Whether expr >= bound follows from the symbols' bounds alone. False means unknown."""
    lowest = _lowest(expr)
    return lowest is not None and lowest >= bound


def _lowest(expr: Expr, depth: int = 8) -> int | None:
    """A constant lower bound: replaces an index by the end of its range that makes the expression smallest, term by term."""
    poly = _poly(expr)
    for atom in {atom for monomial in poly for atom in monomial if atom.op is Op.SYMBOL and atom.args}:
        terms = [(m, c) for m, c in poly.items() if atom in m]
        if depth and all(len(m) == 1 for m, _ in terms) and terms[0][1] < 0:
            largest = sub(atom.args[0], ONE)
            return _lowest(substitute_atom(expr, atom, largest), depth - 1)
    total = 0
    for monomial, coefficient in poly.items():
        if not monomial:
            total += coefficient
            continue
        lows = [_atom_lowest(atom, depth) for atom in monomial]
        if coefficient < 0 or any(low is None or low < 0 for low in lows):
            single = _negative_term(monomial, coefficient, depth)
            if single is None:
                return None
            total += single
            continue
        total += coefficient * reduce(lambda x, y: x * y, (low for low in lows if low is not None), 1)
    return total


def _negative_term(monomial: _Monomial, coefficient: int, depth: int) -> int | None:
    """Lower bound of coefficient * atom for one atom whose own range is constant on the side that matters."""
    if len(monomial) != 1:
        return None
    atom = monomial[0]
    if coefficient > 0:
        low = _atom_lowest(atom, depth)
        return None if low is None else coefficient * low
    high = _atom_highest(atom)
    return None if high is None else coefficient * high


def _atom_lowest(atom: Expr, depth: int) -> int | None:
    if atom.op is Op.SYMBOL:
        return 1 if isinstance(atom.value, _Nonempty) else 0
    if atom.op is Op.MOD and divides_safely(atom.args[1]):
        return 0
    if atom.op is Op.FLOORDIV and depth and divides_safely(atom.args[1]):
        low = _lowest(atom.args[0], depth - 1)
        return 0 if low is not None and low >= 0 else None
    if atom.op is Op.WRAP:
        return wrapped_range(*atom.value)[0]  # type: ignore[misc]
    if atom.op is Op.ITE and depth:
        lows = [_lowest(branch, depth - 1) for branch in atom.args[1:]]
        return None if any(low is None for low in lows) else min(low for low in lows if low is not None)
    return None


def _atom_highest(atom: Expr) -> int | None:
    if atom.op is Op.MOD:
        modulus = const_int(atom.args[1])
        return None if modulus is None else modulus - 1
    if atom.op is Op.SYMBOL and atom.args:
        extent = const_int(atom.args[0])
        return None if extent is None else extent - 1
    if atom.op is Op.FLOORDIV and (divisor := const_int(atom.args[1])) is not None and divisor >= 1:
        lowest = _lowest(neg(atom.args[0]))
        return None if lowest is None else -lowest // divisor
    return None


Range = tuple[int, int]


def value_range(expr: Expr) -> Range:
    """Bounds of an integer expression for sizes up to MAX_SIZE and data below MAX_DATA; wide rather than wrong."""
    low = high = 0
    for monomial, coefficient in _poly(expr).items():
        ends = [coefficient, coefficient]
        for atom in monomial:
            ends = [x * y for x in (min(ends), max(ends)) for y in _atom_range(atom)]
        low, high = low + min(ends), high + max(ends)
    return low, high


def _atom_range(atom: Expr) -> Range:
    match atom.op:
        case Op.SYMBOL if not atom.args:
            return 0, MAX_SIZE
        case Op.SYMBOL:
            return 0, max(0, min(value_range(atom.args[0])[1], MAX_SIZE) - 1)
        case Op.FLOORDIV if divides_safely(atom.args[1]):
            low, high = value_range(atom.args[0])
            return min(low, 0), max(high, 0)
        case Op.MOD if divides_safely(atom.args[1]):
            return 0, max(0, value_range(atom.args[1])[1] - 1)
        case Op.ITE:
            ranges = [value_range(branch) for branch in atom.args[1:]]
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        case Op.WRAP:
            return wrapped_range(*atom.value)  # type: ignore[misc]
        case Op.ROUND:  # rounding is monotonic, and moves a number by less than its own size
            low, high = value_range(atom.args[0])
            return 2 * min(low, 0), 2 * max(high, 0)
    return -MAX_DATA, MAX_DATA


def wrapped_range(bits: int, signed: bool) -> Range:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def wrap(expr: Expr, bits: int, signed: bool) -> Expr:
    """An integer as a type of this many bits keeps it."""
    if expr.op is Op.ITE:
        return ite(expr.args[0], wrap(expr.args[1], bits, signed), wrap(expr.args[2], bits, signed))
    lowest, highest = wrapped_range(bits, signed)
    low, high = value_range(expr)
    if lowest <= low and high <= highest:
        return expr
    if (value := const_int(expr)) is not None:
        return integer(wrap_number(value, bits, signed))
    return Expr(Op.WRAP, Sort.INT, (expr,), (bits, signed))


def wrap_number(value: int, bits: int, signed: bool) -> int:
    lowest, _ = wrapped_range(bits, signed)
    return (value - lowest) % (1 << bits) + lowest


def rounded(expr: Expr, exact: int) -> Expr:
    """An integer as a floating-point type keeps it that is exact up to this magnitude."""
    if expr.op is Op.ITE:
        return ite(expr.args[0], rounded(expr.args[1], exact), rounded(expr.args[2], exact))
    if (value := const_int(expr)) is not None:
        return integer(round_number(value, exact))
    low, high = value_range(expr)
    return expr if -exact <= low and high <= exact else Expr(Op.ROUND, Sort.INT, (expr,), exact)


LARGEST_HALF = 65519  # Larger numbers are infinite in float16.


def round_number(value: int, exact: int) -> int:
    """A number as a type keeps it that is exact up to this power of two: to the nearest multiple of a step, ties to the even one."""
    if exact == 1 << 11 and abs(value) > LARGEST_HALF:
        return (1 << 200) * (1 if value > 0 else -1)
    step = 1 << max(0, abs(value).bit_length() - exact.bit_length() + 1)
    whole, rest = divmod(value, step)
    return (whole + (2 * rest > step or (2 * rest == step and whole % 2 == 1))) * step


def substitute_atom(expr: Expr, atom: Expr, replacement: Expr) -> Expr:
    """expr with one atom of its polynomial replaced (not inside other atoms)."""
    total = ZERO
    for monomial, coefficient in _poly(expr).items():
        factors = (replacement if factor == atom else factor for factor in monomial)
        total = add(total, mul(integer(coefficient), product_of(factors)))
    return total


# ------------------------------------------------------------------------------------------------ comparisons, logic


def le(a: Expr, b: Expr) -> Expr:
    """a <= b, for integers or for reals that are integers in disguise."""
    return _compared(a, b, le, lambda x, y: x <= y, lambda difference: _le0(difference))


def lt(a: Expr, b: Expr) -> Expr:
    return _compared(a, b, lt, lambda x, y: x < y, lambda difference: _le0(add(difference, ONE)))


def eq(a: Expr, b: Expr) -> Expr:
    if a.sort is Sort.BOOL and b.sort is Sort.BOOL:
        return or_(and_(a, b), and_(not_(a), not_(b)))
    return _compared(a, b, eq, lambda x, y: x == y, lambda difference: _eq0(difference))


_Comparison = Callable[[Expr, Expr], Expr]


def _compared(
    a: Expr, b: Expr, compare: _Comparison, numbers: Callable[[float, float], bool], difference: Callable[[Expr], Expr]
) -> Expr:
    a, b = (to_integer(side) if side.sort is Sort.BOOL else side for side in (a, b))
    if a.is_const and b.is_const:
        return boolean(numbers(a.value, b.value))  # type: ignore[arg-type]
    if (pushed := _pushed(a, b, compare)) is not None:
        return pushed
    if Sort.REAL in (a.sort, b.sort) and (decided := _beside_fraction(a, b, compare)) is not None:
        return decided
    return difference(sub(to_integer(a), to_integer(b)))


def _beside_fraction(a: Expr, b: Expr, compare: _Comparison) -> Expr | None:
    """Comparison of an integer with a number that is none: with its floor, or decided where it is infinite or NaN."""
    for this, number, flip in ((a, b, False), (b, a, True)):
        if not number.is_const or number.sort is not Sort.REAL:
            continue
        value = float(number.value)  # type: ignore[arg-type]
        if value.is_integer():
            continue
        whole = to_integer(this)
        if isnan(value) or compare is eq:
            return FALSE
        if not isfinite(value):
            return boolean((value > 0) is not flip)
        return lt(integer(floor(value)), whole) if flip else le(whole, integer(floor(value)))
    return None


def to_integer(expr: Expr) -> Expr:
    """An integer expression of the same value. Raises NotInteger where there is none in this language."""
    if expr.sort is Sort.INT:
        return expr
    if expr.sort is Sort.BOOL:
        return ite(expr, ONE, ZERO)
    if expr.op is Op.TO_REAL:
        return expr.args[0]
    if expr.is_const and float(expr.value).is_integer():  # type: ignore[arg-type]
        return integer(int(expr.value))  # type: ignore[call-overload]
    if expr.op is Op.ITE:
        return ite(expr.args[0], to_integer(expr.args[1]), to_integer(expr.args[2]))
    raise NotInteger(expr)


class NotInteger(Exception):
    """A real-valued expression stands where only integers can be reasoned about."""

    def __init__(self, expr: Expr) -> None:
        super().__init__(f"a real-valued expression in a comparison: {show(expr)}")
        self.expr = expr


def _pushed(a: Expr, b: Expr, compare: _Comparison) -> Expr | None:
    """Comparison of a two-way constant with a constant, decided on each branch."""
    for this, that, flip in ((a, b, False), (b, a, True)):
        if this.op is Op.ITE and that.is_const and _is_tree_of_constants(this):
            branches = (compare(that, branch) if flip else compare(branch, that) for branch in this.args[1:])
            return ite(this.args[0], *branches)
    return None


def _is_tree_of_constants(expr: Expr) -> bool:
    return expr.is_const or (expr.op is Op.ITE and all(_is_tree_of_constants(branch) for branch in expr.args[1:]))


def _le0(poly: Expr) -> Expr:
    if (value := const_int(poly)) is not None:
        return boolean(value <= 0)
    if at_least(neg(poly), 0):
        return TRUE
    if at_least(poly, 1):
        return FALSE
    return Expr(Op.LE0, Sort.BOOL, (poly,))


def _eq0(poly: Expr) -> Expr:
    if (value := const_int(poly)) is not None:
        return boolean(value == 0)
    if at_least(poly, 1) or at_least(neg(poly), 1):
        return FALSE
    flipped = neg(poly)
    return Expr(Op.EQ0, Sort.BOOL, (min(poly, flipped, key=lambda e: e.digest),))


def not_(a: Expr) -> Expr:
    if a.is_const:
        return boolean(not a.value)
    if a.op is Op.NOT:
        return a.args[0]
    if a.op is Op.LE0:
        return _le0(sub(ONE, a.args[0]))
    return Expr(Op.NOT, Sort.BOOL, (a,))


def and_(*terms: Expr) -> Expr:
    return _junction(Op.AND, terms, neutral=TRUE, absorbing=FALSE)


def or_(*terms: Expr) -> Expr:
    return _junction(Op.OR, terms, neutral=FALSE, absorbing=TRUE)


def _junction(op: Op, terms: Iterable[Expr], *, neutral: Expr, absorbing: Expr) -> Expr:
    flat = {part for term in terms for part in (term.args if term.op is op else (term,)) if part != neutral}
    if absorbing in flat or any(not_(part) in flat for part in flat if part.op in (Op.NOT, Op.LE0)):
        return absorbing
    if len(flat) <= 1:
        return flat.pop() if flat else neutral
    return Expr(op, Sort.BOOL, tuple(sorted(flat, key=lambda part: part.digest)))


def ite(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    if condition.is_const:
        return then if condition.value else otherwise
    if then == otherwise:
        return then
    if then.sort is Sort.BOOL:
        return or_(and_(condition, then), and_(not_(condition), otherwise))
    return Expr(Op.ITE, then.sort, (condition, then, otherwise))


# ----------------------------------------------------------------------------------------------------------- reals


def to_real(expr: Expr) -> Expr:
    if expr.sort is Sort.REAL:
        return expr
    if expr.sort is Sort.BOOL:
        return ite(expr, real(1.0), real(0.0))
    if expr.op is Op.ITE:
        return ite(expr.args[0], to_real(expr.args[1]), to_real(expr.args[2]))
    return real(float(expr.value)) if expr.is_const else Expr(Op.TO_REAL, Sort.REAL, (expr,))  # type: ignore[arg-type]


def real_add(a: Expr, b: Expr) -> Expr:
    a, b = to_real(a), to_real(b)
    if a.is_const and b.is_const:
        return real(float(a.value) + float(b.value))  # type: ignore[arg-type]
    if a == real(0.0):
        return b
    if b == real(0.0):
        return a
    if a.op is Op.TO_REAL and (b.op is Op.TO_REAL or (b.is_const and float(b.value).is_integer())):  # type: ignore[arg-type]
        return to_real(add(a.args[0], to_integer(b)))
    if b.op is Op.TO_REAL and a.is_const and float(a.value).is_integer():  # type: ignore[arg-type]
        return real_add(b, a)
    return Expr(Op.REAL_ADD, Sort.REAL, (a, b))


def real_mul(a: Expr, b: Expr) -> Expr:
    a, b = to_real(a), to_real(b)
    if a.is_const and b.is_const:
        return real(float(a.value) * float(b.value))  # type: ignore[arg-type]
    if a.is_const:
        a, b = b, a
    if b == real(1.0):
        return a
    if b.is_const and a.op is Op.ITE and _is_tree_of_constants(a):
        return ite(a.args[0], real_mul(a.args[1], b), real_mul(a.args[2], b))
    number = const_real(b)
    whole = b.is_const and number is not None and abs(number) <= MAX_SIZE and number.is_integer()
    if a.op is Op.TO_REAL and (b.op is Op.TO_REAL or whole):
        return to_real(mul(a.args[0], to_integer(b)))
    return Expr(Op.REAL_MUL, Sort.REAL, (a, b))


def real_div(a: Expr, b: Expr) -> Expr:
    a, b = to_real(a), to_real(b)
    divisor = const_real(b)
    if divisor and a.is_const:
        return real(float(a.value) / divisor)  # type: ignore[arg-type]
    return Expr(Op.REAL_DIV, Sort.REAL, (a, b))


def real_tanh(a: Expr) -> Expr:
    return real(tanh(float(a.value))) if a.is_const else Expr(Op.TANH, Sort.REAL, (a,))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- whole formulas


def walk(expr: Expr) -> Iterator[Expr]:
    """Every distinct node, parents before their first-reached children."""
    seen: set[bytes] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if node.digest in seen:
            continue
        seen.add(node.digest)
        yield node
        stack.extend(node.args)


def rebuild(expr: Expr, args: Index) -> Expr:
    """The same operation on other arguments, folded again."""
    builders: dict[Op, Callable[..., Expr]] = {
        Op.FLOORDIV: floordiv,
        Op.MOD: mod,
        Op.WRAP: lambda a: wrap(a, *expr.value),  # type: ignore[misc]
        Op.ROUND: lambda a: rounded(a, expr.value),  # type: ignore[arg-type]
        Op.AND: and_,
        Op.OR: or_,
        Op.NOT: not_,
        Op.ITE: ite,
        Op.LE0: lambda a: _pushed(a, ZERO, le) or _le0(a),
        Op.EQ0: lambda a: _pushed(a, ZERO, eq) or _eq0(a),
        Op.TO_REAL: to_real,
        Op.REAL_ADD: real_add,
        Op.REAL_MUL: real_mul,
        Op.REAL_DIV: real_div,
        Op.TANH: real_tanh,
    }
    if expr.op is Op.SUM:
        constant, coefficients = sum_parts(expr)
        return add(integer(constant), *(mul(integer(c), a) for c, a in zip(coefficients, args, strict=True)))
    if expr.op is Op.PRODUCT:
        return product_of(args)
    if expr.op in builders:
        return builders[expr.op](*args)
    return Expr(expr.op, expr.sort, args, expr.value)


def transform(expr: Expr, replace: Callable[[Expr], Expr | None]) -> Expr:
    """Bottom-up copy; `replace` may give another node for one whose children are already replaced."""
    done: dict[bytes, Expr] = {}

    def visit(node: Expr) -> Expr:
        if (known := done.get(node.digest)) is not None:
            return known
        early = replace(node)
        if early is None:
            args = node.args if node.op is Op.SYMBOL else tuple(visit(arg) for arg in node.args)
            changed = node if args == node.args else rebuild(node, args)
            early = changed if changed is node else (replace(changed) or changed)
        done[node.digest] = early
        return early

    return visit(expr)


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """expr with these nodes (symbols, usually) replaced."""
    return transform(expr, values.get)


def ideal(expr: Expr) -> Expr:
    """The formula with integers in place of machine numbers."""
    return transform(expr, lambda node: ideal(node.args[0]) if node.op in (Op.WRAP, Op.ROUND) else None)


def _show_sum(poly: _Poly) -> str:
    terms = [
        f"{'' if c == 1 else '-' if c == -1 else f'{c}*'}{'*'.join(map(show, monomial))}"
        for monomial, c in poly.items()
        if monomial
    ]
    constant = [str(poly.get((), 0))] if poly.get((), 0) or not terms else []
    return " + ".join([*terms, *constant]).replace("+ -", "- ")


def show(expr: Expr) -> str:
    """Short text for messages."""
    args = [show(arg) for arg in expr.args] if expr.op is not Op.SYMBOL else []
    match expr.op:
        case Op.CONST:
            return str(expr.value).lower() if expr.sort is Sort.BOOL else str(expr.value)
        case Op.SYMBOL:
            return expr.name
        case Op.APPLY:
            return f"{expr.name}[{', '.join(args)}]"
        case Op.SUM:
            return _show_sum(_poly(expr))
        case Op.LE0 | Op.EQ0:
            poly = _poly(expr.args[0])
            left = {monomial: c for monomial, c in poly.items() if monomial and c > 0}
            right = {monomial: -c for monomial, c in poly.items() if not monomial or c < 0}
            return f"{_show_sum(left)} {'<=' if expr.op is Op.LE0 else '=='} {_show_sum(right)}"
        case Op.ITE:
            return f"({args[1]} if {args[0]} else {args[2]})"
        case Op.AND | Op.OR:
            return f"({f' {expr.op} '.join(args)})"
        case Op.WRAP:
            return f"wrap{expr.value[0]}({args[0]})"  # type: ignore[index]
        case Op.NOT | Op.TANH | Op.TO_REAL | Op.ROUND:
            return f"{expr.op}({args[0]})"
        case _:
            symbol = {
                Op.PRODUCT: "*",
                Op.FLOORDIV: "//",
                Op.MOD: "%",
                Op.REAL_ADD: "+",
                Op.REAL_MUL: "*",
                Op.REAL_DIV: "/",
            }
            return f"({symbol[expr.op].join(args)})"
