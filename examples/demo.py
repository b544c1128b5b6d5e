"""Export a sliding-window decoder, compile it, and run both in ONNX Runtime: what was found, how it was proven, what it gains.

python examples/demo.py                      # 4 layers, hidden size 1024, window 64, length 2048
python examples/demo.py --lengths 128 512 2048 4096 --json times.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from export_mistral import export

import swacompile
from swacompile.attention import BandProof
from swacompile.runtime.ort_library import call_count

PAUSE_SECONDS = 0.1
LEAST_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, "mistral.onnx"), Path(folder, "mistral.swa")
        print("exporting a 4-layer Mistral-like decoder, hidden size 1024", flush=True)
        export(source, layers=4, hidden=1024, window=args.window)
        print_findings(swacompile.inspect(source))
        print("compiling", flush=True)
        swacompile.compile(source, compiled)
        rows = [compare(source, compiled, length, args.rounds) for length in args.lengths]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def print_findings(inspection: swacompile.Inspection) -> None:
    print(f"found {len(inspection.findings)} attention layers")
    for finding in inspection.findings:
        if isinstance(finding.verdict, BandProof):
            mask, sizes = finding.verdict.mask, ", ".join(finding.verdict.valid_for) or "all sizes"
            print(
                f"  {finding.node}: window {mask} = {(mask.left or 0) + 1} keys, proven by {finding.verdict.method} for {sizes}"
            )
        else:
            print(f"  {finding.node}: {finding.verdict.reason}")


def compare(source: Path, compiled: Path, length: int, rounds: int) -> dict[str, Any]:
    """Median times of the exported and the compiled model, taken in turn, and the largest difference of their outputs.

    `portable` is the compiled model's file without the kernel library, as any ONNX runtime runs it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    before = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    portable = onnxruntime.InferenceSession(str(compiled / "model.onnx"), options, providers=["CPUExecutionProvider"])
    after = swacompile.load(compiled)
    ids = np.random.default_rng(0).integers(0, 1024, (1, length))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    library = compiled / "libswacompile_ort.so"
    calls = call_count(library)
    expected, result = before.run(None, feeds)[0], next(iter(after.run(feeds).values()))
    layers = len(after.manifest["replaced"])
    assert call_count(library) == calls + layers, "the banded kernel did not run"
    contenders: dict[str, Callable[[], object]] = {
        "before": lambda: before.run(None, feeds),
        "portable": lambda: portable.run(None, feeds),
        "after": lambda: after.run(feeds),
    }
    times = paired(contenders, rounds)
    row = {
        "length": length, **{f"{name}_ms": 1e3 * statistics.median(taken) for name, taken in times.items()},
        "speed_up": statistics.median(b / a for b, a in zip(times["before"], times["after"], strict=True)),
        "largest_difference": float(np.abs(result - expected).max()), "largest_output": float(np.abs(expected).max()),
    }  # fmt: skip
    print(
        f"length {length:5d}: before {row['before_ms']:8.1f} ms, after {row['after_ms']:8.1f} ms, speed-up {row['speed_up']:.2f}x "
        f"(without the kernel library {row['portable_ms']:.1f} ms), "
        f"largest difference {row['largest_difference']:.1e} (outputs up to {row['largest_output']:.1f})",
        flush=True,
    )
    return row


def paired(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a run of each contender, in turn in every round, so that both meet the same state of the machine.

    The pause lets the other session's threads, which spin for a while after a run, go to sleep; the first run after it is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            run()
            start, runs = time.perf_counter(), 0
            while runs == 0 or time.perf_counter() - start < LEAST_SECONDS:
                run()
                runs += 1
            times[name].append((time.perf_counter() - start) / runs)
    return times


if __name__ == "__main__":
    main()
