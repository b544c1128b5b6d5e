"""ALiBi: a slope a head times the distance of key and query, added to the scores in any spelling."""

from collections.abc import Iterator
from functools import reduce
from math import prod

from swacompile.attention import Axes
from swacompile.index_expr import (
    Expr,
    NotInteger,
    Op,
    const_real,
    eq,
    ideal,
    not_,
    or_,
    real,
    real_mul,
    sub,
    to_integer,
    walk,
    wrap_parts,
)
from swacompile.passes.smt import is_valid


def slope_of(bias: Expr, visible: Expr, axes: Axes) -> Expr | None:
    """The factor a of bias = a * (key - something that is the same for the whole row), where `a` depends on the head alone.

    What is the same for a whole row does not change a softmax. The equality is needed where a key is visible only.
    """
    moving = {axes.batch, axes.query, axes.key}
    factors = tuple(_factors(bias))
    fixed = [factor for factor in factors if not moving & set(walk(factor))]
    distances = [factor for factor in factors if factor not in fixed]
    numbers = [number for factor in fixed if (number := const_real(factor)) is not None]
    slope = reduce(real_mul, (factor for factor in fixed if const_real(factor) is None), real(1.0))
    for distance in distances if len(distances) == 1 else ():
        if axes.key not in walk(distance) or any(_wraps_early(node) for node in walk(distance)):
            continue
        try:
            steps = to_integer(ideal(distance))
        except NotInteger:
            continue
        for sign, ahead in ((1.0, sub(axes.key, axes.query)), (-1.0, sub(axes.query, axes.key))):
            same_row = axes.key not in walk(sub(steps, ahead))
            if same_row or is_valid(or_(not_(visible), eq(steps, ahead))):
                return real_mul(slope, real(sign * prod(numbers)))
    return None


def _wraps_early(node: Expr) -> bool:
    """Whether an integer type is too narrow for the distances of usual lengths. Rounding is that of any number that is added to scores."""
    return node.op is Op.WRAP and wrap_parts(node)[0] < 32


def _factors(product: Expr) -> Iterator[Expr]:
    if product.op is not Op.REAL_MUL:
        yield product
        return
    for part in product.args:
        yield from _factors(part)
