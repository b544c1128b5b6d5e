"""Torch programs compiled for a GPU, on a machine without one: kernels, files, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import swacompile  # noqa: E402  after the check for torch
from swacompile import torch_pipeline  # noqa: E402
from swacompile.attention import Refutation  # noqa: E402
from swacompile.errors import ArtifactError  # noqa: E402
from swacompile.runtime.torch_op.cuda_program import kernels_of  # noqa: E402
from swacompile.schedules.cuda.arch import CUDA_ARCHS  # noqa: E402
from swacompile.target import target_named  # noqa: E402

pytestmark = pytest.mark.torch

H100 = "nvidia/nvidia-h100"
HAS_NVCC = shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


class Layers(torch.nn.Module):
    """Attentions over the last `windows` keys, one after another; 8 query heads and 2 key heads."""

    def __init__(self, *windows: int, size: int = 64) -> None:
        super().__init__()
        self.windows, self.size = windows, size
        self.inside = torch.nn.Linear(32, 12 * size)
        self.outside = torch.nn.Linear(8 * size, 32)

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        place = torch.arange(x.shape[1], device=x.device)
        for window in self.windows:
            heads = self.inside(x).unflatten(-1, (12, self.size)).transpose(1, 2)
            query, key, value = heads[:, :8], heads[:, 8:10], heads[:, 10:]
            mask = (place <= place[:, None]) & (place > place[:, None] - window)
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
            x = self.outside(output.transpose(1, 2).flatten(2))
        return x


def exported(model: "torch.nn.Module", dtype: "torch.dtype") -> "torch.export.ExportedProgram":
    x = torch.randn(1, 40, 32, dtype=dtype)
    return torch.export.export(model.to(dtype).eval(), (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2)},))


def test_one_kernel_serves_several_bands_with_the_tiles_of_the_widest() -> None:
    program = torch_pipeline.rewrite(exported(Layers(8, 700), torch.bfloat16)).program
    assert program is not None
    found = kernels_of(program, CUDA_ARCHS["sm_90a"])
    assert [kernel.spec.symbol for kernel in found] == ["swa_bf16_d64_v64", "swa_bf16_d64_v64_split"]
    alone = torch_pipeline.rewrite(exported(Layers(700), torch.bfloat16)).program
    assert alone is not None and kernels_of(alone, CUDA_ARCHS["sm_90a"]) == found
    narrow = torch_pipeline.rewrite(exported(Layers(8), torch.bfloat16)).program
    assert narrow is not None and kernels_of(narrow, CUDA_ARCHS["sm_90a"]) != found


def test_what_has_no_kernel_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(Layers(8, size=20), torch.float16), path)
    done = torch_pipeline.compile(path, tmp_path / "out", targets=(target_named(H100),))
    assert done.manifest is None and not (tmp_path / "out").exists()
    (refused,) = done.rewrite.outcomes
    assert isinstance(refused, Refutation) and refused.code == "head-size"
    assert "head_size must be a multiple of 8" in refused.reason


@pytest.mark.cpu
@pytest.mark.skipif(not HAS_NVCC, reason="building CUDA kernels needs nvcc")
def test_a_folder_for_a_gpu_needs_none_to_be_made(run_cli: Callable[..., object], tmp_path: Path) -> None:
    path, out = tmp_path / "model.pt2", tmp_path / "out"
    torch.export.save(exported(Layers(8), torch.float16), path)
    run_cli("compile", path, "-o", out, "--target", H100)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["targets"] == ["nvidia_h100"]
    assert manifest["kernels"] == ["swa_f16_d64_v64_sm_90a", "swa_f16_d64_v64_split_sm_90a"]
    runtime = {"libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so"}
    assert runtime | {"model.pt2", "libswacompile_cuda_sm_90a.so", "libswacompile_cuda_sm_90a.json"} <= set(
        manifest["sha256"]
    )
    if not torch.cuda.is_available():
        with pytest.raises(
            ArtifactError, match="it was compiled for sm_90a, expected a GPU and a torch built with CUDA"
        ):
            swacompile.load(out)
