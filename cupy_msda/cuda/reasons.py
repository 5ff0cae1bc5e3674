"""Why a call gets its kernels, in sentences, and the least time that it can take, for :func:`cupy_msda.explain`.

Pure functions of the problem, the alignment and the GPU.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ..arrays import item_size
from ..call import Problem, Wanted
from . import cost_model, heuristics, plan, plan_backward
from .axes import VECTOR_BYTES
from .gpu import Gpu
from .kernel_spec import Axis
from .launch_tables import table_of
from .plan import Launch
from .sorted_specs import ReduceBucketsSpec
from .specs import BackwardSpec, ForwardSpec
from .tuning import applied
from .tuning.tuned import Axes

_ENTRIES = {
    "many_channel_tiles": "a head has very many channels, whose sums need the registers",
    "float64": "float64 vectors and sums take twice the registers",
    "pixels_32_bits": "the queries are pixels and fill the GPU: large blocks share pixels in the L1 cache",
    "fused_pixels_32_bits": "the queries are pixels and fill the GPU: large blocks share pixels in the L1 cache",
    "pixels_16_bits": "the queries are pixels and fill the GPU",
    "queries_32_bits": "the queries are no pixels, or do not fill the GPU: small blocks end independently",
    "queries_16_bits": "the queries are no pixels and fill the GPU",
    "few_queries_16_bits": "the queries do not fill the GPU: each has more loads in flight",
}
# The axes that are choices of a launch, in the order in which they are printed.
_CHOICES = (
    "warps", "min_blocks", "unroll", "vec", "lanes", "lane_groups", "heads_per_warp", "query_tiles", "tile_rows",
    "chunk", "masked_neighbours", "aggregation_bits", "paired_tiles", "bucket_size", "wide_index",
)  # fmt: skip


class ExplainedKernel(NamedTuple):
    """A kernel of a call: its launch, the axes that were chosen, and why.

    `measured` are the axes that tuning has set.
    """

    name: str
    launch: Launch
    configuration: dict[str, Axis]
    measured: Axes
    reasons: tuple[str, ...]


def forward(problem: Problem, alignment: int, gpu: Gpu) -> list[ExplainedKernel]:
    """The kernel of a forward."""
    launch, axes = plan.forward(problem, alignment, gpu), applied.axes_of("forward", problem, alignment, gpu)
    spec = launch.spec
    assert isinstance(spec, ForwardSpec)
    table, entry = table_of(gpu).forward, heuristics.forward_entry(problem, spec.channels, gpu)
    names = [field.name for field in dataclasses.fields(table) if getattr(table, field.name) is entry]
    reasons = [_ENTRIES[names[0]], *_of_block(launch, gpu), *_of_vectors(problem, spec.channels.vec, alignment)]
    if spec.lane_groups > 1:
        reasons.append(f"{spec.lane_groups} groups of lanes share the samples of a query, which shortens each query")
    if spec.heads_per_warp > 1:
        reasons.append(f"the value vectors of {spec.heads_per_warp} heads fill a cache line together")
    if spec.queries.tile_rows:
        reasons.append("Q = S: neighbouring warps take neighbouring pixels and read the same value vectors")
    if spec.queries.chunk < problem.K:
        reasons.append(f"of {problem.K} samples per query, {spec.queries.chunk} are in shared memory at a time")
    reasons += _of_unused_tuning("forward", problem, alignment, gpu)
    return [_explained("forward", launch, axes, reasons)]


def backward(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted) -> list[ExplainedKernel]:
    """The kernels of a backward, in their order."""
    planned = plan_backward.backward(problem, alignment, gpu, wanted)
    found = []
    for launch in planned.launches:
        name, reasons = launch.spec.kernel, _of_block(launch, gpu)
        subject, of_subject = name, wanted
        if isinstance(launch.spec, BackwardSpec):
            subject, of_subject, first = _of_backward(launch.spec, problem, alignment, gpu, wanted)
            reasons = [first, *reasons, *_of_vectors(problem, launch.spec.channels.vec, alignment)]
        elif isinstance(launch.spec, ReduceBucketsSpec):
            reasons.insert(0, "a warp sums a bucket of value vectors in a fixed order")
        elif name == "bucket_sort":
            reasons.insert(
                0, f"grad_value is summed from sorted contributions: {_why_way(problem, alignment, gpu, wanted)}"
            )
        elif name == "cast":
            reasons.insert(0, "the atomic additions are to float32 sums")
        if name == "bucket_sort":  # it loads no vectors of value
            axes = applied.axes_of(name, problem, VECTOR_BYTES, gpu)
        else:
            axes = applied.axes_of(subject, problem, alignment, gpu, of_subject)
            reasons += _of_unused_tuning(subject, problem, alignment, gpu, of_subject)
        found.append(_explained(name, launch, axes, reasons))
    return found


def _of_backward(
    spec: BackwardSpec, problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted
) -> tuple[str, Wanted, str]:
    """What tuning calls a launch of this kernel, with which gradients, and what it is for."""
    if not spec.gradients.grad_value:
        return "samples", wanted._replace(value=False), "the gradients of the samples alone"
    why = _why_way(problem, alignment, gpu, wanted)
    if spec.aggregation_bits:
        return "aggregated", wanted, f"a block adds up the samples of a cell before its atomic additions: {why}"
    return "atomics", wanted, f"an atomic addition per sample and value vector: {why}"


def _why_way(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted) -> str:
    """Why the gradient of value is summed as it is."""
    if problem.deterministic:
        return "deterministic=True asks for a fixed order"
    if applied.axes_of("grad_value", problem, alignment, gpu, wanted):
        return "measured on this GPU"
    costs = cost_model.estimates(problem)
    listed = ", ".join(f"{name} {costs[name] / 1000:.0f}" for name in sorted(costs, key=costs.__getitem__))
    unused = _of_unused_tuning("grad_value", problem, alignment, gpu, wanted)
    return "; ".join([f"estimated microseconds on an H100: {listed}", *unused])


def _of_unused_tuning(name: str, problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted | None = None) -> list[str]:
    """Why what tuning found for a call like this one is not used."""
    if alignment >= VECTOR_BYTES or not gpu.choices.axes(name, problem, wanted):
        return []
    return [
        f"the tuned {name} is not used: it holds for addresses at multiples of {VECTOR_BYTES} bytes, and these are at "
        f"multiples of {alignment}"
    ]


def _of_block(launch: Launch, gpu: Gpu) -> list[str]:
    if "min_blocks" not in launch.spec.axes():
        return []
    blocks, threads = launch.spec.min_blocks, launch.threads
    registers = min(255, gpu.registers_per_multiprocessor // (threads * blocks) // 8 * 8)
    resident = launch.spec.resident_blocks(gpu)
    share = resident * threads * 100 // gpu.threads_per_multiprocessor
    return [
        f"{resident} blocks of {threads // 32} warps on a multiprocessor, {share} % of its threads; a thread has up to "
        f"{registers} registers"
    ]


def _of_vectors(problem: Problem, vec: int, alignment: int) -> list[str]:
    """Why a lane moves fewer bytes at a time than it could."""
    nbytes = vec * item_size(problem.value_dtype)
    if nbytes >= VECTOR_BYTES or vec == problem.D:
        return []
    if min(alignment, problem.stride_alignment) <= nbytes:
        return [f"loads of {nbytes} bytes, because an address or a stride is no multiple of more"]
    if problem.D % (2 * vec):
        return [f"loads of {nbytes} bytes, because D = {problem.D} is no multiple of more"]
    return [f"loads of {nbytes} bytes, whose float32 gradient has {VECTOR_BYTES}"]


def _explained(name: str, launch: Launch, axes: Axes, reasons: list[str]) -> ExplainedKernel:
    found = launch.spec.axes()
    chosen = {axis: found[axis] for axis in _CHOICES if axis in found and found[axis] is not False}
    return ExplainedKernel(name, launch, chosen, axes, tuple(reasons))


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Bytes per second of the memory, and of all L1 caches together; 0 where they are not known."""

    memory: float
    l1: float


class Floor(NamedTuple):
    """Bytes that a call moves to and from memory at least, and the microseconds that this and its loads take."""

    nbytes: int
    memory_us: float
    l1_us: float


def floor(problem: Problem, wanted: Wanted | None, rates: Rates) -> Floor:
    """Every input is read once and every output is written once; of value, as many vectors as there are reads."""
    item, location = item_size(problem.value_dtype), item_size(problem.location_dtype)
    vectors = problem.N * problem.M * problem.D * item
    neighbours = len(problem.variant.neighbours) ** 2
    reads = problem.N * problem.Q * problem.M * problem.K * neighbours * problem.D * item
    value, output = min(vectors * problem.S, reads), vectors * problem.Q
    samples = 3 * problem.N * problem.Q * problem.M * problem.K * location
    nbytes = samples + output
    if wanted is None or wanted.samples:
        nbytes += value
    if wanted is not None:
        nbytes += vectors * problem.S * wanted.value + samples * (2 * wanted.locations + wanted.weights) // 3
    passes = 0 if wanted is not None and not wanted.samples else reads
    return Floor(nbytes, _microseconds(nbytes, rates.memory), _microseconds(passes, rates.l1))


def _microseconds(nbytes: float, rate: float) -> float:
    return nbytes / rate * 1e6 if rate else 0.0
