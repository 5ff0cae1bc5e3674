"""Tuning on an emulated GPU whose launches have a time of their own, and the results of drawn configurations."""

import random
from dataclasses import replace

import numpy as np
import pytest

import cupy_msda
from cupy_msda import Sizes
from cupy_msda.call import ALL
from cupy_msda.cuda import plan, plan_backward, run
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.tuner import tune
from cupy_msda.cuda.tuner.bench import Bench
from cupy_msda.cuda.tuner.device_arrays import DeviceArrays
from cupy_msda.cuda.tuner.targets import targets_of
from cupy_msda.cuda.tuning import loaded, storage, tuned
from cupy_msda.cuda.tuning.tuned import Choices
from tests.helpers import drawn_entries, emulated_gpu, emulator
from tests.helpers.cases import to_fused
from tests.helpers.emulated_calls import DENSE, FUSED, HALF, PLAIN, check

SIZES = Sizes(((12, 8), (6, 4)), N=2, Q=40, M=4)
SMALL = Sizes(((6, 4), (3, 2)), Q=7, M=2, D=8, P=2)


def milliseconds(launch):
    """Four warps, two vectors at a time and 24 resident warps are the fastest; a sorted sum takes twice as long."""
    axes = launch.spec.axes()
    warps = axes.get("warps", 4)
    found = 1 + abs(warps - 4) / 8 + abs(warps * axes.get("min_blocks", 24 // warps) - 24) / 64
    return 0.01 * found * (1 if axes.get("unroll", 2) == 2 else 1.5) * (2 if "bucket" in launch.spec.kernel else 1)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Launches compute nothing."""
    monkeypatch.setenv(storage.VARIABLE, str(tmp_path))
    found = emulated_gpu.install(monkeypatch, run=lambda planned, words: None)
    found.milliseconds = milliseconds
    monkeypatch.setattr(DeviceArrays, "agree", lambda self, one, other: True)
    return found


def problem_of(sizes=SIZES, dtype="float32", **changes):
    return replace(cupy_msda.sizes.problems_of([sizes], [dtype], 0)[0], **changes)


def time_of(launches):
    return sum(map(milliseconds, launches))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, replace(SIZES, reference_coordinates=2, packed=True)], ids=["plain", "fused"])
def test_later_calls_take_what_was_faster(gpu, sizes, deterministic):
    entries = cupy_msda.tune(sizes, progress=False)
    assert entries
    assert all(entry.tuned_us <= entry.default_us for entry in entries)
    problem = problem_of(sizes, deterministic=deterministic)
    on, wanted = loaded.gpu_of(0), problem.computed(ALL._replace(references=problem.fused is not None))
    assert time_of([plan.forward(problem, 16, on)]) < 0.9 * time_of([plan.forward(problem, 16, H100)])
    after, before = (plan_backward.backward(problem, 16, one, wanted).launches for one in (on, H100))
    assert time_of(after) < 0.95 * time_of(before)
    gpu.check()


def test_another_process_takes_them_too(gpu):
    cupy_msda.tune(SIZES, backward=False, progress=False)
    launch = plan.forward(problem_of(), 16, loaded.gpu_of(0))
    loaded.reload()
    assert plan.forward(problem_of(), 16, loaded.gpu_of(0)) == launch != plan.forward(problem_of(), 16, H100)


def test_the_warm_up_compiles_what_was_found(gpu):
    cupy_msda.tune(SIZES, progress=False)
    cupy_msda.warmup(SIZES, progress=False)
    loaded = len(gpu._kernels)
    for deterministic in (False, True):
        problem = problem_of(deterministic=deterministic)
        run.prepare_forward(problem, 16, 0)
        run.prepare_backward(problem, 16, 0, ALL)
    assert len(gpu._kernels) == loaded


def test_a_first_call_measures_nothing(gpu, monkeypatch):
    monkeypatch.setattr(tune, "Bench", None)
    inputs = PLAIN.inputs()
    arrays = [gpu.put(part) for part in (inputs.value, inputs.locations, inputs.weights)]
    cupy_msda.ms_deform_attn(arrays[0], inputs.shapes, None, *arrays[1:])
    assert len(gpu.launches) == 1
    assert not list(storage.folder().iterdir())


def test_recorded_calls_are_tuned(gpu):
    inputs = PLAIN.inputs()
    arrays = [gpu.put(part) for part in (inputs.value, inputs.locations, inputs.weights, inputs.grad_output)]

    def model():
        for _ in range(2):
            cupy_msda.ms_deform_attn(arrays[0], inputs.shapes, None, *arrays[1:3])
            cupy_msda.ms_deform_attn_backward(arrays[0], inputs.shapes, None, *arrays[1:], 64)

    model()  # recorded although it is prepared
    with cupy_msda.record() as calls:
        model()
    model()
    assert [call.wanted for call in calls] == [None, ALL]
    names = {entry.subject.name for entry in cupy_msda.tune(calls, progress=False)}
    assert names >= {"forward", "samples", "bucket_sort", "reduce_buckets", "atomics", "grad_value"}
    problem = calls[0].problem
    assert loaded.gpu_of(0).choices.axes("forward", problem)


def test_calls_after_tuning_launch_what_was_found(gpu):
    """What was prepared before is planned anew."""
    inputs = PLAIN.inputs()
    arrays = [gpu.put(part) for part in (inputs.value, inputs.locations, inputs.weights)]
    with cupy_msda.record() as calls:
        cupy_msda.ms_deform_attn(arrays[0], inputs.shapes, None, *arrays[1:])
    before = gpu.launches[-1]
    cupy_msda.tune(calls, progress=False)
    cupy_msda.ms_deform_attn(arrays[0], inputs.shapes, None, *arrays[1:])
    assert milliseconds(gpu.launches[-1]) < milliseconds(before)


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_keeps_what_was_found(gpu, monkeypatch, after):
    original, measured = Bench.tune, []

    def interrupted(self, target, deadline):
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append(target)
        return original(self, target, deadline)

    monkeypatch.setattr(Bench, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cupy_msda.tune(SIZES, progress=False)
    assert {entry.subject.name for entry in loaded.gpu_of(0).choices.entries} == {target.name for target in measured}


def test_the_budget_ends_the_search(gpu, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(seconds)))
    cupy_msda.tune([replace(SIZES, N=n) for n in (1, 3, 9)], budget=30, progress=False)
    assert next(seconds) < 400


def test_other_results_are_left_out(gpu, monkeypatch):
    monkeypatch.setattr(DeviceArrays, "agree", lambda self, one, other: False)
    with pytest.warns(RuntimeWarning, match="another result, so this is left out"):
        entries = cupy_msda.tune(SIZES, backward=False, progress=False)
    assert all(not entry.axes for entry in entries)


def test_a_problem_that_is_too_large_is_left_out(gpu, monkeypatch):
    class OutOfMemoryError(Exception):
        pass

    original = DeviceArrays.__init__

    def init(self, problem, on, stream):
        if problem.N == 3:
            raise OutOfMemoryError("no memory")
        original(self, problem, on, stream)

    monkeypatch.setattr(DeviceArrays, "__init__", init)
    with pytest.warns(RuntimeWarning, match="is left out: no memory"):
        entries = cupy_msda.tune([replace(SIZES, N=n) for n in (3, 1)], backward=False, progress=False)
    assert {entry.sizes.N for entry in entries} == {1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget: expected a positive number of seconds, got 0"),
        ({"dtypes": "int8"}, TypeError, "dtypes: expected float16"),
    ],
)
def test_what_cannot_be_tuned_is_refused(gpu, options, error, message):
    with pytest.raises(error, match=message):
        cupy_msda.tune(SIZES, **options)


def test_the_reference_kernels_are_not_tuned(gpu, monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    with pytest.raises(RuntimeError, match="expected CUPY_MSDA_KERNELS=fast, got naive"):
        cupy_msda.tune(SIZES)


def test_the_typical_calls_are_tuned_without_sizes():
    problems = tune.calls_of(None, ["float16"], True, 0)
    assert {problem.Q for problem, _ in problems} >= {22223, 300, 900}
    assert all(wanted == [None, ALL] for _, wanted in problems)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
@pytest.mark.parametrize("form", ["plain", "dense", "half", "fused"])
def test_drawn_configurations_have_right_results(monkeypatch, form, seed, deterministic):
    """Whatever a tuning file says: results, launches and memory are right."""
    gpu = emulated_gpu.install(monkeypatch)
    case, pair = {"plain": (PLAIN, ()), "dense": (DENSE, ()), "half": (PLAIN, HALF), "fused": (DENSE, ())}[form]
    inputs = case.inputs(*pair)
    if form == "fused":
        inputs = to_fused(inputs, **FUSED)
    pick = random.Random(f"{form} {seed}")

    class Drawn(Choices):
        """Some axes for whatever is asked for."""

        def entry(self, name, problem, wanted=None):
            drawn = drawn_entries.choices_of(pick, problem, wanted or ALL)
            return drawn.find(tuned.subject_of(name, problem, wanted), tuned.measured_of(problem))

    some = drawn_entries.choices_of(pick, problem_of(), ALL)
    monkeypatch.setattr(loaded, "_choices", {0: Drawn(some.entries)})
    check(gpu, inputs, deterministic=deterministic)
    gpu.check()


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("wanted", [None, ALL], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", [SMALL, replace(SMALL, reference_coordinates=4)], ids=["plain", "fused"])
def test_results_are_compared(monkeypatch, sizes, wanted):
    """Every way to the same results agrees; a kernel that leaves something out does not."""
    gpu = emulated_gpu.install(monkeypatch)
    gpu.device = 0
    bench = Bench(problem_of(sizes))
    name, axes = ("grad_value", {"way": "atomics"}) if wanted else ("forward", {"lanes_per_query": 4, "warps": 1})
    target = next(one for one in targets_of(bench.problem, wanted) if one.name == name)
    default, other = (bench.planner.candidate(target, one) for one in ({"way": "sorted"} if wanted else None, axes))
    assert default.launches != other.launches
    assert bench.arrays.agree(default, other)
    launch, first = gpu._run, []

    def without_the_first(planned, words):
        return launch(planned, words) if first else first.append(planned)

    monkeypatch.setattr(gpu, "_run", without_the_first)
    assert not bench.arrays.agree(default, other)


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
def test_deterministic_calls_have_the_same_bits_with_other_blocks(monkeypatch):
    gpu, inputs = emulated_gpu.install(monkeypatch), DENSE.inputs()
    _, default = check(gpu, inputs, deterministic=True)
    blocks = {"warps": 2, "min_blocks": 3}

    class Chosen(Choices):
        def axes(self, name, problem, wanted=None):
            allowed = set(tuned.AXES[name]) - set(tuned.ORDERED.get(name, ()))
            return {axis: value for axis, value in blocks.items() if axis in allowed}

        def __bool__(self):
            return True

    monkeypatch.setattr(loaded, "_choices", {0: Chosen()})
    loaded.forget_launches()
    _, chosen = check(gpu, inputs, deterministic=True)
    assert {launch.spec.axes().get("warps") for launch in gpu.launches} >= {2}
    for one, other in zip(default[:3], chosen[:3], strict=True):
        assert np.array_equal(one.get(), other.get())
