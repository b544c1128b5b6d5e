"""A real kernel built once, and a builder whose candidates misbehave in every way."""

import sys
from pathlib import Path

import pytest

from swacompile.target import host_targets
from swacompile.tuning import database, measure
from swacompile.tuning.database import Database
from swacompile.tuning.record import TuningRecord
from swacompile.tuning.rules import rule_for
from swacompile.workload import Workload

SHIPPED = database.SHIPPED
WORKLOAD = Workload.parse("f32-d16-v16-g2-w32-n256-decode")


def written(database: Database) -> tuple[TuningRecord, ...]:
    """The database's records of WORKLOAD on this machine; none of the shipped ones is of it."""
    found = database.records(host_targets()[0].name)
    return tuple(record for record in found if record.workload == WORKLOAD)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory) -> Path:
    """A correct kernel for WORKLOAD."""
    target = host_targets()[0]
    rule = rule_for(WORKLOAD, target)
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    rule.build(WORKLOAD, rule.default(WORKLOAD, target), target, library)
    return library


@pytest.fixture(autouse=True)
def no_shipped_records(tmp_path_factory, monkeypatch):
    """Tests see only the records that they make."""
    monkeypatch.setattr(database, "SHIPPED", tmp_path_factory.mktemp("shipped"))


@pytest.fixture
def bench(kernel, monkeypatch):
    """A workbench whose builder is tests.tuning.fake_builder."""
    monkeypatch.setenv("SWACOMPILE_TEST_KERNEL", str(kernel))
    command = (sys.executable, "-m", "tests.tuning.fake_builder")
    with measure.Workbench(host_targets()[0], command=command, build_seconds=5) as made:
        yield made
