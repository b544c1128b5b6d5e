"""Tuners on one machine take turns: many may build at once, but who takes times is alone."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_LOCK = Path(tempfile.gettempdir()) / "swacompile-timing.lock"


@contextmanager
def turn(lock: Path, *, alone: bool) -> Iterator[None]:
    """Wait for a turn and keep it. The system ends the turn of a process that dies."""
    file = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)
