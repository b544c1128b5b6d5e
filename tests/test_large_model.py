"""Weights in external files stay on disk, unread."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests import models

MEASURE = """
import json, resource, sys
from pathlib import Path
from swacompile.pipeline import rewrite
done = rewrite(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({"replaced": len(done.replaced), "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


@pytest.mark.parametrize("other_folder", [False, True])
def test_eight_gigabytes(tmp_path, other_folder):
    """8 GB of weights in a sparse file: rewritten in seconds, and linked rather than copied."""
    source = models.with_external_weights(tmp_path, megabytes=8192, layers=16)
    folder = tmp_path / "out" if other_folder else tmp_path
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", MEASURE, str(source), str(folder / "out.onnx")], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 30
    measured = json.loads(run.stdout)
    assert measured["replaced"] == 1
    assert measured["rss_gb"] < 1.5
    weights = folder / "weights.bin"
    assert os.path.samefile(weights, tmp_path / "weights.bin")
    assert weights.stat().st_size == 8 << 30
