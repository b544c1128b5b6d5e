"""Padding that is spelled by arithmetic on integers: (1 - mask) * lowest, added to the scores.

Of integers nobody knows that they are 0 and 1, and at 2 the term would be a large number above 0. So this is padding only where a rewritten
model checks its input; the proof names that.
"""

from swacompile.attention import Attention, Residual, ResidualKind
from swacompile.index_expr import ZERO, Expr, Op, Sort, const_real, eq, integer, not_, substitute, walk
from swacompile.passes.arrays import PREFIX
from swacompile.passes.logits import Logit


def integers_that_hide(bias: Expr, dtype: str) -> Expr | None:
    """The integer of run-time data that a term added to scores is made of, if the term is 0 where it is 1, and hides where it is 0."""
    data = [node for node in walk(bias) if node.op is Op.APPLY]
    if len(data) != 1 or data[0].sort is not Sort.INT or data[0].name.startswith(PREFIX):
        return None
    hidden, shown = (const_real(substitute(bias, {data[0]: integer(number)})) for number in (0, 1))
    hides = hidden is not None and Logit(constant=hidden).hides(dtype, dtype)
    return data[0] if shown == 0 and hides else None


def binary_padding(bias: Expr, site: Attention) -> Residual | None:
    """The factor of the mask that a term added to the scores is, if its integers are 0 and 1; None for other terms."""
    data, axes = integers_that_hide(bias, site.dtype), site.axes
    if data is None or axes.key not in data.args or {axes.query, axes.head} & set(walk(data)):
        return None
    factor = not_(eq(data, ZERO))
    return Residual(kind=ResidualKind.KEY_PADDING, condition=factor, data=factor)


def binary_data(residual: Residual) -> str:
    """The value whose elements a padding found here takes for 0 and 1."""
    (name,) = {node.name for node in walk(residual.condition) if node.op is Op.APPLY}
    return name
