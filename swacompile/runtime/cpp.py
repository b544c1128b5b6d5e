"""Compile and link C++ sources into a shared library, written in one step."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swacompile.errors import ToolchainError
from swacompile.runtime.ort_library import find_compiler

BUILD_SECONDS = 300
FLAGS = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# -Bsymbolic and the version script: a loaded libtvm_ffi must not take over the symbols that kernels call here.
# nodelete: whoever loads the library keeps pointers into it.
LINKER_FLAGS = ("-Wl,-Bsymbolic", "-Wl,-z,nodelete")


def link(
    sources: Sequence[Path], output: Path, *, exports: Path, includes: Sequence[Path] = (), flags: Sequence[str] = ()
) -> Path:
    """Compile `sources` (C++ or object files) into `output`, replacing it whole; gives `output`.

    `exports` is the linker's version script. Raises ToolchainError where there is no C++ compiler or it fails.
    """
    command = find_compiler()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".swacompile-") as folder:
        linked = Path(folder, "library.so")
        paths = [*(f"-I{include}" for include in includes), *map(str, sources)]
        _run(command, *FLAGS, *paths, f"-Wl,--version-script={exports}", *LINKER_FLAGS, *flags, "-o", str(linked))
        os.replace(linked, output)
    return output


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{command[0]} could not be run: {error}. Check the C++ compiler.") from error
    if done.returncode != 0:
        raise ToolchainError(f"{command[0]} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
