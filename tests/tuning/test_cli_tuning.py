"""The commands tune and records, as people and scripts see them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from swacompile.target import host_targets
from swacompile.tuning import store
from swacompile.tuning.record import Origin
from tests.tuning.records import HERE, config, record

WORKLOAD = "f32-d16-v16-g2-w32-n256-decode"


def test_dry_run_builds_nothing(run_cli, tmp_path):
    result = run_cli(
        "tune", "f32-d64-v64-g4-w128-n4096", "--target", "x86_64_v4", "--dry-run", "--records", tmp_path / "r"
    )
    assert result.code == 0
    assert "100800" in result.out and "13376" in result.out and "at most" in result.out
    assert "cpu_tiles:queries=16|32|48|" in result.out and ",score_vectors=1|2|3|4," in result.out
    assert not (tmp_path / "r").exists()


def test_a_model_gives_all_its_workloads(run_cli, corpus):
    result = run_cli("tune", corpus / "gpt_oss" / "onnx-sdpa-dyn-pad.onnx", "--dry-run", "--target", "x86_64_v4")
    assert "f32-d8-v8-g2-w16-n4096-key_padding-sinks " in result.out
    assert "f32-d8-v8-g2-w16-n4096-key_padding-sinks-decode " in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "not a workload"),
        (["missing.onnx"], "there is no such model file"),
        (["/"], "expected a .onnx or a .pt2 file, found a folder"),
        ([], "nothing to tune"),
        ([WORKLOAD, "--budget", "soon"], "not a time: 'soon'"),
        ([WORKLOAD, "--tracker", "127.0.0.1:1"], "--tracker and --key belong together"),
        ([WORKLOAD, "--tracker", "here", "--key", "k"], "not an address"),
        ([WORKLOAD, "--target", "toaster"], "unknown target 'toaster'"),
        (["--import-results", "none.jsonl"], "found no file"),
    ],
)
def test_mistakes(run_cli, tmp_path, arguments, words):
    result = run_cli("tune", *arguments, "--records", tmp_path)
    assert result.code == 2 and words in result.err


@pytest.mark.cpu
def test_interrupt_keeps_and_a_second_run_continues(tmp_path):
    records = tmp_path / "records"
    path = records / f"{host_targets()[0].name}.jsonl"
    command = [
        sys.executable,
        "-m",
        "swacompile",
        "tune",
        WORKLOAD,
        "--records",
        records,
        "--trials",
        "3",
        "--chart",
        tmp_path / "c.html",
    ]

    def listen() -> None:  # a shell's background job ignores SIGINT, and so would the child
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 120
    while not store.read(path).records and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    kept = store.read(path).records
    assert first.returncode == 130 and "interrupted: what was measured is kept" in out and kept
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0 and f"{WORKLOAD}: tuned on" in second.stdout
    found = store.read(path).records
    assert found[: len(kept)] == kept
    screened = [r.config for r in found if r.rung == 0]
    assert len(screened) == len(set(screened)) == 3
    assert "times as fast as the default" in second.stdout
    assert (tmp_path / "c.html").read_text().count("<svg") == 2
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_records_list_compare_prune_merge(run_cli, tmp_path):
    folder = tmp_path / "records"
    default, chosen = record(100.0, origin=Origin.DEFAULT), record(50.0, of=config(keys=48))
    dropped = [record(70.0, rung=0, of=config(keys=24)), record(90.0, of=config(keys=72), provenance=HERE)]
    store.append(folder / "x86_64_v4.jsonl", [*dropped, default, chosen])
    listed = run_cli("records", "list", "--records", folder, "--target", "x86_64_v4").out
    assert str(chosen.config) in listed and "50.0 us" in listed and "test device" in listed
    compared = run_cli("records", "compare", "--records", folder, "--target", "x86_64_v4").out
    assert "2.00" in compared and "keys=48" in compared
    assert "| 100 | 50.0 | 2.00 |" in run_cli("records", "markdown", "--records", folder, "--target", "x86_64_v4").out
    assert "2 of 4 records dropped" in run_cli("records", "prune", "--records", folder).out
    assert store.read(folder / "x86_64_v4.jsonl").records == (default, chosen)
    other = tmp_path / "other.jsonl"
    store.append(other, [chosen, record(10.0, workload="f32-d64-v64-g1-w16-n16")])
    assert "1 new records" in run_cli("records", "merge", other, "--records", folder).out
    assert "expected a file of records" in run_cli("records", "merge", tmp_path / "none", "--records", folder).err
    assert "nothing to merge" in run_cli("records", "merge", "--records", folder).err
    assert "unknown action" in run_cli("records", "burn", "--records", folder).err
