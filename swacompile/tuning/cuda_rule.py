"""The CUDA kernels as tunable rules, one a family. A Config has the fields of the family's dataclass in schedules.cuda.spec."""

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cuda.arch import CUDA_ARCHS, CudaArch
from swacompile.schedules.cuda.choose import Shape, choose
from swacompile.schedules.cuda.spec import Config as CudaConfig
from swacompile.schedules.cuda.spec import Features, KernelSpec, MmaConfig, WgmmaConfig
from swacompile.target import CudaLimits, Target
from swacompile.tuning.config import Config
from swacompile.tuning.space import Parameter, Space
from swacompile.workload import Feature, Workload

_CLASSES: Mapping[str, type[Any]] = {"wgmma": WgmmaConfig, "mma": MmaConfig}
# What may be tried, in an order in which neighbours behave alike. A field that is not listed keeps the default's value.
_AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "wgmma": {
        "keys_per_tile": (32, 48, 64, 80, 96, 112, 128, 160, 176),
        "consumers": (1, 2, 3),
        "key_stages": (2, 3, 4),
        "value_stages": (2, 3, 4),
        "query_stages": (1, 2, 3),
        "pack": (1, 2, 4, 8, 16),
        "blocks_per_sm": (1, 2, 3),
        "pingpong": (0, 1),
        "overlap": (0, 1),
        "query_steps": (0, 2, 4, 6, 8),
        "tail_keys": (0, 32, 64),
        "stage_output": (0, 1),
    },
    "mma": {
        "keys_per_tile": (16, 32, 48, 64, 96, 128),
        "warps": (4, 8),
        "row_blocks": (1, 2),
        "stages": (2, 3, 4),
        "pack": (1, 2, 4, 8, 16),
        "blocks_per_sm": (1, 2, 3),
    },
}
# Few queries: many bytes under way count, and a tile holds a whole group.
_DECODE_AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "wgmma": {
        "keys_per_tile": (32, 48, 64, 96, 128),
        "key_stages": (2, 3, 4, 6),
        "value_stages": (2, 3, 4, 6),
        "pack": (1, 2, 4, 8, 16, 32),
        "blocks_per_sm": (1, 2, 3),
    },
    "mma": {
        "keys_per_tile": (16, 32, 48, 64, 96, 128),
        "warps": (2, 4, 8),
        "stages": (2, 3, 4),
        "pack": (1, 2, 4, 8, 16, 32),
        "blocks_per_sm": (1, 2, 3),
    },
}
_SPARE_REGISTERS = 24
"""Of a thread, for addresses, row sums and loop counters: less than what any kernel was seen to need."""
_SOURCES = Path(__file__).parents[1] / "schedules" / "cuda"
_NOT_KERNELS = {
    "wgmma": ("arch.py", "choose.py", "mma.py", "fragments.py"),
    "mma": ("arch.py", "choose.py", "wgmma.py"),
}
"""Files that say which kernel is chosen, or are another family's: times stay comparable when these change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaTilesRule:
    """Tiles, stages and warps of one family of CUDA kernels: of the family that is the default for a workload."""

    name: str

    def applies(self, workload: Workload, target: Target) -> bool:
        default = default_kernel(workload, target)
        return default is not None and default.family == self.name

    def default(self, workload: Workload, target: Target) -> Config:
        kernel = default_kernel(workload, target)
        if kernel is None:
            raise ValueError(f"no CUDA kernel for {workload} on {target.name}")
        return config_of(kernel.config)

    def space(self, workload: Workload, target: Target) -> Space:
        base = self.default(workload, target)
        axes = (_DECODE_AXES if Feature.DECODE in workload.features else _AXES)[self.name]

        def refusal(config: Config) -> str | None:
            return refuse(config, workload, target)

        return Space(
            base=base,
            parameters=tuple(Parameter(name=name, values=axes[name]) for name, _ in base.values if name in axes),
            refusal=refusal,
        )

    def completed(self, config: Config) -> Config | None:
        if config.rule != self.name:
            return None
        earlier = {
            field.name: int(field.default) for field in fields(_CLASSES[self.name]) if field.default is not MISSING
        }
        try:
            return config_of(cuda_config(Config.of(self.name, earlier | config.as_dict())))
        except ValueError:
            return None

    def function_name(self, workload: Workload, target: Target) -> str:
        return spec_of(workload).symbol

    def build(self, workload: Workload, config: Config, target: Target, library: Path) -> None:
        """Raises CudaBuildError, also for a kernel whose registers do not suffice: it would use local memory."""
        from swacompile.kernels.build_cuda import CudaBuildError, build_kernels

        kernel = Kernel(spec=spec_of(workload), config=cuda_config(config))
        built = build_kernels([kernel], arch_of(target), library)
        spilled = sum(report.spill_bytes for report in built.reports)
        if spilled:
            library.unlink()
            raise CudaBuildError(f"registers do not suffice: {spilled} bytes are spilled")

    def revision(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(_SOURCES.glob("*.py")):
            if path.name not in _NOT_KERNELS[self.name]:
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:12]


def default_kernel(workload: Workload, target: Target) -> Kernel | None:
    """The kernel that the analytical model chooses; None where CUDA has none for the workload."""
    if target.cuda is None:
        return None
    try:
        spec = spec_of(workload)
        shape = Shape(group=workload.group, band=workload.window)
        return Kernel(spec=spec, config=choose(spec, arch_of(target), shape))
    except ValueError:
        return None


def spec_of(workload: Workload) -> KernelSpec:
    """What the kernel computes; one for few queries splits the keys. Raises ValueError where CUDA has no such kernel."""
    known = {field.name for field in fields(Features)}
    switched = {str(feature): True for feature in workload.features if str(feature) in known}
    return KernelSpec(
        dtype=workload.dtype.long_name,
        head_size=workload.head_size,
        value_size=workload.value_size,
        features=Features(**switched, split=Feature.DECODE in workload.features),
    )


def arch_of(target: Target) -> CudaArch:
    return CUDA_ARCHS[_limits(target).arch]


def config_of(config: CudaConfig) -> Config:
    family = next(name for name, kind in _CLASSES.items() if isinstance(config, kind))
    return Config.of(family, {name: int(value) for name, value in asdict(config).items()})


def cuda_config(config: Config) -> CudaConfig:
    """Raises ValueError where the Config has other names than the family's dataclass, or values that it refuses."""
    kind = _CLASSES.get(config.rule)
    expected = [(field.name, field.type) for field in fields(kind)] if kind is not None else []
    values = config.as_dict()
    if kind is None or sorted(values) != sorted(name for name, _ in expected):
        raise ValueError(f"expected {config.rule} with {', '.join(name for name, _ in expected)}, found {config}")
    made: CudaConfig = kind(**{name: bool(values[name]) if of is bool else values[name] for name, of in expected})
    return made


def refuse(config: Config, workload: Workload, target: Target) -> str | None:
    """Why a kernel with this Config cannot be built within the target's limits, or is another one by another name."""
    limits, spec = _limits(target), spec_of(workload)
    try:
        cuda = cuda_config(config)
    except ValueError as error:
        return str(error)
    if cuda.threads > limits.threads_per_block:
        return f"{cuda.threads} threads, a block has at most {limits.threads_per_block}"
    used, arch = cuda.shared_bytes(spec), arch_of(target)
    if used > limits.shared_per_block:
        return f"{used} bytes of shared memory, a block has at most {limits.shared_per_block}"
    # Of an mma kernel blocks_per_sm only bounds registers.
    if isinstance(cuda, WgmmaConfig) and not arch.holds(used, cuda.blocks_per_sm):
        return f"{cuda.blocks_per_sm} blocks need {used} bytes of shared memory each, a multiprocessor has {arch.shared_per_sm}"
    if cuda.pack > 1 << (workload.group - 1).bit_length():
        return f"{cuda.pack} heads a tile, a group has {workload.group}"
    needed, available = _registers(cuda, spec, limits)
    if needed > available:
        return f"a thread needs {needed} registers or more, it has {available}"
    if isinstance(cuda, WgmmaConfig) and not cuda.pingpong and cuda.consumers == 1:
        return "a single consumer takes no turns: the same kernel as with pingpong=1"
    if config.as_dict().get("query_steps", 0) > spec.head_size // 16:
        return f"a query has {spec.head_size // 16} steps of sixteen columns"
    return None


def _registers(cuda: CudaConfig, spec: KernelSpec, limits: CudaLimits) -> tuple[int, int]:
    """Fewest registers that a thread with accumulators can do with, and those that it has.

    Scores and outputs are float32. A wgmma kernel holds the weights as 16-bit operands beside the next tile's scores.
    """
    columns = cuda.keys_per_tile + spec.value_size
    if isinstance(cuda, WgmmaConfig):
        weights = cuda.keys_per_tile // 4
        return columns // 2 + weights + 4 * cuda.query_steps + _SPARE_REGISTERS, cuda.registers[1]
    needed = cuda.row_blocks * columns // 2 + _SPARE_REGISTERS
    return needed, min(limits.registers_per_sm // (cuda.threads * cuda.blocks_per_sm), 255)


def _limits(target: Target) -> CudaLimits:
    if target.cuda is None:
        raise ValueError(f"expected a CUDA target, found {target.name}")
    return target.cuda
