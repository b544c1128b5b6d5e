"""The files: two writers, torn lines, kill -9, and rewriting beside an appender."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from swacompile.errors import OutputError
from swacompile.tuning import store
from swacompile.tuning.record import Status
from tests.tuning.records import record

KILLS = int(os.environ.get("SWACOMPILE_KILLS", "8"))
WRITER = """
import sys
from pathlib import Path
from swacompile.tuning import store
from tests.tuning.records import record
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    store.append(path, [record(number + 1.0, message=f"{name} {number} " + "x" * 250)])
    print(number, flush=True)
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True
    )


def messages(path):
    contents = store.read(path)
    return [r.message.strip("x").strip() for r in contents.records], contents.bad


def test_two_writers(tmp_path):
    path = tmp_path / "a.jsonl"
    writers = [writer(path, name, 150) for name in "ab"]
    for process in writers:
        process.communicate(timeout=60)
    found, bad = messages(path)
    assert not bad
    for name in "ab":
        assert [m for m in found if m.startswith(name)] == [f"{name} {number}" for number in range(150)]
    assert found != sorted(found), "the writers did not overlap: the test shows nothing"


def test_kill_at_random_moments(tmp_path):
    """After each kill the file loads, and every record whose append had returned is in it. SWACOMPILE_KILLS=100 is the long version."""
    path, rng, finished = tmp_path / "a.jsonl", random.Random(5), []
    for run in range(KILLS):
        process = writer(path, f"run{run}", 100_000)
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        lines = (first + process.stdout.read()).split("\n")[:-1]
        finished += [f"run{run} {number}" for number in lines]
        found, _ = messages(path)
        missing = set(finished) - set(found)
        assert not missing
    assert len(finished) > KILLS


def test_torn_line_spoils_no_other(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    store.append(path, [record(message="first")])
    with path.open("a") as file:
        file.write(record(message="torn").line()[:100])
    store.append(path, [record(message="second")])
    found, bad = messages(path)
    assert found == ["first", "second"]
    assert [line.number for line in bad] == [2]
    assert f"{path}:2: not JSON" in caplog.text and "the line is skipped" in caplog.text


def test_binary_rubbish_is_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n\n" + record(message="good").line().encode() + b"\n\x80\x04\x95pickle\n")
    found, bad = messages(path)
    assert found == ["good"] and len(bad) == 2


def test_whole_last_line_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(record(message="only").line())
    assert messages(path) == (["only"], ())


def test_edit_keeps_what_others_append(tmp_path):
    path = tmp_path / "a.jsonl"
    process = writer(path, "w", 200)
    process.stdout.readline()
    for _ in range(20):
        with store.edit(path) as kept:
            kept[:] = [r for r in kept if r.status is Status.OK]
    process.communicate(timeout=60)
    assert messages(path) == ([f"w {number}" for number in range(200)], ())


def test_a_full_disk_is_an_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot be written"):
        store.append(tmp_path / "a.jsonl", [record()])
