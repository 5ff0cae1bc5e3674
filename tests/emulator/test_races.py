"""No data races: the access log on every kernel, and what it reports of a kernel without one of its barriers."""

import functools
import re
from collections import Counter

import pytest

from cupy_msda.cuda import kernels, naive
from tests.helpers import cases, emulated_naive, emulator
from tests.helpers.access_log import Log
from tests.helpers.barriers import all_barriers, line_of_change
from tests.helpers.cases import CASES
from tests.helpers.covering import COVERING
from tests.helpers.faults import Fault

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

expected = functools.cache(lambda name: COVERING[name].expected())


@functools.cache
def reached_by(name):
    """The barriers that a sound kernel reaches, as (kernel, line of its source)."""
    log = Log()
    COVERING[name].check(expected(name), log=log)
    return log.reached


@pytest.mark.parametrize("name", COVERING)
def test_kernels_have_no_data_race(name):
    reached_by(name)


def test_naive_kernels_have_no_data_race(monkeypatch):
    emulated_naive.device(monkeypatch)
    run = functools.partial(emulated_naive.launch_on_arrays, log=Log())
    monkeypatch.setattr(naive, "_run", lambda planned, device: lambda stream, *words: run(planned, words))
    inputs = cases.to_fused(CASES[0].inputs("float16"), packed=True)
    emulated_naive.forward(inputs)
    emulated_naive.backward(inputs)


def test_every_barrier_is_known():
    """The scan of the sources misses none."""
    known = Counter(barrier.file for barrier in all_barriers())
    for path in kernels.source_folder().rglob("*.cu*"):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        file = str(path.relative_to(kernels.source_folder()))
        assert known[file] == len(re.findall(r"__sync(?:threads|warp)|__threadfence", code)), file


# ---- without one of its barriers -------------------------------------------------------------------------------------

# Barriers without which no data race is left, by file and their number in it, counted from zero.
REDUNDANT = {
    "backward.cu 2": "the next chunk has a barrier before it writes samples; before that it writes counts alone",
    "backward.cu 5": "a lane writes the next sample where it has read this one; a fused call has no next one",
    "common/levels.cuh 0": "a lane reads the level that it has written itself",
    "common/sample_gradients.cuh 1": "each dot product has a barrier before it takes the place of its sample",
}


def cases_that_reach(kernel, text):
    """The cases that reach the line in which `text` differs from the source of the kernel."""
    line = line_of_change(kernel, text)
    return [name for name in COVERING if (kernel, line) in reached_by(name)]


def is_caught(kernel, text, name):
    try:
        COVERING[name].check(expected(name), texts={kernel: text}, log=Log())
    except AssertionError:
        return True
    return False


def thinned(barriers):
    """Every twelfth barrier, and the others among the longer proofs."""
    return [one if at % 12 == 0 else pytest.param(one, marks=pytest.mark.long) for at, one in enumerate(barriers)]


NEEDED = [barrier for barrier in all_barriers() if str(barrier) not in REDUNDANT]


@pytest.mark.parametrize("barrier", thinned(NEEDED), ids=str)
def test_a_missing_barrier_is_caught_in_every_kernel_that_reaches_it(barrier, tmp_path):
    texts = barrier.removed(tmp_path)
    reached = {kernel: cases_that_reach(kernel, text) for kernel, text in texts.items()}
    assert any(reached.values())
    for kernel, names in reached.items():
        assert not names or any(is_caught(kernel, texts[kernel], name) for name in names), kernel


@pytest.mark.long
@pytest.mark.parametrize("barrier", [one for one in all_barriers() if str(one) in REDUNDANT], ids=str)
def test_a_redundant_barrier_is_redundant(barrier, tmp_path):
    """Else its reason no longer holds, and it leaves the list."""
    for kernel, text in barrier.removed(tmp_path).items():
        for name in cases_that_reach(kernel, text):
            COVERING[name].check(expected(name), texts={kernel: text}, log=Log())


def test_redundant_barriers_exist():
    assert {str(barrier) for barrier in all_barriers()} >= set(REDUNDANT)


# ---- with another fault ----------------------------------------------------------------------------------------------

COUNT_KEY = "atomicAdd(shared.key_begin + key, 1u)"
DONE = "atomicAdd(&queue->chunk[first].done, 1u)"
FAULTS = {
    "count of a key without an atomic addition": (
        "backward: aggregated",
        Fault("backward", COUNT_KEY, "shared.key_begin[key]++"),
        "shared memory",
    ),
    "gradient of value without atomic additions": (
        "backward: few queries",
        Fault("backward", "atomicAdd((T*)target + v, x[v])", "((T*)target)[v] += x[v]"),
        "grad_value",
    ),
    "chunks that are done, counted without an atomic addition": (
        "summation: chunks",
        Fault("reduce_buckets", DONE, DONE.replace("atomicAdd(&", "(").replace(", 1u)", "++)")),
        "of queue",
    ),
    "a barrier of the warp for one of the block": (
        "summation: sorted batches",
        Fault("bucket_sort", "__syncthreads();    // the sorted run", "__syncwarp();    // the sorted run"),
        "shared memory",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_report_names_the_array(fault):
    name, planted, array = FAULTS[fault]
    with pytest.raises(
        emulator.EmulatorError, match=f"data race on byte .*{array}.* thread .* at line .* thread .* at line"
    ):
        COVERING[name].run(texts={planted.kernel: planted.planted()}, log=Log())


def test_a_read_by_ldg_of_what_the_launch_writes_is_caught():
    """Its cache does not see what other multiprocessors write meanwhile; the emulator's memory does."""
    planted = Fault("reduce_buckets", "__ldcg(&queue->chunk[place].number", "__ldg(&queue->chunk[place].number")
    with pytest.raises(emulator.EmulatorError, match=r"of .*queue.* is read by __ldg and written in the same launch"):
        COVERING["summation: chunks"].run(texts={"reduce_buckets": planted.planted()}, log=Log())
