"""Every choice of the planner fits the GPU: on each architecture, for random problems."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cupy_msda.cuda import gpu, heuristics, plan, plan_backward
from cupy_msda.cuda.gpu import ARCHITECTURES, H100
from cupy_msda.sizes import Sizes, problems_of
from tests.helpers import random_problems

CUDA_THREADS_PER_BLOCK = 1024
# Asked of the planner on every architecture.
ASKED = random_problems.draw(400, seed=1)
# Encoders with many samples per query or many levels: the samples of 16 warps are more than some GPUs have room for.
LARGE_BLOCKS = problems_of(
    [
        Sizes(((64, 64), (32, 32), (16, 16), (8, 8)), N=4, M=16, D=16, P=16),
        Sizes(((256, 256),), N=2, M=16, D=16, P=64),
        Sizes(((64, 64),) * 20, N=2, M=8, D=32, P=100),
        Sizes(((100, 167), (50, 84), (25, 42), (13, 21)), N=2, P=3000),
    ],
    ["float32", "float16"],
    device=0,
)
# Problems with large blocks that each architecture plans.
DRAWN_LARGE = 300
CUDA_GRID = (2**31 - 1, 65535, 65535)


def launches(asked, on):
    problem, alignment, wanted = asked
    for plan_one in (
        lambda: (plan.forward(problem, alignment, on),),
        lambda: plan_backward.backward(problem, alignment, on, wanted).launches,
    ):
        try:
            yield from plan_one()
        except NotImplementedError:  # a fused call with more samples than shared memory holds
            assert problem.fused
            assert problem.K > 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_choice_fits(architecture):
    on, kernels = ARCHITECTURES[architecture], set()
    for asked in ASKED:
        for launch in launches(asked, on):
            spec, resident = launch.spec, launch.spec.min_blocks
            kernels.add(spec.kernel)
            assert launch.threads <= CUDA_THREADS_PER_BLOCK, launch
            assert resident * launch.threads <= on.threads_per_multiprocessor, launch
            assert 1 <= resident <= on.blocks_per_multiprocessor, launch
            assert launch.shared_bytes <= on.shared_memory_per_block, launch
            # The carve-out and the last wave count the blocks that the shared memory has room for.
            held = spec.resident_blocks(on)
            assert 1 <= held <= resident
            if spec.shared_bytes:
                needed = held * (spec.shared_bytes + on.reserved_shared_memory)
                assert needed <= on.shared_memory_per_multiprocessor, launch
    assert len(kernels) == 7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("problem", LARGE_BLOCKS, ids=lambda problem: f"{problem.value_dtype}-K={problem.K}")
def test_large_blocks_fit(problem, architecture):
    on = ARCHITECTURES[architecture]
    assert plan.forward(problem, 16, on).is_possible(on)


def launches_of_every_way(asked, on):
    """Of the forward, and of the backward by each way to sum grad_value, whether or not the planner would choose it."""
    problem, alignment, wanted = asked
    asked_of_planner = [lambda: plan.forward(problem, alignment, on)]
    if wanted.samples:
        asked_of_planner.append(lambda: plan.backward(problem, alignment, on, wanted._replace(value=False)))
    if wanted.value:
        in_order = replace(problem, deterministic=True)
        asked_of_planner += [
            lambda: plan.backward(problem, alignment, on, wanted),
            lambda: plan.backward(problem, alignment, on, wanted, aggregated=True),
            lambda: plan_backward.backward(in_order, alignment, on, wanted),
        ]
    for make in asked_of_planner:
        try:
            yield from make().launches
        except NotImplementedError:  # a fused call with more samples than shared memory holds
            assert problem.fused
            assert problem.K > 32


def impossible_launches(architecture, way=launches_of_every_way):
    """Launches of large problems that are not within the limits of CUDA and of the architecture."""
    on = ARCHITECTURES[architecture]
    for asked in random_problems.draw_large(DRAWN_LARGE, seed=architecture):
        for launch in way(asked, on):
            grid = all(1 <= size <= most for size, most in zip(launch.grid, CUDA_GRID, strict=True))
            threads = launch.threads <= CUDA_THREADS_PER_BLOCK
            resident = launch.spec.min_blocks * launch.threads <= on.threads_per_multiprocessor
            shared = launch.shared_bytes <= on.shared_memory_per_block
            if not (grid and threads and resident and shared):
                yield asked.problem, launch


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_large_blocks_of_every_way_fit(architecture):
    assert not list(impossible_launches(architecture))


def test_the_large_problems_need_smaller_blocks_on_turing(monkeypatch):
    """Without the rule that halves the warps of a block, several of these forwards do not fit into 64 KiB."""
    monkeypatch.setattr(heuristics, "_fitting", lambda spec, on: spec)
    found = [problem for problem, launch in impossible_launches(75, launches) if launch.spec.kernel == "forward"]
    assert len(found) >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resident_blocks_are_those_of_hopper_or_what_fits(architecture):
    """Fewer are resident where one more would not fit, or would leave a thread fewer registers than it needs there."""
    on = replace(ARCHITECTURES[architecture], multiprocessors=H100.multiprocessors)
    for asked in ASKED:
        for launch, hopper in zip(launches(asked, on), launches(asked, H100), strict=True):
            most = on.threads_per_multiprocessor // launch.threads
            wanted = min(hopper.spec.min_blocks, most)
            assert launch.spec.min_blocks <= wanted
            if launch.spec.min_blocks < wanted:
                assert architecture != 90
                # A fused call with many samples has smaller blocks, and as many of them.
                assert asked.problem.fused or (1 << 16) // (launch.threads * (launch.spec.min_blocks + 1)) < 72


def test_turing_holds_two_blocks_of_16_warps():
    encoder = next(a.problem for a in ASKED if forward_warps(a.problem, H100) == 16)
    t4 = replace(ARCHITECTURES[75], multiprocessors=1)
    spec = plan.forward(encoder, 16, t4).spec
    assert (spec.block.warps, spec.block.min_blocks) == (16, 2)


def forward_warps(problem, on):
    try:
        return plan.forward(problem, 16, on).spec.block.warps
    except NotImplementedError:
        return 0


@pytest.mark.parametrize(
    ("threads", "shared", "blocks"), [(512, 0, 2), (1024, 0, 1), (32, 0, 16), (64, 30 << 10, 2), (64, 40 << 10, 1)]
)
def test_resident_blocks_of_turing(threads, shared, blocks):
    assert ARCHITECTURES[75].resident_blocks(threads, shared) == blocks


def test_carveout_is_what_the_resident_blocks_need():
    assert H100.carveout(3, 18 << 10) == 25  # 3 * 19 KiB of 228
    assert H100.carveout(9, 48 << 10) == 100


# ---- a GPU by its attributes -----------------------------------------------------------------------------------------

ATTRIBUTES = {
    "MultiProcessorCount": 20,
    "MaxThreadsPerMultiProcessor": 1536,
    "MaxBlocksPerMultiprocessor": 24,
    "MaxRegistersPerMultiprocessor": 65536,
    "MaxSharedMemoryPerMultiprocessor": 233472,
    "MaxSharedMemoryPerBlockOptin": 232448,
    "ReservedSharedMemoryPerBlock": 1024,
    "L2CacheSize": 1 << 25,
}


def test_an_architecture_that_is_not_listed_is_served_from_its_attributes():
    assert 110 not in ARCHITECTURES
    found = gpu.from_attributes(110, ATTRIBUTES)
    assert (found.multiprocessors, found.threads_per_multiprocessor, found.l2_bytes) == (20, 1536, 1 << 25)
    planned = [launch for asked in ASKED[:50] for launch in launches(asked, found)]
    assert all(launch.spec.min_blocks * launch.threads <= 1536 for launch in planned)


def test_the_list_agrees_with_attributes():
    """What a device would say, written as the list does."""
    listed = ARCHITECTURES[120]
    said = gpu.from_attributes(
        120,
        ATTRIBUTES
        | {"MultiProcessorCount": 170, "L2CacheSize": 96 << 20}
        | {"MaxSharedMemoryPerMultiprocessor": 102400, "MaxSharedMemoryPerBlockOptin": 101376},
    )
    assert said == listed


@pytest.mark.parametrize(
    ("architecture", "nvrtc", "works"), [(75, 13, True), (70, 13, False), (70, 12, True), (61, 12, False)]
)
def test_a_gpu_that_is_too_old_gets_a_sentence(architecture, nvrtc, works):
    reason = gpu.refusal(architecture, nvrtc)
    assert (reason is None) == works
    if reason:
        assert f"compute capability {architecture / 10}" in reason
        assert "expected 7.5 or newer, or 7.0 with the extra cuda12; move the arrays to the CPU" in reason


def test_a_call_on_a_gpu_that_is_too_old_is_refused(monkeypatch):
    old = SimpleNamespace(compute_capability="61", attributes=ATTRIBUTES)
    cuda = SimpleNamespace(Device=lambda device: old, nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)))
    monkeypatch.setattr(gpu.arrays, "require_cupy", lambda what: SimpleNamespace(cuda=cuda))
    with pytest.raises(RuntimeError, match=r"compute capability 6\.1 is too old"):
        gpu.of_device.__wrapped__(0)


def test_a_gpu_that_is_not_here_has_the_limits_of_the_nearest_listed_one():
    assert gpu.described(90) == H100
    assert gpu.described(103) == replace(ARCHITECTURES[100], architecture=103)
    assert gpu.described(121) == replace(ARCHITECTURES[120], architecture=121)
    assert (gpu.described(70).multiprocessors, gpu.described(72).multiprocessors) == (80, 80)
    assert gpu.is_listed(70)
    assert not gpu.is_listed(103)
    with pytest.raises(ValueError, match=r"compute capability 6\.1 is too old"):
        gpu.described(61)
