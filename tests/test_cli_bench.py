"""The command bench, as people and scripts see it."""

import json

import pytest

from swacompile import cli_bench
from swacompile.target import target_named

WORKLOAD = "f32-d16-v16-g2-w16-n64"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to time"),
        (["nonsense"], "or a model file (.onnx, .pt2), or a set: prefill, short, decode"),
        (["missing.onnx"], "missing.onnx"),
        (["f32-d16-v16-g1-w16-n64-alibi"], "no peers for alibi"),
        (["bf16-d16-v16-g1-w16-n64"], "no peers for bf16"),
        ([WORKLOAD, "--target", "toaster"], "unknown target 'toaster'"),
        ([WORKLOAD, "--target", "aarch64_neon"], "expected a target that this machine runs"),
        ([WORKLOAD, "--contender", "fish"], "no contender 'fish'"),
        (["--plot", "picture.gif"], ".svg or .png, found '.gif'"),
        (["--plot", "no-such-folder/picture.svg"], "the folder no-such-folder does not exist"),
        (["--plot", "picture.svg", "--target", "cuda"], "--plot draws CPU kernels"),
        (["f32-d60000-v16-g1-w16-n64"], "more than 65536 bytes of scratch"),
    ],
)
def test_mistakes(run_cli, tmp_path, arguments, words):
    result = run_cli("bench", *arguments, "--records", tmp_path)
    assert result.code == 2 and words in result.err


@pytest.mark.parametrize("target", ["cuda", "nvidia/nvidia-h100"])
def test_cuda_needs_a_device(run_cli, monkeypatch, target):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_cli("bench", "--target", target)
    assert result.code == 2 and "expected a CUDA device" in result.err


@pytest.fixture
def gpu(monkeypatch):
    """A device as torch describes it."""
    torch = pytest.importorskip("torch")

    def describe(name, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return describe


@pytest.mark.parametrize(
    ("device", "capability", "name", "target"),
    [
        ("NVIDIA H200", (9, 0), "cuda", "nvidia/nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "cuda", "nvidia/nvidia-h100"),
        ("NVIDIA H200", (9, 0), "nvidia/nvidia-h100", "nvidia/nvidia-h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "cuda", "nvidia/nvidia-a100"),
    ],
)
def test_cuda_is_the_target_of_the_device(gpu, device, capability, name, target):
    gpu(device, capability)
    assert cli_bench._cuda_device(name) == (device, target_named(target))


def test_cuda_refuses_kernels_that_the_device_does_not_run(run_cli, gpu):
    gpu("NVIDIA H200", (9, 0))
    result = run_cli("bench", "--target", "nvidia/nvidia-a100")
    assert result.code == 2 and "built for sm_80, the device is NVIDIA H200: name nvidia/nvidia-h200" in result.err
    gpu("NVIDIA T4", (7, 5))
    assert "no kernels for NVIDIA T4 (sm_75)" in run_cli("bench", "--target", "cuda").err


def test_a_model_without_windows(run_cli, corpus):
    result = run_cli("bench", corpus / "longformer" / "ts-sdpa-dyn-pad.onnx")
    assert result.code == 2 and "no attention has a window" in result.err


@pytest.mark.cpu
def test_document(run_cli, tmp_path):
    result = run_cli(
        "bench", WORKLOAD, "--json", "--contender", "dense", "--seconds", 0, "--threads", 1, "--threads", 2
    )
    assert result.code == 0
    document = json.loads(result.out)
    assert document["machine"]["cores"] >= 1
    rows = document["rows"]
    assert [(row["contender"], row["threads"]) for row in rows] == [
        ("swacompile", 1), ("ORT dense", 1), ("swacompile", 2), ("ORT dense", 2),
    ]  # fmt: skip
    assert all(row["median"] > 0 and not row["refused"] for row in rows)


@pytest.mark.cpu
def test_table_of_a_model(run_cli, corpus):
    model = corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx"
    result = run_cli("bench", model, "--length", 64, "--contender", "dense", "--seconds", 0)
    assert result.code == 0
    assert "| 4/2 heads, D 8, 64 x 64, window 5, key padding | 1 | swacompile |" in result.out
    assert "1 x 64, window 5" in result.out and "the fastest peer, ORT dense" in result.out


def test_cuda_cases_are_named_by_the_type_they_run_in():
    pytest.importorskip("torch")
    (case,) = cli_bench._cuda_cases("f32-d64-v64-g4-w512-n2048", None)
    assert (case.name, case.left, case.keys) == ("bf16-d64-v64-g4-w512-n2048", 511, 2048)
