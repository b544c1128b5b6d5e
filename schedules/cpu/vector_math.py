"""Powers, tanh, sums and transposes on vectors of float32. NaN in, NaN out."""

from collections.abc import Callable, Sequence

from tvm import tirx

from swacompile.schedules.cpu.emit import Expr, lanes_of, let, select, shuffle, splat

LOG2_E = 1.4426950408889634

# (2^r - 1) / r on [-1/2, 1/2], from Lawson's iteration: 1 + r * p(r) is 2^r to 9e-8 relative ...
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# ... and r * p(r) is 2^r - 1 to 1e-8 relative, which tanh needs near 0.
_EXP2_MINUS_1 = (
    0.6931471824645996,
    0.24022649228572845,
    0.05550357326865196,
    0.009618237614631653,
    0.0013390735257416964,
    0.00015403512225020677,
)
_ROUNDING = 1.5 * 2.0**23 + 127
"""Adding this rounds to an integer n and leaves n + 127, the exponent bits of 2^n, in the low bits."""
SMALLEST_EXPONENT = -100.0
"""Below it exp2 gives exactly 0: no denormal ever enters the products, and 2^-100 is nothing beside the row's largest weight."""
_TANH_IS_ONE = 30.0


def exp2(x: Expr, lanes: int) -> Expr:
    """2^x for x <= 100; exactly 0 below SMALLEST_EXPONENT."""
    fraction, power = _split(x, lanes)
    value = let((fraction * _polynomial(_EXP2, fraction, lanes) + splat(1.0, lanes)) * power)
    return select(x < splat(SMALLEST_EXPONENT, lanes), splat(0.0, lanes), value)


def tanh(x: Expr, lanes: int) -> Expr:
    """(e^2x - 1) / (e^2x + 1), with e^2x - 1 computed without cancellation."""
    twice = let(x * splat(2 * LOG2_E, lanes))
    twice = select(twice > splat(_TANH_IS_ONE, lanes), splat(_TANH_IS_ONE, lanes), twice)
    twice = select(twice < splat(-_TANH_IS_ONE, lanes), splat(-_TANH_IS_ONE, lanes), twice)
    fraction, power = _split(twice, lanes)
    less_one = let(fraction * _polynomial(_EXP2_MINUS_1, fraction, lanes) * power + (power - splat(1.0, lanes)))
    return let(less_one / (less_one + splat(2.0, lanes)))


def _split(x: Expr, lanes: int) -> tuple[Expr, Expr]:
    """x = n + r with n an integer, as (r, 2^n)."""
    shifted = let(x + splat(_ROUNDING, lanes))
    fraction = let(x - (shifted - splat(_ROUNDING, lanes)))
    kind = "int32" if lanes == 1 else f"int32x{lanes}"
    bits = tirx.reinterpret(kind, shifted) << splat(tirx.const(23, "int32"), lanes)
    return fraction, let(tirx.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", bits))


def _polynomial(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    value = splat(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + splat(coefficient, lanes)
    return let(value)


def reduce_lanes(vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes combined pairwise into a scalar."""
    while lanes > 1:
        lanes //= 2
        low = shuffle([vector], range(lanes))
        high = shuffle([vector], range(lanes, 2 * lanes))
        vector = let(combine(low, high))
    return vector


def sum_lanes(vector: Expr, lanes: int) -> Expr:
    return reduce_lanes(vector, lanes, lambda a, b: a + b)


def sum_each(vectors: Sequence[Expr], lanes: int) -> list[Expr]:
    """The sum of each vector's lanes. Vectors are added in pairs, half of one beside half of the other, so that all share the work."""
    count = 1 << (len(vectors).bit_length() - 1)
    if lanes < count or count == 1:
        return [sum_lanes(vector, lanes) for vector in vectors]
    part, rows = lanes, list(vectors[:count])
    while part > 1:
        part //= 2
        rows = [_add_halves(rows[i : i + 2], part) for i in range(0, len(rows), 2)]
    sums = [shuffle(rows, [i]) for i in range(count)]
    return sums + (sum_each(vectors[count:], lanes) if count < len(vectors) else [])


def _add_halves(vectors: Sequence[Expr], part: int) -> Expr:
    """Of the concatenation of one or two vectors the lower `part` of every 2 * part lanes plus the upper."""
    total = sum(map(lanes_of, vectors))
    starts = range(0, total, 2 * part)
    low, high = (shuffle(vectors, [start + shift + i for start in starts for i in range(part)]) for shift in (0, part))
    return let(low + high)


def transpose(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """`lanes` vectors of `lanes` elements, transposed by exchanging ever larger blocks."""
    columns = list(rows)
    step = 1
    while step < lanes:
        for row in (row for row in range(lanes) if not row & step):
            a, b = columns[row], columns[row + step]
            columns[row] = shuffle([a, b], [i if not i & step else lanes + i - step for i in range(lanes)])
            columns[row + step] = shuffle([a, b], [i + step if not i & step else lanes + i for i in range(lanes)])
        step *= 2
    return columns
