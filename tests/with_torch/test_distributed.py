"""Training with several processes: the gradients are those of one process that has all images."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--small", "--size", "1", "64", "96", "--steps", "1", "--compile-backend", "eager")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*arguments):
    """The JSON records that two processes on the CPU print."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(records, *modes):
    assert [record["mode"] for record in records] == list(modes)
    for record in records:
        assert record["processes"] == 2
        assert record["gradient_error"] < 1e-4, record
        assert record["images_per_second"] == pytest.approx(2 / record["step_s"])


def test_ddp_and_fsdp_of_a_served_model():
    check(run(*TORCHRUN, "-m", "benchmarks.several_gpus", *SMALL, "--modes", "ddp", "fsdp"), "ddp", "fsdp")


def test_compiled_ddp_of_a_layer():
    run(*TORCHRUN, "-m", "tests.helpers.distributed_layer")


def test_processes_make_their_first_call_at_the_same_time():
    (record,) = run(*TORCHRUN, "-m", "benchmarks.first_call")
    assert record["processes"] == 2
    assert record["largest_difference"] == 0


@pytest.mark.long
def test_compiled_ddp_of_a_served_model():
    check(run(*TORCHRUN, "-m", "benchmarks.several_gpus", *SMALL, "--modes", "compiled"), "compiled")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_accelerate_starts_the_same_program():
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no")
    check(run(*launch, "-m", "benchmarks.several_gpus", *SMALL, "--modes", "ddp"), "ddp")
