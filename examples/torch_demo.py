"""Export a sliding-window decoder with torch.export, replace its attention, and run both: what is found and what it gains.

python examples/torch_demo.py                  # 4 layers, hidden size 1024, window 64, length 2048, on the CPU
python examples/torch_demo.py --device cuda --dtype bfloat16 --lengths 2048 16384
"""

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
from demo import paired
from export_mistral import Decoder, build

import swacompile
import swacompile.torch as swacompile_torch
from swacompile.attention import Refutation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"exporting a 4-layer Mistral-like decoder, hidden size 1024, torch {torch.__version__}", flush=True)
    model = Decoder(build(layers=4, hidden=1024, window=args.window)).to(args.device, getattr(torch, args.dtype))
    source = export(model, args.device)
    done = swacompile.rewrite(source)
    for outcome in done.outcomes:
        print(f"  {outcome.reason if isinstance(outcome, Refutation) else f'window {outcome.proof.mask}, replaced'}")
    assert isinstance(done.program, torch.export.ExportedProgram)
    before, after = source.module(), done.program.module()
    for length in args.lengths:
        ids = torch.arange(length, device=args.device)[None] * 37 % 1024
        values = (ids, torch.ones_like(ids))
        check(before, after, values, layers=len(done.replaced))
        compare("as it is", before, after, values, args.rounds)
        compare("torch.compile", torch.compile(before), torch.compile(after), values, args.rounds)


def export(model: torch.nn.Module, device: str) -> torch.export.ExportedProgram:
    ids = torch.ones(2, 32, dtype=torch.long, device=device)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (ids, torch.ones_like(ids)), dynamic_shapes=(dynamic, dynamic))


Run = Callable[..., torch.Tensor]


def check(before: Run, after: Run, values: tuple[torch.Tensor, ...], *, layers: int) -> None:
    calls = swacompile_torch.call_count()
    result = after(*values)
    assert swacompile_torch.call_count() == calls + layers, "the banded kernel did not run"
    expected = before(*values)
    gap, size = (float(part.abs().max()) for part in ((result - expected).float(), expected.float()))
    print(f"length {values[0].shape[1]}: largest difference {gap:.1e} (outputs up to {size:.1f})", flush=True)


def compare(name: str, before: Run, after: Run, values: tuple[torch.Tensor, ...], rounds: int) -> None:
    """Median times, taken in turn."""

    def waited(run: Run) -> Callable[[], None]:
        def once() -> None:
            run(*values)
            if values[0].is_cuda:
                torch.cuda.synchronize()

        return once

    times = paired({"before": waited(before), "after": waited(after)}, rounds)
    medians = {part: 1e3 * statistics.median(found) for part, found in times.items()}
    speed_up = statistics.median(b / a for b, a in zip(times["before"], times["after"], strict=True))
    print(
        f"  {name:13s} before {medians['before']:8.1f} ms, after {medians['after']:8.1f} ms, speed-up {speed_up:.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
