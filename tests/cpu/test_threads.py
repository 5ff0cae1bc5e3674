"""Threads of the NumPy path: how many, and what happens where they cannot start."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cupy_msda
from cupy_msda.cpu import tasks, threads
from tests.helpers.backends import NumPyBackend
from tests.helpers.calls import call_of
from tests.helpers.cases import Case
from tests.helpers.checks import run_operator

ROOT = Path(__file__).parent.parent.parent
INPUTS = Case("tasks", N=6, queries=2000).inputs(seed=2)  # several tasks
# At the end of a process: the operator, by a program that has no thread left or may start none.
PROGRAM = """
import atexit, threading, time
import numpy as np
import cupy_msda

locations, weights = np.full((3, 500, 2, 1, 2, 2), 0.5), np.ones((3, 500, 2, 1, 2))
arguments = (np.ones((3, 6, 2, 4)), [(2, 3)], None, locations, weights)

def total():
    return cupy_msda.ms_deform_attn(*arguments).sum()

want = total()
"""
AT_EXIT = "atexit.register(lambda: print(total() == want))"
DAEMON = """
def repeat():
    while True:
        assert total() == want

threading.Thread(target=repeat, daemon=True).start()
atexit.register(lambda: [time.sleep(0.2), print(True)])
"""


def results(monkeypatch, setting):
    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", setting)
    output, grads = run_operator(NumPyBackend(), INPUTS)
    return [output, *grads]


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_inputs_are_several_tasks():
    assert len(tasks.divide(call_of(*INPUTS[:6]).problem, None)) == 3


@pytest.mark.parametrize("started", [0, 1])
def test_the_caller_does_the_work_of_a_thread_that_does_not_start(monkeypatch, started):
    want, start, asked = results(monkeypatch, "1"), threading.Thread.start, []

    def limited(thread):
        asked.append(thread)
        if len(asked) > started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(threads, "num_threads", lambda of_framework: 4)
    output = cupy_msda.ms_deform_attn(*INPUTS[:5])
    np.testing.assert_array_equal(output, want[0])
    assert len(asked) == started + 1
    asked.clear()
    assert_equal(cupy_msda.ms_deform_attn_backward(*INPUTS, 64), want[1:])


def test_no_room_for_a_thread(monkeypatch):
    want = results(monkeypatch, "1")
    before = threading.stack_size(1 << 46)
    try:
        got = results(monkeypatch, "4")
    finally:
        threading.stack_size(before)
    assert_equal(got, want)


@pytest.mark.parametrize("what", [AT_EXIT, DAEMON], ids=["atexit", "daemon thread"])
def test_the_end_of_the_interpreter(monkeypatch, what):
    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", "3")
    command = [sys.executable, "-W", "error", "-c", PROGRAM + what]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "True", "")


@pytest.mark.parametrize("setting", ["0", "-1", "two", "²", "1e3", "2.0", "9" * 5000])
def test_number_of_threads_must_be_a_positive_int(monkeypatch, setting):
    with pytest.raises(ValueError, match="CUPY_MSDA_NUM_THREADS: expected a positive int, got '"):
        results(monkeypatch, setting)


@pytest.mark.parametrize(("setting", "count"), [("4", 4), (" 4 ", 4), ("+4", 4), ("04", 4), ("٤", 4)])
def test_spellings_of_a_positive_int_are_accepted(monkeypatch, setting, count):
    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", setting)
    assert threads.num_threads() == count


@pytest.fixture
def cores(monkeypatch):
    """Eight cores, and no other limit than a test sets."""
    for name in ("CUPY_MSDA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: None)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_number_of_threads_is_none(monkeypatch, cores, empty):
    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", empty)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.num_threads() == 3


@pytest.mark.parametrize(
    ("ours", "of_framework", "omp", "expected"),
    [
        (None, None, None, 8),
        (None, None, "3", 3),
        (None, None, "3,2", 3),
        (None, None, "all", 8),
        (None, None, "0", 8),
        (None, None, "99", 8),
        (None, 2, "3", 2),
        (None, 99, None, 8),
        ("5", 2, "3", 5),
        ("99", 2, "3", 99),
    ],
)
def test_settings_of_threads(cores, monkeypatch, ours, of_framework, omp, expected):
    for name, setting in (("CUPY_MSDA_NUM_THREADS", ours), ("OMP_NUM_THREADS", omp)):
        if setting is not None:
            monkeypatch.setenv(name, setting)
    assert threads.num_threads(of_framework) == expected


def test_cores_without_affinity(cores, monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert threads.num_threads() == 5


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
    ids=str,
)
def test_the_quota_of_a_container(monkeypatch, tmp_path, files, expected):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CONTROL_GROUP", tmp_path)
    assert threads._quota.__wrapped__() == expected


def test_a_quota_limits_the_cores(cores, monkeypatch):
    monkeypatch.setattr(threads, "_quota", lambda: 2)
    assert threads.num_threads() == threads.num_threads(6) == 2


def test_torch_decides_for_its_tensors(cores, monkeypatch):
    torch = pytest.importorskip("torch")
    asked, before = [], torch.get_num_threads()
    monkeypatch.setattr(threads, "num_threads", lambda of_framework: asked.append(of_framework) or 1)
    torch.set_num_threads(2)
    try:
        cupy_msda.ms_deform_attn(*(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in INPUTS[:5]))
        cupy_msda.ms_deform_attn(*INPUTS[:5])
    finally:
        torch.set_num_threads(before)
    assert asked == [2, None]
