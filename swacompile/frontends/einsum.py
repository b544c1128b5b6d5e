"""Einstein sums of two operands as one product between views of them, for every frontend.

bthd,bshd->bhts      ->  transpose, transpose, matmul
btkgh,bskh->bkgts    ->  the left operand as (b,k,g,t,h), the right one as (b,k,1,h,s): letters that only one side has and the
                         matmul has no place for lead it, and have length 1 on the other side
bq,bk->bqk           ->  no letter is summed: an elementwise product
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An operation of the neutral vocabulary. Inputs are numbers: 0 and 1 the operands, 2 the first step's result, and so on."""

    op: str
    inputs: tuple[int, ...]
    attrs: Mapping[str, object] = field(default_factory=dict)


def contraction(equation: str, ranks: tuple[int, ...]) -> tuple[Step, ...] | None:
    """The steps that an equation is with operands of these ranks; the last one's result is the sum.

    None for sums over one operand, over several letters, or of other than two operands.
    """
    terms = _terms(equation, ranks)
    if terms is None:
        return None
    left, right, result = terms
    summed = [letter for letter in left if letter in right and letter not in result]
    if len(summed) > 1 or any(letter not in result and letter not in summed for letter in left + right):
        return None
    steps: list[Step] = []
    if not summed:
        sides = (_view(steps, 0, left, list(result)), _view(steps, 1, right, list(result)))
        return (*steps, Step(op="mul", inputs=sides))
    batch = [letter for letter in result if letter in left and letter in right]
    own = [[letter for letter in result if letter in term and letter not in batch] for term in (left, right)]
    lead = [*batch, *own[0][:-1], *own[1][:-1]]
    rows, columns = (letters[-1] if letters else "" for letters in own)
    sides = (
        _view(steps, 0, left, [*lead, rows, summed[0]]),
        _view(steps, 1, right, [*lead, summed[0], columns]),
    )
    steps.append(Step(op="matmul", inputs=sides))
    product = [*lead, rows, columns]
    if gone := [axis for axis, letter in enumerate(product) if not letter]:
        steps.append(Step(op="squeeze", inputs=(len(steps) + 1,), attrs={"axes": gone}))
    order = [[letter for letter in product if letter].index(letter) for letter in result]
    _transposed(steps, len(steps) + 1, order)
    return tuple(steps)


def _terms(equation: str, ranks: tuple[int, ...]) -> tuple[str, str, str] | None:
    """(left, right, result) with a letter for each axis, also for those behind an ellipsis."""
    text, _, result = equation.replace(" ", "").partition("->")
    names = text.split(",")
    if len(names) != 2 or len(ranks) != 2:
        return None
    unused = [letter for letter in ascii_letters if letter not in equation]
    hidden = [
        rank - len(name.replace("...", "")) if "..." in name else 0 for name, rank in zip(names, ranks, strict=True)
    ]
    if min(hidden) < 0:
        return None
    spread = "".join(unused[: max(hidden)])
    wide = [name.replace("...", spread[len(spread) - extra :]) for name, extra in zip(names, hidden, strict=True)]
    if "->" not in equation:
        once = sorted(letter for letter in set(text) if letter.isalpha() and text.count(letter) == 1)
        result = ("..." if "..." in text else "") + "".join(once)
    wanted = result.replace("...", spread)
    given = (*wide, wanted)
    if any(len(set(term)) != len(term) for term in given) or any(
        len(term) != rank for term, rank in zip(wide, ranks, strict=True)
    ):
        return None
    return (wide[0], wide[1], wanted) if set(wanted) <= set(wide[0] + wide[1]) else None


def _view(steps: list[Step], operand: int, term: str, wanted: list[str]) -> int:
    """The operand with its axes in this order, and an axis of length 1 for each letter that it lacks."""
    value = _transposed(steps, operand, [term.index(letter) for letter in wanted if letter and letter in term])
    new = [axis for axis, letter in enumerate(wanted) if not letter or letter not in term]
    if not new:
        return value
    steps.append(Step(op="unsqueeze", inputs=(value,), attrs={"axes": new}))
    return len(steps) + 1


def _transposed(steps: list[Step], value: int, order: list[int]) -> int:
    if order == sorted(order):
        return value
    steps.append(Step(op="transpose", inputs=(value,), attrs={"perm": order}))
    return len(steps) + 1
