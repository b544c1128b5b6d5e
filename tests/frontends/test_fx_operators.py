"""Formulas of ATen operators: in every cell they give the number that torch computes, also after writes to memory."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from swacompile.frontends.fx import FxModel, read_exported_program  # noqa: E402
from swacompile.index_expr import Expr, Op, add, const_real, integer, mul, walk  # noqa: E402
from swacompile.passes.evaluate import evaluate  # noqa: E402
from swacompile.passes.read_masks import read_masks  # noqa: E402

pytestmark = pytest.mark.torch
Function = Callable[..., Any]


class Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(12).reshape(3, 4) % 5)

    def forward(self, x: torch.Tensor, m: torch.Tensor) -> Any:
        return self.function(self, x, m)


X = torch.tensor([[3, -1, 4, 1], [5, 9, -2, 6], [0, 3, 5, 8]])
M = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, True]])


def exported(function: Function, **options: Any) -> FxModel:
    return read_exported_program(torch.export.export(Module(function), (X, M), **options))


def check(
    model: FxModel, inputs: dict[str, np.ndarray], expected: np.ndarray, *, output: int = 0, opaque: bool = False
) -> None:
    """The formula of an output equals the expected array in every cell; `opaque` where it may not say more than "data"."""
    reading = read_masks(model.graph)
    tensor = reading.tensors[model.graph.outputs[output]]
    assert len(tensor.shape) == expected.ndim
    cells = [tensor.at(*map(integer, place)) for place in product(*map(range, expected.shape))]
    names = {node.name for cell in cells for node in walk(cell) if node.op is Op.APPLY}
    if opaque:
        assert names - set(inputs), "expected run-time data that is no input"
        return
    assert names <= set(inputs), f"{names - set(inputs)} is not read"
    found = [_value(cell, inputs) for cell in cells]
    assert found == expected.reshape(-1).tolist()


def _value(cell: Expr, inputs: dict[str, np.ndarray]) -> Any:
    number = const_real(cell)
    return (
        number
        if number is not None
        else evaluate(cell, {}, lambda node, args: inputs[node.name][tuple(map(int, args))].item())
    )


OPERATORS: dict[str, Function] = {
    "add_alpha": lambda s, x, m: torch.add(x, m.long(), alpha=3),
    "add_bools": lambda s, x, m: m + (x > 3),
    "mul_bools": lambda s, x, m: m * (x > 3),
    "rsub": lambda s, x, m: 7 - x,
    "floor_divide": lambda s, x, m: x // 3,
    "div_floor": lambda s, x, m: torch.div(x, 3, rounding_mode="floor"),
    "div_trunc": lambda s, x, m: torch.div(x, 3, rounding_mode="trunc"),
    "remainder": lambda s, x, m: x % 4,
    "abs_neg": lambda s, x, m: (-x).abs() - x,
    "clamp": lambda s, x, m: x.clamp(0, 5),
    "minimum": lambda s, x, m: torch.minimum(x, 5 - x) + torch.maximum(x, 2 * x),
    "compare": lambda s, x, m: (x < 3) | (x >= 6) ^ (x == 4) & (x != 1),
    "not": lambda s, x, m: ~m & torch.logical_not(x),
    "logical": lambda s, x, m: torch.logical_and(x, m) | torch.logical_xor(m, x),
    "where": lambda s, x, m: torch.where(m, x, -1) + torch.where(m, 2, x),
    "masked_fill": lambda s, x, m: x.masked_fill(m, 7),
    "to_int32": lambda s, x, m: (x.to(torch.int32) * 100).to(torch.int8).long(),
    "to_bool": lambda s, x, m: x.bool(),
    "bool_to_int": lambda s, x, m: m.long() * 3,
    "type_as": lambda s, x, m: m.type_as(x),
    "arange_down": lambda s, x, m: torch.arange(7, -2, -3) + torch.arange(2, -1, -1),
    "square": lambda s, x, m: x.square() + x**2,
    "relu_sign": lambda s, x, m: x.relu() * 10 + x.sign(),
    "round": lambda s, x, m: (x.float().floor() + x.float().ceil()).long() + torch.round(x.float()).long(),
    "bits": lambda s, x, m: (
        (m.long() & (x > 3).long()) + 2 * (m.int() | (x > 3).int()) + 4 * (m.long() ^ (x > 3).long())
    ),
    "meshgrid": lambda s, x, m: (
        torch.meshgrid(x[0], x[:, 1], indexing="ij")[1] - torch.meshgrid(x[:, 2], x[1], indexing="xy")[0].t()[:, :1].t()
    ),
    "flip": lambda s, x, m: x.flip(0, -1) + x.flip(1),
    "pad": lambda s, x, m: torch.nn.functional.pad(x, (1, 2, 0, 1), value=7),
    "pad_cuts": lambda s, x, m: torch.nn.functional.pad(x, (-1, 1)),
    "written_where": lambda s, x, m: (x + 0).index_put((m,), torch.tensor(9)),
    "arange": lambda s, x, m: torch.arange(2, 11, 3) + torch.arange(3),
    "full": lambda s, x, m: torch.full((2, 3), 4) + x.new_ones(3) + torch.zeros_like(x)[:1, :3],
    "view": lambda s, x, m: x.view(2, 6),
    "reshape": lambda s, x, m: x.t().reshape(2, 2, 3),
    "flatten": lambda s, x, m: x.flatten(),
    "unflatten": lambda s, x, m: x.unflatten(1, (2, 2)),
    "transpose": lambda s, x, m: x.transpose(0, 1),
    "permute": lambda s, x, m: x.view(3, 2, 2).permute(2, 0, -2),
    "movedim": lambda s, x, m: x.view(3, 2, 2).movedim(0, -1),
    "unsqueeze": lambda s, x, m: x.unsqueeze(-1).unsqueeze(0),
    "squeeze": lambda s, x, m: x.view(1, 3, 1, 4).squeeze(0).squeeze() - x.view(3, 1, 4).squeeze(1),
    "expand": lambda s, x, m: x.unsqueeze(1).expand(-1, 2, 4),
    "slice": lambda s, x, m: x[1:, -3:-1],
    "slice_steps": lambda s, x, m: x[::2, 1::2],
    "select": lambda s, x, m: x[-1] + x[0],
    "narrow": lambda s, x, m: x.narrow(1, 1, 2),
    "split": lambda s, x, m: x.split(3, dim=1)[1] + x.split([1, 3], dim=1)[0],
    "chunk": lambda s, x, m: x.chunk(2, dim=1)[1],
    "unbind": lambda s, x, m: x.unbind(0)[1] - x.unbind(1)[-1][0],
    "cat": lambda s, x, m: torch.cat([x, x[:1], torch.arange(4).view(1, 4)]),
    "cat_empty": lambda s, x, m: torch.cat([torch.empty(0, dtype=torch.long), x[0]]),
    "stack": lambda s, x, m: torch.stack([x, x + 1], dim=1),
    "repeat": lambda s, x, m: x.repeat(2, 1, 2),
    "repeat_interleave": lambda s, x, m: x.repeat_interleave(2, dim=1),
    "diff": lambda s, x, m: torch.diff(x, prepend=x[:, :1] - 1, append=x[:, -1:]),
    "slice_scatter": lambda s, x, m: torch.slice_scatter(x, x[:1] * 0, 0, 1, 2),
    "select_scatter": lambda s, x, m: torch.select_scatter(x, x[:, 0] * 2, 1, -1),
    "tril": lambda s, x, m: torch.tril(x, -1) + torch.triu(x, 1),
    "index_select": lambda s, x, m: x.index_select(1, torch.tensor([2, 0])),
    "index_one": lambda s, x, m: x[:, torch.tensor([[3, 0], [1, -1]])],
    "index_two": lambda s, x, m: x[torch.arange(3)[:, None], torch.tensor([0, 3])[None]],
    "index_apart": lambda s, x, m: x.view(3, 2, 2)[torch.tensor([0, 2]), :, torch.tensor([1, 0])],
    "embedding": lambda s, x, m: s.table[torch.tensor([2, 0])],
    "buffer": lambda s, x, m: s.table - x,
    "cumsum_ones": lambda s, x, m: torch.cumsum(torch.ones_like(x), 1) + torch.cumsum(m & ~m, 0),
    "numpy_T": lambda s, x, m: x.T + 1,
    "copy": lambda s, x, m: torch.empty_like(x).copy_(x[0]),
}
# Operations whose results are data: never a formula, and never a wrong one.
DATA: dict[str, Function] = {
    "bits": lambda s, x, m: x & 6,
    "cumsum_data": lambda s, x, m: torch.cumsum(x, 1),
    "empty": lambda s, x, m: x[m],
    "sorted": lambda s, x, m: x.sort(dim=1).values,
    "fraction": lambda s, x, m: (x / 2 > 1.2).long().cumsum(0),
}


@pytest.fixture(scope="module")
def all_operators() -> FxModel:
    return exported(lambda s, x, m: tuple(function(s, x, m) for function in OPERATORS.values()))


@pytest.mark.parametrize("position", range(len(OPERATORS)), ids=list(OPERATORS))
def test_operators_are_read_as_torch_computes_them(all_operators, position):
    function = list(OPERATORS.values())[position]
    expected = np.asarray(function(Module(function), X, M))
    check(all_operators, {"x": X.numpy(), "m": M.numpy()}, expected, output=position)


def test_operators_after_decomposition():
    functions = [function for name, function in OPERATORS.items() if name not in ("cumsum_ones", "copy")]
    program = torch.export.export(
        Module(lambda s, x, m: tuple(f(s, x, m) for f in functions)), (X, M)
    ).run_decompositions()
    model = read_exported_program(program)
    for position, function in enumerate(functions):
        check(model, {"x": X.numpy(), "m": M.numpy()}, np.asarray(function(Module(function), X, M)), output=position)


@pytest.mark.parametrize("function", DATA.values(), ids=list(DATA))
def test_unknown_results_are_data(function):
    expected = np.asarray(function(Module(function), X, M))
    check(exported(function), {"x": X.numpy(), "m": M.numpy()}, expected, opaque=True)


# -------------------------------------------------------------------------------------------------------------- writes


def _slice_written(s, x, m):
    y = x.clone()
    before = y + 0
    y[1:, 2:] = 7
    return y - before


def _row_written_through_view(s, x, m):
    y = x.clone()
    row = y.t()[1]
    row.mul_(2)
    return y


def _view_read_after_write(s, x, m):
    y = x.clone()
    view = y.view(2, 6)
    part = view[:, :3]
    y.add_(1)
    return part


def _sibling_view(s, x, m):
    y = x.clone()
    left, right = y[:, :3], y[:, 1:]
    left.fill_(0)
    return right


def _chain(s, x, m):
    y = torch.zeros(3, 4, dtype=torch.long)
    y.copy_(x)
    y[0].zero_()
    y.masked_fill_(m, 5)
    y.unsqueeze(0)[:, 2, 3:].sub_(1)
    return y.triu_(0)


def _logic_in_place(s, x, m):
    y = m.clone()
    y &= x > 0
    y |= x < 0
    return y


def _through_identity(s, x, m):
    y = x.clone()
    same = y.to(torch.long)
    same.add_(3)
    return y


def _old_value_kept(s, x, m):
    y = x.clone()
    copied = y.clone()
    y.zero_()
    return copied


WRITES = (
    _slice_written,
    _row_written_through_view,
    _view_read_after_write,
    _sibling_view,
    _chain,
    _logic_in_place,
    _through_identity,
    _old_value_kept,
)


@pytest.mark.parametrize("function", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_writes_to_memory_are_followed(function):
    expected = np.asarray(function(Module(function), X.clone(), M.clone()))
    check(exported(function), {"x": X.numpy(), "m": M.numpy()}, expected)


VIEWS: tuple[Callable[[random.Random, Any], Any], ...] = (
    lambda r, t: t.transpose(0, 1) if t.dim() > 1 else t.unsqueeze(0),
    lambda r, t: t.unsqueeze(r.randrange(t.dim() + 1)),
    lambda r, t: t[r.randrange(t.shape[0]) :],
    lambda r, t: t.select(r.randrange(t.dim()), -1) if t.dim() > 1 else t,
    lambda r, t: t.narrow(-1, 0, 1 + r.randrange(t.shape[-1])),
    lambda r, t: t.reshape(-1),
    lambda r, t: t.squeeze(),
    lambda r, t: t.to(torch.long),
    lambda r, t: t.contiguous(),
    lambda r, t: t.expand_as(t),
    lambda r, t: t.split(max(1, t.shape[0] // 2))[-1],
    lambda r, t: t.unbind(0)[-1] if t.dim() > 1 else t,
    lambda r, t: t[::2],
    lambda r, t: t.view(-1) if t.is_contiguous() else t,
)
WRITERS: tuple[Callable[[random.Random, Any], Any], ...] = (
    lambda r, t: t.add_(r.randrange(5)),
    lambda r, t: t.fill_(r.randrange(9)),
    lambda r, t: t.copy_(t.clone() * 3),
    lambda r, t: t.masked_fill_(t > 2, 1),
    lambda r, t: torch.add(t.clone(), 1, out=t),
    lambda r, t: t.clamp_(0, 6),
)


def random_program(seed: int) -> Function:
    def function(s, x, m):
        choice = random.Random(seed)
        values = [x.clone()]
        for _ in range(choice.randrange(3, 9)):
            chosen = choice.choice([value for value in values if value.dim()])
            values.append(choice.choice(VIEWS if choice.random() < 0.6 else WRITERS)(choice, chosen))
        return tuple(value + 0 for value in values)

    return function


def test_random_views_and_writes():
    exact = 0
    for seed in range(25):
        function = random_program(seed)
        model = exported(function)
        reading = read_masks(model.graph)
        for name, expected in zip(model.graph.outputs, function(None, X.clone(), M), strict=True):
            for place in product(*map(range, expected.shape)):
                cell = reading.tensors[name].at(*map(integer, place))
                if {node.name for node in walk(cell) if node.op is Op.APPLY} <= {"x"}:
                    assert _value(cell, {"x": X.numpy()}) == expected[place].item(), (seed, name, place)
                    exact += 1
    assert exact > 800  # most cells are formulas: writes are followed, not given up


def test_what_a_node_writes_beside_its_result_is_data():
    class Normalized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4).train()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x), self.norm.running_mean + 0

    model = read_exported_program(torch.export.export(Normalized(), (torch.ones(3, 4),)))
    cell = read_masks(model.graph).tensors[model.graph.outputs[-1]].at(integer(0))
    names = {node.name for node in walk(cell) if node.op is Op.APPLY}
    assert names and not names & set(model.graph.outputs) and not names & {"batch_norm"}


def test_a_write_that_cannot_be_followed_makes_data():
    def function(s, x, m):
        y = x.clone()
        flat = y.t().reshape(-1)  # a copy here, a view elsewhere
        y[:, ::2].add_(1)  # a written slice with steps is not followed
        return torch.cat([y.view(-1), flat])

    check(exported(function), {"x": X.numpy(), "m": M.numpy()}, np.asarray(function(None, X, M)), opaque=True)


def test_a_written_buffer_is_state_not_a_constant():
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return x + self.seen

    program = torch.export.export(Counter(), (X,))
    for model in (read_exported_program(program), read_exported_program(program.run_decompositions())):
        seen = next(name for name in model.graph.inputs if "seen" in name)
        assert seen not in model.graph.constants
        output = -1  # buffers that are returned come first
        check(model, {"x": X.numpy(), seen: np.asarray(11)}, X.numpy() + 12, output=output)


def test_symbols_of_one_size_stay_one():
    lengths = torch.export.Dim("length")
    program = torch.export.export(
        Module(lambda s, x, m: torch.arange(x.shape[0] * 2 + 1) + torch.arange(m.shape[0] + x.shape[0] + 1)),
        (X, M),
        dynamic_shapes={"x": {0: lengths}, "m": {0: lengths}},
    )
    model = read_exported_program(program)
    reading = read_masks(model.graph)
    assert reading.tensors[model.graph.outputs[0]].at(integer(4)) == integer(8)
    (x_length, _), (m_length, _) = (reading.extents(name) for name in ("x", "m"))
    assert x_length == m_length
    assert reading.extents(model.graph.outputs[0]) == (add(mul(integer(2), x_length), integer(1)),)
