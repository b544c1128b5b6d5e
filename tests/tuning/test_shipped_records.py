"""The records in the package: all readable, all possible, none slower than the default beside it, and as the document has them."""

from pathlib import Path

import pytest

from swacompile.target import TARGETS, target_named
from swacompile.tuning import store
from swacompile.tuning.database import MARGIN, best
from swacompile.tuning.gains import gains, markdown, needed
from swacompile.tuning.record import Origin, Status
from swacompile.tuning.rules import rule_for
from tests.tuning.conftest import SHIPPED

FILES = sorted(SHIPPED.glob("*.jsonl"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "tuning.md"


def test_there_are_some():
    assert {"x86_64_v4", "nvidia_h100", "nvidia_h200"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_records_hold(path):
    assert path.stem in {target.name for target in TARGETS}
    contents = store.read(path)
    assert contents.records and not contents.bad
    groups = {}
    for record in contents.records:
        assert record.target == path.stem and record.status is Status.OK
        target = target_named(record.target)
        rule = rule_for(record.workload, target)
        config = rule.completed(record.config)
        assert config is not None and rule.space(record.workload, target).refusal(config) is None
        groups.setdefault(record.workload, []).append(record)
    for records in groups.values():
        defaults = [record for record in records if record.origin is Origin.DEFAULT]
        chosen = best(records)
        assert defaults and chosen is not None
        assert chosen in defaults or chosen.median_us < min(d.median_us for d in defaults) * (1 - MARGIN)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_document_has_their_table(path):
    records = store.read(path).records
    assert markdown(gains(records)) in DOCUMENT.read_text(), f"see `swacompile records markdown --target {path.stem}`"
    assert needed(records) == list(records), "what no choice needs is not shipped"
