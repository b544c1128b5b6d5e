"""The CUDA rules: spaces within the limits, Configs that are the family's dataclass, builds that do not spill."""

import random
from dataclasses import replace

import pytest

from swacompile.errors import TargetError
from swacompile.schedules.cuda.spec import MmaConfig, WgmmaConfig
from swacompile.target import TARGETS, TargetClass, target_named
from swacompile.tuning.config import Config
from swacompile.tuning.cuda_rule import CudaTilesRule, config_of, cuda_config, refuse, spec_of
from swacompile.tuning.rules import rule_for
from swacompile.tuning.shapes import MODELS
from swacompile.tuning.space import MOST_LISTED
from swacompile.workload import DType, Workload

H100 = target_named("nvidia_h100")
CUDA_TARGETS = [target for target in TARGETS if target.target_class is TargetClass.CUDA]
WORKLOADS = [model.workload(DType.BF16, 4096, decode=decode) for model in MODELS for decode in (False, True)]
PLAIN = Workload.parse("bf16-d128-v128-g4-w4096-n4096")


@pytest.mark.parametrize("target", CUDA_TARGETS, ids=lambda target: target.name)
def test_spaces_hold_the_default_and_its_neighbours(target):
    for workload in WORKLOADS:
        space = rule_for(workload, target).space(workload, target)
        assert space.refusal(space.base) is None
        around = list(space.neighbours(space.base))
        assert around and space.base not in around
        for config in around:
            tiles = cuda_config(config)
            assert config_of(tiles) == config
            assert tiles.shared_bytes(spec_of(workload)) <= target.cuda.shared_per_block


def test_a_large_space_is_sampled():
    workload = Workload.parse("bf16-d256-v256-g2-w4096-n4096-softcap")
    space = rule_for(workload, H100).space(workload, H100)
    possible, exact = space.possible()
    assert space.points > MOST_LISTED and not exact and 0.001 < possible / space.points < 0.01
    seen, rng = set(), random.Random(0)
    for _ in range(5):
        config = space.sample(rng, seen)
        assert config is not None and space.refusal(config) is None
        seen.add(config)
    assert len(seen) == 5


def test_families_follow_the_architecture():
    assert rule_for(PLAIN, H100).name == "wgmma"
    assert rule_for(PLAIN, target_named("nvidia_a100")).name == "mma"
    with pytest.raises(TargetError, match="no tunable kernels for bf16-d20-v20"):
        rule_for(Workload.parse("bf16-d20-v20-g1-w64-n512"), H100)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys_per_tile": 256}, "bytes of shared memory, a block has at most 232448"),
        ({"blocks_per_sm": 3, "consumers": 1, "key_stages": 2, "value_stages": 2}, "3 blocks need"),
        ({"pack": 8}, "8 heads a tile, a group has 4"),
        ({"keys_per_tile": 176, "key_stages": 2, "value_stages": 2, "stage_output": 0}, "a thread needs"),
        ({"pingpong": 0, "consumers": 1, "keys_per_tile": 48}, "the same kernel as with pingpong=1"),
        ({"keys_per_tile": 24}, "multiple of 16"),
        ({"nothing": 1}, "expected wgmma with keys_per_tile"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, reason):
    base = config_of(
        WgmmaConfig(keys_per_tile=64, consumers=3, key_stages=3, value_stages=3, pack=4, stage_output=True)
    )
    assert refuse(base, PLAIN, H100) is None
    assert reason in refuse(base.replaced(changes), PLAIN, H100)


def test_a_config_of_before_a_parameter_is_completed():
    rule = CudaTilesRule(name="mma")
    today = config_of(MmaConfig(keys_per_tile=64))
    earlier = Config.of("mma", {"keys_per_tile": 64, "warps": 4})
    assert rule.completed(earlier) == today
    assert rule.completed(Config.of("mma", {"warps": 4})) is None
    assert rule.completed(Config.of("mma", {"keys_per_tile": 64, "of_yore": 1})) is None
    assert rule.completed(replace(today, rule="wgmma")) is None


@pytest.mark.cpu
def test_a_kernel_that_spills_is_not_built(tmp_path):
    pytest.importorskip("tvm")
    from swacompile.kernels.build_cuda import CudaBuildError

    workload = Workload.parse("bf16-d128-v128-g1-w64-n512")
    tiles = config_of(MmaConfig(keys_per_tile=128, row_blocks=2))
    with pytest.raises(CudaBuildError, match="bytes are spilled"):
        CudaTilesRule(name="mma").build(workload, tiles, target_named("nvidia_a100"), tmp_path / "kernel.so")
    assert not (tmp_path / "kernel.so").exists()
