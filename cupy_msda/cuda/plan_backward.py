"""Which kernels a backward is made of, and their launches: a pure function of the problem.

The gradient of value is a sum over all samples that touch a pixel, and there are three ways to it:

- by atomic additions, one a sample and row (msda_backward.cu): few launches, for small problems;
- merged: the same, but a block first adds up its samples of a cell, for many samples a row of value;
- in lists, without atomics (msda_bins.cuh says what parts, bins, lists and runs are): every sum in the order of the
  samples, so the result is the same to the last bit, and each row of grad_value is written once, in value's dtype.
  For `deterministic`, and for few samples in a large value, where zeroing, adding and rounding cost more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..arrays import item_size
from ..call import ALL, SIXTEEN_BIT, Problem, Wanted
from . import plan
from .plan import LEVEL_BYTES, KernelKey, Launch, lanes_of_gradient, levels_by_value, shared_bytes

# Rows of value, of all images and heads, from which on lists pay for their launches: of 32 bits and more, and of 16,
# which atomics have to round as well. H100, microseconds, lists against atomics, before the last 15 % of the lists:
# decoder_300 with N = 2 (2**18.4 rows) 42 and 38 in float32, 35 and 60 in float16; with N = 1 25 and 22, 24 and 31;
# rtdetr_640 with N = 2 (2**17.0) 30 and 21, 29 and 28; with N = 8 (2**19.0) 77 and 100, 64 and 127.
MANY_ROWS = (2**18, 2**17)
# Parts a row of value from which on a block sums each bin (msda_sum.cu), instead of a warp (msda_add.cu).
DENSE = 4
# Sums of a bin in shared memory, in bytes.
BIN_BYTES = 8 * 1024
# Rows of a bin at most, and bins whose lists a block can count in shared memory; more are done slab after slab.
MAX_ROWS, MAX_BINS = 32, 1024
# Slabs up to which lists are chosen for their speed: each reads all samples again.
MAX_SLABS = 4
# Parts of a run in shared memory, in bytes.
SORT_BYTES = 48 * 1024
# Parts that a block sums: a bin of more is summed in pieces of this many, a multiple of what it sorts at a time.
PIECE = 8 * 1024
# Warps of a block that counts: they share the runs of 32 bins.
COUNT_WARPS = 32
# Bytes of parts between the launches, unless one head needs more: heads are done in groups.
WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Summation:
    """The launches of a sum in lists, and the memory between them.

    `heads` of N * M and `rows` of S are done at a time. Each head has `runs` of at most `capacity` entries, which stand
    at byte `entries` of the workspace of `nbytes`; the beginnings of their lists come before. Where a bin can have more
    than `piece` parts, `count` lists its pieces: what the kernels call `msda_counts` is at byte `counts`, the list at
    `pieces`, and the sums of each piece at `sums`.
    """

    sort: Launch
    count: Launch | None
    sum: Launch
    heads: int
    rows: int
    runs: int
    capacity: int
    piece: int
    entries: int
    counts: int
    pieces: int
    sums: int
    nbytes: int

    @property
    def launches(self) -> tuple[Launch, ...]:
        """In their order."""
        return (self.sort, self.count, self.sum) if self.count else (self.sort, self.sum)


@dataclass(frozen=True)
class Backward:
    """What runs, in this order: None for what does not. `workspace` is the bytes between the launches.

    `samples` computes the gradients of locations and weights alone, and may run beside `summation`. `atomics` adds to
    zeros, and computes those gradients too where they are wanted; `rounding` rounds its sums to 16 bits. With a front
    end, `expand` makes the locations and weights of `summation`, at byte `expanded` of the workspace, and `references`
    sums what the heads add to the gradient of reference points, at byte `parts`.
    """

    samples: Launch | None = None
    expand: Launch | None = None
    summation: Summation | None = None
    atomics: Launch | None = None
    rounding: Launch | None = None
    references: Launch | None = None
    expanded: int = 0
    parts: int = 0
    workspace: int = 0

    @property
    def launches(self) -> tuple[Launch, ...]:
        """All of them."""
        sums = self.summation.launches if self.summation else ()
        found = (self.samples, self.expand, *sums, self.atomics, self.rounding, self.references)
        return tuple(launch for launch in found if launch)


def backward(problem: Problem, alignment: int, multiprocessors: int = 132, wanted: Wanted = ALL) -> Backward:
    """The launches for the gradients that are wanted; `alignment` is what all value-like addresses are multiples of."""
    planned = _gradients(problem, alignment, multiprocessors, wanted)
    if not wanted.references:
        return planned
    front, parts = problem.fused, _aligned(planned.workspace)
    assert front is not None
    count = problem.N * problem.Q * problem.M * problem.L * front.coordinates
    return replace(
        planned,
        references=plan.sum_references(problem),
        parts=parts,
        workspace=parts + count * item_size(problem.accumulator_dtype),
    )


def _gradients(problem: Problem, alignment: int, multiprocessors: int, wanted: Wanted) -> Backward:
    samples = None
    if wanted.samples:
        samples = plan.backward(problem, alignment, multiprocessors, wanted._replace(value=False))
    if not wanted.value:
        return Backward(samples)
    if in_lists(problem):
        summed = summation(problem, alignment)
        expand = expansion(problem)
        if expand is None:
            return Backward(samples, summation=summed, workspace=summed.nbytes)
        at = _aligned(summed.nbytes)
        nbytes = 3 * item_size(problem.accumulator_dtype) * problem.N * problem.Q * problem.M * problem.K
        return Backward(samples, expand, summed, expanded=at, workspace=at + nbytes)
    atomics = plan.backward(problem, alignment, multiprocessors, wanted)
    if problem.value_dtype not in SIXTEEN_BIT:
        return Backward(atomics=atomics)
    count = problem.N * problem.S * problem.M * problem.D
    rounding = plan.round_gradient(problem.value_dtype, count)
    return Backward(atomics=atomics, rounding=rounding, workspace=4 * count)


def expansion(problem: Problem) -> Launch | None:
    """Launch of the kernel that makes locations and weights for the sort, where it does not by itself.

    It has a sample a lane, one after the other: a softmax among them needs queries that do not straddle warps. Then no
    launch comes before it (decoder_300 on an H100: 45 us with it, 33 without).
    """
    if problem.fused is None or problem.K in (1, 2, 4, 8, 16, 32):
        return None
    return plan.expand(problem)


def in_lists(problem: Problem) -> bool:
    """Whether grad_value is summed in lists: where the caller wants a fixed order, and where it is faster."""
    if problem.deterministic:
        return True
    many = MANY_ROWS[problem.value_dtype in SIXTEEN_BIT]
    rows = problem.N * problem.S * problem.M
    few_slabs = problem.S <= MAX_SLABS * MAX_BINS * MAX_ROWS
    return not plan.merges(problem) and few_slabs and rows >= many


def summation(problem: Problem, alignment: int) -> Summation:
    """Launches and memory of a sum in lists."""
    if problem.Q >= 2**32:
        raise NotImplementedError(f"deterministic: expected fewer than 2**32 queries, got Q = {problem.Q}")
    samples, parts = problem.Q * problem.K, len(problem.variant.neighbours)
    of_sum = _sum_key(problem, alignment, dense=parts * samples > DENSE * problem.S)
    bins = min(-(-problem.S // of_sum.rows), MAX_BINS)
    of_sort = _sort_key(problem, of_sum.rows, of_sum.index_64)
    runs = -(-samples // (of_sort.warps * of_sort.chunk))
    capacity = of_sort.warps * of_sort.chunk * parts

    entry = entry_bytes(problem.value_dtype)
    pitch = 2 * (2 * bins + 2)  # bytes of the beginnings of a run's lists
    heads = max(1, min(problem.N * problem.M, WORKSPACE // (runs * (pitch + capacity * entry))))
    entries = _aligned(heads * runs * pitch)
    counts = entries + heads * runs * capacity * entry
    count, most, of_piece = None, 0, 0
    if of_sum.kind == "sum" and 2 * parts * samples > PIECE:
        # A part that reaches into the next bin is in both, and a bin of more than a piece has less than twice as many
        # pieces as its parts would fill.
        most = 2 * heads * (2 * parts * samples // PIECE)
        of_piece = of_sum.rows * -(-problem.D // (of_sum.lanes * of_sum.vec)) * of_sum.lanes * of_sum.vec
        of_count = _key("count", warps=COUNT_WARPS, rows=of_sum.rows)
        count = Launch(of_count, (heads * -(-bins // 32), 1, 1), 32 * of_count.warps, shared_bytes(of_count))
    pieces = _aligned(counts + (16 + 8 * heads * bins if count else 0))
    sums = _aligned(pieces + 16 * most)
    levels = problem.L * LEVEL_BYTES
    sorted_bytes = -(-max(capacity * entry, of_sort.warps * pitch) // 16) * 16
    bins_of_block = 1 if of_sum.kind == "sum" else of_sum.warps
    return Summation(
        Launch(of_sort, (heads * runs, 1, 1), 32 * of_sort.warps, sorted_bytes + levels + 4 * of_sort.warps + pitch),
        count,
        Launch(of_sum, (heads * -(-bins // bins_of_block), 1, 1), 32 * of_sum.warps, shared_bytes(of_sum)),
        heads=heads,
        rows=bins * of_sum.rows,
        runs=runs,
        capacity=capacity,
        piece=PIECE,
        entries=entries,
        counts=counts,
        pieces=pieces,
        sums=sums,
        nbytes=sums + most * of_piece * item_size(problem.accumulator_dtype),
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def _sum_key(problem: Problem, alignment: int, dense: bool) -> KernelKey:
    """By a block a bin, which sorts its parts by row, or by a warp a bin, which adds them one after the other.

    A warp needs all channels of its rows at once, in shared memory and in registers: not for very many of them.
    """
    vec, lanes, turns = lanes_of_gradient(problem, alignment)
    accumulator = item_size(problem.accumulator_dtype)
    step_bytes = lanes * vec * accumulator
    choices: dict[str, Any]
    if dense or turns > 4 or turns * step_bytes > BIN_BYTES:
        # encoder_800x1333 on an H100, with the sort, microseconds: 467; 4 blocks a multiprocessor, loading 4 parts
        # ahead, 484; 1024 parts at a time 511; 64 rows a bin 600 and more. mask2former_1024 171, 182, 197.
        rows = _rows(BIN_BYTES // (2 * step_bytes))
        choices = {"kind": "sum", "chunk": 512 if accumulator == 4 else 256, "warps": 8, "min_blocks": 5, "unroll": 2}
    else:
        # decoder_900 likewise: 143; 2 warps a block 146; 10 blocks 151; 16 rows a bin 197, 64 rows 166.
        rows = _rows(BIN_BYTES // (turns * step_bytes))
        choices = {"kind": "add", "warps": 4, "min_blocks": 8, "unroll": 4 // turns}
    widest = 2 * max(problem.S * problem.M * problem.D, problem.Q * problem.M * max(problem.K, problem.D))
    return _key(
        value_dtype=problem.value_dtype, index_64=widest >= 2**31, M=problem.M, D=problem.D, vec=vec, lanes=lanes,
        rows=rows, **choices,
    )  # fmt: skip


def _rows(most: int) -> int:
    """Rows of a bin: a power of two."""
    return 1 << max(0, min(most, MAX_ROWS).bit_length() - 1)


def _sort_key(problem: Problem, rows: int, index_64: bool) -> KernelKey:
    """Long runs keep the beginnings of lists few, short ones fill the GPU.

    encoder_800x1333 on an H100, with the sum: 525 us with 2,048 samples a run, 618 with 1,024; decoder_900 143 with
    1,024, 148 with 512; decoder_300 34.2 with 512, 34.9 with 1,024, 42 with 2,048. A run of SORT_BYTES fits on every
    architecture.
    """
    expanded = expansion(problem) is not None
    all_samples = problem.N * problem.M * problem.Q * problem.K
    fits = SORT_BYTES // (8 * 32 * len(problem.variant.neighbours) * entry_bytes(problem.value_dtype)) * 32
    return _key(
        "sort",
        value_dtype=problem.value_dtype,
        location_dtype=problem.accumulator_dtype if expanded else problem.location_dtype,
        index_64=index_64,
        L=problem.L,
        P=problem.P,
        M=problem.M,
        chunk=min(fits, 256 if all_samples >= 2**20 else 128 if all_samples >= 2**18 else 64),
        warps=8,
        min_blocks=4,
        levels_on_device=not levels_by_value(problem),
        points=problem.variant.num_points or (),
        nearest=problem.variant.nearest,
        border=problem.variant.padding_mode == "border",
        align_corners=problem.variant.align_corners,
        rows=rows,
        padded=problem.ragged,
        pixels=problem.fused is not None,
        **({} if expanded else plan.front_axes(problem)),
    )


def entry_bytes(value_dtype: str) -> int:
    """Size of the kernels' `msda_entry`."""
    return 32 if value_dtype == "float64" else 16


def _key(kind: str, **axes: Any) -> KernelKey:
    """A key with neutral values on the axes that a kernel does not have."""
    neutral = dict(
        value_dtype="float32", location_dtype="float32", index_64=False, L=1, P=1, M=1, D=1, vec=1, lanes=1, chunk=1,
        warps=1, rounds=1, min_blocks=1, unroll=1, band=0, levels_on_device=False,
    )  # fmt: skip
    return KernelKey(kind, **(neutral | axes))
