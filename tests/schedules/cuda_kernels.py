"""Kernels that stand for all: every family, both types, each feature, odd head sizes, each way of storing.

`python cuda_kernels.py FOLDER` builds them for sm_90a, for a GPU machine that has no compiler; see `cuda_device.py`.
"""

import sys
from pathlib import Path

from swacompile.kernels.build_cuda import build_kernels
from swacompile.report.bench_cuda import CASES, choice_of
from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cuda.arch import CUDA_ARCHS
from swacompile.schedules.cuda.choose import Shape, choose
from swacompile.schedules.cuda.spec import Config, Features, KernelSpec, MmaConfig, WgmmaConfig
from swacompile.target import target_named
from swacompile.tuning.database import Database


def kernel(
    head: int, value: int, config: Config, *features: str, dtype: str = "bfloat16", tf32: bool = False
) -> Kernel:
    switched = Features(**{name: True for name in features})
    spec = KernelSpec(dtype=dtype, head_size=head, value_size=value, features=switched, tf32=tf32)
    return Kernel(spec=spec, config=config)


def default(head: int, value: int, shape: Shape, *features: str, dtype: str = "bfloat16") -> Kernel:
    """With the tiles that the rules for sm_90a choose."""
    spec = kernel(head, value, MmaConfig(keys_per_tile=16), *features, dtype=dtype).spec
    return Kernel(spec=spec, config=choose(spec, CUDA_ARCHS["sm_90a"], shape))


def portable(head: int, value: int, shape: Shape, *features: str, dtype: str = "bfloat16") -> Kernel:
    """For sm_90a, with the tiles that the rules for sm_86 choose."""
    spec = kernel(head, value, MmaConfig(keys_per_tile=16), *features, dtype=dtype).spec
    return Kernel(spec=spec, config=choose(spec, CUDA_ARCHS["sm_86"], shape))


FEATURE_SETS = (
    ("sinks", "lse"),
    ("softcap", "lse"),
    ("key_padding", "lse"),
    ("segments", "key_padding"),
    ("bias", "lse"),
    ("alibi",),
    ("chunked",),
    ("zeroed", "key_padding"),
    ("zeroed", "lse"),
    ("sinks", "softcap", "key_padding", "segments", "bias", "alibi", "chunked", "lse"),
)
ANY, GROUP = Shape(), Shape(group=4)
PORTABLE = MmaConfig(keys_per_tile=64)

WGMMA_KERNELS = (
    *(default(64, 64, GROUP, *features) for features in FEATURE_SETS),
    default(128, 128, GROUP),
    default(128, 128, ANY, dtype="float16"),
    default(96, 96, ANY),
    default(80, 80, ANY),
    default(72, 40, GROUP),
    default(32, 32, GROUP, dtype="float16"),
    default(192, 128, GROUP),
    default(256, 256, Shape(group=2)),
    default(256, 256, ANY, "bias", "key_padding"),
    default(256, 256, Shape(group=2), "softcap"),
    default(256, 256, ANY, "segments", "lse", dtype="float16"),
    default(192, 192, GROUP, "chunked", "key_padding"),
    default(64, 64, Shape(group=8, band=128), "sinks"),
    default(64, 64, Shape(band=128), dtype="float16"),
    kernel(128, 64, WgmmaConfig(keys_per_tile=176, pack=2, polynomial_every=3)),
    kernel(
        64, 128, WgmmaConfig(keys_per_tile=128, query_stages=2, pingpong=False, polynomial_every=4), dtype="float16"
    ),
    default(128, 128, Shape(group=8), "split"),
    default(64, 64, GROUP, "split", "sinks", "lse", "key_padding"),
    default(256, 256, GROUP, "split", "softcap"),
)
MMA_KERNELS = (
    *(kernel(64, 64, PORTABLE, *features) for features in FEATURE_SETS),
    kernel(64, 64, MmaConfig(keys_per_tile=64, row_blocks=2, blocks_per_sm=2, pack=4)),
    portable(128, 128, ANY, dtype="float16"),
    portable(128, 128, GROUP),
    portable(96, 96, ANY, "sinks", "lse"),
    kernel(128, 64, MmaConfig(keys_per_tile=64, stages=3)),
    kernel(72, 40, PORTABLE),
    kernel(80, 80, PORTABLE),
    kernel(32, 32, PORTABLE),
    kernel(192, 128, MmaConfig(keys_per_tile=32)),
    kernel(256, 256, MmaConfig(keys_per_tile=32)),
    kernel(64, 64, PORTABLE, "split", "sinks", "lse"),
)
FLOAT32_KERNELS = (
    default(128, 128, GROUP, dtype="float32"),
    default(256, 256, ANY, dtype="float32"),
    default(
        64, 64, GROUP, "sinks", "softcap", "key_padding", "segments", "bias", "alibi", "chunked", "lse", dtype="float32"
    ),
    default(80, 40, ANY, "zeroed", "key_padding", "lse", dtype="float32"),
    default(64, 64, GROUP, "split", "sinks", "lse", dtype="float32"),
    kernel(64, 64, MmaConfig(keys_per_tile=32, row_blocks=2, pack=4), dtype="float32"),
    kernel(64, 64, MmaConfig(keys_per_tile=32, pack=4), "lse", dtype="float32", tf32=True),
    kernel(192, 128, MmaConfig(keys_per_tile=16, warps=2), dtype="float32", tf32=True),
)
FAMILIES = {"wgmma": WGMMA_KERNELS, "mma": MMA_KERNELS, "float32": FLOAT32_KERNELS}


def benchmarked() -> dict[str, tuple[Kernel, ...]]:
    """The default kernels of the benchmark's cases, each once, by the name of the first case that it serves."""
    target, nothing = target_named("nvidia/nvidia-h100"), Database(folders=())
    kernels: dict[Kernel, str] = {}
    for case in CASES:
        kernels.setdefault(choice_of(case, target, nothing).default, case.name)
    return {name: (kernel,) for kernel, name in kernels.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for family, kernels in (FAMILIES | benchmarked()).items():
        built = build_kernels(kernels, CUDA_ARCHS["sm_90a"], folder / f"{family}.so")
        (folder / f"{family}.cubin").write_bytes(built.cubin)
        for report in built.reports:
            print(family, report.kernel, report.registers, "registers", report.spill_bytes, "bytes of spills")


if __name__ == "__main__":
    main()
