"""Real modelling code in bfloat16: a rewritten program is no worse than 1.5 times its source's own error against float32.

A router that chooses experts amplifies rounding: where two experts are nearly level, the last bit of bfloat16 decides between
them, before and after a rewrite as often, and the row's result is another. So all programs take the experts that the exact
one takes, weighted by their own logits.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import swacompile  # noqa: E402
from tests.frontends.test_fx_rewrite import LENGTH, LONG, Program, widened  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
DRAWS, TOKENS = 3, 100


class Hidden(torch.nn.Module):
    """A model with sharp weights, from token numbers to its last hidden state."""

    def __init__(self, model: "torch.nn.Module") -> None:
        super().__init__()
        self.model = model
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 6

    def forward(self, ids: "torch.Tensor") -> Any:
        return self.model(input_ids=ids, use_cache=False).last_hidden_state


def gpt_oss() -> "torch.nn.Module":
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_hidden_layers=2, sliding_window=6, layer_types=["sliding_attention", "full_attention"], vocab_size=TOKENS,
        pad_token_id=0, attn_implementation="eager", experts_implementation="batched_mm",
    )  # fmt: skip
    model = transformers.GptOssModel(config)
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def gpt_neo() -> "torch.nn.Module":
    """Its queries and keys are widened to float32 before their product."""
    config = transformers.GPTNeoConfig(
        num_layers=2, num_heads=4, hidden_size=32, attention_types=[[["global", "local"], 1]], window_size=5, vocab_size=TOKENS,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPTNeoModel(config)


def export(model: "torch.nn.Module") -> Program:
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % TOKENS
    length = torch.export.Dim.DYNAMIC(min=4, max=200)
    return torch.export.export(model, (ids,), dynamic_shapes=({1: length},), strict=False)


class Routed(torch.fx.Interpreter):
    """Runs a program; `taken` are the experts of each router in turn, which `given` prescribes."""

    def __init__(self, program: Program, given: Sequence["torch.Tensor"] = ()) -> None:
        super().__init__(program.module())
        self.given, self.taken = list(given), []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.aten.topk.default:
            return super().call_function(target, args, kwargs)
        experts = self.given[len(self.taken)] if self.given else super().call_function(target, args, kwargs)[1]
        self.taken.append(experts)
        return args[0].gather(-1, experts), experts


@dataclass(frozen=True, slots=True)
class Programs:
    exact: Program
    source: Program
    rewritten: Program


@pytest.fixture(scope="module", params=[gpt_oss, gpt_neo], ids=lambda make: make.__name__)
def programs(request: pytest.FixtureRequest) -> Programs:
    torch.manual_seed(0)
    half = Hidden(request.param()).eval().requires_grad_(False).bfloat16()
    source = export(half)
    done = swacompile.rewrite(source)
    assert len(done.replaced) == 1
    return Programs(export(copy.deepcopy(half).float()), source, done.program)


@pytest.mark.parametrize("length", [LENGTH, LONG])
def test_is_as_exact_as_its_source(programs: Programs, length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    wide = widened(programs.rewritten)
    for _ in range(DRAWS):
        ids = torch.randint(0, TOKENS, (2, length), generator=draw)
        exact = Routed(programs.exact)
        expected = exact.run(ids)
        own, found, wrong = (
            (Routed(program, exact.taken).run(ids).float() - expected).abs().max()
            for program in (programs.source, programs.rewritten, wide)
        )
        assert found <= 1.5 * own < wrong
