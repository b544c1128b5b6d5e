"""What is added to scores, and positions of the model's data, found in torch programs and given to the operator."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import swacompile  # noqa: E402
from swacompile.attention import Refutation  # noqa: E402
from tests.frontends.test_fx_rewrite import OPERATOR, difference, targets, widened  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
HEADS, SIZE, WINDOW, LONGEST, CACHE = 4, 8, 5, 64, 24
LENGTHS = (21, 37)


class Added(torch.nn.Module):
    """Windowed attention whose scores get something else beside the mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table = torch.nn.Embedding(2 * LONGEST, HEADS)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))
        self.register_buffer("stored", torch.randn(1, HEADS, LONGEST, LONGEST))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        line = torch.arange(x.shape[2])
        query, key = line[:, None], line[None, :]
        scores = x @ x.transpose(2, 3) * 0.3 + self.added(query, key, bias)
        scores = scores.masked_fill(~((key > query - WINDOW) & (key <= query)), torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(x.dtype) @ x

    def added(self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        slopes, length = self.slopes.view(1, HEADS, 1, 1), query.shape[0]
        match self.kind:
            case "alibi":
                return slopes * (key - query)
            case "alibi of absolute distance":
                return -slopes * (query - key).abs().float()
            case "alibi of positions":
                return (self.slopes[:, None] * key).view(1, HEADS, 1, length)
            case "input":
                return bias
            case "one for all heads":
                return bias[:, 2]
            case "table":
                return self.table(key - query + LONGEST).permute(2, 0, 1)
            case "stored":
                return self.stored[:, :, :length, :length]
            case "twice":
                return 2 * bias * self.stored[:, :, :length, :length]
        return 2.0 * bias.double()


def example(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    x = torch.randn(2, HEADS, length, SIZE, generator=draw) * 2
    return x, torch.randn(1, HEADS, length, length, generator=draw)


def rewritten(kind: str) -> tuple[Any, Any]:
    length = torch.export.Dim("length", min=3, max=LONGEST - 1)
    shapes = ({2: length}, {2: length, 3: length})
    source = torch.export.export(Added(kind), example(LENGTHS[0]), dynamic_shapes=shapes)
    return source, swacompile.rewrite(source)


@pytest.mark.parametrize(
    ("kind", "operand"),
    {
        "alibi": "alibi_slopes",
        "alibi of absolute distance": "alibi_slopes",
        "alibi of positions": "alibi_slopes",
        "input": "bias",
        "one for all heads": "bias",
        "table": "bias",
        "stored": "bias",
        "twice": "bias",
    }.items(),
)
def test_added_to_scores(kind: str, operand: str) -> None:
    source, done = rewritten(kind)
    (replaced,) = done.replaced
    assert getattr(replaced, operand) is not None
    left = targets(done.program)
    assert left.count(OPERATOR) == 1 and "aten.softmax.int" not in left
    for length in LENGTHS:
        assert difference(source.module(), done.program.module(), example(length)) < MODEL_ATOL
        assert difference(source.module(), widened(done.program).module(), example(length)) > 1e-2


def test_a_bias_of_another_data_type_is_kept() -> None:
    _, done = rewritten("double")
    (outcome,) = done.outcomes
    assert isinstance(outcome, Refutation)


class Decoder(torch.nn.Module):
    """One token a call, written into a cache at a position that is an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(16, 3 * HEADS * SIZE)
        self.project.weight.data *= 6
        self.register_buffer("keys", torch.zeros(1, HEADS, CACHE, SIZE))
        self.register_buffer("values", torch.zeros(1, HEADS, CACHE, SIZE))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.view(1, 1, HEADS, SIZE).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        keys, values = self.keys.index_copy_(2, position, key), self.values.index_copy_(2, position, value)
        line = torch.arange(CACHE)
        mask = (line[None, :] > position[:, None] - WINDOW) & (line[None, :] <= position[:, None])
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def test_decoding_into_a_cache() -> None:
    source = torch.export.export(Decoder(), (torch.randn(1, 1, 16), torch.tensor([0])))
    done = swacompile.rewrite(source)
    (replaced,) = done.replaced
    assert replaced.offset is not None and replaced.left_window_size == WINDOW - 1
    modules = [program.module() for program in (source, done.program, widened(done.program))]

    wrong = 0.0
    for step in range(CACHE):
        values = (torch.randn(1, 1, 16), torch.tensor([step]))
        expected, found, wide = (module(*values) for module in modules)
        assert (found - expected).abs().max() < MODEL_ATOL
        wrong = max(wrong, float((wide - expected).abs().max()))
    assert wrong > 1e-2


class Padded(torch.nn.Module):
    """An encoder's attention, whose padding comes with all four axes."""

    def forward(self, x: torch.Tensor, padding: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        line = torch.arange(x.shape[2])
        mask = ((line[None, :] - line[:, None]).abs() <= WINDOW) & (padding & ~others[:, :, None])
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("batch", [1, 2])
def test_padding_of_four_axes(batch: int) -> None:
    """Two conditions on keys, which the model joins to one."""

    def inputs(length: int) -> tuple[torch.Tensor, ...]:
        x, draw = example(length)[0], torch.Generator().manual_seed(0)
        padding, others = torch.rand(batch, 1, 1, length, generator=draw) < 0.7, torch.zeros(2, 1, length).bool()
        padding[..., ::WINDOW], others[1, 0, 1::WINDOW] = True, True
        return x, padding, others

    length = torch.export.Dim("length", min=3, max=LONGEST - 1)
    source = torch.export.export(Padded(), inputs(LENGTHS[0]), dynamic_shapes=({2: length}, {3: length}, {2: length}))
    done = swacompile.rewrite(source)
    (replaced,) = done.replaced
    assert replaced.key_padding is not None and replaced.bias is None
    for length in LENGTHS:
        assert difference(source.module(), done.program.module(), inputs(length)) < MODEL_ATOL
        assert difference(source.module(), widened(done.program).module(), inputs(length)) > 1e-2
