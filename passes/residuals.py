"""Take a mask apart: the factors that are known only at run time, and the rest, which is a matter of positions."""

from collections.abc import Iterator

from swacompile.attention import Axes, Residual, ResidualKind
from swacompile.band import Alignment
from swacompile.index_expr import FALSE, Expr, Op, Sort, add, eq, integer, not_, sub, substitute, walk
from swacompile.passes.arrays import PREFIX


def factor_out(visible: Expr, axes: Axes) -> tuple[tuple[Residual, ...], Expr]:
    """(run-time factors, rest): the mask is their conjunction. Each factor hides for certain where it does not hold.

    visible = (factor and rest) is Shannon's expansion of `visible` at a condition: exact, whatever the condition is.
    """
    residuals: list[Residual] = []
    rest = visible
    for literal in _run_time_literals(visible):
        for factor, hides in ((literal, FALSE), (not_(literal), not_(FALSE))):
            residual = _residual(factor, axes)
            if residual and substitute(rest, {literal: hides}) == FALSE:
                residuals.append(residual)
                rest = substitute(rest, {literal: not_(hides)})
                break
    return tuple(residuals), rest


def run_time_data(expr: Expr) -> set[str]:
    """Names of the run-time data and constant arrays in a formula."""
    return {node.name for node in walk(expr) if node.op is Op.APPLY}


def offset_of(alignment: Alignment, axes: Axes) -> Expr:
    """Position among the keys of query 0."""
    return sub(axes.keys, axes.queries) if alignment is Alignment.BOTTOM_RIGHT else integer(0)


def _run_time_literals(expr: Expr) -> Iterator[Expr]:
    """Comparisons and conditions that read run-time data, in a stable order."""
    found = {
        node for node in walk(expr) if node.op in (Op.LE0, Op.EQ0) or (node.op is Op.APPLY and node.sort is Sort.BOOL)
    }
    yield from sorted((node for node in found if _is_run_time(node)), key=lambda node: node.digest)


def _is_run_time(expr: Expr) -> bool:
    names = run_time_data(expr)
    return bool(names) and not any(name.startswith(PREFIX) for name in names)


def _residual(factor: Expr, axes: Axes) -> Residual | None:
    """The factor as an operand: a condition on (batch, key), or one label for query and key."""
    nodes = set(walk(factor))
    if axes.head in nodes or axes.key not in nodes:
        return None
    if axes.query not in nodes:
        return Residual(kind=ResidualKind.KEY_PADDING, condition=factor, data=factor)
    for label in sorted((node for node in nodes if _is_label(node, axes)), key=lambda node: node.digest):
        aligned = [a for a in Alignment if factor == eq(label, _at_query(label, axes, a))]
        if aligned:
            alignment = None if len(aligned) == len(Alignment) else aligned[0]
            return Residual(kind=ResidualKind.SEGMENTS, condition=factor, data=label, alignment=alignment)
    return None


def _is_label(node: Expr, axes: Axes) -> bool:
    return node.op is Op.APPLY and node.sort is Sort.INT and axes.key in node.args and axes.query not in walk(node)


def _at_query(label: Expr, axes: Axes, alignment: Alignment) -> Expr:
    return substitute(label, {axes.key: add(axes.query, offset_of(alignment, axes))})
