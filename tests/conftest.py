"""What several test files share."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swacompile import cli, pipeline
from swacompile.kernels import build
from swacompile.kernels.build import KernelVariant
from swacompile.runtime.ort_library import call_count
from swacompile.target import Target, host_targets
from swacompile.workload import DType


@dataclass(frozen=True, slots=True)
class CliResult:
    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., CliResult]:
    """Runs the command line in this process."""

    def run(*args: object) -> CliResult:
        monkeypatch.setattr(sys, "argv", ["swacompile", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        return CliResult(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of exported models: the full one where SWACOMPILE_CORPUS names it, else the subset kept with the tests."""
    return corpus_folder()


def corpus_folder() -> Path:
    named = os.environ.get("SWACOMPILE_CORPUS")
    return Path(named) if named else Path(__file__).parent / "data" / "corpus"


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """A kernel that several tests build goes through the compiler once."""
    known: dict[tuple[Any, str], Any] = {}
    compile_module = build._compile

    def remembered(module: Any, target: Target) -> Any:
        from tvm_ffi import StructuralKey

        key = (StructuralKey(module), target.name)
        if key not in known:
            known[key] = compile_module(module, target)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile", remembered)
        yield


@dataclass(frozen=True, slots=True)
class Library:
    """An ONNX Runtime library with kernels for this machine."""

    path: Path

    def calls(self) -> int:
        return call_count(self.path)


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Kernels for the corpus' head size, float32 and float16."""
    path = tmp_path_factory.mktemp("library") / "libswacompile_ort.so"
    variants = [KernelVariant(dtype=dtype, head_size=8, value_size=8) for dtype in (DType.F32, DType.F16)]
    pipeline.build_library(variants, host_targets()[:1], path)
    return Library(path)
