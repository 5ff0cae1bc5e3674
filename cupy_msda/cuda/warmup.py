"""Warm-up: compiles the kernels of later calls, so that none of these waits and a CUDA graph can capture the first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .. import arrays, options, validate
from ..call import ALL, SIXTEEN_BIT, VALUE_DTYPES, FusedFrontEnd, Problem, contiguous_starts
from . import kernels, plan, plan_backward, session, streams
from .gpu import Gpu, of_device
from .kernel_spec import KernelSpec
from .level_tables import level_table

# With fewer kernels, a progress bar would be gone before it is read.
_MANY = 8


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call in the notation of the contract. `levels` holds (H, W) of each; Q None stands for Q = S, an
    encoder.

    `num_points` to `align_corners` are those of :func:`cupy_msda.ms_deform_attn`; with `num_points`, P has no meaning.
    `ragged` stands for calls with `query_lengths`.

    `reference_coordinates` of 2 (points) or 4 (boxes) stands for calls of :func:`cupy_msda.ms_deform_attn_fused`, with
    a reference for each level unless `one_reference`, and with `packed` for offsets and logits in one array.
    """

    levels: Sequence[tuple[int, int]]
    N: int = 1
    Q: int | None = None
    M: int = 8
    D: int = 32
    P: int = 4
    num_points: Sequence[int] | None = None
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    ragged: bool = False
    reference_coordinates: int | None = None
    one_reference: bool = False
    packed: bool = False

    @property
    def S(self) -> int:
        """Pixels of all levels together."""
        return sum(h * w for h, w in self.levels)

    @property
    def contiguous_levels(self) -> tuple[tuple[int, int, int], ...]:
        """(H, W, start) of each level."""
        starts = contiguous_starts(self.levels)
        return tuple((h, w, start) for (h, w), start in zip(self.levels, starts, strict=True))


def warmup(
    sizes: Sizes | Iterable[Sizes],
    dtypes: str | Iterable[str] = ("float32",),
    *,
    backward: bool = True,
    device: int | None = None,
    progress: bool | None = None,
) -> int:
    """Compile and load every CUDA kernel that calls of these sizes and dtypes use, in parallel.

    A kernel serves many sizes (it depends on dtypes, L, P, M and D, and on whether Q = S and the GPU is filled), so one
    entry per layer of a model is enough. Covers locations in value's dtype and in float32, metadata on the host and on
    the GPU, and the backward with all gradients, `deterministic` or not; with reference points, these in the dtypes of
    locations too, and the backward with their gradient and without. A value with strides has kernels of its own,
    which its first call compiles.

    Parameters
    ----------
    sizes : Sizes or iterable of Sizes
        Calls to come.
    dtypes : str or iterable of str
        Of value: float16, bfloat16, float32, float64.
    backward : bool
        Compile the backward too.
    device : int, optional
        CUDA device; None: the current one.
    progress : bool, optional
        Whether to show a progress bar (with tqdm); None: for more than 8 kernels, on a terminal.

    Returns
    -------
    int
        Number of kernels that were not there before.

    Raises
    ------
    TypeError, ValueError
        For a dtype that the operator does not have, or levels without pixels.
    RuntimeError
        Without CuPy or a CUDA device.
    """
    reason = arrays.cuda_unavailable()
    if reason is not None:
        raise RuntimeError(f"warmup: {reason}")
    sizes = [sizes] if isinstance(sizes, Sizes) else list(sizes)
    number: int = arrays.require_cupy("warmup").cuda.runtime.getDevice() if device is None else device
    wanted = launches(
        sizes,
        [dtypes] if isinstance(dtypes, str) else list(dtypes),
        device=number,
        backward=backward,
        gpu=of_device(number),
    )
    missing = [
        spec for spec in dict.fromkeys(launch.spec for launch in wanted) if not kernels.is_compiled(spec, number)
    ]

    def compile_one(spec: KernelSpec) -> None:
        with session.on_device(number):
            kernels.function(spec, number)

    with ThreadPoolExecutor(max(1, min(len(missing), os.cpu_count() or 1))) as pool:
        for _ in _with_bar(pool.map(compile_one, missing), len(missing), progress):
            pass
    with session.on_device(number):
        for size in sizes:
            level_table(size.contiguous_levels, number, 0)
        if backward:
            streams.create_first(number)
    return len(missing)


def launches(
    sizes: Sequence[Sizes], dtypes: Sequence[str], *, device: int, backward: bool, gpu: Gpu
) -> list[plan.Launch]:
    """The launches of all these calls, as the planner decides."""
    for dtype in dtypes:
        if dtype not in VALUE_DTYPES:
            raise TypeError(f"dtypes: expected float16, bfloat16, float32 or float64, got {dtype!r}")
    found = []
    for size, dtype in product(sizes, dtypes):
        location_dtypes = dict.fromkeys((dtype, "float32") if dtype in SIXTEEN_BIT else (dtype,))
        for location_dtype, fused in product(location_dtypes, fused_front_ends(size, location_dtypes)):
            call = problem_of(size, dtype, location_dtype, fused, device)
            found.append(plan.forward(call, plan.VECTOR_BYTES, gpu))
            if backward:
                for deterministic, of_references in product((False, True), (False, True) if fused else (False,)):
                    ordered = replace(call, deterministic=deterministic)
                    wanted = call.computed(ALL._replace(references=of_references))
                    found += plan_backward.backward(ordered, plan.VECTOR_BYTES, gpu, wanted).launches
    return found


def problem_of(size: Sizes, dtype: str, location_dtype: str, fused: FusedFrontEnd | None, device: int) -> Problem:
    """The problem of a call of this size on a CUDA device, with a contiguous value."""
    if not size.levels or min(min(level) for level in size.levels) <= 0:
        raise ValueError(f"sizes: expected levels of positive (H, W), got {size.levels!r}")
    S, levels = size.S, size.contiguous_levels
    form = options.requested_variant(size.num_points, size.interpolation, size.padding_mode, size.align_corners)
    variant, P = validate.equal_points(options.read_variant(form, len(levels)), size.P)
    return Problem(
        size.N, S, size.M, size.D, len(levels), P, S if size.Q is None else size.Q,
        value_dtype=dtype, location_dtype=location_dtype, device=("cuda", device),
        levels=levels, variant=variant, ragged=size.ragged, fused=fused,
    )  # fmt: skip


def fused_front_ends(size: Sizes, dtypes: Iterable[str]) -> list[FusedFrontEnd | None]:
    """What the samples of calls of this size come from: reference points of each dtype, or nothing."""
    coordinates = size.reference_coordinates
    if coordinates is None:
        if size.one_reference or size.packed:
            raise ValueError("sizes: expected reference_coordinates 2 or 4 with one_reference or packed, got None")
        return [None]
    if coordinates not in (2, 4):
        raise ValueError(f"sizes: expected reference_coordinates 2, 4 or None, got {coordinates!r}")
    levels = 1 if size.one_reference else len(size.levels)
    return [FusedFrontEnd(coordinates, levels, dtype, size.packed) for dtype in dtypes]


def _with_bar(steps: Iterable[Any], count: int, progress: bool | None) -> Iterable[Any]:
    if progress is False or (progress is None and count <= _MANY):
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=count, desc="compiling kernels", disable=None if progress is None else False)
