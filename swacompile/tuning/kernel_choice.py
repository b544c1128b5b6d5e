"""Which Configs a model's kernels are built with: asked of the database, for each kernel of each target."""

from collections.abc import Iterable
from dataclasses import dataclass

from swacompile.kernels.build import KernelVariant
from swacompile.schedules.cpu.tiles import Tiles
from swacompile.target import Target
from swacompile.tuning.cpu_rule import CpuTilesRule, combined, refuse, tiles_of, variant_of
from swacompile.tuning.database import Choice, Database
from swacompile.workload import Feature, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The tiles of one CPU kernel, and the choices that they were taken from: for many queries, for a single one, or both."""

    variant: KernelVariant
    target: Target
    tiles: Tiles
    choices: tuple[Choice, ...]


def choose_cpu_kernels(
    workloads: Iterable[Workload], target: Target, database: Database, *, device: str | None = None
) -> tuple[KernelChoice, ...]:
    """One choice a kernel. A kernel serves all workloads of its head sizes; it is tuned for the one with the most work.

    Raises ValueError where a head size is too large for the scratch memory.
    """
    groups: dict[KernelVariant, list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(variant_of(workload), []).append(workload)
    return tuple(_choose(variant, group, target, database, device) for variant, group in groups.items())


def _choose(
    variant: KernelVariant, workloads: list[Workload], target: Target, database: Database, device: str | None
) -> KernelChoice:
    rule = CpuTilesRule()
    prefill = [workload for workload in workloads if Feature.DECODE not in workload.features]
    decode = [workload for workload in workloads if Feature.DECODE in workload.features]
    choices = tuple(
        database.choose(rule, max(group, key=_work), target, device=device) for group in (prefill, decode) if group
    )
    config = choices[0].config
    if len(choices) == 2:
        both = combined(choices[0].config, choices[1].config)
        config = both if refuse(both, choices[0].workload, target) is None else config
    return KernelChoice(variant=variant, target=target, tiles=tiles_of(config, target), choices=choices)


def _work(workload: Workload) -> tuple[int, str]:
    """Pairs of query and key, and the text so that the order is stable."""
    return min(workload.window or workload.length, workload.length) * workload.length, str(workload)
