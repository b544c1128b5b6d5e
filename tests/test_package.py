"""What is shipped, and what importing it drags in."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {"swacompile": "swacompile", "passes": "swacompile/passes", "schedules": "swacompile/schedules"}


def test_wheel_holds_every_module(tmp_path):
    """All Python files of the three source folders, under one import name and nothing beside it."""
    source = tmp_path / "source"  # built from a copy: leftovers of an earlier build would be packed too
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "out", "tests", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} == {"swacompile"}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cc", ".c", ".h", ".map", ".typed", ".jsonl") and not path.is_relative_to(ROOT / "swacompile" / "passes")
        and not path.is_relative_to(ROOT / "swacompile" / "schedules")
    }  # fmt: skip
    assert shipped == expected


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_onnx_route_needs_no_torch(tmp_path):
    from tests import models

    path = models.save(models.causal_window(5), tmp_path / "model.onnx")
    code = f"""
from pathlib import Path
import swacompile
assert swacompile.rewrite(Path({str(path)!r}), Path({str(tmp_path / "out.onnx")!r})).replaced
"""
    modules = loaded_by(code)
    assert "onnx_ir" in modules
    assert not modules & {"torch", "tvm", "transformers"}


def test_importing_loads_nothing_heavy():
    assert not loaded_by("import swacompile\nswacompile.load") & {"torch", "tvm", "onnxruntime"}
