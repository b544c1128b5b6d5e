"""Equalities between sizes that a model needs to run, in the simplest words that mean the same."""

from collections.abc import Iterator

from swacompile.index_expr import Expr, Op, const_int, eq, integer, le, minimum, not_, or_, sum_parts, walk
from swacompile.passes.smt import is_valid

MOST_NUMBERS = 8  # Numbers of one equality that are tried as bounds.


def simplest(gone: Expr, stays: Expr) -> tuple[Expr, str]:
    """(a condition, the same for people) that holds where two sizes are equal.

    1. That a length cut off at a limit is itself says that it is within the limit.
    2. A condition on one size that is made of choices may be a bound of it: the solver tells.
    """
    if gone.op is Op.ITE and stays in gone.args[1:]:
        (limit,) = (branch for branch in gone.args[1:] if branch != stays)
        if minimum(stays, limit) == gone or minimum(limit, stays) == gone:
            return le(stays, limit), f"{stays} <= {limit}"
    same = eq(gone, stays)
    if any(node.op is Op.ITE for node in walk(same)):
        for bound, words in _bounds(same):
            if is_valid(or_(not_(same), bound)) and is_valid(or_(same, not_(bound))):
                return bound, words
    sides = (stays, gone) if const_int(gone) is not None else (gone, stays)
    return same, f"{sides[0]} == {sides[1]}"


def _bounds(condition: Expr) -> Iterator[tuple[Expr, str]]:
    """Bounds of the only size in a condition by the numbers in it."""
    nodes = set(walk(condition))
    sizes = [node for node in nodes if node.op is Op.SYMBOL]
    if len(sizes) != 1:
        return
    (length,) = sizes
    constants = {abs(sum_parts(node)[0]) for node in nodes if node.op is Op.SUM}
    constants |= {abs(number) for node in nodes if (number := const_int(node)) is not None}
    for number in sorted(constants)[:MOST_NUMBERS]:
        bound = integer(number)
        yield le(length, bound), f"{length} <= {number}"
        yield le(bound, length), f"{length} >= {number}"
        yield eq(length, bound), f"{length} == {number}"
