import pytest

from swacompile.errors import TargetError
from swacompile.schedules.cuda.arch import CUDA_ARCHS
from swacompile.target import TARGETS, Target, TargetClass, cuda_target, host_targets, target_named

CUDA_ROWS = [target for target in TARGETS if target.target_class is TargetClass.CUDA]


@pytest.mark.parametrize("spelling", ["nvidia_h100", "nvidia-h100", "nvidia/nvidia-h100"])
def test_a_target_is_found_by_name_and_tag(spelling):
    assert target_named(spelling).name == "nvidia_h100"


def test_an_unknown_target_is_answered_with_those_known():
    with pytest.raises(TargetError, match=r"unknown target 'h1000': expected one of x86_64_v4, .*nvidia/nvidia-h100"):
        target_named("h1000")


@pytest.mark.parametrize("target", CUDA_ROWS, ids=lambda target: target.name)
def test_cuda_rows_agree_with_the_schedules(target: Target):
    assert target.cuda is not None
    assert target.cuda.shared_per_block == CUDA_ARCHS[target.cuda.arch].shared_per_block
    assert target.tvm["arch"] == target.cuda.arch


def test_a_device_finds_its_row_or_one_of_its_architecture():
    assert cuda_target("NVIDIA H200", (9, 0)).name == "nvidia_h200"
    assert cuda_target("NVIDIA H100 80GB HBM3", (9, 0)).name == "nvidia_h100"
    assert cuda_target("NVIDIA H800", (9, 0)).name == "nvidia_h100"
    assert cuda_target("NVIDIA L4", (8, 9)).name == "nvidia_l40s"
    with pytest.raises(TargetError, match=r"no kernels for Tesla T4 \(sm_75\): expected one of sm_100a, "):
        cuda_target("Tesla T4", (7, 5))


def test_this_machine_is_no_gpu():
    assert {target.target_class for target in host_targets()} == {TargetClass.CPU}


def test_an_onnx_model_is_not_compiled_for_a_gpu(run_cli, corpus, tmp_path):
    model = corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx"
    result = run_cli("compile", model, "-o", tmp_path / "out", "--target", "nvidia/nvidia-h100")
    assert result.code == 2
    assert "expected a CPU target, found nvidia_h100" in result.err
    assert not (tmp_path / "out").exists()


def test_targets_are_listed(run_cli):
    result = run_cli("targets")
    assert result.code == 0
    assert all(target.name in result.out for target in TARGETS)
