"""What a BandedAttention node takes beside query, key and value, made of the values that a plan names.

Where a node lacks an operand that others of the model have, it gets the neutral one of docs/operator.md.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from swacompile.band import Alignment
from swacompile.frontends.onnx_guards import OnnxGuards
from swacompile.frontends.onnx_splice import Splicer
from swacompile.kernels.onnx_function import Optional
from swacompile.passes.operands import Fit, RunTimeOperand
from swacompile.passes.plan_rewrite import Replacement

QUERIES, KEYS = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOperands:
    """Writes the operands of one attention before an existing node. `values` are query, key and value (batch, heads, sequence, size).

    `dense`: whoever reads a bias wants a row of it for every query.
    """

    splicer: Splicer
    guards: OnnxGuards
    before: ir.Node
    replacement: Replacement
    values: list[ir.Value]
    dense: bool = False

    def operand(self, name: Optional) -> ir.Value:
        match name:
            case Optional.KEY_PADDING:
                return self._key_padding()
            case Optional.SEGMENTS:
                return self._segments()
            case Optional.SINKS:
                return self._sinks()
            case Optional.BIAS:
                return self._bias()
            case Optional.ALIBI:
                return self._slopes()
            case Optional.OFFSET:
                return self._offset()
        raise AssertionError(f"{name} is no operand")

    def _key_padding(self) -> ir.Value:
        if self.replacement.key_padding is None:
            return self.splicer.constant(np.ones((1, 1), np.bool_), "no_padding")
        return self._per_key(self.replacement.key_padding, ir.DataType.BOOL)

    def _segments(self) -> ir.Value:
        if self.replacement.segments is None:
            return self.splicer.constant(np.zeros((1, 1), np.int64), "no_segments")
        return self._per_key(self.replacement.segments, ir.DataType.INT64)

    def _per_key(self, operand: RunTimeOperand, dtype: ir.DataType) -> ir.Value:
        """(batch, keys)."""
        value = self.splicer.values[operand.value]
        if operand.rank > 2:
            inner = self._ints(*range(1, operand.rank - 1))
            flat = self._once("Squeeze", value, inner)
            flat.type = value.type
            value = flat
        if value.dtype != dtype or operand.nonzero:
            value = self._cast(value, dtype)
        return self.guards.per_key(self.before, self.replacement, self.values, value)

    def _sinks(self) -> ir.Value:
        """(heads,)."""
        site = self.replacement.site
        sinks, dtype = -np.inf if site.sinks is None else site.sinks, np.dtype(site.dtype)
        if isinstance(sinks, float):
            return self.splicer.constant(
                np.full(site.heads, sinks, dtype), f"sinks_{site.heads}_{sinks:g}_{site.dtype}"
            )
        value = self.splicer.values[sinks]
        if value.const_value is None:
            return self._flat(value)
        array = value.const_value.numpy()
        head_axis = next(axis for axis, extent in enumerate(array.shape) if extent == site.heads)
        row = array[tuple(slice(None) if axis == head_axis else 0 for axis in range(array.ndim))]
        return self.splicer.constant(np.ascontiguousarray(row), f"sinks_{sinks}")

    def _bias(self) -> ir.Value:
        """(1 or batch, 1 or heads, 1 or queries, keys)."""
        plan = self.replacement.bias
        if plan is None:
            return self.splicer.constant(np.zeros((1, 1, 1, 1), self.replacement.site.dtype), "no_bias")
        value, missing = self.splicer.values[plan.value], 4 - len(plan.fits)
        fits = (Fit.ONE,) * missing + plan.fits
        cut = [axis for axis, fit in enumerate(fits) if fit is Fit.LONGER]
        if cut:
            places = self._ints(*(axis - missing for axis in cut))
            ends = self._shape([self._extent(axis) for axis in cut])
            value = self._once("Slice", value, self._ints(*(0 for _ in cut)), ends, places)
        if missing:
            value = self._once("Unsqueeze", value, self._ints(*range(missing)))
        if fits[KEYS] is Fit.ONE or (self.dense and fits[QUERIES] is Fit.ONE):
            rows = self._extent(QUERIES) if self.dense else self._ints(1)
            value = self._once("Expand", value, self._shape([self._ints(1, 1), rows, self._extent(KEYS)]))
        return value

    def _slopes(self) -> ir.Value:
        """(heads,), float32."""
        plan, heads = self.replacement.alibi_slopes, self.replacement.site.heads
        if plan is None or plan.value is None:
            factor = 0.0 if plan is None else plan.factor
            return self.splicer.constant(np.full(heads, factor, np.float32), f"slopes_{heads}_{factor!r}")
        value = self.splicer.values[plan.value]
        if value.const_value is not None:
            array = value.const_value.numpy().reshape(-1).astype(np.float32) * np.float32(plan.factor)
            return self.splicer.constant(array, f"slopes_{plan.factor:g}_{plan.value}")
        flat = self._flat(value if value.dtype is ir.DataType.FLOAT else self._cast(value, ir.DataType.FLOAT))
        return flat if plan.factor == 1.0 else self._once("Neg", flat)

    def _offset(self) -> ir.Value:
        """(), int64."""
        plan, alignment = self.replacement.offset, self.replacement.proof.mask.alignment
        if plan is None and alignment is Alignment.TOP_LEFT:
            return self.splicer.constant(np.asarray(0), "top_left")
        if plan is None:
            return self._once("Squeeze", self._once("Sub", self._extent(KEYS), self._extent(QUERIES)), self._ints(0))
        element = source = self.splicer.values[plan.value]
        for place in plan.index:
            element = self._once("Gather", element, self.splicer.constant(np.asarray(place), f"place_{place}"))
        return element if source.dtype is ir.DataType.INT64 else self._cast(element, ir.DataType.INT64)

    def _extent(self, axis: int) -> ir.Value:
        """The size of an axis of (batch, heads, queries, keys), int64 of shape (1,)."""
        query, key, _ = self.values
        value, place = (key, QUERIES) if axis == KEYS else (query, axis)
        shape = self.splicer.shape_of(self.before, value)
        return self._once("Gather", shape, self._ints(place))

    def _shape(self, parts: list[ir.Value]) -> ir.Value:
        return self._once("Concat", *parts, axis=0)

    def _flat(self, value: ir.Value) -> ir.Value:
        if value.shape is not None and len(value.shape) == 1:
            return value
        return self._once("Reshape", value, self._ints(-1))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = self._once("Cast", value, to=int(dtype))
        cast.dtype, cast.shape = dtype, value.shape
        return cast

    def _ints(self, *numbers: int) -> ir.Value:
        return self.splicer.constant(np.asarray(numbers), f"ints_{'_'.join(map(str, numbers))}")

    def _once(self, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """A node that layers with the same operand share."""
        name = " ".join([*(str(value.name) for value in inputs), *map(str, attributes.values())])
        return self.splicer.once(self.before, name, op, inputs, dict(attributes))
