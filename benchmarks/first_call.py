"""torchrun --nproc-per-node 8 -m benchmarks.first_call: many processes compile the same kernels at once.

With an empty kernel cache (CUPY_CACHE_DIR), all processes make their first call at the same time, forward and backward,
each on one of the GPUs that there are. Rank 0 prints a JSON record: seconds of the first and of a later call in the
slowest process, and how far the outputs and gradients of the processes are apart.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cupy_msda.torch import ms_deform_attn

LEVELS = ((25, 42), (13, 21))
S = sum(h * w for h, w in LEVELS)


def call(device: torch.device) -> tuple[list[Tensor], float]:
    """Output and gradients of the same call in every process, and its seconds."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, S, 8, 32), (2, S, 8, 2, 4, 2), (2, S, 8, 2, 4)
    inputs = [torch.rand(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    _synchronize(device)
    begin = time.perf_counter()
    output = ms_deform_attn(inputs[0], LEVELS, None, *inputs[1:], deterministic=True)
    gradients = torch.autograd.grad(output.sum(), inputs)
    _synchronize(device)
    return [output.detach(), *gradients], time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    dist.init_process_group("gloo")
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", dist.get_rank() % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    torch.ones(1, device=device).sum().item()  # the context, which is no part of the call
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    before = len(list(folder.glob("*.cubin")))
    dist.barrier()
    results, first = call(device)
    seconds = torch.tensor([first, call(device)[1]])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    largest = torch.cat([result.flatten().cpu() for result in results])
    smallest = largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        record = {"mode": "first call", "processes": dist.get_world_size(), "gpus": gpus, "cached_before": before}
        record |= {"cached_after": len(list(folder.glob("*.cubin"))), "first_call_s": float(seconds[0])}
        record |= {"second_call_s": float(seconds[1]), "largest_difference": float((largest - smallest).abs().max())}
        print(json.dumps(record), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
