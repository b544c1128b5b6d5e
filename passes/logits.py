"""The argument of a softmax as cases: under which condition it is a scaled score, a hidden one, or something else."""

from dataclasses import dataclass, replace
from math import inf, isnan

from swacompile.graph import EXP_UNDERFLOW, LARGEST_SCORE, LOWEST
from swacompile.index_expr import (
    FALSE,
    TRUE,
    Expr,
    Op,
    and_,
    const_real,
    ite,
    not_,
    real,
    real_mul,
    substitute,
    walk,
)

MAX_CASES = 64
HUGE = 1e30  # A larger number is there to hide scores, not to shift them.


class UnreadableLogits(Exception):
    """The argument of a softmax has a form that is not understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logit:
    """outer * tanh(inner * score) + constant + terms, or inner * score + ... where `outer` is None; no score where `inner` is None."""

    inner: float | None = None
    outer: float | None = None
    constant: float = 0.0
    terms: tuple[Expr, ...] = ()

    @property
    def softcap(self) -> float | None:
        return self.outer

    @property
    def scale(self) -> float:
        """Factor of the score before softcap: softcap * tanh(scale * score / softcap)."""
        assert self.inner is not None
        return self.inner * (1.0 if self.outer is None else self.outer)

    def hides(self, scores_dtype: str, weights_dtype: str) -> bool:
        """Whether the weight is exactly zero beside a visible score.

        The constant is -inf, the lowest number of the scores' data type (sums of such included) or one that no score comes near; or it is
        further below the largest score than the softmax's exp can resolve, where a softcap bounds the scores.
        """
        largest = LARGEST_SCORE.get(scores_dtype)
        if self.constant <= (0.99 * LOWEST.get(scores_dtype, -inf) if largest is None else -3 * largest):
            return True
        if self.outer is None or self.terms:
            return False
        return self.constant < EXP_UNDERFLOW.get(weights_dtype, -inf) - 2 * abs(self.outer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    condition: Expr
    logit: Logit


def cases(expr: Expr, score: str) -> tuple[Case, ...]:
    """The cases of a softmax argument; `score` is the value of the query-key product.

    Raises UnreadableLogits where the expression is not built from scores, constants, conditions, sums, constant factors and tanh.
    """
    found = tuple(case for case in _cases(expr, score) if case.condition != FALSE)
    if len(found) > MAX_CASES:
        raise UnreadableLogits(f"more than {MAX_CASES} cases")
    return found


def _cases(expr: Expr, score: str) -> list[Case]:
    if (number := const_real(expr)) is not None:
        return [Case(condition=TRUE, logit=Logit(constant=number))]
    match expr.op:
        case Op.APPLY if expr.name == score:
            return [Case(condition=TRUE, logit=Logit(inner=1.0))]
        case Op.ITE:
            condition, then, otherwise = expr.args
            return _guarded(condition, _cases(then, score)) + _guarded(not_(condition), _cases(otherwise, score))
        case Op.REAL_ADD:
            return _paired(expr, score, _sum)
        case Op.REAL_MUL if (choice := _choice(expr)) is not None:
            return _cases(choice, score)
        case Op.REAL_MUL:
            return _paired(expr, score, _product)
        case Op.REAL_DIV if divisor := const_real(expr.args[1]):
            return [replace(case, logit=_times(case.logit, 1 / divisor)) for case in _cases(expr.args[0], score)]
        case Op.TANH:
            return [replace(case, logit=_tanh(case.logit)) for case in _cases(expr.args[0], score)]
    if any(node.op is Op.APPLY and node.name == score for node in walk(expr)):
        raise UnreadableLogits(f"the scores go through {expr.op}")
    return [Case(condition=TRUE, logit=Logit(terms=(expr,)))]


def _choice(product: Expr) -> Expr | None:
    """A number that counts reasons to hide, times one that hides, as a choice between such products; None for other products."""
    for number, factor in (product.args, product.args[::-1]):
        if number.op is not Op.TO_REAL or not factor.is_const or abs(const_real(factor) or 0.0) < HUGE:
            continue
        choice = next((node for node in walk(number) if node.op is Op.ITE), None)
        if choice is not None:
            condition, *branches = choice.args
            return ite(condition, *(real_mul(substitute(number, {choice: branch}), factor) for branch in branches))
    return None


def _guarded(condition: Expr, inner: list[Case]) -> list[Case]:
    return [Case(condition=and_(condition, case.condition), logit=case.logit) for case in inner]


def _paired(expr: Expr, score: str, combine) -> list[Case]:  # type: ignore[no-untyped-def]
    left, right = (_cases(arg, score) for arg in expr.args)
    if len(left) * len(right) > MAX_CASES:
        raise UnreadableLogits(f"more than {MAX_CASES} cases")
    pairs = ((and_(a.condition, b.condition), a.logit, b.logit) for a in left for b in right)
    return [Case(condition=condition, logit=combine(a, b, expr)) for condition, a, b in pairs if condition != FALSE]


def _sum(a: Logit, b: Logit, expr: Expr) -> Logit:
    if a.inner is not None and b.inner is not None:
        raise UnreadableLogits("a sum of two score terms")
    scored = a if a.inner is not None else b
    constant = a.constant + b.constant
    if isnan(constant):
        raise UnreadableLogits("inf - inf in the mask")
    return Logit(inner=scored.inner, outer=scored.outer, constant=constant, terms=a.terms + b.terms)


def _product(a: Logit, b: Logit, expr: Expr) -> Logit:
    for factor, other in ((a, b), (b, a)):
        if factor.inner is None and not factor.terms:
            return _times(other, factor.constant)
    if a.inner is None and b.inner is None:
        return Logit(terms=(expr,))
    raise UnreadableLogits("the scores are multiplied by run-time data")


def _times(logit: Logit, factor: float) -> Logit:
    terms = tuple(real_mul(term, real(factor)) for term in logit.terms)
    constant = 0.0 if logit.constant == 0 else logit.constant * factor
    if isnan(constant):
        raise UnreadableLogits("0 * inf in the mask")
    if logit.inner is None:
        return Logit(constant=constant, terms=terms)
    if logit.outer is not None:
        return Logit(inner=logit.inner, outer=logit.outer * factor, constant=constant, terms=terms)
    return Logit(inner=logit.inner * factor, constant=constant, terms=terms)


def _tanh(logit: Logit) -> Logit:
    if logit.inner is None or logit.outer is not None or logit.constant or logit.terms:
        raise UnreadableLogits("a tanh of something other than a scaled score")
    return Logit(inner=logit.inner, outer=1.0)
