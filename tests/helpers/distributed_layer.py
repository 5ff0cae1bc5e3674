"""A process of several that train a layer: DDP, and DDP compiled, against one process that has all images.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.distributed_layer``.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.torch_calls import attention_module, module_inputs


def gradients(layer):
    return torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])


def step(layer, inputs):
    layer(*inputs).square().mean().backward()


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    *arrays, shapes, starts = module_inputs(N=2 * world)
    part = [array.chunk(world)[rank] for array in arrays]
    alone = attention_module()
    step(alone, (*arrays, shapes, starts))
    local = attention_module()
    step(local, (*part, shapes, starts))
    assert not torch.allclose(gradients(local), gradients(alone))
    for compiled in (False, True):
        layer = attention_module()
        called = DistributedDataParallel(layer)
        if compiled:
            called = torch.compile(called, backend="aot_eager", fullgraph=False)
        for _ in range(2):  # the second time by what the first one has left
            layer.zero_grad()
            step(called, (*part, shapes, starts))
            torch.testing.assert_close(gradients(layer), gradients(alone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
