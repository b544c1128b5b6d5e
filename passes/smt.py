"""Formulas for the SMT solver: is there a cell where two conditions differ, for any sizes?"""

from dataclasses import dataclass, field

import z3

from swacompile.attention import Axes, Witness
from swacompile.index_expr import (
    LARGEST_HALF,
    MAX_SIZE,
    TRUE,
    Expr,
    Op,
    Sort,
    divides_safely,
    not_,
    sum_parts,
    walk,
    wrap_parts,
    wrapped_range,
)

WORK = 50_000_000
"""What one question may cost, in z3's units: 5 to 15 seconds of a processor. A verdict so does not depend on how busy the machine is."""
LONGEST_MS = 300_000  # whatever it costs


class Undecided(Exception):
    """The solver found neither a proof nor a witness in its time."""


class Untranslatable(Exception):
    """The formula uses something that the solver is not asked about."""


@dataclass(slots=True, kw_only=True)
class Translation:
    """One question's formulas; `bounds` collects what the symbols' extents say.

    Names in the solver tell sizes, indices and data apart, whatever the model calls them. Where `largest` is given, no size exceeds it.
    """

    largest: int | None = None
    constants: dict[Expr, z3.ExprRef] = field(default_factory=dict)
    bounds: list[z3.BoolRef] = field(default_factory=list)
    done: dict[Expr, z3.ExprRef] = field(default_factory=dict)

    def __call__(self, expr: Expr) -> z3.ExprRef:
        if (known := self.done.get(expr)) is None:
            known = self.done[expr] = self._translate(expr)
        return known

    def _translate(self, expr: Expr) -> z3.ExprRef:
        if expr.op is Op.SYMBOL:
            return self._symbol(expr)
        args = [self(arg) for arg in expr.args]
        match expr.op:
            case Op.CONST if expr.sort is Sort.INT:
                return z3.IntVal(expr.value)
            case Op.CONST if expr.sort is Sort.BOOL:
                return z3.BoolVal(expr.value)
            case Op.SUM:
                constant, coefficients = sum_parts(expr)
                return z3.Sum([z3.IntVal(constant), *(c * arg for c, arg in zip(coefficients, args, strict=True))])
            case Op.PRODUCT:
                return z3.Product(args)
            case Op.FLOORDIV | Op.MOD if divides_safely(expr.args[1]):
                self.bounds.append(args[1] >= 1)
                return args[0] / args[1] if expr.op is Op.FLOORDIV else args[0] % args[1]
            case Op.FLOORDIV | Op.MOD:
                raise Untranslatable(f"a division by {expr.args[1]}, which may be 0 or negative")
            case Op.WRAP:
                bits, signed = wrap_parts(expr)
                lowest, highest = wrapped_range(bits, signed)
                wrapped = (args[0] - lowest) % (1 << bits) + lowest
                return z3.If(z3.And(lowest <= args[0], args[0] <= highest), args[0], wrapped)
            case Op.ROUND:
                return _rounded(args[0], expr.value, 4 * (self.largest or MAX_SIZE))  # type: ignore[arg-type]
            case Op.LE0:
                return args[0] <= 0
            case Op.EQ0:
                return args[0] == 0
            case Op.AND:
                return z3.And(args)
            case Op.OR:
                return z3.Or(args)
            case Op.NOT:
                return z3.Not(args[0])
            case Op.ITE:
                return z3.If(*args)
            case Op.APPLY if expr.sort is not Sort.REAL:
                result = z3.BoolSort() if expr.sort is Sort.BOOL else z3.IntSort()
                name = f"data {expr.name}"
                return z3.Function(name, *[z3.IntSort()] * len(args), result)(*args) if args else z3.Const(name, result)
        raise Untranslatable(f"{expr.op} of real numbers in the mask's condition: {expr}")

    def _symbol(self, symbol: Expr) -> z3.ExprRef:
        constant = self.constants[symbol] = z3.Int(
            f"index {symbol.digest.hex()}" if symbol.args else f"size {symbol.name}"
        )
        self.bounds.append(constant >= 0)
        if symbol.args:
            self.bounds.append(constant < self(symbol.args[0]))
        if self.largest is not None:
            self.bounds.append((self(symbol.args[0]) if symbol.args else constant) <= self.largest)
        return constant


def _rounded(value: z3.ArithRef, exact: int, bound: int) -> z3.ArithRef:
    """index_expr.round_number for the solver; rounding of numbers beyond `bound` is left open."""
    size = z3.If(value < 0, -value, value)
    half = exact == 1 << 11
    result = z3.IntVal(1 << 200) if half else z3.Function(f"rounded beyond {exact}", z3.IntSort(), z3.IntSort())(size)
    largest = LARGEST_HALF + 1 if half else max(bound, exact)
    for bits in reversed(range(exact.bit_length(), largest.bit_length() + 1)):
        step = 1 << (bits - exact.bit_length() + 1)
        whole, rest = size / step, size % step
        up = z3.Or(2 * rest > step, z3.And(2 * rest == step, whole % 2 == 1))
        result = z3.If(size < min(1 << bits, largest), z3.If(up, whole + 1, whole) * step, result)
    return z3.If(size <= exact, value, z3.If(value < 0, -result, result))


def always_equal(a: Expr, b: Expr, axes: Axes, *, given: Expr = TRUE, largest: int | None = None) -> Witness | None:
    """None if the conditions agree in every cell for all sizes, else a cell where they differ.

    `given` is a condition on the sizes beside that of the axes, `largest` a bound of all of them. Raises Undecided, Untranslatable.
    """
    if largest is None and uses_machine_numbers(a):
        largest = MAX_SIZE
    translate = Translation(largest=largest)
    shown, claimed = translate(a), translate(b)
    for symbol in (axes.batch, axes.head, axes.query, axes.key):
        translate(symbol)
    solver = _limited(z3.SolverFor("ALL"))
    solver.add(translate(given), translate(axes.given), *translate.bounds, shown != claimed)
    verdict = solver.check()
    if verdict == z3.unsat:
        return None
    if verdict == z3.unknown:
        raise Undecided(solver.reason_unknown())
    return _witness(solver.model(), translate, shown, axes)


def _limited(solver: z3.Solver) -> z3.Solver:
    solver.set("rlimit", WORK)
    solver.set("timeout", LONGEST_MS)
    return solver


def _witness(model: z3.ModelRef, translate: Translation, shown: z3.ExprRef, axes: Axes) -> Witness:
    def value(expr: Expr) -> int:
        return int(model.eval(translate(expr), model_completion=True).as_long())

    sizes = {symbol for symbol in translate.constants if not symbol.args}
    return Witness(
        batch=value(axes.batch), head=value(axes.head), query=value(axes.query), key=value(axes.key),
        sizes=tuple(sorted((symbol.name, value(symbol)) for symbol in sizes)),
        mask_shows=z3.is_true(model.eval(shown, model_completion=True)),
    )  # fmt: skip


def is_valid(condition: Expr) -> bool:
    """Whether a condition holds for all values of its symbols. False also where the solver cannot tell."""
    translate = Translation(largest=MAX_SIZE)
    try:
        claim = translate(condition)
    except Untranslatable:
        return False
    solver = _limited(z3.Solver())
    solver.add(*translate.bounds, z3.Not(claim))
    return bool(solver.check() == z3.unsat)


def is_possible(condition: Expr) -> bool:
    """Whether a condition on sizes holds for some of them. True also where the solver cannot tell."""
    return (condition.is_const and bool(condition.value)) or not is_valid(not_(condition))


def uses_machine_numbers(expr: Expr) -> bool:
    """Whether arithmetic in the formula may overflow or lose digits at some sizes."""
    return any(node.op in (Op.WRAP, Op.ROUND) for node in walk(expr))
