"""How a chosen kernel is launched, its grid and its limits: a pure function of the problem and the GPU.

A :class:`~cupy_msda.cuda.kernel_spec.KernelSpec` is every compile-time choice; :class:`Launch` adds what varies from
call to call. ``plan_backward.py`` says which launches a backward consists of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..call import ALL, SIXTEEN_BIT, Problem, Wanted
from . import heuristics, sorted_heuristics
from .axes import VECTOR_BYTES
from .gpu import Gpu
from .index_width import INT, Index, Sizes, sizes_of
from .kernel_spec import KernelSpec
from .specs import CastSpec, ForwardSpec, ReduceReferencesSpec

__all__ = [
    "VECTOR_BYTES",
    "Launch",
    "backward",
    "cast_gradient",
    "countable",
    "forward",
    "launch_of",
    "materialise",
    "measured",
    "reduce_references",
    "size_words",
]

# Blocks of a kernel that takes one element after the other, at most.
_MAX_ELEMENT_BLOCKS = 1 << 16
# Threads of a block, at most: a limit of CUDA.
_MAX_THREADS = 1024


@dataclass(frozen=True)
class Launch:
    """A kernel and its launch: blocks along x, y and z, and bytes of dynamic shared memory."""

    spec: KernelSpec
    grid: tuple[int, int, int]
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.spec.threads

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Itself alone."""
        return (self,)

    def is_possible(self, gpu: Gpu) -> bool:
        """Whether it is within the limits of CUDA and of the GPU."""
        x, y, z = self.grid
        return (
            self.threads <= _MAX_THREADS
            and self.spec.min_blocks <= gpu.resident_blocks(self.threads)
            and self.shared_bytes <= gpu.shared_memory_per_block
            and x < 2**INT
            and max(y, z) <= heuristics.MAX_GRID_Y
        )


class _Launches(Protocol):
    @property
    def launches(self) -> tuple[Launch, ...]: ...


Planned = TypeVar("Planned", bound=_Launches)


def measured(gpu: Gpu, make: Callable[[Gpu], Planned]) -> Planned:
    """What `make` plans with the measured choices of `gpu`, or without them where a launch is not possible so."""
    if gpu.choices:
        with contextlib.suppress(NotImplementedError):
            planned = make(gpu)
            if all(launch.is_possible(gpu) for launch in planned.launches):
                return planned
    return make(gpu.untuned)


def size_words(problem: Problem) -> tuple[int, int, int, int, int]:
    """S, Q, the strides of value's images and heads, N * M: the last words of the forward and backward kernels."""
    return (problem.S, problem.Q, problem.strides.image, problem.strides.head, problem.N * problem.M)


def forward(problem: Problem, alignment: int, gpu: Gpu) -> Launch:
    """Launch of the forward kernel; `alignment` is the bytes that all value-like addresses are multiples of."""
    return measured(gpu, lambda on: launch_of(problem, heuristics.forward(problem, alignment, on), on))


def launch_of(problem: Problem, spec: ForwardSpec, gpu: Gpu) -> Launch:
    """Launch of this forward kernel."""
    queries = spec.block.warps * spec.queries.query_tiles * spec.queries_per_tile
    rows = heuristics.grid_rows(problem, spec, gpu)
    return _accepted(problem, Launch(spec, _grid(problem, queries, rows), spec.shared_bytes))


def backward(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted = ALL, aggregated: bool = False) -> Launch:
    """Launch of the backward kernel, for the gradients that are wanted."""

    def make(on: Gpu) -> Launch:
        spec = heuristics.backward(problem, alignment, on, wanted, aggregated)
        queries = spec.block.warps * spec.queries.query_tiles * spec.queries_per_tile
        return _accepted(problem, Launch(spec, _grid(problem, queries, problem.N * problem.M), spec.shared_bytes))

    return measured(gpu, make)


def materialise(problem: Problem) -> Launch:
    """Launch of the kernel that turns offsets and logits into locations, in pixels, and weights."""
    spec = sorted_heuristics.materialise(problem)
    grid = _grid(problem, spec.warps * spec.queries_per_tile, problem.N * problem.M)
    return _accepted(problem, Launch(spec, grid, spec.shared_bytes))


def cast_gradient(value_dtype: str, count: int) -> Launch:
    """Launch of the kernel that casts a float32 gradient of `count` elements to a 16-bit dtype."""
    assert value_dtype in SIXTEEN_BIT
    return over_elements(CastSpec(value_dtype=value_dtype), -(-count // 4))


def reduce_references(problem: Problem) -> Launch:
    """Launch of the kernel that sums the gradient of reference points over heads."""
    fused = problem.fused
    assert fused is not None
    spec = ReduceReferencesSpec(
        value_dtype=problem.value_dtype,
        reference_dtype=fused.dtype,
        M=problem.M,
        L=problem.L,
        reference_coordinates=fused.coordinates,
        reference_levels=fused.levels,
    )
    return _accepted(problem, over_elements(spec, problem.N * problem.Q * fused.levels * fused.coordinates))


def _grid(problem: Problem, queries: int, rows: int) -> tuple[int, int, int]:
    """Blocks of `queries` queries along x; rows, mostly one per head, along y and then z."""
    along_y = min(rows, heuristics.MAX_GRID_Y)
    return (-(-problem.Q // queries), along_y, -(-rows // along_y))


def over_elements(spec: KernelSpec, count: int) -> Launch:
    """Launch of a kernel whose threads take `count` elements, one after the other."""
    return Launch(spec, (max(1, min(-(-count // spec.threads), _MAX_ELEMENT_BLOCKS)), 1, 1), 0)


def _accepted(problem: Problem, launch: Launch) -> Launch:
    if problem.fused and launch.shared_bytes > heuristics.SHARED_WITHOUT_OPT_IN:
        raise NotImplementedError(
            f"sampling_offsets: expected fewer samples per query and head than L*P = {problem.K} on a GPU, where all "
            f"of them are in shared memory for their softmax; ms_deform_attn takes any number"
        )
    return countable(problem, launch, sizes_of(problem))


def countable(problem: Problem, launch: Launch, sizes: Sizes) -> Launch:
    """`launch`, whose kernel and grid can count what there is.

    Raises
    ------
    NotImplementedError
        Where they cannot.
    """
    blocks, _, planes = launch.grid
    of_grid = {f"the blocks for Q = {problem.Q}": Index(blocks, INT), "N*M / 65535": Index(planes, 16)}
    for name, index in (launch.spec.indices(sizes) | of_grid).items():
        if not index.fits:
            raise NotImplementedError(
                f"{_argument(problem, name)}: expected {name} below 2**{index.bits} on a GPU, got {index.size}; call "
                f"the operator on a part of the arrays at a time, or set CUPY_MSDA_KERNELS=naive"
            )
    return launch


def _argument(problem: Problem, counted: str) -> str:
    """The argument that is too large where this is, in the symbols of the contract."""
    if "N" in counted or "D" in counted:
        return "value"
    if "H" in counted:
        return "spatial_shapes"
    return "sampling_offsets" if problem.fused else "sampling_locations"
