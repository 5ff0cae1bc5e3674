"""Arrays that are divided between devices by images and heads stay so, and nothing is gathered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cupy_msda.cli.check import TOLERANCE

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("form", ["plain", "fused", "packed"])
def test_on_eight_devices(form):
    """The gradient of reference points, which have no heads, is a sum over the devices that hold different heads."""
    command = [sys.executable, "-m", "tests.helpers.sharded_jax", form]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert len(found) == 5
    for division, case in found.items():
        assert case["collectives"] == [], division
        assert case["kept"], division
        assert case["error"] <= TOLERANCE["float32"], division
        assert case["calls"] == 2, division
        summed = form != "plain" and ("heads" in division or "shard_map" in division)
        assert case["sums"] == summed, division
