"""Layers of real sizes, exported, rewritten and timed: `python examples/torch_models.py mistral [--device cpu] [--kernels LIBRARY]`.

Modelling code is transformers', weights are random bfloat16, two windowed layers. Prints for the program before and after, eager and
with torch.compile, and for torch.compile(model, backend="swacompile"): median time of a call, peak memory beside weights and inputs,
and the time in attention's kernels.
Without a GPU (`--device cpu`) sizes are small, to show the way only. `--kernels` loads a CUDA kernel library where TVM is not
installed, with TVM's runtime beside it.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import swacompile
import swacompile.torch as swacompile_torch

ATTENTION = ("swa_", "fmha", "flash", "attention", "softmax")
"""Parts of the names of kernels that are attention's; its products in an eager program are not told from others."""


class Hidden(nn.Module):
    """A model from token numbers to its last hidden state."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, **self.options).last_hidden_state
        return found


class DenseExperts(nn.Module):
    """The arithmetic of the four experts that gpt-oss takes for a token, as one dense layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 8 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        gate, up = self.up(x).chunk(2, -1)
        return self.down((up + 1) * gate * torch.sigmoid(gate * 1.702)), None


def mistral(small: bool) -> tuple[nn.Module, tuple[int, int]]:
    sizes = (256, 512, 8, 2, 64) if small else (4096, 14336, 32, 8, 4096)
    hidden, intermediate, heads, kv_heads, window = sizes
    config = transformers.MistralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=128, num_hidden_layers=2, sliding_window=window, vocab_size=1024, attn_implementation="sdpa",
    )  # fmt: skip
    return Hidden(transformers.MistralModel(config), use_cache=False), (1, 256 if small else 16384)


def modernbert(small: bool) -> tuple[nn.Module, tuple[int, int]]:
    """Two of ModernBERT-base's local layers."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256} if small else {}
    config = transformers.ModernBertConfig(
        num_hidden_layers=2, layer_types=["sliding_attention"] * 2, vocab_size=1024, attn_implementation="sdpa",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **sizes,
    )  # fmt: skip
    return Hidden(transformers.ModernBertModel(config)), (8, 256 if small else 8192)


def gpt_oss(small: bool) -> tuple[nn.Module, tuple[int, int]]:
    """Two of gpt-oss-20b's local layers with sinks; its experts are a dense layer of the same arithmetic."""
    hidden, heads, kv_heads, window = (256, 16, 2, 32) if small else (2880, 64, 8, 128)
    config = transformers.GptOssConfig(
        hidden_size=hidden, intermediate_size=64, num_local_experts=4, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=64, num_hidden_layers=2, sliding_window=window, vocab_size=1024,
        layer_types=["sliding_attention"] * 2, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GptOssModel(config)
    for layer in model.layers:
        layer.mlp = DenseExperts(hidden)
        nn.init.normal_(layer.self_attn.sinks)
    return Hidden(model, use_cache=False), (1, 256 if small else 8192)


MODELS = {"mistral": mistral, "modernbert": modernbert, "gpt-oss": gpt_oss}


def make(name: str, device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model, shape = MODELS[name](device == "cpu")
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False), torch.randint(3, 1000, shape, device=device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[Tensor], Tensor], ids: Tensor, calls: int = 10) -> float:
    """Median of calls that are waited for."""
    times = []
    for _ in range(calls + 2):
        wait(ids.device.type)
        start = time.perf_counter()
        run(ids)
        wait(ids.device.type)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def peak_mib(run: Callable[[Tensor], Tensor], ids: Tensor) -> float | None:
    """Most memory that one call takes beyond what is there before it; None on a CPU."""
    if ids.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(ids)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(run: Callable[[Tensor], Tensor], ids: Tensor) -> list[tuple[float, int, str]]:
    """Milliseconds, launches and name of the kernels of one call, longest first; empty on a CPU."""
    if ids.device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run(ids)
        torch.cuda.synchronize()
    rows = [(event.self_device_time_total / 1e3, event.count, event.key) for event in recorded.key_averages()]
    return sorted((row for row in rows if row[0] > 0), reverse=True)


def measure(run: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Any]:
    run(ids)
    found = {"ms": milliseconds(run, ids), "again_ms": milliseconds(run, ids), "peak_mib": peak_mib(run, ids)}
    rows = kernels(run, ids)
    attention = sum(row[0] for row in rows if any(part in row[2].lower() for part in ATTENTION))
    return found | {"kernels_ms": sum(row[0] for row in rows), "attention_ms": attention, "longest": rows[:8]}


def difference(before: nn.Module, after: nn.Module, ids: Tensor) -> float:
    """||after - before|| / ||before|| of the results."""
    expected = before(ids).float()
    return float((after(ids).float() - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.kernels:
        swacompile_torch.add_cuda_kernels(given.kernels, given.kernels.parent)
    model, ids = make(given.model, given.device)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), strict=False)
        done = swacompile.rewrite(program)
        assert isinstance(done.program, torch.export.ExportedProgram)
        before, after = program.module(), done.program.module()
        count = swacompile_torch.call_count()
        after(ids)
        print(
            f"{given.model} {tuple(ids.shape)}: {len(done.replaced)} attentions replaced, {swacompile_torch.call_count() - count} kernels "
            f"ran, results differ by {difference(before, after, ids):.2e}; torch {torch.__version__}",
            flush=True,
        )
        runs = {
            "before": before,
            "after": after,
            "before, compiled": torch.compile(before),
            "after, compiled": torch.compile(after),
            "the model itself": torch.compile(model, backend="swacompile"),
        }
        report = {}
        for name, run in runs.items():
            found = report[name] = measure(run, ids)
            print(
                f"{name:16s} {found['ms']:9.3f} ms (again {found['again_ms']:.3f}), peak {found['peak_mib'] or 0:8.1f} MiB, "
                f"attention {found['attention_ms']:.3f} of {found['kernels_ms']:.3f} ms",
                flush=True,
            )
            for row in found["longest"][:6]:
                print(f"    {row[0]:9.3f} ms {row[1]:4d} x {row[2][:100]}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
