"""Which Configs a model's kernels are built with: asked of the database, for each kernel of each target."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swacompile.kernels.build import KernelVariant
from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cpu.tiles import Tiles
from swacompile.target import Target
from swacompile.tuning.cpu_rule import CpuTilesRule, combined, refuse, tiles_of, variant_of
from swacompile.tuning.cuda_rule import arch_of, config_of, cuda_config, default_kernel
from swacompile.tuning.database import Choice, Database, Level
from swacompile.tuning.rules import rule_for
from swacompile.workload import Feature, Workload

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernelChoice:
    """A CUDA kernel as it is built, and with its default tiles; `choice` is None where no workload asks for it."""

    kernel: Kernel
    default: Kernel
    choice: Choice | None


def choose_cuda_kernels(
    kernels: Iterable[Kernel],
    workloads: Iterable[Workload],
    target: Target,
    database: Database,
    *,
    device: str | None = None,
) -> tuple[CudaKernelChoice, ...]:
    """The kernels with the tiles of tuning records, each tuned for the workload with the most work among those it serves."""
    known = tuple(workloads)
    return tuple(_choose_cuda(kernel, known, target, database, device) for kernel in kernels)


def _choose_cuda(
    kernel: Kernel, workloads: tuple[Workload, ...], target: Target, database: Database, device: str | None
) -> CudaKernelChoice:
    served = [workload for workload in workloads if _serves(kernel, workload, target)]
    if not served:
        return CudaKernelChoice(kernel=kernel, default=kernel, choice=None)
    workload = max(served, key=_work)
    choice = database.choose(rule_for(workload, target), workload, target, device=device)
    config = kernel.config if choice.level is Level.DEFAULT else cuda_config(choice.config)
    return CudaKernelChoice(kernel=Kernel(spec=kernel.spec, config=config), default=kernel, choice=choice)


def _serves(kernel: Kernel, workload: Workload, target: Target) -> bool:
    default = default_kernel(workload, target)
    return default is not None and default.spec == kernel.spec


def build_cuda_choices(choices: Sequence[CudaKernelChoice], target: Target, path: Path) -> tuple[CudaKernelChoice, ...]:
    """Build a library of chosen kernels; gives what was built. A record of older sources may no longer build, or only with
    registers in local memory: then all kernels get their default tiles, and a warning says so. Raises CudaBuildError.
    """
    from swacompile.kernels.build_cuda import CudaBuildError, build_kernels

    arch = arch_of(target)
    tuned = [choice for choice in choices if choice.kernel != choice.default]
    try:
        built = build_kernels([choice.kernel for choice in choices], arch, path)
        spilled = sum(report.spill_bytes for report in built.reports)
        if not (tuned and spilled):
            return tuple(choices)
        reason = f"{spilled} bytes of registers are spilled"
    except CudaBuildError as error:
        if not tuned:
            raise
        reason = str(error)
    log.warning(
        "tuned tiles are left for the defaults, because a kernel does not build with them (%s): tune again", reason
    )
    plain = tuple(_with_default(choice) for choice in choices)
    build_kernels([choice.kernel for choice in plain], arch, path)
    return plain


def _with_default(made: CudaKernelChoice) -> CudaKernelChoice:
    choice = made.choice and Choice(
        workload=made.choice.workload, config=config_of(made.default.config), level=Level.DEFAULT, record=None
    )
    return CudaKernelChoice(kernel=made.default, default=made.default, choice=choice)


def _work(workload: Workload) -> tuple[int, str]:
    """Pairs of query and key, and the text so that the order is stable."""
    return min(workload.window or workload.length, workload.length) * workload.length, str(workload)
