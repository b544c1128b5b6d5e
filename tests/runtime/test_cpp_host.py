"""The C++ example: built, and run with the library against the same model in Python without it."""

import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from swacompile.kernels.onnx_function import banded_attention_function
from swacompile.runtime.cpp import find_compiler
from tests.runtime.cases import PLAIN, body_of, session

SOURCE = Path(__file__).parents[2] / "examples" / "ort_cpp" / "main.cc"
LENGTH = 50


def pattern(shape: tuple[int, ...]) -> np.ndarray:
    """What the example feeds."""
    numbers = np.arange(np.prod(shape)) * 37 % 101
    return (numbers.astype(np.float32) / np.float32(50.5) - 1).reshape(shape)


def test_a_cpp_program_runs_the_kernel(stand_in_library: Path, tmp_path: Path) -> None:
    runtime = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
    if not runtime:
        pytest.skip("this onnxruntime ships no libonnxruntime.so")
    case = PLAIN.but(batch=1, queries=LENGTH, keys=LENGTH)
    model = case.model(banded_attention_function(body_of(case)))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "libswacompile_ort.so").symlink_to(stand_in_library)
    subprocess.run([find_compiler(), "-std=c++17", str(SOURCE), "-o", str(tmp_path / "host"), "-ldl"], check=True)
    command = [tmp_path / "host", runtime[0], tmp_path, str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = re.search(r"output sums to (\S+), kernel calls (\d+)", done.stdout)
    assert found is not None, done.stdout
    feed = {name: pattern(array.shape) for name, array in case.operands.items()}
    (output,) = session(model).run(None, feed)
    assert float(found[1]) == pytest.approx(float(output.sum(dtype=np.float64)), abs=1e-3)
    assert int(found[2]) == 1
