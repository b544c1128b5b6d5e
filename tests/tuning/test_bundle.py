"""The offline route: exported here, measured by the runner where there is no tvm package, taken in again."""

import json
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import numpy
import pytest
import tvm_ffi

from swacompile.errors import ArgumentError, ToolchainError
from swacompile.target import host_targets, target_named
from swacompile.tuning import bundle, runner
from swacompile.tuning.cpu_rule import CpuTilesRule
from swacompile.tuning.database import Database, Level
from swacompile.tuning.measure import Candidate
from swacompile.tuning.record import Origin, Status
from swacompile.tuning.rules import rule_for
from swacompile.workload import Workload
from tests.tuning.conftest import WORKLOAD
from tests.tuning.records import record

pytestmark = pytest.mark.cpu


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """An interpreter that sees numpy and tvm_ffi, and neither tvm nor swacompile."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in (numpy, tvm_ffi):
        home = Path(package.__file__).parent
        names = {home.name, f"{home.name}.libs", *(p.name for p in home.parent.glob(f"*{home.name}*.dist-info"))}
        for name in names | {"typing_extensions.py"}:
            if (home.parent / name).exists() and not (site / name).exists():
                (site / name).symlink_to(home.parent / name)
    return folder / "bin" / "python"


def test_route_without_a_compiler(bench, bare_python, tmp_path):
    check = "import importlib.util as u; print(u.find_spec('tvm'), u.find_spec('swacompile'))"
    assert (
        subprocess.run([bare_python, "-c", check], capture_output=True, text=True, cwd=tmp_path).stdout == "None None\n"
    )
    picked = [
        candidate
        for candidate in bundle.pick(WORKLOAD, bench.target, Database(), trials=40)
        if candidate.origin is Origin.DEFAULT or candidate.config.as_dict()["row_keys"] == 64
    ]
    tar, results = tmp_path / "work.tar.xz", tmp_path / "results.jsonl"
    count = bundle.export(picked, bench, tar)
    assert count == sum(c.config.as_dict()["row_heads"] != 8 for c in picked) >= 6
    with tarfile.open(tar) as opened:
        opened.extract(bundle.RUNNER_FILE, tmp_path, filter="data")
        assert all(entry.uname == "" and entry.mtime == 0 for entry in opened)
    command = [bare_python, "-m", "swacompile_runner", tar, "-o", results, "--timeout", "4", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    with results.open("a") as file:
        file.write('{"schema": 1, "config": "__import__"}\n')
    database = Database(folders=(tmp_path / "records",))
    finals = 1 + runner.FINALISTS
    assert bundle.take_in(results, database) == (count + finals, 1)
    assert bundle.take_in(results, database) == (0, 1)
    last = [record for record in database.records(host_targets()[0].name) if record.rung == bundle.EFFORT.rung + 1]
    assert len(last) == finals and {record.samples for record in last} == {runner.ROUNDS * bundle.EFFORT.samples}
    kinds = {record.config.as_dict()["row_heads"]: record.status for record in database.records(host_targets()[0].name)}
    expected = {1: Status.OK, 2: Status.OK, 3: Status.WRONG, 4: Status.OK, 5: Status.CRASHED, 6: Status.HUNG}
    assert kinds == expected
    choice = database.choose(rule_for(WORKLOAD, bench.target), WORKLOAD, bench.target)
    assert choice.level is Level.EXACT and choice.record.provenance.device
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert "0 measurements" in again.stdout


def test_candidates_are_the_default_what_was_best_and_what_is_near(tmp_path):
    target, workload = target_named("x86_64_v4"), Workload.parse("f32-d64-v64-g4-w128-n4096")
    database = Database(folders=(tmp_path,))
    base = CpuTilesRule().default(workload, target)
    best = base.replaced({"queries": 96, "keys": 48, "score_vectors": 1})
    database.add([record(1.0, of=best)])
    picked = bundle.pick(workload, target, database, trials=12)
    assert [picked[0].config, picked[1].config] == [base, best]
    assert [candidate.origin for candidate in picked] == [Origin.DEFAULT, *[Origin.SEARCH] * 11]
    assert len({candidate.config for candidate in picked}) == 12
    neighbours = CpuTilesRule().space(workload, target).neighbours(base)
    near = {c for c in neighbours if sum(a != b for a, b in zip(c.values, base.values, strict=True)) == 1}
    assert 5 <= len(near) <= 8 and near < {candidate.config for candidate in picked}
    assert [candidate.config for candidate in bundle.pick(workload, target, database, trials=1)] == [base]


def test_a_bundle_of_nothing_is_refused(bench, tmp_path):
    config = CpuTilesRule().default(WORKLOAD, bench.target).replaced({"row_heads": 8, "row_keys": 64})
    candidate = Candidate(workload=WORKLOAD, config=config, origin=Origin.SEARCH)
    with pytest.raises(ToolchainError, match="could be built: ValueError: no such tile"):
        bundle.export([candidate], bench, tmp_path / "work.tar")
    assert not (tmp_path / "work.tar").exists()


def test_another_format_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "jobs": []}))
    script = Path(runner.__file__)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "expected a bundle of format 2, found 99" in done.stderr


def test_missing_results(tmp_path):
    with pytest.raises(ArgumentError, match="found no file"):
        bundle.take_in(tmp_path / "none.jsonl", Database(folders=(tmp_path,)))
