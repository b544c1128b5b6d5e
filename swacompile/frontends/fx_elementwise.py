"""ATen operators that work element by element, and those that make tensors of numbers."""

from collections.abc import Callable, Mapping

import torch

from swacompile.frontends.fx_call import Call, Result, Untranslated, aligned, op
from swacompile.graph import FLOATS
from swacompile.index_expr import add, mul


def elementwise(name: str, operands: int) -> Callable[[Call], Result]:
    def rule(call: Call) -> Result:
        return aligned(call, name, [call[i] for i in range(operands)])

    return rule


def _add(call: Call) -> Result:
    if call.dtype(call.node) == "bool":
        return aligned(call, "or", (call[0], call[1]))
    return _with_alpha(call, "add", call[0], call[1])


def _sub(call: Call) -> Result:
    return _with_alpha(call, "sub", call[0], call[1])


def _rsub(call: Call) -> Result:
    return _with_alpha(call, "sub", call[1], call[0])


def _with_alpha(call: Call, name: str, left: object, right: object) -> Result:
    if call.get("alpha") in (1, None):
        return aligned(call, name, (left, right))
    scaled = call.emit("mul", call.operand(right), call.operand(call.get("alpha")), dtype=call.dtype(call.node))
    return op(name, call.operand(left), scaled)


def _mul(call: Call) -> Result:
    return aligned(call, "and" if call.dtype(call.node) == "bool" else "mul", (call[0], call[1]))


def _div(call: Call) -> Result:
    """torch divides integers exactly where no rounding is asked for; the neutral `div` of integers rounds toward zero."""
    rounding = call.get("rounding_mode")
    integers = call.dtype(call.node) not in FLOATS
    if rounding == "floor":
        return aligned(call, "floordiv", (call[0], call[1]))
    if rounding == "trunc":
        if not integers:
            raise Untranslated("a rounded division of reals")
        return aligned(call, "div", (call[0], call[1]))
    if all(call.is_number(operand) or call.dtype(operand) in FLOATS for operand in (call[0], call[1])):
        return aligned(call, "div", (call[0], call[1]))
    dtype = call.dtype(call.node)
    return op("div", *(_as_real(call, operand, dtype) for operand in (call[0], call[1])))


def _as_real(call: Call, operand: object, dtype: str) -> str:
    if call.is_number(operand):
        number = call.number(operand)
        return (
            call.graph.number(float(number))
            if not isinstance(number, torch.SymInt)
            else call.emit("cast", call.graph.number(number), dtype=dtype)
        )
    return call.emit("cast", call.tensor(operand), dtype=dtype)


def _logical(name: str) -> Callable[[Call], Result]:
    """Bitwise operators are logic where they work on conditions."""

    def rule(call: Call) -> Result:
        if call.dtype(call.node) != "bool" and name == "not":
            raise Untranslated("bits of integers")
        logic = name if call.dtype(call.node) == "bool" else f"bit_{name}"
        return aligned(call, logic, [call[i] for i in range(1 if name == "not" else 2)])

    return rule


def _condition(name: str) -> Callable[[Call], Result]:
    """Logic on numbers asks whether they are 0."""

    def rule(call: Call) -> Result:
        operands = [call[i] for i in range(1 if name == "not" else 2)]
        if all(call.dtype(operand) == "bool" for operand in operands):
            return aligned(call, name, operands)
        return op(name, *(call.emit("cast", call.tensor(operand), dtype="bool") for operand in operands))

    return rule


def _where(call: Call) -> Result:
    if call[1] is None:
        raise Untranslated("the positions of a condition")
    return aligned(call, "where", (call[0], call[1], call[2]))


def _masked_fill(call: Call) -> Result:
    return aligned(call, "where", (call[1], call[2], call[0]))


def _clamp(call: Call) -> Result:
    value, low, high = call.tensor(call[0]), call.get("min"), call.get("max")
    known = call.type_like(call.dtype(call.node))
    if low is not None:
        value = call.emit("max", value, call.operand(low), known=known)
    if high is not None:
        value = call.emit("min", value, call.operand(high), known=known)
    return op("identity", value)


def _rsqrt(call: Call) -> Result:
    return op("reciprocal", call.emit("sqrt", call.tensor(call[0])))


def _convert(call: Call) -> Result:
    """Any change of data type, device or memory."""
    before, after = call.dtype(call[0]), call.dtype(call.node)
    if before == after:
        return aligned(call, "identity", (call[0],))
    return aligned(call, "cast", (call[0],), dtype=after)


def _copy(call: Call) -> Result:
    """The second operand in the first one's shape and type."""
    value = call.operand(call[1])
    if not call.is_number(call[1]) and call.dtype(call[1]) != call.dtype(call[0]):
        value = call.emit("cast", value, dtype=call.dtype(call[0]))
    return op("expand", value, call.graph.vector(call.meta(call[0]).shape))


def _dropout(call: Call) -> Result:
    if call[2] is not False and call[1] != 0.0:
        raise Untranslated("dropout in training")
    return aligned(call, "identity", (call[0],))


# --------------------------------------------------------------------------------------------------------------- sources


def _arange(call: Call) -> Result:
    start, step = call.get("start"), call.get("step")
    bounds = (0 if start is None else start, call.get("end"), 1 if step is None else step)
    return op("iota", *(call.operand(bound) for bound in bounds), dtype=call.dtype(call.node))


def _iota(call: Call) -> Result:
    """prims.iota: so many numbers from a start on."""
    start, step = (call.graph.sizes.of(call.number(call.get(name))) for name in ("start", "step"))
    end = add(start, mul(step, call.graph.sizes.of(call.number(call.get("length")))))
    return op("iota", *(call.graph.scalar(bound) for bound in (start, end, step)), dtype=call.dtype(call.node))


def _filled(value: object) -> Callable[[Call], Result]:
    """A tensor of one number; `value` is the number, or the name of the argument that gives it."""

    def rule(call: Call) -> Result:
        fill, dtype = call.get(value) if isinstance(value, str) else value, call.dtype(call.node)
        if isinstance(fill, bool | int | float):
            fill = bool(fill) if dtype == "bool" else float(fill) if dtype in FLOATS else int(fill)
        return op("full", call.shape(), call.operand(fill), dtype=dtype)

    return rule


def _square(call: Call) -> Result:
    return aligned(call, "mul", (call[0], call[0]))


def _round(call: Call) -> Result:
    if call.get("decimals"):
        raise Untranslated("rounding to decimals")
    return aligned(call, "round", (call[0],))


def _without_nan(call: Call) -> Result:
    """Infinite numbers are replaced, too, which the name says and no formula: detection knows where there are none."""
    if call.get("nan") not in (None, 0.0):
        raise Untranslated("NaN replaced by another number than 0")
    return aligned(call, "nan_to_num", (call[0],))


def _activation(call: Call) -> Result:
    return aligned(call, "activation", (call[0],))


UNARY = (
    "neg", "abs", "exp", "tanh", "sqrt", "reciprocal", "isnan", "log", "floor", "ceil", "trunc", "sign", "relu",
)  # fmt: skip
BINARY = {
    "pow": "pow", "maximum": "max", "minimum": "min", "remainder": "mod", "floor_divide": "floordiv", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "eq": "eq", "ne": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne",
    "clamp_min": "max", "clamp_max": "min",
}  # fmt: skip
LOGIC = {
    "bitwise_and": "and", "__and__": "and", "__iand__": "and", "bitwise_or": "or", "__or__": "or", "__ior__": "or", "bitwise_xor": "xor",
    "__xor__": "xor", "__ixor__": "xor", "bitwise_not": "not",
}  # fmt: skip
SAME = (
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "to",
    "_to_copy",
    "type_as",
    "_to_dtype",
    "positive",
    "convert_element_type",
)
ACTIVATIONS = (
    "sigmoid", "gelu", "silu", "mish", "elu", "leaky_relu", "softplus", "hardtanh", "hardswish", "hardsigmoid", "erf", "sin", "cos",
    "log1p", "log2", "log_softmax", "_log_softmax", "relu6", "celu", "selu",
)  # fmt: skip

OPERATORS: Mapping[str, Callable[[Call], Result]] = {
    **{name: elementwise(name, 1) for name in UNARY},
    **{name: elementwise(meaning, 2) for name, meaning in BINARY.items()},
    **{name: _logical(meaning) for name, meaning in LOGIC.items()},
    **{f"logical_{name}": _condition(name) for name in ("and", "or", "xor", "not")},
    **dict.fromkeys(SAME, _convert),
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), _filled(0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _filled(1)),
    **dict.fromkeys(("full", "new_full", "full_like"), _filled("fill_value")),
    **dict.fromkeys(("dropout", "native_dropout"), _dropout),
    **dict.fromkeys(("add", "__iadd__"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "rsub": _rsub,
    "square": _square,
    "round": _round,
    "nan_to_num": _without_nan,
    "where": _where,
    "masked_fill": _masked_fill,
    "rsqrt": _rsqrt,
    "copy": _copy,
    "fill": _filled("value"),
    "scalar_tensor": _filled("s"),
    "arange": _arange,
    "iota": _iota,
}
