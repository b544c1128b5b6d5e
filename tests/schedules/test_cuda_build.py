"""Builds CUDA kernels without a GPU, and checks what can be: machine code, registers, spills, instructions."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from swacompile.runtime.cuda.library import Kernel, manifest_path
from swacompile.schedules.cuda.arch import CUDA_ARCHS
from swacompile.schedules.cuda.choose import Shape, choose
from swacompile.schedules.cuda.spec import Features, KernelSpec, MmaConfig

pytest.importorskip("tvm")
if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
    pytest.skip("building CUDA kernels needs nvcc", allow_module_level=True)

from swacompile.kernels.build_cuda import BuiltLibrary, CudaBuildError, build_kernels, parse_ptxas

pytestmark = pytest.mark.cpu
ELF_CUDA = 190
MEANT = {"wgmma": ("HGMMA", "UTMALDG"), "mma": ("HMMA", "LDGSTS", "LDSM")}
MEANT_TEXT = {
    "wgmma": ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"),
    "mma": ("mma.sync", "cp.async.cg", "ldmatrix"),
}


def spec(size: int, *features: str, dtype: str = "bfloat16") -> KernelSpec:
    switched = Features(**dict.fromkeys(features, True))
    return KernelSpec(dtype=dtype, head_size=size, value_size=size, features=switched)


def build(specs: list[KernelSpec], arch: str, folder: Path, shape: Shape) -> BuiltLibrary:
    kernels = [Kernel(spec=s, config=choose(s, CUDA_ARCHS[arch], shape)) for s in specs]
    return build_kernels(kernels, CUDA_ARCHS[arch], folder / f"{arch}.so")


def check(built: BuiltLibrary, family: str) -> None:
    assert int.from_bytes(built.cubin[18:20], "little") == ELF_CUDA
    assert built.cubin[:64] in built.path.read_bytes(), "the library holds other machine code than ptxas made"
    for report in built.reports:
        assert (report.spill_bytes, report.stack_bytes, report.warnings) == (0, 0, ()), report
        assert 0 < report.registers <= 255
    for text in MEANT_TEXT[family]:
        assert text in built.source
    if shutil.which("cuobjdump"):
        cubin = built.path.with_suffix(".cubin")
        cubin.write_bytes(built.cubin)
        sass = subprocess.run(["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
        assert all(instruction in sass for instruction in MEANT[family])
        assert not re.search(r"\b(STL|LDL)\b", sass), "registers went to local memory"


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_each_family_builds_for_each_architecture(arch: str, tmp_path: Path) -> None:
    specs = [
        spec(64),
        spec(128, "lse"),
        spec(80, "sinks", "key_padding", dtype="float16"),
        spec(64, "split", dtype="float16"),
    ]
    check(build(specs, arch, tmp_path, Shape(group=4)), CUDA_ARCHS[arch].families[0])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_float32_is_multiplied_as_tf32(arch: str, tmp_path: Path) -> None:
    specs = [spec(64, dtype="float32"), KernelSpec(dtype="float32", head_size=128, value_size=128, tf32=True)]
    built = build(specs, arch, tmp_path, Shape(group=4))
    check(built, "mma")
    assert "f32.tf32.tf32.f32" in built.source


def test_every_feature_builds_for_hopper(tmp_path: Path) -> None:
    names = ("sinks", "softcap", "key_padding", "segments", "bias", "alibi", "chunked", "lse")
    specs = [
        spec(64, *names),
        spec(96, "zeroed", "key_padding"),
        spec(256, "bias"),
        spec(256),
    ]
    check(build(specs, "sm_90a", tmp_path, Shape()), "wgmma")


def test_the_manifest_says_what_was_built(tmp_path: Path) -> None:
    built = build([spec(32)], "sm_80", tmp_path, Shape(group=2))
    text = manifest_path(built.path).read_text()
    assert '"arch": "sm_80"' in text and '"head_size": 32' in text and '"family": "mma"' in text


def test_a_library_for_another_gpu_says_so_instead_of_crashing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from swacompile.runtime.cuda.library import CudaLibrary, CudaRuntimeError

    built = build([spec(32)], "sm_80", tmp_path, Shape())
    library = CudaLibrary(built.path)
    with pytest.raises(CudaRuntimeError, match="GPU 0 does not answer"):
        library.check_device(0)
    with pytest.raises(CudaRuntimeError, match="holds no kernel swa_bf16_d64_v64: build it first"):
        library.find(spec(64))


def test_ptxas_report_is_read() -> None:
    log = """ptxas info    : Compiling entry function 'a_kernel' for 'sm_90a'
ptxas info    : Function properties for a_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""
    (report,) = parse_ptxas(log)
    assert (report.kernel, report.registers, report.stack_bytes, report.spill_bytes) == ("a_kernel", 168, 16, 20)
    assert (report.barriers, report.shared_bytes) == (3, 1024)
    assert "C7512" in report.warnings[0]
    with pytest.raises(CudaBuildError, match="said nothing on b's registers"):
        parse_ptxas("Compiling entry function 'b' for 'sm_80'\n")


def test_a_spilling_config_is_told(tmp_path: Path) -> None:
    kernel = Kernel(spec=spec(128), config=MmaConfig(keys_per_tile=96, row_blocks=2))
    built = build_kernels([kernel], CUDA_ARCHS["sm_80"], tmp_path / "spills.so")
    assert built.reports[0].spill_bytes > 0


HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
FEATURES: tuple[tuple[str, ...], ...] = (
    (),
    ("sinks",),
    ("softcap",),
    ("key_padding",),
    ("segments",),
    ("bias",),
    ("alibi",),
    ("chunked",),
    ("zeroed",),
    ("split",),
    ("sinks", "softcap", "key_padding", "segments", "bias", "alibi", "chunked", "lse"),
    ("split", "sinks", "softcap", "key_padding", "lse"),
    ("zeroed", "key_padding", "sinks", "lse"),
)


@pytest.mark.cuda_matrix
@pytest.mark.parametrize(("arch", "size"), list(itertools.product(CUDA_ARCHS, HEAD_SIZES)))
def test_matrix(arch: str, size: int, tmp_path: Path) -> None:
    specs = [spec(size, *names) for names in FEATURES] + [spec(size, dtype="float16")]
    check(
        build([spec(size, dtype="float32"), spec(size, "split", dtype="float32")], arch, tmp_path, Shape(group=4)),
        "mma",
    )
    check(build(specs, arch, tmp_path, Shape(group=4)), CUDA_ARCHS[arch].families[0])
