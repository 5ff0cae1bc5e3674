"""python -m benchmarks.variants: kernels of other sources, or launched otherwise, beside the planned ones in one run.

For whoever changes a kernel. After ``git worktree add /tmp/before HEAD``,

    python -m benchmarks.variants --sources /tmp/before/cuda_src cuda_src --choices "" warps=8,min_blocks=6

times the forward of every workload with each pair of the two lists, a sample of each in turn, and prints microseconds,
registers, bytes of local memory a thread (spills), and how far the result is from that of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupy_msda.cuda import kernels, plan
from cupy_msda.cuda import run as cuda
from cupy_msda.torch.integrations.patch import Patch

from . import cases, implementations
from .run import DTYPES, relative_error
from .timing import Timer, summary


class Variant(NamedTuple):
    """A folder like ``cuda_src``, and fields of the forward's `KernelKey` that are not what the planner chose."""

    sources: Path
    choices: Mapping[str, int]

    def __str__(self) -> str:
        return " ".join((str(self.sources), *(f"{name}={number}" for name, number in self.choices.items())))


def parse_choices(text: str) -> dict[str, int]:
    """``warps=8,min_blocks=6`` as a mapping; an empty text is none."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name: int(number) for name, _, number in pairs}


def source_in(folder: Path, kind: str) -> str:
    """As :func:`cupy_msda.kernels.source`, out of `folder`; headers that it does not have yet are left out."""
    return "\n".join(file.read_text() for file in kernels.source_files(folder, kind) if file.exists())


@contextlib.contextmanager
def installed(variant: Variant) -> Iterator[dict[Any, Any]]:
    """While this lasts, kernels are made and launched as `variant` says. Gives those that have been compiled."""
    planned = plan.forward

    def forward(problem: Any, *arguments: Any) -> plan.Launch:
        launch = planned(problem, *arguments)
        return plan.launch_of(problem, replace(launch.key, **variant.choices)) if variant.choices else launch

    compiled: dict[Any, Any] = {}
    with Patch() as patch:
        patch.replace(plan, "forward", forward)
        patch.replace(kernels, "source", functools.partial(source_in, variant.sources))
        patch.replace(kernels, "_functions", compiled)
        patch.replace(cuda, "_prepared", {})
        yield compiled


def result_of(found: Any) -> torch.Tensor:
    """Everything that a call gave, as one vector."""
    return torch.cat([t.flatten().double() for t in (found if isinstance(found, tuple) else (found,))])


def measure(workload: cases.Workload, dtype: str, variants: list[Variant], backward: bool, rounds: int) -> None:
    """Print a line a variant."""
    operator = implementations.CupyMsda()
    sets = cases.input_sets(workload, DTYPES[dtype], "cuda")
    timed: list[tuple[Variant, Timer, list[float], str]] = []
    kept: list[dict[Any, Any]] = []  # the graphs replay kernels, whose modules must stay loaded
    first: torch.Tensor | None = None
    for variant in variants:
        with installed(variant) as compiled:
            calls: list[Callable[[], Any]] = [
                operator.prepare_backward(inputs) if backward else functools.partial(operator.forward, inputs)
                for inputs in sets
            ]
            timer = Timer(calls, "cuda", None)
            if timer.method != "graph replay":  # called again later, it would be the planned kernel
                raise RuntimeError(f"{variant}: expected calls that a CUDA graph can capture")
            result = result_of(calls[0]())
            first = result if first is None else first
            kept.append(compiled)
            about = [f"{k.num_regs} registers, {k.local_size_bytes} B local" for k in compiled.values()]
            about.append(f"{relative_error(result, first):.1e} from the first")
        timed.append((variant, timer, [], "; ".join(about)))
    for _ in range(rounds):
        for _, timer, samples, _ in timed:
            samples.append(timer.sample())
    for variant, _, samples, about in timed:
        print(f"{workload.name:20} {dtype:9} {summary(samples)['median_us']:8.1f} us  {variant}  ({about})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    workloads = cases.load()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", type=Path, default=[kernels.source_folder()])
    parser.add_argument("--choices", nargs="+", type=parse_choices, default=[{}])
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="the backward; choices are the forward's alone")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    variants = [Variant(*pair) for pair in itertools.product(options.sources, options.choices)]
    for name, dtype in itertools.product(options.workloads, options.dtypes):
        measure(workloads[name], dtype, variants, options.backward, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
