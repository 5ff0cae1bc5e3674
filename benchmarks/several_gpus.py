"""torchrun --nproc-per-node 2 -m benchmarks.several_gpus: trains a served Deformable DETR on several GPUs.

Random weights and images, float32, a fixed number of images per GPU. For DDP, FSDP2 and compiled DDP it compares the
gradients of a step with those of one process that has all images, and measures images per second. Rank 0 prints a JSON
record per mode. `accelerate launch --multi_gpu --num_processes 2 -m benchmarks.several_gpus` starts it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cupy_msda.torch

from .robust_gradients import make_gradients_robust

WARM_UP_STEPS = 5
SEED = 0


class Place(NamedTuple):
    """The number of a process, that of all processes, and its device."""

    rank: int
    world: int
    device: torch.device


class Sizes(NamedTuple):
    """Images per process, and their height and width."""

    N: int
    H: int
    W: int


# ---- the model -------------------------------------------------------------------------------------------------------


def make_model(small: bool) -> nn.Module:
    """Deformable DETR with random weights, the same in every process, and without dropout."""
    torch.manual_seed(SEED)
    levels = {"out_features": ["stage2", "stage3", "stage4"]}
    if small:
        backbone = hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, layer_type="basic", **levels
        )
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        sizes = {"d_model": 32, "num_queries": 7, "encoder_attention_heads": 4, "decoder_attention_heads": 4} | layers
    else:
        backbone, sizes = hf.ResNetConfig(**levels), {}
    model = hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(backbone_config=backbone, dropout=0.0, **sizes))
    make_gradients_robust(model)
    return model.train()


def loss_of(outputs: Any) -> Tensor:
    """A mean over images, so that its gradient is the mean of the processes' gradients."""
    return outputs.logits.square().mean() + outputs.pred_boxes.square().mean()


# ---- several processes -----------------------------------------------------------------------------------------------


def data_parallel(model: nn.Module, place: Place) -> nn.Module:
    """Every process has all parameters, and gradients are averaged while the backward runs."""
    return DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None)


def fully_sharded(model: nn.Module, place: Place) -> nn.Module:
    """Every process holds a part of each parameter, and gathers those of one layer at a time."""
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        fully_shard(layer)
    return fully_shard(model)


MODES: dict[str, Callable[[nn.Module, Place], nn.Module]] = {
    "ddp": data_parallel,
    "fsdp": fully_sharded,
    "compiled": data_parallel,
}


def join() -> Place:
    """The place that torchrun or accelerate gives this process."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return Place(rank, world, torch.device("cpu"))
    torch.backends.cudnn.allow_tf32 = False  # float32 alone: TF32's rounding differs between numbers of images
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return Place(rank, world, device)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


# ---- measurements ----------------------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> Tensor:
    """The gradients of all parameters as one vector; of sharded parameters, all parts of them."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten() for grad in found])


def measure(mode: str, place: Place, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one mode: the distance of the gradients from one process's, and images per second."""
    model = make_model(options.small).to(place.device)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(place.world * sizes.N, 3, sizes.H, sizes.W, generator=generator).to(place.device)
    part = images.chunk(place.world)[place.rank]
    with cupy_msda.torch.patch(model):
        loss_of(model(pixel_values=images)).backward()
        want = gradients(model).clone()
        model.zero_grad()
        called = MODES[mode](model, place)
        if mode == "compiled":
            called = torch.compile(called, backend=options.compile_backend)
        begin = time.perf_counter()
        loss_of(called(pixel_values=part)).backward()
        _wait(place)
        first = time.perf_counter() - begin
        error = float((gradients(model) - want).norm() / want.norm())
        seconds = _seconds_per_step(called, part, options.steps, place)
    record = {"mode": mode, "processes": place.world, "images_per_process": sizes.N, "size": [sizes.H, sizes.W]}
    record |= {"gradient_error": error, "first_step_s": first, "step_s": seconds}
    return record | {"images_per_second": len(images) / seconds}


def _seconds_per_step(model: nn.Module, images: Tensor, steps: int, place: Place) -> float:
    """Median of training steps, in the slowest process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    taken = []
    for _ in range(WARM_UP_STEPS + steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model(pixel_values=images)).backward()
        optimizer.step()
        _wait(place)
        taken.append(time.perf_counter() - begin)
    slowest = torch.tensor(statistics.median(taken[WARM_UP_STEPS:]), device=place.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _wait(place: Place) -> None:
    """For this process's GPU and for all processes."""
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.several_gpus", description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=30, help="timed steps per mode (default: %(default)s)")
    parser.add_argument("--size", nargs=3, type=int, default=(2, 800, 1333), metavar=("N", "H", "W"))
    parser.add_argument("--small", action="store_true", help="a small model, as the tests take")
    parser.add_argument("--compile-backend", default="inductor")
    options = parser.parse_args(arguments)
    place = join()
    for mode in options.modes:
        record = measure(mode, place, Sizes(*options.size), options)
        if place.rank == 0:
            print(json.dumps(record), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
