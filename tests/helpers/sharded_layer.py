"""What one process of a group makes of a layer with sharded parameters: on meta, empty, and reset.

As a program, ``python -m tests.helpers.sharded_layer RANK WORLD STORE`` is one process of several.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cupy_msda.torch import MSDeformAttn

SIZES = {"d_model": 15, "n_levels": 2, "n_heads": 3, "n_points": 3}


def join(rank, world, store):
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))


def reset_layer(layer):
    layer.reset_parameters()


def reset_modules(layer):
    """What trainers do: reset the modules that hold parameters."""
    for module in layer.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()


RESETS = {"layer": reset_layer, "modules": reset_modules}


def sharded_layer(world, reset="layer", **sizes):
    layer = MSDeformAttn(**(SIZES | sizes), device="meta")
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.detach().fill_(torch.nan)
    torch.manual_seed(2)
    RESETS[reset](layer)
    return layer


def compare(layer):
    """Every parameter against an unsharded layer's: those that start at random numbers have the right range."""
    want = MSDeformAttn(**SIZES)
    for name, parameter in layer.named_parameters():
        assert parameter.placements[0].is_shard(), name
        have, exact = parameter.full_tensor(), want.get_parameter(name)
        if name in ("value_proj.weight", "output_proj.weight"):
            bound = (6 / sum(exact.shape)) ** 0.5
            assert bound / 2 < have.abs().max() <= bound, name
        else:
            assert torch.equal(have, exact), name


if __name__ == "__main__":
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    join(rank, world, store)
    for reset in RESETS:
        compare(sharded_layer(world, reset))
    dist.destroy_process_group()
