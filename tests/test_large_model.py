"""Weights in external files stay on disk, unread."""

import json
import subprocess
import sys
import time

import onnx
import pytest

from swacompile.errors import OutputError
from swacompile.pipeline import rewrite
from tests import models

MEASURE = """
import json, resource, sys
from pathlib import Path
from swacompile.pipeline import rewrite
done = rewrite(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({"replaced": len(done.replaced), "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def test_eight_gigabytes(tmp_path):
    """8 GB of weights in a sparse file: the model is rewritten beside it in seconds, and the weights are not read."""
    source = models.with_external_weights(tmp_path, megabytes=8192, layers=16)
    weights = tmp_path / "weights.bin"
    touched = weights.stat()
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - start < 30
    measured = json.loads(run.stdout)
    assert measured["replaced"] == 1
    assert measured["rss_gb"] < 1.5
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino, weights.stat().st_nlink) == (
        touched.st_mtime_ns,
        touched.st_ino,
        1,
    )
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_weights_go_along_to_another_folder(tmp_path):
    source = models.with_external_weights(tmp_path, megabytes=8)
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * (1 << 15))
    (tmp_path / "out").mkdir()
    assert rewrite(source, tmp_path / "out" / "out.onnx").replaced
    copy = tmp_path / "out" / "weights.bin"
    assert copy.read_bytes() == (tmp_path / "weights.bin").read_bytes()
    assert copy.stat().st_nlink == (tmp_path / "weights.bin").stat().st_nlink == 1, "ONNX's checker refuses hard links"
    onnx.checker.check_model(str(tmp_path / "out" / "out.onnx"), full_check=True)


def test_weights_of_another_model_are_not_replaced(tmp_path):
    source = models.with_external_weights(tmp_path, megabytes=8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights.bin").write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        rewrite(source, tmp_path / "out" / "out.onnx")
    assert (tmp_path / "out" / "weights.bin").read_text() == "precious"
