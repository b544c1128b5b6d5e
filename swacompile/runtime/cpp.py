"""Compile and link C++ sources into a shared library, written in one step."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swacompile.errors import ToolchainError

COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300
FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
OBJECT = ".o"
# -Bsymbolic and the version script: a loaded libtvm_ffi must not take over the symbols that kernels call here.
# nodelete: whoever loads the library keeps pointers into it.
LINKER_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,nodelete")


def link(
    sources: Sequence[Path], output: Path, *, exports: Path, includes: Sequence[Path] = (), flags: Sequence[str] = ()
) -> Path:
    """Compile `sources` (C++ or object files), as many at once as there are processors, and link them into `output`,
    replacing it whole; gives `output`.

    `exports` is the linker's version script; `flags` are the compiler's and the linker's. Raises ToolchainError where
    there is no C++ compiler or it fails.
    """
    command = (find_compiler(), *FLAGS)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".swacompile-") as folder:

        def compiled(numbered: tuple[int, Path]) -> str:
            number, source = numbered
            if source.suffix == OBJECT:
                return str(source)
            made = str(Path(folder, f"{number}{OBJECT}"))
            _run(*command, *flags, *(f"-I{include}" for include in includes), "-c", str(source), "-o", made)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, enumerate(sources)))
        linked = Path(folder, "library.so")
        _run(*command, *objects, f"-Wl,--version-script={exports}", *LINKER_FLAGS, *flags, "-o", str(linked))
        os.replace(linked, output)
    return output


def find_compiler() -> str:
    """The system's C++ compiler. Raises ToolchainError, saying what to install."""
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolchainError(
        f"no C++ compiler: expected one of {', '.join(COMPILERS)} on the PATH. Install one: `apt install g++` "
        "(Debian, Ubuntu), `dnf install gcc-c++` (Fedora, RHEL) or `conda install cxx-compiler`."
    )


def tvm_ffi_headers() -> Path:
    """Folder of the C headers of apache-tvm-ffi, found without importing it. Raises ToolchainError."""
    spec = importlib.util.find_spec("tvm_ffi")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        headers = Path(location, "include")
        if (headers / "tvm" / "ffi" / "c_api.h").is_file():
            return headers
    raise ToolchainError(
        "the headers of apache-tvm-ffi are missing: expected tvm/ffi/c_api.h. Install apache-tvm-ffi again."
    )


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{command[0]} could not be run: {error}. Check the C++ compiler.") from error
    if done.returncode != 0:
        raise ToolchainError(f"{command[0]} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
