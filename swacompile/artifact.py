"""The folder that `compile` writes: the rewritten model, a kernel library, and a manifest of how they were made."""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from swacompile.errors import ArtifactError, OutputError

if TYPE_CHECKING:
    import onnxruntime

    from swacompile.torch_artifact import CompiledProgram

FORMAT_VERSION = 1
MANIFEST, MODEL, LIBRARY = "manifest.json", "model.onnx", "libswacompile_ort.so"
PACKAGES = ("swacompile", "apache-tvm", "onnx", "onnx-ir", "onnxruntime", "z3-solver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a compiled folder holds. `report` is the document of `inspect --json` for the source model, `tuning` says where sizes come from."""

    source: str
    replaced: tuple[str, ...]
    kernels: tuple[str, ...]
    targets: tuple[str, ...]
    tuning: tuple[str, ...]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    hashes: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION, "source": self.source, "replaced": list(self.replaced), "kernels": list(self.kernels),
            "targets": list(self.targets), "tuning": list(self.tuning), "report": dict(self.report), "versions": dict(self.versions), "sha256": dict(self.hashes),
        }  # fmt: skip


class Abandoned(Exception):
    """Raised inside `new_folder` when there is nothing to write after all."""


def versions() -> dict[str, str]:
    """Versions of the packages that made an artifact."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.document(), indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it was written. Raises ArtifactError where the folder is no artifact of this format."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: expected a folder written by `swacompile compile`, found no readable {MANIFEST} ({error})."
        ) from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder}: expected format version {FORMAT_VERSION}, found {version}. Compile the model again with this version."
        )
    return dict(document)


@contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill, that becomes `out` only when all went well.

    Raises OutputError where `out` exists and is not an artifact that `force` may replace, or where the disk refuses.
    """
    if out.exists() and not force:
        raise OutputError(f"{out}: expected a path that does not exist yet. Give another, or --force to replace it.")
    if out.exists() and not (out / MANIFEST).is_file():
        raise OutputError(
            f"{out}: expected a compiled folder to replace, found something else. It is left alone; give another path."
        )
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist. Create it first.")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            fresh, old = Path(aside) / "new", Path(aside) / "old"
            fresh.mkdir()
            yield fresh
            if out.exists():
                os.replace(out, old)
            os.replace(fresh, out)
    except Abandoned:
        return
    except OutputError as error:  # of a file in the folder
        raise OutputError(str(error).replace(str(fresh), str(out))) from error
    except OSError as error:
        raise OutputError(
            f"{out}: could not be written ({error.strerror or error}). Nothing was changed; free space or choose another path."
        ) from error


class CompiledModel:
    """A compiled folder in an ONNX Runtime session: `run` feeds arrays by name, `session` is the session itself."""

    def __init__(self, folder: Path, session: "onnxruntime.InferenceSession", manifest: Mapping[str, Any]) -> None:
        self.folder, self.session, self.manifest = folder, session, manifest

    def run(
        self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name, all of them unless `outputs` chooses."""
        names = list(outputs) if outputs is not None else [output.name for output in self.session.get_outputs()]
        return dict(zip(names, (np.asarray(value) for value in self.session.run(names, dict(inputs))), strict=True))


def load(
    folder: str | Path, session_options: "onnxruntime.SessionOptions | None" = None
) -> "CompiledModel | CompiledProgram":
    """Open a folder written by `swacompile compile`: of an ONNX model a CompiledModel, of a torch program a CompiledProgram.

    TVM is not needed. Raises ArtifactError where a file is missing or not the one that was compiled.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest["sha256"].items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: {name} is missing. Compile the model again.")
        if file_hash(folder / name) != expected:
            raise ArtifactError(f"{folder}: {name} is not the file that was compiled. Compile the model again.")
    if MODEL not in manifest["sha256"]:
        from swacompile.torch_artifact import open_program

        return open_program(folder, manifest)
    return _open_session(folder, manifest, session_options)


def _open_session(
    folder: Path, manifest: Mapping[str, Any], session_options: "onnxruntime.SessionOptions | None"
) -> CompiledModel:
    import onnxruntime

    from swacompile.runtime.ort_library import register

    options = session_options or onnxruntime.SessionOptions()
    if (folder / LIBRARY).is_file():
        register(options, folder / LIBRARY)
    session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    return CompiledModel(folder, session, manifest)


__all__ = [
    "LIBRARY",
    "MODEL",
    "CompiledModel",
    "Manifest",
    "file_hash",
    "load",
    "new_folder",
    "read_manifest",
    "versions",
    "write_manifest",
]
