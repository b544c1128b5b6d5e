"""Where libraries that were built on first use are kept between runs."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from swacompile.errors import OutputError


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/swacompile, by default ~/.cache/swacompile, made where it does not exist. Raises OutputError."""
    # Read here and not in cli.py: the operator works in programs that never run the command line.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swacompile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: this cache cannot be made ({error.strerror}). Set XDG_CACHE_HOME to a writable folder."
        ) from error
    return folder


def fingerprint(sources: Iterable[Path], *more: str) -> str:
    """Twelve hex digits that change with the content of any source, or with `more`."""
    digest = hashlib.sha256("\0".join(more).encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]
