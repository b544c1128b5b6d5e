"""A file of records, one a line: appended to by many processes at once, and whole whatever kills them."""

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swacompile.errors import OutputError
from swacompile.tuning.record import MAX_LINE, BadRecord, TuningRecord

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that was skipped, with the reason."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.reason}; the line is skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a file holds, in its order."""

    records: tuple[TuningRecord, ...]
    bad: tuple[BadLine, ...]


def read(path: Path) -> Contents:
    """All records of a file, and the lines that are none. A missing file is empty.

    A last line without a line break is the remains of a write that was cut short: reported like any other bad line,
    unless it is whole.
    """
    records, bad = [], []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Contents(records=(), bad=())
    except OSError as error:
        raise OutputError(f"{path}: the records cannot be read ({error.strerror or error}).") from error
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            records.append(TuningRecord.parse(raw.decode()))
        except (BadRecord, UnicodeDecodeError) as error:
            bad.append(BadLine(path=path, number=number, reason=str(error)))
    for line in bad:
        log.warning("%s", line)
    return Contents(records=tuple(records), bad=tuple(bad))


def append(path: Path, records: Sequence[TuningRecord]) -> None:
    """Add records, each in one write, and return when they are on the disk. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            is_new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                for record in records:
                    _append_line(file, record.line().encode())
                os.fsync(file)
            finally:
                os.close(file)
            if is_new:
                _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: the records cannot be written ({error.strerror or error}).") from error


def rewrite(path: Path, records: Sequence[TuningRecord]) -> None:
    """Replace a file's records in one step. Raises OutputError. Whoever read before must not rely on what it read.

    See `edit`.
    """
    data = "".join(record.line() + "\n" for record in records).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except OSError as error:
            Path(file.name).unlink(missing_ok=True)
            raise OutputError(f"{path}: the records cannot be written ({error.strerror or error}).") from error
    _sync_folder(path.parent)


@contextmanager
def edit(path: Path) -> Iterator[list[TuningRecord]]:
    """The file's records as a list; what the list holds at the end replaces them. Appenders wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        records = list(read(path).records)
        yield records
        rewrite(path, records)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is a file of its own, because `rewrite` puts a new file in the place of the old one.

    The system drops it with its process.
    """
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _append_line(file: int, line: bytes) -> None:
    """One write.

    A remnant that a killed or out-of-space writer left is closed by a line break first, so that it spoils no
    other line.
    """
    if len(line) > MAX_LINE:
        raise OSError(None, f"a record of {len(line)} bytes is longer than {MAX_LINE}")
    size = os.fstat(file).st_size
    torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
    data = (b"\n" if torn else b"") + line + b"\n"
    written = os.write(file, data)
    if written != len(data):
        raise OSError(None, f"only {written} of {len(data)} bytes were written: is the disk full?")


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
