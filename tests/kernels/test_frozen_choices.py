"""On an H100 the planner makes the choices that were measured: those of a recording, for random problems.

`python -m tests.kernels.test_frozen_choices` writes the recording anew, after a choice that was a fault.
"""

import hashlib
import json
from pathlib import Path

import pytest

from cupy_msda.cuda import plan, plan_backward
from cupy_msda.cuda.gpu import H100
from tests.helpers import random_problems

# Digests of `described_choices` for the problems of `draw`, made by the planner of commit 775fc3d. Those of some are
# later: its forwards of more than 2**21 pixels as queries did not compile, and some of its bucket sorts took 64-bit
# indices for arrays that they do not read.
RECORDING = Path(__file__).with_name("frozen_choices.json")

_ALL = ("vec", "lanes", "chunk", "warps", "query_tiles", "min_blocks", "unroll", "tile_rows", "wide_index")
# The axes that are choices, in the order of the recording. Other axes follow from the problem.
CHOICES = {
    "forward": (
        *_ALL, "lane_groups", "heads_per_warp", "masked_neighbours", "levels_in_registers", "warp_independent"
    ),
    "backward": (
        *_ALL, "aggregation_bits", "paired_tiles", "grad_value", "grad_locations", "grad_weights", "grad_references"
    ),
    "bucket_sort": ("chunk", "warps", "min_blocks", "bucket_size", "smallest_bucket", "wide_index"),
    "reduce_buckets": ("vec", "lanes", "chunk", "warps", "min_blocks", "unroll", "bucket_size"),
    "materialise": ("chunk", "warps", "wide_index"),
    "cast": (),
    "reduce_references": (),
}  # fmt: skip


def text_of(launch):
    if launch is None:
        return "none"
    members = launch.spec.config()
    axes = {axis: int(members[axis]) for axis in CHOICES[launch.spec.kernel]}
    return f"{launch.spec.kernel} {axes} grid={launch.grid} threads={launch.threads} shared={launch.shared_bytes}"


def text_of_summation(sums):
    if sums is None:
        return "none"
    memory = (
        sums.heads, sums.pixels, sums.buckets, sums.runs, sums.capacity, sums.contributions_per_bucket, sums.chunk_size,
        sums.queued, sums.table, sums.contributions, sums.queue, sums.sums, sums.nbytes,
    )  # fmt: skip
    return "; ".join([text_of(sums.sort), text_of(sums.reduce), str(memory)])


def text_of_backward(planned):
    parts = [
        text_of(planned.samples),
        text_of(planned.materialise),
        text_of_summation(planned.summation),
        text_of(planned.atomics),
        text_of(planned.cast),
        text_of(planned.references),
        str((planned.materialised, planned.reference_parts, planned.workspace)),
    ]
    return " | ".join(parts)


def _answer(ask):
    try:
        return ask()
    except NotImplementedError:
        return "refused"


def described_choices(asked):
    problem, alignment, wanted = asked
    forward = _answer(lambda: text_of(plan.forward(problem, alignment, H100)))
    return f"{forward}\n{_answer(lambda: text_of_backward(plan_backward.backward(problem, alignment, H100, wanted)))}"


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_choices_are_those_of_the_recording():
    recorded = json.loads(RECORDING.read_text())
    for asked, want in zip(random_problems.draw(len(recorded)), recorded, strict=True):
        text = described_choices(asked)
        assert digest(text) == want, f"{asked}\n{text}"


@pytest.mark.parametrize("axis", ["warps", "grid", "shared"])
def test_another_choice_is_seen(axis):
    text = described_choices(random_problems.draw(1)[0])
    assert f"{axis}" in text
    assert digest(text.replace(axis, f"{axis}_", 1)) != json.loads(RECORDING.read_text())[0]


if __name__ == "__main__":
    count = len(json.loads(RECORDING.read_text()))
    digests = [f'"{digest(described_choices(asked))}"' for asked in random_problems.draw(count)]
    lines = (", ".join(digests[at : at + 10]) for at in range(0, count, 10))
    RECORDING.write_text("[\n" + ",\n".join(lines) + "\n]\n")
