"""Warm-up: compiles the kernels of later calls, so that none of these waits and a CUDA graph can capture the first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .. import arrays
from ..call import ALL
from ..sizes import Sizes, problems_of
from . import kernels, plan, plan_backward, session, streams
from .gpu import Gpu
from .kernel_spec import KernelSpec
from .level_tables import level_table
from .tuning import loaded

# With fewer kernels, a progress bar would be gone before it is read.
_MANY = 8


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
        Of value: float16, bfloat16, float32, float64. "float16/float32": float16 with float32 locations alone.
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
        gpu=loaded.gpu_of(number),
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
    """The launches of all these calls, as the planner decides; each also as a deterministic call."""
    found = []
    for problem in problems_of(sizes, dtypes, device):
        for deterministic in (False, True):
            call = replace(problem, deterministic=deterministic)
            found.append(plan.forward(call, plan.VECTOR_BYTES, gpu))
            for of_references in ((False, True) if call.fused else (False,)) if backward else ():
                wanted = call.computed(ALL._replace(references=of_references))
                found += plan_backward.backward(call, plan.VECTOR_BYTES, gpu, wanted).launches
    return found


def _with_bar(steps: Iterable[Any], count: int, progress: bool | None) -> Iterable[Any]:
    if progress is False or (progress is None and count <= _MANY):
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=count, desc="compiling kernels", disable=None if progress is None else False)
