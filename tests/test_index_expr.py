"""Formulas: whatever the constructors fold, the value stays the same."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swacompile.index_expr import (
    FALSE,
    MAX_SIZE,
    ONE,
    TRUE,
    ZERO,
    Expr,
    NotInteger,
    Sort,
    absolute,
    add,
    and_,
    apply,
    at_least,
    boolean,
    divides_safely,
    eq,
    exact_div,
    floordiv,
    ideal,
    index,
    integer,
    ite,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    nonempty,
    not_,
    or_,
    real,
    real_add,
    real_mul,
    round_number,
    rounded,
    size,
    sub,
    substitute,
    to_integer,
    to_real,
    truncdiv,
    value_range,
    wrap,
    wrap_number,
)  # fmt: skip
from swacompile.passes.evaluate import evaluate

S, T = size("S"), size("T")
Q, K = index("q", S), index("k", T)
Formula = tuple[Expr, Callable[[dict[str, int]], int]]


def drawn(source: random.Random, depth: int) -> Formula:
    """A random integer formula, and its value as plain arithmetic."""
    if depth == 0 or source.random() < 0.2:
        return leaf(source)
    a, value_a = drawn(source, depth - 1)
    b, value_b = drawn(source, depth - 1)
    c = source.randint(1, 7)
    match source.randrange(12):
        case 0:
            return add(a, b), lambda v: value_a(v) + value_b(v)
        case 1:
            return sub(a, b), lambda v: value_a(v) - value_b(v)
        case 2:
            return mul(a, integer(c - 4)), lambda v: value_a(v) * (c - 4)
        case 3:
            return floordiv(a, integer(c)), lambda v: value_a(v) // c
        case 4:
            return mod(a, integer(c)), lambda v: value_a(v) % c
        case 5:
            return truncdiv(a, integer(c)), lambda v: int(value_a(v) / c)
        case 6:
            return minimum(a, b), lambda v: min(value_a(v), value_b(v))
        case 7:
            return maximum(a, b), lambda v: max(value_a(v), value_b(v))
        case 8:
            return absolute(a), lambda v: abs(value_a(v))
        case 9:
            return ite(le(a, b), a, add(b, ONE)), lambda v: value_a(v) if value_a(v) <= value_b(v) else value_b(v) + 1
        case 10:
            return ite(
                or_(lt(a, b), not_(eq(a, b))), b, neg(a)
            ), lambda v: value_b(v) if value_a(v) != value_b(v) else -value_a(v)
        case _:
            return wrap(a, 8, True), lambda v: wrap_number(value_a(v), 8, True)


def leaf(source: random.Random) -> Formula:
    number = source.randint(-9, 9)
    options: list[Formula] = [
        (Q, lambda v: v["q"]), (K, lambda v: v["k"]), (S, lambda v: v["S"]), (T, lambda v: v["T"]), (integer(number), lambda _: number),
    ]  # fmt: skip
    return source.choice(options)


def values_of(numbers: dict[str, int]) -> dict[Expr, int]:
    return {Q: numbers["q"], K: numbers["k"], S: numbers["S"], T: numbers["T"]}


@settings(max_examples=500, deadline=None, database=None)
@given(source=st.randoms(use_true_random=False))
def test_folding_keeps_values_and_bounds(source: random.Random) -> None:
    formula, plain = drawn(source, 4)
    low, high = value_range(formula)
    least = next((bound for bound in range(40, -40, -1) if at_least(formula, bound)), None)
    for _ in range(8):
        numbers = {"S": source.randint(1, 9), "T": source.randint(1, 9)}
        numbers |= {"q": source.randrange(numbers["S"]), "k": source.randrange(numbers["T"])}
        value = plain(numbers)
        assert evaluate(formula, values_of(numbers)) == value
        assert low <= value <= high
        assert least is None or value >= least
        if numbers["q"] + 1 < numbers["T"]:
            moved = evaluate(substitute(formula, {K: add(Q, ONE)}), values_of(numbers))
            assert moved == plain(numbers | {"k": numbers["q"] + 1})


@settings(max_examples=200, deadline=None, database=None)
@given(source=st.randoms(use_true_random=False))
def test_logic_keeps_values(source: random.Random) -> None:
    (a, value_a), (b, value_b) = drawn(source, 2), drawn(source, 2)
    conditions = [
        (and_(le(a, b), not_(lt(b, a))), lambda v: value_a(v) <= value_b(v)),
        (eq(le(a, b), lt(a, b)), lambda v: (value_a(v) <= value_b(v)) == (value_a(v) < value_b(v))),
        (or_(eq(a, b), lt(a, b)), lambda v: value_a(v) <= value_b(v)),
        (ite(lt(a, b), le(b, a), TRUE), lambda v: value_a(v) >= value_b(v)),
    ]
    for _ in range(8):
        numbers = {"S": source.randint(1, 9), "T": source.randint(1, 9)}
        numbers |= {"q": source.randrange(numbers["S"]), "k": source.randrange(numbers["T"])}
        for condition, plain in conditions:
            assert evaluate(condition, values_of(numbers)) == plain(numbers)


# ------------------------------------------------------------------------------------------------ what folds, what not


def test_sizes_may_be_0() -> None:
    assert not at_least(S, 1) and at_least(nonempty(S), 1)
    assert minimum(ONE, S) != ONE and minimum(ONE, nonempty(S)) == ONE


def test_indices_stay_within_their_axis() -> None:
    assert le(Q, sub(S, ONE)) == TRUE
    assert lt(K, ZERO) == FALSE
    assert le(Q, K) not in (TRUE, FALSE)


def test_division_by_what_may_be_0_stays() -> None:
    assert not divides_safely(sub(K, integer(3))) and not divides_safely(integer(-2)) and not divides_safely(ZERO)
    assert divides_safely(mul(S, T)) and divides_safely(integer(2))


def test_rows_of_a_reshape_fold() -> None:
    flat = add(mul(Q, T), K)
    assert (floordiv(flat, T), mod(flat, T)) == (Q, K)
    assert exact_div(mul(add(S, ONE), T), T) == add(S, ONE)
    assert exact_div(add(S, ONE), T) is None


@pytest.mark.parametrize(
    ("comparison", "folded"),
    [
        (le(to_real(K), real(3.5)), le(K, integer(3))),
        (lt(to_real(K), real(3.5)), le(K, integer(3))),
        (le(real(3.5), to_real(K)), le(integer(4), K)),
        (lt(real(-0.5), to_real(K)), TRUE),
        (eq(to_real(K), real(0.5)), FALSE),
        (le(to_real(K), real(float("inf"))), TRUE),
        (le(real(float("inf")), to_real(K)), FALSE),
        (le(to_real(K), real(float("nan"))), FALSE),
        (le(real(float("nan")), to_real(K)), FALSE),
        (lt(real(float("-inf")), to_real(K)), TRUE),
        (le(ite(le(Q, K), real(0.0), real(float("-inf"))), real(-1.0)), lt(K, Q)),
    ],
)
def test_comparisons_with_fractions(comparison: Expr, folded: Expr) -> None:
    assert comparison == folded


def test_real_data_is_not_an_integer() -> None:
    with pytest.raises(NotInteger, match="x"):
        to_integer(real_add(apply("x", (), Sort.REAL), to_real(K)))


def test_integers_stay_integers_through_reals() -> None:
    assert real_add(to_real(K), real(1.0)) == to_real(add(K, ONE))
    assert real_mul(to_real(K), to_real(Q)) == to_real(mul(K, Q))


# --------------------------------------------------------------------------------------------------- machine numbers


def test_wrap_goes_where_nothing_overflows() -> None:
    assert wrap(sub(K, Q), 32, True) == sub(K, Q)
    assert wrap(add(K, integer(4)), 32, True) != add(K, integer(4))
    assert wrap(sub(K, Q), 8, True) != sub(K, Q)
    assert ideal(le(wrap(sub(K, Q), 8, True), ZERO)) == le(K, Q)
    assert wrap(integer(200), 8, True) == integer(-56)


def test_rounded_goes_where_all_digits_stay() -> None:
    assert rounded(K, 1 << 53) == K
    assert rounded(K, 1 << 24) != K
    short = index("i", integer(100))
    assert rounded(short, 1 << 8) == short


@pytest.mark.parametrize(("dtype", "exact"), [(np.float32, 1 << 24), (np.float16, 1 << 11), (np.float64, 1 << 53)])
def test_rounding_is_the_hardwares(dtype: type, exact: int) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        value = rng.choice((-1, 1)) * rng.getrandbits(rng.randint(1, 60))
        with np.errstate(over="ignore"):
            expected = dtype(value)
        found = round_number(value, exact)
        assert abs(found) == 1 << 200 if np.isinf(expected) else found == int(expected)


def test_wrapping_is_the_hardwares() -> None:
    rng = random.Random(0)
    for bits, signed, dtype in ((8, True, np.int8), (8, False, np.uint8), (16, True, np.int16), (32, True, np.int32)):
        for _ in range(300):
            value = rng.randint(-(1 << 40), 1 << 40)
            assert wrap_number(value, bits, signed) == int(np.int64(value).astype(dtype))


def test_ranges_hold_for_the_longest_axes() -> None:
    assert value_range(sub(K, Q)) == (-(MAX_SIZE - 1), MAX_SIZE - 1)
    assert boolean(True) == TRUE
