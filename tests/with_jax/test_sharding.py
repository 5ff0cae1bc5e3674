"""Arrays that are divided between devices by images and heads stay so, and nothing is gathered."""

import json
import os
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


UNEVEN = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cupy_msda.jax import ms_deform_attn
r = np.random.default_rng(0)
v, x, w = (jnp.asarray(r.random(s, "f4")) for s in ((2, 49, 3, 4), (2, 6, 3, 1, 2, 2), (2, 6, 3, 1, 2)))
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
def loss(v, spec=None):
    output = ms_deform_attn(v, [(7, 7)], None, x, w)
    if spec is not None:
        output = jax.lax.with_sharding_constraint(output, NamedSharding(mesh, spec))
    return jnp.sin(output).sum()
want = jax.grad(loss)(v)
got = jax.jit(jax.grad(lambda v: loss(v, P(None, None, "x"))))(v)
np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
"""


def test_channels_divided_by_devices_that_do_not_divide_the_heads():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", UNEVEN], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
