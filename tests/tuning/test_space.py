"""The CPU rule's space: limits come from the target table, and what breaks them is never proposed."""

import random
import time
from dataclasses import replace

import pytest

from swacompile.schedules.cpu.tiles import SCRATCH_BYTES, scratch_bytes
from swacompile.target import TARGETS, TargetClass, target_named
from swacompile.tuning.cpu_rule import CpuTilesRule, combined, refuse, tiles_of
from swacompile.workload import Workload

RULE = CpuTilesRule()
CPU_TARGETS = [target for target in TARGETS if target.target_class is TargetClass.CPU]
WORKLOADS = [
    Workload.parse(t)
    for t in ("f32-d64-v64-g4-w128-n4096", "bf16-d256-v256-g2-w4096-n4096", "f32-d128-v128-g4-w128-n4096-decode")
]


@pytest.mark.parametrize("target", CPU_TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_only_possible_points(target, workload):
    space = RULE.space(workload, target)
    assert space.refusal(space.base) is None
    rng, seen = random.Random(1), set()
    for _ in range(30):
        config = space.sample(rng, seen)
        if config is None:
            break
        seen.add(config)
    for config in [*seen, *space.neighbours(space.base)]:
        tiles = tiles_of(config, target)
        assert tiles.score_keys * tiles.score_vectors + tiles.score_vectors < target.cpu.vector_registers
        sizes = {"dtype": workload.dtype, "head_size": workload.head_size, "value_size": workload.value_size}
        assert scratch_bytes(tiles, **sizes) <= SCRATCH_BYTES
    assert len(seen) > 5


def test_refusals_say_why():
    target, workload = target_named("x86_64_v3"), WORKLOADS[0]
    base = RULE.default(workload, target)
    assert "vector registers, x86_64_v3 has 16" in refuse(
        base.replaced({"score_keys": 24, "score_vectors": 2}), workload, target
    )
    assert "bytes of scratch" in refuse(base.replaced({"keys": 288, "queries": 96}), workload, target)
    assert "do not split" in refuse(base.replaced({"queries": 47}), workload, target)
    assert "at least 1" in refuse(base.replaced({"row_heads": 0}), workload, target)
    assert "expected cpu_tiles" in refuse(replace(base, rule="cuda_wgmma"), workload, target)


def test_sampling_ends_when_the_space_does():
    target = target_named("x86_64_v4")
    space = RULE.space(WORKLOADS[2], target)
    seen, rng = set(), random.Random(0)
    while (config := space.sample(rng, seen)) is not None:
        assert config not in seen
        seen.add(config)
    assert seen == set(space)


def test_neighbours_change_one_or_two_axes():
    space = RULE.space(WORKLOADS[0], target_named("x86_64_v4"))
    found = list(space.neighbours(space.base))
    changes = [sum(a != b for a, b in zip(space.base.values, other.values, strict=True)) for other in found]
    assert set(changes) == {1, 2}


def test_two_configs_make_a_kernel():
    target = target_named("x86_64_v4")
    base = RULE.default(WORKLOADS[0], target)
    both = combined(base.replaced({"keys": 48}), base.replaced({"keys": 24, "row_keys": 128, "row_heads": 2}))
    assert both == base.replaced({"keys": 48, "row_keys": 128, "row_heads": 2})


def test_default_is_immediate():
    start = time.perf_counter()
    for target in CPU_TARGETS:
        for workload in WORKLOADS:
            RULE.default(workload, target)
    assert time.perf_counter() - start < 1
