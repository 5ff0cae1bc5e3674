"""python -m benchmarks.compare_kernels: times kernels of two source folders or launch configurations in one process.

For changes of a kernel. After ``git worktree add /tmp/before HEAD``,

    python -m benchmarks.compare_kernels --sources /tmp/before/cuda_src cuda_src --launches "" warps=8,min_blocks=6

times the forward of every workload with each pair from the two lists. Samples of the pairs alternate. It prints the
time, the registers, the local memory per thread (spills), and the difference of the result from that of the first pair.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupy_msda.call import Problem
from cupy_msda.cuda import kernels, plan
from cupy_msda.cuda import run as cuda
from cupy_msda.cuda.gpu import Gpu
from cupy_msda.torch.integrations.patch import Patch

from . import cases, implementations
from .run import DTYPES, relative_error
from .timing import Timer, summary


class Candidate(NamedTuple):
    """A folder like ``cuda_src``, and axes of the forward's `ForwardSpec` that replace the planner's choice."""

    sources: Path
    launch: Mapping[str, int]

    def __str__(self) -> str:
        return " ".join((str(self.sources), *(f"{name}={number}" for name, number in self.launch.items())))


class Measured(NamedTuple):
    """A candidate with its timer, its samples, and its registers, local memory and difference as text."""

    candidate: Candidate
    timer: Timer
    samples: list[float]
    description: str


def parse_launch(text: str) -> dict[str, int]:
    """``warps=8,min_blocks=6`` as a mapping; an empty text replaces nothing."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name: int(number) for name, _, number in pairs}


@contextlib.contextmanager
def installed(candidate: Candidate) -> Iterator[dict[Any, Any]]:
    """Compile and launch kernels as `candidate` says within the context. Yields the kernels that were compiled."""
    planner = plan.forward

    def plan_forward(problem: Problem, alignment: int, gpu: Gpu) -> plan.Launch:
        launch = planner(problem, alignment, gpu)
        return plan.launch_of(problem, launch.spec.with_axes(**candidate.launch), gpu) if candidate.launch else launch

    compiled: dict[Any, Any] = {}
    with Patch() as patch:
        patch.replace(plan, "forward", plan_forward)
        patch.replace(kernels, "source", functools.partial(kernels.source_in, candidate.sources))
        patch.replace(kernels, "_functions", compiled)
        patch.replace(cuda, "_prepared", {})
        yield compiled


def as_vector(result: Any) -> torch.Tensor:
    """All tensors of a result as one float64 vector."""
    return torch.cat([t.flatten().double() for t in (result if isinstance(result, tuple) else (result,))])


def compare(workload: cases.Workload, dtype: str, candidates: list[Candidate], backward: bool, repeats: int) -> None:
    """Print one line per candidate."""
    operator = implementations.CupyMsda()
    sets = cases.input_sets(workload, DTYPES[dtype], "cuda")
    measured: list[Measured] = []
    loaded: list[dict[Any, Any]] = []  # graphs replay these kernels, so their modules must stay loaded
    first: torch.Tensor | None = None
    for candidate in candidates:
        with installed(candidate) as compiled:
            calls: list[Callable[[], Any]] = [
                operator.prepare_backward(inputs) if backward else functools.partial(operator.forward, inputs)
                for inputs in sets
            ]
            timer = Timer(calls, "cuda", None)
            if timer.method != "graph replay":  # outside the context, a call would launch the planner's kernel
                raise RuntimeError(f"{candidate}: expected calls that a CUDA graph can capture")
            result = as_vector(calls[0]())
            first = result if first is None else first
            loaded.append(compiled)
            parts = [f"{k.num_regs} registers, {k.local_size_bytes} B local" for k in compiled.values()]
            parts.append(f"difference from the first {relative_error(result, first):.1e}")
        measured.append(Measured(candidate, timer, [], "; ".join(parts)))
    for _ in range(repeats):
        for one in measured:
            one.samples.append(one.timer.sample())
    for one in measured:
        time = summary(one.samples)["median_us"]
        print(f"{workload.name:20} {dtype:9} {time:8.1f} us  {one.candidate}  ({one.description})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    workloads = cases.load()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sources", nargs="+", type=Path, default=[kernels.source_folder()])
    parser.add_argument(
        "--launches", nargs="+", type=parse_launch, default=[{}], help="choices that replace the planner's"
    )
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--backward", action="store_true", help="time the backward; --launches changes the forward only"
    )
    parser.add_argument("--repeats", type=int, default=15, help="samples per candidate")
    options = parser.parse_args(arguments)
    candidates = [Candidate(*pair) for pair in itertools.product(options.sources, options.launches)]
    for name, dtype in itertools.product(options.workloads, options.dtypes):
        compare(workloads[name], dtype, candidates, options.backward, options.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
