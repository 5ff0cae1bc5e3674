"""A device of torch without kernels of the package: "npu", whose tensors hold a tensor on the CPU.

torch's dispatcher treats it as any other device (its key is PrivateUse1), and every function of torch computes there,
by the CPU. It stays for the rest of the process, so tests use it in a process of their own: ``python -m
tests.helpers.stand_in_device`` makes the calls of :data:`CALLS` and :data:`REFUSED` and prints what came of each.
"""

import json
import warnings
from functools import partial

import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration

import cupy_msda
from cupy_msda.torch import (
    MSDeformAttnFunction,
    MultiScaleDeformableAttention,
    extension,
    mmcv,
    ms_deform_attn,
    ms_deform_attn_fused,
    transformers,
)
from tests.helpers.cases import Case
from tests.helpers.torch_calls import (
    LEVELS,
    attention_module,
    backward_operator,
    forward_operator,
    module_inputs,
    tensors_of,
)

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class DeviceTensor(torch.Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu):
        tensor = torch._C._acc.create_empty_tensor(tuple(on_cpu.shape), on_cpu.dtype)
        tensor.__class__ = DeviceTensor
        return tensor

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu.contiguous()  # as is the tensor: a view is a copy here


def _to_cpu(part):
    if isinstance(part, torch.device) and part.type == "npu":
        return torch.device("cpu")
    return part.on_cpu if isinstance(part, DeviceTensor) else part


def _by_the_cpu(operator, *args, **kwargs):
    inputs = {id(t.on_cpu): t for t in tree.tree_leaves((args, kwargs)) if isinstance(t, DeviceTensor)}
    device = kwargs.get("device")
    results = operator(*tree.tree_map(_to_cpu, args), **tree.tree_map(_to_cpu, kwargs))
    if device is not None and torch.device(device).type == "cpu":
        return results
    return tree.tree_map_only(torch.Tensor, lambda t: inputs[id(t)] if id(t) in inputs else DeviceTensor(t), results)


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):
    """``torch.npu``."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def install():
    """Make ``torch.device("npu")``. What this registers holds until the process ends."""
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=_Module())
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(_by_the_cpu, "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # These have a kernel for every device, in C++, which the fallback does not replace.
    for key in ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"):
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
            namespace, _, full = name.partition("::")
            if namespace == "aten":
                base, _, overload = full.partition(".")
                operator = getattr(getattr(torch.ops.aten, base), overload or "default")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # two of the keys have the same operator
                    aten.impl(full, partial(_by_the_cpu, operator), "PrivateUse1", allow_override=True)
    return fallback, aten


def problem(device, dtype=torch.float32, location_dtype=None, **variant):
    """value, shapes, starts, locations, weights, grad_output on a device; the first and the last two are leaves."""
    value, shapes, starts, locations, weights, grad_output = (
        tensor.detach().to(device)
        for tensor in tensors_of(Case("device", variant=variant), "cpu", dtype, location_dtype)
    )
    for tensor in (value, weights, *(() if variant.get("interpolation") else (locations,))):
        tensor.requires_grad_()
    return value, shapes, starts, locations, weights, grad_output


def plain(device, function=ms_deform_attn, metadata="device", dtype=torch.float32, location_dtype=None, **variant):
    """Output and gradients."""
    value, shapes, starts, locations, weights, grad_output = problem(device, dtype, location_dtype, **variant)
    if metadata == "cpu":
        shapes, starts = shapes.cpu(), starts.cpu()
    elif metadata == "numbers":
        shapes, starts = shapes.tolist(), None
    output = function(value, shapes, starts, locations, weights, **variant)
    leaves = [tensor for tensor in (value, locations, weights) if tensor.requires_grad]
    return [output, *torch.autograd.grad(output, leaves, grad_output)]


def fused(device, packed=False, coordinates=2):
    value, shapes, starts, offsets, logits, grad_output = problem(device)
    torch.manual_seed(0)
    references = torch.rand(*value.shape[:1], offsets.shape[1], 2, coordinates).to(device).requires_grad_()
    samples = (torch.cat((offsets.flatten(3), logits.flatten(3)), -1), None) if packed else (offsets, logits)
    output = ms_deform_attn_fused(value, shapes, starts, references, *samples)
    return [output, *torch.autograd.grad(output, (value, references, offsets, logits), grad_output)]


def ragged(device):
    value, shapes, starts, locations, weights, _ = problem(device)
    return [ms_deform_attn(value, shapes, starts, locations, weights, query_lengths=torch.tensor([2, 4]).to(device))]


def layer(device):
    attention, inputs = attention_module().to(device), [tensor.to(device) for tensor in module_inputs(4)]
    output = attention(*inputs)
    output.square().sum().backward()
    return [output, *(parameter.grad for parameter in attention.parameters())]


def kernel_layer(device):
    value, shapes, starts, locations, weights, _ = problem(device)
    return [MultiScaleDeformableAttention()(value, shapes, list(LEVELS), starts, locations, weights, 64)]


def other_metadata(device):
    """The tensors on the CPU, and the metadata on the device."""
    value, shapes, starts, locations, weights, grad_output = problem("cpu")
    shapes, starts = shapes.to(device), starts.to(device)
    output = ms_deform_attn(value, shapes, starts, locations, weights)
    lengths = torch.tensor([2, 4]).to(device)
    leaves = value, locations, weights
    plain = [leaf.detach() for leaf in leaves]
    return [
        output,
        *torch.autograd.grad(output, leaves, grad_output),
        cupy_msda.ms_deform_attn(plain[0], shapes, starts, *plain[1:], query_lengths=lengths),
        ms_deform_attn(value, shapes, starts, locations, weights, query_lengths=lengths),
        forward_operator(value, shapes, starts, locations, weights, 64),
    ]


def under_autocast(device):
    """Weights in value's dtype with locations in float32, as under autocast a linear layer and a softmax make them."""
    value, shapes, starts, locations, weights, grad_output = problem(device, torch.bfloat16, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        output = ms_deform_attn(value, shapes, starts, locations, weights.bfloat16())
    return [output, *torch.autograd.grad(output, (value, locations, weights), grad_output)]


def registered(device):
    value, shapes, starts, locations, weights, grad_output = problem(device)
    inputs = value, shapes, starts, locations, weights, 64, None
    grads = backward_operator(grad_output, *inputs, (True, False, True))
    return [forward_operator(*inputs), grads[0], grads[2]]


def transformed(device):
    value, shapes, starts, locations, weights, _ = (tensor.detach() for tensor in problem(device, torch.float64))

    def loss(*leaves):
        return ms_deform_attn(leaves[0], shapes, starts, *leaves[1:]).square().sum()

    first = torch.func.grad(loss, argnums=(0, 1, 2))(value, locations, weights)
    second = torch.func.grad(lambda w: torch.func.grad(loss)(value, locations, w).square().sum())(weights)
    mapped = torch.func.vmap(lambda v: ms_deform_attn(v, shapes, starts, locations, weights))(
        torch.stack((value, value + value))
    )
    return [*first, second, mapped]


def through_extension(device):
    value, shapes, starts, locations, weights, grad_output = (tensor.detach() for tensor in problem(device))
    inputs = value, shapes, starts, locations, weights
    return [
        extension.ms_deform_attn_forward(*inputs, 64),
        *extension.ms_deform_attn_backward(*inputs, grad_output, 64),
    ]


def through_mmcv(device):
    value, shapes, starts, locations, weights, _ = problem(device)
    return [
        mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights),
        mmcv.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64),
    ]


def through_transformers(device):
    value, shapes, _, locations, weights, _ = problem(device)
    value2, _, _, locations2, weights2, _ = problem(device, num_points=(3, 1))
    return [
        transformers.multi_scale_deformable_attention(value, shapes, locations, weights),
        transformers.multi_scale_deformable_attention_v2(value2, shapes, locations2, weights2, [3, 1], "discrete"),
    ]


CALLS = {
    "plain": plain,
    "apply": partial(plain, function=MSDeformAttnFunction.apply),
    "metadata on the cpu": partial(plain, metadata="cpu"),
    "metadata as numbers": partial(plain, metadata="numbers"),
    "metadata alone": other_metadata,
    "float64": partial(plain, dtype=torch.float64),
    "float16": partial(plain, dtype=torch.float16),
    "bfloat16 with float32": partial(plain, dtype=torch.bfloat16, location_dtype=torch.float32),
    "points": partial(plain, num_points=(3, 1)),
    "nearest": partial(plain, interpolation="nearest"),
    "border": partial(plain, padding_mode="border"),
    "align_corners": partial(plain, align_corners=True),
    "ragged": ragged,
    "fused": fused,
    "packed": partial(fused, packed=True),
    "boxes": partial(fused, coordinates=4),
    "layer": layer,
    "kernel layer": kernel_layer,
    "autocast": under_autocast,
    "registered operators": registered,
    "torch.func": transformed,
    "extension": through_extension,
    "mmcv": through_mmcv,
    "transformers": through_transformers,
}


def _array_function(device):
    value, shapes, starts, locations, weights, _ = (tensor.detach() for tensor in problem(device))
    cupy_msda.ms_deform_attn(value, shapes, starts, locations, weights)


def _mixed(device):
    value, shapes, starts, locations, weights, _ = problem(device)
    ms_deform_attn(value, shapes, starts, locations.cpu(), weights)


REMEDY = "copy it with .cpu(), or call the function of cupy_msda.torch, which takes tensors on any device"
REFUSED = {
    "array function": (
        _array_function,
        f"TypeError: value: expected a tensor on the CPU or a CUDA device, got one on npu:0: {REMEDY}",
    ),
    "two devices": (_mixed, "ValueError: sampling_locations: expected value's device, npu:0, got cpu"),
}


def compare(call):
    """ "equal", or how the results on the two devices differ."""
    try:
        have, want = call("npu"), call("cpu")
        torch.testing.assert_close([tensor.detach().cpu() for tensor in have], [tensor.detach() for tensor in want])
    except Exception as error:  # whatever it is, the test compares it
        return f"{type(error).__name__}: {error}"
    return "equal"


def sentence(call):
    try:
        call("npu")
    except Exception as error:  # whatever it is, the test compares it
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


if __name__ == "__main__":
    kept = install()
    warnings.simplefilter("ignore")
    found = {name: compare(call) for name, call in CALLS.items()}
    print(json.dumps(found | {name: sentence(call) for name, (call, _) in REFUSED.items()}))
