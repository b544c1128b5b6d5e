"""What compile asks of the database: one kernel a pair of head sizes, tuned for the most work, from two records."""

import pytest

from swacompile import pipeline
from swacompile.target import host_targets, target_named
from swacompile.tuning import database as database_module
from swacompile.tuning.database import Database, Level
from swacompile.tuning.kernel_choice import choose_cpu_kernels
from swacompile.tuning.shapes import MODELS, model_workloads, workloads_of_model
from swacompile.workload import DType, Workload
from tests.tuning.records import config, record

TARGET = target_named("x86_64_v4")


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "SHIPPED", tmp_path / "shipped")
    return Database(folders=(tmp_path / "own",))


def parsed(*texts):
    return [Workload.parse(text) for text in texts]


def test_two_records_make_one_kernel(database):
    many, single = config(keys=48, row_heads=8), config(keys=24, row_keys=128, row_heads=2)
    small = config(keys=72)
    database.add(
        [
            record(1.0, workload="f32-d64-v64-g4-w128-n4096", of=many),
            record(1.0, workload="f32-d64-v64-g4-w128-n512", of=small),
            record(1.0, workload="f32-d64-v64-g4-w128-n4096-decode", of=single),
        ]
    )
    wanted = ("f32-d64-v64-g4-w128-n512", "f32-d64-v64-g4-w128-n4096", "f32-d64-v64-g4-w128-n4096-decode")
    (kernel,) = choose_cpu_kernels(parsed(*wanted), TARGET, database)
    assert (kernel.tiles.keys, kernel.tiles.row_keys, kernel.tiles.row_heads) == (48, 128, 2)
    assert [choice.level for choice in kernel.choices] == [Level.EXACT, Level.EXACT]


def test_head_sizes_have_kernels_of_their_own(database):
    kernels = choose_cpu_kernels(parsed("f32-d64-v64-g4-w128-n512", "f32-d96-v96-g1-w128-n512"), TARGET, database)
    assert [kernel.variant.head_size for kernel in kernels] == [64, 96]
    assert all(choice.level is Level.DEFAULT for kernel in kernels for choice in kernel.choices)


def test_a_model_s_lengths(corpus):
    open_lengths = workloads_of_model(corpus / "mistral" / "onnx-sdpa-dyn-pad.onnx")
    assert len(open_lengths) == 2 and sum("decode" in str(w) for w in open_lengths) == 1
    (fixed,) = workloads_of_model(corpus / "mistral" / "onnx-sdpa-static.onnx")
    assert "decode" not in str(fixed) and fixed.length < 4096


def test_published_shapes_are_workloads():
    wanted = model_workloads(DType.BF16, (4096, 32768))
    assert len(set(wanted)) == len(wanted) and Workload.parse("bf16-d64-v64-g8-w128-n4096-sinks-decode") in wanted
    assert not any("two_sided-decode" in str(workload) for workload in wanted)
    decode = [str(workload) for workload in wanted if "decode" in str(workload)]
    assert [text for text in decode if "n32768" in text] == ["bf16-d64-v64-g7-w32768-n32768-decode"]
    assert len(decode) == 10 and len(wanted) == 30
    for model in MODELS:
        assert model.heads % model.kv_heads == 0
        prefill, decode = (model.workload(DType.F32, 4096, decode=decode) for decode in (False, True))
        assert Workload.parse(str(prefill)) == prefill != decode


@pytest.mark.cpu
def test_compile_says_which_record_it_used(database, corpus, tmp_path, monkeypatch):
    model = corpus / "mistral" / "onnx-sdpa-static.onnx"
    (workload,) = workloads_of_model(model)
    target = host_targets()[0]
    plain = pipeline.compile(model, tmp_path / "plain.swa", database=database)
    assert "analytical default" in str(plain.choices[0])
    tuned = plain.choices[0].config.replaced({"row_heads": 2})
    database.add([record(1.0, workload=str(workload), target=target.name, of=tuned)])
    done = pipeline.compile(model, tmp_path / "tuned.swa", database=database)
    assert [choice.level for choice in done.choices] == [Level.EXACT]
    assert done.manifest.tuning == (str(done.choices[0]),) and str(tuned) in done.manifest.tuning[0]
    assert (tmp_path / "plain.swa" / "libswacompile_ort.so").read_bytes() != (
        tmp_path / "tuned.swa" / "libswacompile_ort.so"
    ).read_bytes()
