"""A forward that programs without Python launch: its kernel for each architecture, and what a launch needs to know.

The host code is ``cuda_src/launcher``; ``c_sources.py`` writes what is here as C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..call import Problem
from . import heuristics, plan
from .axes import VECTOR_BYTES
from .cubins import compile_cubin
from .gpu import described
from .index_width import Sizes
from .specs import ForwardSpec

# More than any index holds.
_BEYOND = 1 << 63


@dataclass(frozen=True)
class ForwardCubin:
    """The kernel for one architecture.

    Attributes
    ----------
    architecture : int
        90 for sm_90.
    spec : ForwardSpec
    image : bytes
        The cubin.
    carveout : int
        Percentage of a multiprocessor's memory that is shared memory.
    resident_blocks : int
        Blocks on a multiprocessor at a time.
    max_S, max_Q, max_heads : int
        Sizes that the kernel's indices count; `max_heads` limits N * M.
    """

    architecture: int
    spec: ForwardSpec
    image: bytes
    carveout: int
    resident_blocks: int
    max_S: int
    max_Q: int
    max_heads: int

    @property
    def queries_per_block(self) -> int:
        return self.spec.block.warps * self.query_tiles * self.spec.queries_per_tile

    @property
    def query_tiles(self) -> int:
        return self.spec.queries.query_tiles


@dataclass(frozen=True)
class ForwardExport:
    """A configuration: its name, the problem whose sizes its kernels are chosen for, and the kernels."""

    name: str
    problem: Problem
    cubins: tuple[ForwardCubin, ...]

    @property
    def pixel_queries(self) -> bool:
        """Whether a kernel takes queries in tiles of pixels, so that Q must be S."""
        return any(cubin.spec.queries.tile_rows for cubin in self.cubins)


def export_forward(name: str, problem: Problem, architectures: Iterable[int]) -> ForwardExport:
    """Compile the forward of `problem` for these architectures, with the launch choices of each."""
    return ForwardExport(name, problem, tuple(_cubin(problem, architecture) for architecture in architectures))


def _cubin(problem: Problem, architecture: int) -> ForwardCubin:
    gpu = described(architecture)
    spec = plan.forward(problem, VECTOR_BYTES, gpu).spec
    assert isinstance(spec, ForwardSpec)
    max_Q = _largest(lambda Q: not spec.exceeded(Sizes(N=1, S=1, Q=Q)))
    if spec.queries.tile_rows:
        max_Q = min(max_Q, heuristics.MAX_TILED_QUERIES)
    resident = spec.resident_blocks(gpu)
    return ForwardCubin(
        architecture=architecture,
        spec=spec,
        image=compile_cubin(spec, architecture),
        carveout=gpu.carveout(resident, spec.shared_bytes),
        resident_blocks=resident,
        max_S=_largest(lambda S: not spec.exceeded(Sizes(N=1, S=S, Q=1))),
        max_Q=max_Q,
        max_heads=problem.M * _largest(lambda N: not spec.exceeded(Sizes(N=N, S=1, Q=1))),
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all smaller ones do."""
    low, high = 0, _BEYOND
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
