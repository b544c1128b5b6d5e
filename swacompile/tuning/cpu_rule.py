"""The CPU kernels as a tunable rule.

A Config is schedules.cpu.tiles.Tiles without the lanes, which the target decides.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from swacompile.errors import TargetError
from swacompile.kernels.build import KernelVariant
from swacompile.schedules.cpu.tiles import SCRATCH_BYTES, Tiles, choose_tiles, scratch_bytes
from swacompile.target import CpuLimits, Target, TargetClass
from swacompile.tuning.config import Config
from swacompile.tuning.space import Parameter, Space
from swacompile.workload import Feature, Workload

NAME = "cpu_tiles"
ROW_PARAMETERS = ("row_keys", "row_heads")
"""Sizes of the path for a single query; all others are of the path for many, so that two records make one kernel."""
_NAMES = tuple(field.name for field in fields(Tiles) if field.name != "lanes")
_SPARE_REGISTERS = 1
_SOURCES = Path(__file__).parents[1] / "schedules" / "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTilesRule:
    """Tile sizes and register blocks of the CPU kernels."""

    name: str = NAME

    def applies(self, workload: Workload, target: Target) -> bool:
        return target.target_class is TargetClass.CPU

    def default(self, workload: Workload, target: Target) -> Config:
        return config_of(default_tiles(workload, target))

    def space(self, workload: Workload, target: Target) -> Space:
        limits = _limits(target)
        parameters = _row_parameters(limits) if Feature.DECODE in workload.features else _tile_parameters(limits)
        base = self.default(workload, target)

        def refusal(config: Config) -> str | None:
            return refuse(config, workload, target)

        return Space(base=base, parameters=parameters, refusal=refusal)

    def completed(self, config: Config) -> Config | None:
        return config if config.rule == NAME and sorted(config.as_dict()) == sorted(_NAMES) else None

    def function_name(self, workload: Workload, target: Target) -> str:
        return variant_of(workload).function_name(target)

    def build(self, workload: Workload, config: Config, target: Target, library: Path) -> None:
        from swacompile.kernels.build import build_cpu_module

        variant = variant_of(workload)
        module = build_cpu_module((variant,), target, tiles={variant: tiles_of(config, target)})
        module.export_library(str(library))

    def revision(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(_SOURCES.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:12]


def variant_of(workload: Workload) -> KernelVariant:
    return KernelVariant(dtype=workload.dtype, head_size=workload.head_size, value_size=workload.value_size)


def default_tiles(workload: Workload, target: Target) -> Tiles:
    return choose_tiles(
        dtype=workload.dtype, head_size=workload.head_size, value_size=workload.value_size, limits=_limits(target)
    )


def config_of(tiles: Tiles) -> Config:
    return Config.of(NAME, {name: value for name, value in asdict(tiles).items() if name != "lanes"})


def tiles_of(config: Config, target: Target) -> Tiles:
    """Raises ValueError where the Config has other names than Tiles or its sizes do not divide each other."""
    if config.rule != NAME or sorted(config.as_dict()) != sorted(_NAMES):
        raise ValueError(f"expected {NAME} with {', '.join(_NAMES)}, found {config}")
    return Tiles(lanes=_limits(target).floats_per_vector, **config.as_dict())


def refuse(config: Config, workload: Workload, target: Target) -> str | None:
    """Why a kernel with this Config cannot be built within the target's limits."""
    limits = _limits(target)
    if any(value < 1 for _, value in config.values):
        return "sizes must be at least 1"
    try:
        tiles = tiles_of(config, target)
    except ValueError as error:
        return str(error)
    for product, rows, vectors in (
        ("scores", tiles.score_keys, tiles.score_vectors),
        ("output", tiles.output_rows, tiles.output_vectors),
    ):
        needed = rows * vectors + vectors + _SPARE_REGISTERS
        if needed > limits.vector_registers:
            return f"{product} need {needed} vector registers, {target.name} has {limits.vector_registers}"
    used = scratch_bytes(tiles, dtype=workload.dtype, head_size=workload.head_size, value_size=workload.value_size)
    return None if used <= SCRATCH_BYTES else f"a thread needs {used} bytes of scratch, the limit is {SCRATCH_BYTES}"


def combined(many: Config, single: Config) -> Config:
    """One kernel's Config: sizes for many queries from one Config, those for a single query from another."""
    row = single.as_dict()
    return many.replaced({name: row[name] for name in ROW_PARAMETERS})


def _limits(target: Target) -> CpuLimits:
    if target.cpu is None:
        raise TargetError(f"expected a CPU target, found {target.name}")
    return target.cpu


def _tile_parameters(limits: CpuLimits) -> tuple[Parameter, ...]:
    """Queries count in vectors, so that the same words fit every vector length."""
    lanes, registers = limits.floats_per_vector, limits.vector_registers
    return (
        Parameter(name="queries", values=_multiples(lanes, (1, 2, 3, 4, 6, 8, 12, 16), at_most=192)),
        Parameter(name="keys", values=(24, 32, 48, 64, 72, 96, 120, 128, 144, 192, 240, 288)),
        Parameter(name="score_keys", values=tuple(n for n in (2, 3, 4, 6, 8, 10, 12, 14, 16, 24) if n < registers)),
        Parameter(name="score_vectors", values=(1, 2, 3, 4)),
        Parameter(name="output_rows", values=tuple(n for n in (1, 2, 4, 8, 16) if n <= lanes)),
        Parameter(name="output_vectors", values=(1, 2, 3, 4, 5, 6)),
    )


def _row_parameters(limits: CpuLimits) -> tuple[Parameter, ...]:
    return (
        Parameter(name="row_keys", values=_multiples(limits.floats_per_vector, (1, 2, 4, 8, 16, 32), at_most=512)),
        Parameter(name="row_heads", values=(1, 2, 3, 4, 5, 6, 8)),
    )


def _multiples(unit: int, factors: Iterable[int], *, at_most: int) -> tuple[int, ...]:
    return tuple(unit * factor for factor in factors if unit * factor <= at_most)
