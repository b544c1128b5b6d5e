"""Lines of the database: what is wrong with one is said, and nothing in it is run."""

import json

import pytest

from swacompile.tuning.record import MAX_LINE, BadRecord, Status, TuningRecord
from tests.tuning.records import record

BAD = [
    ({"schema": 2}, "expected schema 1, found 2"),
    ({"schema": None}, "expected schema 1"),
    ({"extra": 1}, "missing or unknown fields: extra"),
    ({"config": "cpu_tiles:queries=__import__('os').system('touch /tmp/pwned')"}, "config: not a config"),
    ({"config": 5}, "config: expected a printable text"),
    ({"workload": "f32"}, "workload: not a workload"),
    ({"target": "../../etc/passwd"}, "target: expected an identifier"),
    ({"status": "fine"}, "status: "),
    ({"median_us": -1.0}, "must be positive"),
    ({"median_us": None}, "if and only if its status is ok"),
    ({"median_us": "fast"}, "median_us: expected a number"),
    ({"median_us": True}, "median_us: expected a number"),
    ({"samples": 1.5}, "samples: expected an integer"),
    ({"samples": -1}, "samples: expected an integer"),
    ({"spread": -0.5}, "spread at least 0"),
    ({"status": "crashed"}, "if and only if its status is ok"),
    ({"date": "yesterday"}, "date: "),
    ({"device": "x\u001b[31m"}, "device: expected a printable text"),
    ({"message": "x" * 600}, "message: expected a printable text"),
]


def test_line_both_ways():
    for original in (record(12.5, message="fine"), record(status=Status.HUNG, message="no end after 60 s")):
        assert TuningRecord.parse(original.line()) == original
        assert "\n" not in original.line()


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_fields(change, words):
    document = json.loads(record().line()) | change
    with pytest.raises(BadRecord, match=words):
        TuningRecord.parse(json.dumps(document))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        (record().line()[:-9], "not JSON"),
        (record().line().replace("100.0", "NaN"), "NaN is not a number"),
        (record().line().replace("100.0", "1e999"), "must be positive|finite"),
        ("x" * (MAX_LINE + 1), "longer than"),
        ("[" * 4000, "not JSON"),
    ],
)
def test_bad_lines(line, words):
    with pytest.raises(BadRecord, match=words):
        TuningRecord.parse(line)
