"""What happens to scores between the two products, and to a row's sums after them, the same for every family.

An accumulator of the tensor cores holds, in each thread, for the rows `lane // 4` and `lane // 4 + 8` and each 8
columns the two neighbours `2 * (lane % 4)` and the next: element `4 * j + 2 * half + e` is row `half`, column `8 * j
+ 2 * (lane % 4) + e`.
"""

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from swacompile.schedules.cuda.problem import Operands, Rows, Sizes, Tile
from swacompile.schedules.cuda.spec import Features, KernelSpec
from swacompile.schedules.cuda.trace import (
    LN_2,
    LOG2_E,
    MINUS_INFINITY,
    Registers,
    When,
    all_of,
    any_lane,
    any_of,
    exp2_polynomial,
    f32,
    fixed,
    load_strided,
    pack_pair,
    reduce_quad,
    scalar,
    store_strided,
    store_words,
    transpose_quad,
)

NO_SEGMENT = -(2**63)
RESCALE_ABOVE = 8.0
"""The running maximum is replaced only when scores outgrow it by 2^8: float32 sums and 16-bit weights bear the
factor, and most rescaling goes.
"""


def columns(count: int) -> Iterator[tuple[int, int, int]]:
    """(element of half 0, column less the lane's own, its number) of each column that a thread holds."""
    for j in range(count // 8):
        for e in range(2):
            yield 4 * j + e, 8 * j + e, 2 * j + e


class Scores:
    """Modifies and masks one key tile's scores in place."""

    def __init__(
        self,
        spec: KernelSpec,
        sizes: Sizes,
        operands: Operands,
        *,
        lane: Any,
        scale: Any,
        softcap: Any,
    ) -> None:
        self._features: Features = spec.features
        self._sizes = sizes
        self._operands = operands
        self._lane_column = fixed((lane % 4) * 2)
        self._scale = scale
        self._softcap = softcap

    def apply(self, values: Registers, tile: Tile, rows: Rows, key: Any) -> None:
        """`key` is the position of the tile's first key; a thread holds half as many values as the tile has keys.

        Leaves hidden scores at minus infinity.
        """
        first = fixed(key + self._lane_column)
        if self._features.changes_scores:
            self._modify(values, tile, rows, first)
        if self._features.hides_single_keys:
            self._hide_single_keys(values, tile, rows, first)
        self._hide_outside_band(values, tile, rows, key, first)

    def _modify(self, values: Registers, tile: Tile, rows: Rows, first: Any) -> None:
        """Scores times log2(e), so that the softmax's factor is 1."""
        features = self._features
        if features.softcap:
            # cap * tanh(x / cap) = cap - 2 cap / (1 + exp(2 x / cap)): two special-function results, exact to float32.
            rate = fixed(self._scale * f32(2 * LOG2_E) / self._softcap, "float32")
            cap = fixed(self._softcap * f32(LOG2_E), "float32")
        for half in range(2):
            head = fixed(rows.head(half))
            position = fixed(rows.position(half))
            slope = fixed(self._operands.alibi[head] * f32(LOG2_E), "float32") if features.alibi else None
            for element, column, _ in columns(2 * values.length):
                at = element + 2 * half
                if features.softcap:
                    values[at] = cap - f32(2.0) * cap / (f32(1.0) + T.exp2(values[at] * rate))
                else:
                    values[at] = values[at] * (self._scale * f32(LOG2_E))
                if slope is not None:
                    values[at] = values[at] + slope * T.cast(first + column - position, "float32")
                if features.bias:
                    query = T.min(rows.query(half), self._sizes.queries - 1)
                    key = T.min(first + column, self._sizes.keys - 1)
                    bias = load_strided(self._operands.bias, tile.batch, head, query, key)
                    values[at] = values[at] + bias * f32(LOG2_E)

    def _hide_single_keys(self, values: Registers, tile: Tile, rows: Rows, first: Any) -> None:
        segments = [self._segment_of(tile, rows, half) for half in range(2)] if self._features.segments else None
        for element, column, _ in columns(2 * values.length):
            key = fixed(T.min(first + column, self._sizes.keys - 1))
            visible = T.bool(True)
            if self._features.key_padding:
                visible = self._operands.key_padding[tile.batch, key] != T.uint8(0)
            for half in range(2):
                seen = visible
                if segments is not None:
                    seen = all_of(seen, self._operands.segments[tile.batch, key] == segments[half])
                values[element + 2 * half] = T.Select(seen, values[element + 2 * half], f32(MINUS_INFINITY))

    def _segment_of(self, tile: Tile, rows: Rows, half: int) -> Any:
        """Of a query whose position is no key: one that no key has, because it sees nothing."""
        position = fixed(rows.position(half))
        inside = fixed(T.max(T.min(position, self._sizes.keys - 1), 0))
        own = self._operands.segments[tile.batch, inside]
        return fixed(T.Select(inside == position, own, T.int64(NO_SEGMENT)), "int64")

    def _hide_outside_band(self, values: Registers, tile: Tile, rows: Rows, key: Any, first: Any) -> None:
        sizes = self._sizes
        top = tile.first_query + sizes.offset
        bottom = top + (tile.positions - 1)
        last = key + (2 * values.length - 1)
        touches_edge = any_of(key < bottom - sizes.left, last > T.min(top + sizes.right, sizes.keys - 1))
        if self._features.chunked:
            start = fixed(T.floordiv(top, sizes.chunk) * sizes.chunk)
            touches_edge = any_of(
                touches_edge,
                bottom >= start + sizes.chunk,
                key < start,
                last >= start + sizes.chunk,
            )
        with When(touches_edge):
            for half in range(2):
                # Differences to `first`, which changes from tile to tile, so that no bound stays in a register.
                position = fixed(rows.position(half) - first)
                low = scalar(position - sizes.left)
                high = scalar(T.min(position + sizes.right, sizes.keys - 1 - first))
                if self._features.chunked:
                    start = fixed(T.floordiv(rows.position(half), sizes.chunk) * sizes.chunk - first)
                    low[0] = T.max(low[0], start)
                    high[0] = T.min(high[0], start + sizes.chunk - 1)
                for element, column, _ in columns(2 * values.length):
                    at = element + 2 * half
                    inside = all_of(low[0] <= column, high[0] >= column)
                    values[at] = T.Select(inside, values[at], f32(MINUS_INFINITY))


class OnlineSoftmax:
    """Running maximum and sum of two rows a thread. Scores come in raw, `scale` (log2 units) is applied here."""

    def __init__(self, features: Features, *, scale: Any, polynomial_every: int = 0, degree: int = 3) -> None:
        self._zeroed = features.zeroed
        self._scale = f32(1.0) if features.changes_scores else scale
        self._polynomial_every = polynomial_every
        self._degree = degree
        self.maximum = Registers(2, "float32")
        self.total = Registers(2, "float32")
        self.factor = Registers(2, "float32")

    def reset(self) -> None:
        """In a zeroed attention every row sees scores of 0 outside its band, so its maximum starts there."""
        for half in range(2):
            self.maximum[half] = 0.0 if self._zeroed else MINUS_INFINITY
            self.total[half] = 0.0

    def first(self, values: Registers) -> None:
        """Weights of a row's first key tile, in place."""
        if self._zeroed:
            self.next(values)
            return
        for half in range(2):
            self.maximum[half] = self._row_maximum(values, half)[0]
            self.total[half] = self._exponentiate(values, half)[0]

    def next(self, values: Registers) -> None:
        """Weights of another key tile, in place; afterwards `factor` is what earlier sums must be multiplied by."""
        for half in range(2):
            peak = self._row_maximum(values, half)
            # False also for two minus infinities, whose difference is no number.
            grows = fixed((peak[0] - self.maximum[half]) * self._scale > f32(RESCALE_ABOVE), "bool")
            self.factor[half] = T.Select(grows, T.exp2((self.maximum[half] - peak[0]) * self._scale), f32(1.0))
            self.maximum[half] = T.Select(grows, peak[0], self.maximum[half])
            self.total[half] = self.total[half] * self.factor[half] + self._exponentiate(values, half)[0]

    def must_rescale(self) -> Any:
        """Whether a maximum of the warp's rows grew."""
        return any_lane(any_of(self.factor[0] != f32(1.0), self.factor[1] != f32(1.0)))

    def rescale(self, outputs: Registers) -> None:
        multiply_rows(outputs, self.factor)

    def _row_maximum(self, values: Registers, half: int) -> Registers:
        peak = scalar(values[2 * half], "float32")
        for element, _, number in columns(2 * values.length):
            if number:
                peak[0] = T.max(peak[0], values[element + 2 * half])
        reduce_quad(peak, T.max)
        return peak

    def scaled_maximum(self, half: int) -> Any:
        """0 for a row that has seen no key, so that its weights are exp2(-inf - 0) = 0."""
        nothing = self.maximum[half] == f32(MINUS_INFINITY)
        return fixed(T.Select(nothing, f32(0.0), self.maximum[half] * self._scale), "float32")

    def _exponentiate(self, values: Registers, half: int) -> Registers:
        shift = self.scaled_maximum(half)
        outside = fixed(T.exp2(-shift), "float32") if self._zeroed else None
        for element, _, number in columns(2 * values.length):
            at = element + 2 * half
            hidden = values[at] == f32(MINUS_INFINITY)
            weight = self._exp2(values[at] * self._scale - shift, number)
            # The band's part beyond the weight exp(0) that every visible key has; hidden and outside keys
            # add nothing here.
            values[at] = weight if outside is None else T.Select(hidden, f32(0.0), weight - outside)
        # Two chains, half as deep.
        even, odd = scalar(values[2 * half], "float32"), scalar(values[2 * half + 1], "float32")
        for element, _, number in columns(2 * values.length):
            if number > 1:
                chain = odd if number % 2 else even
                chain[0] = chain[0] + values[element + 2 * half]
        even[0] = even[0] + odd[0]
        return even

    def _exp2(self, x: Any, number: int) -> Any:
        if self._polynomial_every and number % self._polynomial_every == 0:
            return exp2_polynomial(x, self._degree)
        return T.exp2(x)


def multiply_rows(outputs: Registers, factors: Registers) -> None:
    for i in range(outputs.length):
        outputs[i] = outputs[i] * factors[(i // 2) % 2]


class Finish:
    """Turns a tile's sums into its output: sink, a zeroed attention's other keys, the division, the log-sum-exp."""

    def __init__(self, spec: KernelSpec, operands: Operands, *, lane: Any) -> None:
        self._features = spec.features
        self._value_size = spec.value_size
        self._operands = operands
        self._lane = lane

    def apply(self, softmax: OnlineSoftmax, outputs: Registers, tile: Tile, rows: Rows) -> None:
        for half in range(2):
            total = scalar(softmax.total[half], "float32")
            reduce_quad(total, lambda a, b: a + b)
            peak = scalar(softmax.scaled_maximum(half), "float32")
            weight = scalar(1.0, "float32")
            if self._features.zeroed:
                self._add_outside_keys(total, peak[0], outputs, tile, half)
            if self._features.sinks and not self._features.split:
                add_sink(total, peak, weight, self._operands.sinks[rows.head(half)])
            positive = total[0] > f32(0.0)
            softmax.factor[half] = T.Select(positive, weight[0] / total[0], f32(0.0))
            if self._features.lse or self._features.split:
                self._store_lse(total, peak, tile, rows, half)
        multiply_rows(outputs, softmax.factor)

    def _add_outside_keys(self, total: Registers, peak: Any, outputs: Registers, tile: Tile, half: int) -> None:
        outside = fixed(T.exp2(-peak), "float32")
        sums = self._operands.value_sum
        total[0] = total[0] + outside * sums[tile.batch, tile.kv_head, self._value_size]
        for element, column, _ in columns(outputs.length * 2):
            at = element + 2 * half
            source = T.min(column + (self._lane % 4) * 2, self._value_size - 1)
            outputs[at] = outputs[at] + outside * sums[tile.batch, tile.kv_head, source]

    def _store_lse(self, total: Registers, peak: Registers, tile: Tile, rows: Rows, half: int) -> None:
        value = T.if_then_else(total[0] > f32(0.0), (peak[0] + T.log2(total[0])) * f32(LN_2), f32(MINUS_INFINITY))
        with When(all_of(self._lane % 4 == 0, rows.exists(half))):
            batch = tile.split * tile.sizes.batch + tile.batch
            T.buffer_store(self._operands.lse, value, [batch, rows.head(half), rows.query(half)])


def add_sink(total: Registers, peak: Registers, weight: Registers, sink: Any) -> None:
    """Let a logit join a row's denominator. `peak` in log2 units; `weight` becomes the factor of the row's own sums."""
    logit = fixed(T.cast(sink, "float32") * f32(LOG2_E), "float32")
    empty = total[0] <= f32(0.0)
    joint = fixed(T.Select(empty, logit, T.max(peak[0], logit)), "float32")
    weight[0] = T.Select(empty, f32(0.0), T.exp2(peak[0] - joint))
    total[0] = total[0] * weight[0] + T.exp2(logit - joint)
    peak[0] = joint


def store_float32(partial: Any, outputs: Registers, tile: Tile, rows: Rows, *, lane: Any, value_size: int) -> None:
    """Float32 results, or a share's partial ones, straight from registers."""
    batch = tile.split * tile.sizes.batch + tile.batch
    for half in range(2):
        with When(rows.exists(half)):
            head, query = fixed(rows.head(half)), fixed(rows.query(half))
            for element, column, _ in columns(2 * outputs.length):
                at = fixed(column + (lane % 4) * 2)
                with When(at < value_size):
                    store_strided(partial, outputs[element + 2 * half], batch, head, query, at)


def store_output(output: Any, outputs: Registers, tile: Tile, rows: Rows, *, lane: Any, spec: KernelSpec) -> None:
    """Round a tile's rows and store them, 16 bytes a lane: four lanes that share a row write 64 bytes of it at once.

    From registers, so that no shared memory is held until the stores are done.
    """
    words = Registers(4, "uint32")
    pairs = outputs.length // 4
    quad_lane = fixed(lane % 4)
    for half in range(2):
        exists = fixed(rows.exists(half), "bool")
        head, query = fixed(rows.head(half)), fixed(rows.query(half))
        for start in range(0, pairs, 4):
            for j in range(4):
                if start + j < pairs:
                    at = 4 * (start + j) + 2 * half
                    pack_pair(words, j, outputs[at], outputs[at + 1], spec.dtype)
            transpose_quad(words, quad_lane)
            column = fixed((quad_lane + start) * 8)
            with When(all_of(exists, column < spec.value_size)):
                store_words(output, words, tile.batch, head, query, column)
