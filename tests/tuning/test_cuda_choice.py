"""CUDA kernels take their tiles from records, and leave them where a kernel no longer builds with them."""

from dataclasses import replace

import pytest

from swacompile.runtime.cuda.library import Kernel
from swacompile.target import target_named
from swacompile.tuning.cuda_rule import CudaTilesRule, config_of, cuda_config, default_kernel
from swacompile.tuning.database import Database, Level
from swacompile.tuning.kernel_choice import build_cuda_choices, choose_cuda_kernels
from swacompile.tuning.record import Origin
from swacompile.workload import Workload
from tests.tuning.records import HERE, record

A100 = target_named("nvidia_a100")
RULE = CudaTilesRule(name="mma")
PREFILL = Workload.parse("bf16-d64-v64-g2-w128-n4096")
SHORT = Workload.parse("bf16-d64-v64-g2-w128-n512")
DECODE = Workload.parse("bf16-d64-v64-g2-w128-n4096-decode")
DEFAULT = RULE.default(PREFILL, A100)
TUNED = DEFAULT.replaced({"stages": 3})
NOW = replace(HERE, revision=RULE.revision())
KERNELS = tuple(default_kernel(workload, A100) for workload in (PREFILL, DECODE))


def measured(time_us, config, *, workload=PREFILL, origin=Origin.SEARCH, provenance=NOW, target="nvidia_a100"):
    return record(time_us, workload=str(workload), of=config, origin=origin, provenance=provenance, target=target)


@pytest.fixture
def database(tmp_path):
    return Database(folders=(tmp_path / "own",))


def test_each_kernel_is_tuned_for_the_most_work_it_does(database):
    database.add([measured(1.0, TUNED), measured(1.0, DEFAULT.replaced({"stages": 4}), workload=SHORT)])
    prefill, decode = choose_cuda_kernels(KERNELS, [SHORT, PREFILL, DECODE], A100, database)
    assert prefill.kernel == Kernel(spec=KERNELS[0].spec, config=cuda_config(TUNED))
    assert prefill.choice.level is Level.EXACT and prefill.default == KERNELS[0]
    assert decode.kernel == KERNELS[1] and decode.choice.level is Level.DEFAULT
    alone, _ = choose_cuda_kernels(KERNELS, [DECODE], A100, database)
    assert alone.choice is None and alone.kernel == KERNELS[0]


def test_a_record_of_the_same_architecture_serves(database):
    database.add([measured(1.0, TUNED, target="nvidia_l40s")])
    (kernel, _) = choose_cuda_kernels(KERNELS, [PREFILL], target_named("geforce_rtx_4090"), database)
    assert kernel.choice.level is Level.SAME_ARCHITECTURE


def test_records_of_other_sources_need_the_default_of_today(database):
    earlier = replace(NOW, revision="earlier")
    database.add([measured(1.0, TUNED, provenance=earlier)])
    assert database.choose(RULE, PREFILL, A100).level is Level.DEFAULT
    other = measured(1.08, DEFAULT.replaced({"warps": 8}), origin=Origin.DEFAULT, provenance=earlier)
    database.add([other, measured(1.0, TUNED, workload=SHORT)])
    assert database.choose(RULE, PREFILL, A100).level is Level.DEFAULT, "nor does a neighbour's stand in for it"
    database.add([measured(1.08, DEFAULT, origin=Origin.DEFAULT, provenance=earlier)])
    choice = database.choose(RULE, PREFILL, A100)
    assert (choice.level, choice.config, choice.outdated) == (Level.EXACT, TUNED, True)
    assert "with other kernel sources (earlier)" in str(choice)
    database.add([measured(1.5, DEFAULT.replaced({"stages": 4}))])
    now = database.choose(RULE, PREFILL, A100)
    assert now.config.as_dict()["stages"] == 4 and not now.outdated


def test_earlier_sources_step_back_behind_a_sibling_s_records_of_today(database):
    l40s, twin = target_named("nvidia_l40s"), "geforce_rtx_4090"
    default = RULE.default(PREFILL, l40s)
    earlier, faster = replace(NOW, revision="earlier"), default.replaced({"stages": 4})
    own = [
        measured(1.0, default.replaced({"stages": 3}), provenance=earlier, target=l40s.name),
        measured(1.05, default, origin=Origin.DEFAULT, provenance=earlier, target=l40s.name),
    ]
    theirs = [measured(1.0, faster, target=twin), measured(1.05, default, origin=Origin.DEFAULT, target=twin)]
    database.add(own)
    assert database.choose(RULE, PREFILL, l40s).level is Level.EXACT
    database.add([replace(record, provenance=earlier) for record in theirs])
    assert database.choose(RULE, PREFILL, l40s).level is Level.EXACT, "no better than one's own of the same age"
    database.add(theirs)
    for workload in (PREFILL, SHORT):
        choice = database.choose(RULE, workload, l40s)
        assert (choice.level, choice.config) == (Level.SAME_ARCHITECTURE, faster)
    database.add([replace(record, provenance=NOW) for record in own])
    assert database.choose(RULE, PREFILL, l40s).level is Level.EXACT


def test_a_large_gain_outlives_the_default_that_it_was_measured_against(database):
    earlier = replace(NOW, revision="earlier")
    beaten = measured(1.2, DEFAULT.replaced({"warps": 8}), origin=Origin.DEFAULT, provenance=earlier)
    database.add([beaten, measured(1.0, TUNED, provenance=earlier)])
    choice = database.choose(RULE, PREFILL, A100)
    assert (choice.config, choice.outdated) == (TUNED, True)


def test_another_kernel_s_records_are_no_guess(database):
    sinks = Workload.parse(f"{PREFILL}-sinks")
    database.add([measured(1.0, TUNED, workload=sinks)])
    assert database.choose(RULE, PREFILL, A100).level is Level.DEFAULT
    assert database.choose(RULE, Workload.parse(f"{SHORT}-sinks"), A100).level is Level.NEAREST


def test_a_neighbour_with_another_default_is_no_guess(database):
    """A short band has tiles of its own: those of a long one, tuned or not, were up to 1.8 times slower on an H200."""
    h200, rule = target_named("nvidia_h200"), CudaTilesRule(name="wgmma")
    short, long = (Workload.parse(f"f16-d64-v64-g8-{window}-n32768") for window in ("w128", "w32768"))
    assert rule.default(short, h200) != rule.default(long, h200)
    today = replace(HERE, revision=rule.revision())
    tuned = rule.default(long, h200).replaced({"query_steps": 2})
    database.add([measured(1.0, tuned, workload=long, provenance=today, target="nvidia_h200")])
    assert database.choose(rule, short, h200).level is Level.DEFAULT
    other = Workload.parse("f16-d64-v64-g8-w32768-n16384")
    assert database.choose(rule, other, h200).config == tuned


@pytest.mark.cpu
def test_tiles_that_spill_are_left_for_the_default(database, tmp_path, caplog):
    pytest.importorskip("tvm")
    workload = Workload.parse("bf16-d128-v128-g1-w64-n512")
    kernel = default_kernel(workload, A100)
    spilling = config_of(kernel.config).replaced({"keys_per_tile": 96, "stages": 2, "blocks_per_sm": 1})
    assert RULE.space(workload, A100).refusal(spilling) is None
    database.add([measured(1.0, spilling, workload=workload)])
    chosen = choose_cuda_kernels([kernel], [workload], A100, database)
    assert chosen[0].kernel.config == cuda_config(spilling)
    (built,) = build_cuda_choices(chosen, A100, tmp_path / "kernels.so")
    assert built.kernel == kernel and built.choice.level is Level.DEFAULT
    assert "tuned tiles are left for the defaults" in caplog.text
    assert (tmp_path / "kernels.so").exists()
