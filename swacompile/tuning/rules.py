"""The rules that can be tuned, in the order in which they are asked."""

from swacompile.errors import TargetError
from swacompile.target import Target
from swacompile.tuning.cpu_rule import CpuTilesRule
from swacompile.tuning.cuda_rule import CudaTilesRule
from swacompile.tuning.space import TunableRule
from swacompile.workload import Workload

RULES: tuple[TunableRule, ...] = (CpuTilesRule(), CudaTilesRule(name="wgmma"), CudaTilesRule(name="mma"))


def rule_for(workload: Workload, target: Target) -> TunableRule:
    """The first rule with kernels for a workload on a target. Raises TargetError."""
    for rule in RULES:
        if rule.applies(workload, target):
            return rule
    raise TargetError(f"no tunable kernels for {workload} on {target.name}: its kernels use their analytical defaults")
