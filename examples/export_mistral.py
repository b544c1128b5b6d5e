"""Export a small Mistral-like decoder (random weights, transformers' own modelling code) to ONNX with dynamic batch and length."""

import argparse
import logging
import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import MistralConfig, MistralForCausalLM


class Decoder(torch.nn.Module):
    """Token ids and padding mask, both (batch, length), to logits (batch, length, vocabulary)."""

    def __init__(self, model: MistralForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def build(*, layers: int = 4, hidden: int = 1024, window: int = 64) -> MistralForCausalLM:
    """A decoder of these sizes. Query and key weights are scaled up so that attention depends on its input."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, head_dim=64, sliding_window=window, max_position_embeddings=32768,
        pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
                if "q_proj" in name or "k_proj" in name:
                    parameter.mul_(2)
    return model


def export(path: Path, **sizes: int) -> None:
    """Write the decoder with its weights as external data beside it."""
    model = Decoder(build(**sizes))
    ids = torch.ones(2, 32, dtype=torch.long)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (ids, torch.ones_like(ids)), dynamo=True, dynamic_shapes=(dynamic, dynamic), verbose=False
        )
    assert program is not None
    program.save(str(path), external_data=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--window", type=int, default=64)
    args = parser.parse_args()
    export(args.path, layers=args.layers, hidden=args.hidden, window=args.window)
