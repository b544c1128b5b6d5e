"""Load .pt2 files, also those whose models take or return types of packages that are not imported here.

torch.export.load builds the types of a model's arguments and results, such as transformers' ModelOutput, and fails where the package
that registers them is not imported. The graph does not need them: while a file is loaded, a stand-in takes the place of each.
"""

import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from swacompile.errors import ModelError

TYPE_NAMES = re.compile(
    rb'\\"type\\": ?\\"([A-Za-z_][\w.]*)\\"'
)  # in the JSON text of a tree of arguments, inside JSON


def load_program(path: Path) -> ExportedProgram:
    """The exported program in a .pt2 file.

    Raises ModelError where the file is none, or needs operators that are not registered in this process.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ModelError(f"{path}: expected a .pt2 file, found {found}. Give the path of a .pt2 file.")
    models = _models(path)
    if not models:
        raise ModelError(
            f"{path}: expected a program that torch.export.save wrote, found an archive without one. It holds compiled code only "
            "(AOTInductor), or is of another format; save the exported program itself."
        )
    try:
        with _stand_ins(models), _quiet():
            return torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{path}: the exported program cannot be loaded ({_reason(error)}). It is damaged, was saved by another version of torch "
            f"(this is {torch.__version__}), or uses custom operators of a package that must be imported first; export it again."
        ) from error


def _models(path: Path) -> list[bytes]:
    """The serialized programs in an archive. Raises ModelError where the file is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in archive.namelist()
                if re.search(r"(models/[^/]*\.json|serialized_exported_program\.json)$", name)
            ]
            return [archive.read(name) for name in names]
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ModelError(
            f"{path}: expected a .pt2 archive, found {path.stat().st_size} bytes that are none ({error}). The file is damaged, "
            "truncated, or of another format; export it again."
        ) from error


@contextmanager
def _stand_ins(models: list[bytes]) -> Iterator[None]:
    """Types that the models name and nobody has registered, for as long as a file is loaded."""
    names = {name.decode() for model in models for name in TYPE_NAMES.findall(model)}
    foreign = sorted(name for name in names if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE)
    types = [type(name.rpartition(".")[2], (), {}) for name in foreign]
    for name, stand_in in zip(foreign, types, strict=True):
        pytree.register_pytree_node(
            stand_in,
            lambda _: ([], None),
            lambda _values, _context: None,
            serialized_type_name=name,
            to_dumpable_context=str,
            from_dumpable_context=lambda context: context,
        )
    try:
        yield
    finally:
        for stand_in in types:
            pytree._deregister_pytree_node(stand_in)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the reason of a failure and raises another; the reason is put on the exception instead."""
    log = logging.getLogger("torch.export")
    reasons = _Reasons()
    log.addFilter(reasons)
    try:
        yield
    except Exception as error:
        if reasons.found:
            raise RuntimeError(_reason(reasons.found[-1])) from error
        raise
    finally:
        log.removeFilter(reasons)


class _Reasons(logging.Filter):
    """Keeps exceptions that are logged, and the log silent."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])
        return False


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
