"""Initial values of parameters that FSDP2 has sharded: those of an unsharded layer."""

import subprocess
import sys

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytest.importorskip("torch.distributed.fsdp", minversion=None)
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)

from cupy_msda.torch import MSDeformAttn, ms_deform_attn
from tests.helpers import sharded_layer
from tests.helpers.torch_calls import module_inputs, to_float32

# torch's, about random numbers of sharded tensors on a CPU, and about in-place operations on what a layer returns
pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators", "ignore:FSDP2-wrapped module")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    sharded_layer.join(0, 1, str(tmp_path_factory.mktemp("group") / "store"))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reset", sharded_layer.RESETS)
def test_sharded_parameters_get_the_values_of_unsharded_ones(reset):
    sharded_layer.compare(sharded_layer.sharded_layer(1, reset))


def test_random_values_are_those_of_the_same_seed():
    layer = sharded_layer.sharded_layer(1)
    torch.manual_seed(2)
    want = MSDeformAttn(**sharded_layer.SIZES, device="meta").to_empty(device="cpu")
    want.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.full_tensor(), want.get_parameter(name)), name


def test_a_sharded_layer_on_meta_may_be_reset():
    layer = MSDeformAttn(**sharded_layer.SIZES, device="meta")
    dist.fsdp.fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    layer.reset_parameters()
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_sharded_layer_trains_as_an_unsharded_one():
    sizes, inputs = {"d_model": 16, "n_levels": 2, "n_heads": 2, "n_points": 3}, to_float32(module_inputs())
    layer = sharded_layer.sharded_layer(1, **sizes)
    want = MSDeformAttn(**sizes)
    want.load_state_dict({name: parameter.full_tensor() for name, parameter in layer.state_dict().items()})
    for one in (layer, want):
        one(*inputs).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), want.get_parameter(name).grad)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_processes_hold_parts_of_the_values_of_an_unsharded_layer(world, tmp_path):
    command = [sys.executable, "-m", "tests.helpers.sharded_layer"]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_a_distributed_tensor_is_refused_with_the_remedy():
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    value = dist.tensor.distribute_tensor(torch.rand(1, 4, 1, 2), mesh, [dist.tensor.Shard(0)])
    with pytest.raises(TypeError, match=r"value: expected a local tensor, got DTensor: .*to_local"):
        ms_deform_attn(value, [[2, 2]], None, torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2))
