"""NaN, infinity and huge numbers through autograd, and against torch's ``grid_sample`` where the contract agrees."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cupy_msda.torch import decomposed, ms_deform_attn, ms_deform_attn_fused
from tests.helpers import non_finite
from tests.helpers.backends import TorchBackend
from tests.helpers.non_finite import FUSED_FORMS, FUSED_KINDS, LEVELS, PLAIN_KINDS, VARIANTS
from tests.helpers.torch_calls import DEVICES

PATHS = {"eager": nullcontext, "decomposed": decomposed}
# On levels of one pixel with align_corners, 0 times NaN is 0 or NaN: tests/fuzz compares that.
CALLS = [(path, name) for path in PATHS for name in VARIANTS if (path, name) != ("decomposed", "zeros, align_corners")]


def gradients(output, leaves, grad_output, backend):
    """Gradients of those leaves that require one, None for the others; as NumPy arrays."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad_output))
    return [backend.get(next(found)) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize(("path", "name"), CALLS)
def test_plain_call(path, name, kind, device):
    backend, inputs = TorchBackend(device), non_finite.plain(kind)
    value, _, _, locations, weights, grad_output = (backend.put(array) for array in inputs)
    leaves = value.requires_grad_(), locations.requires_grad_(name != "nearest"), weights.requires_grad_()
    with PATHS[path]():
        output = ms_deform_attn(value, LEVELS, None, locations, weights, **VARIANTS[name])
    grads = gradients(output, leaves, grad_output, backend)
    non_finite.check_plain(backend.get(output), grads, inputs, ("float32",) * 2, **VARIANTS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", FUSED_KINDS)
@pytest.mark.parametrize("form", FUSED_FORMS)
@pytest.mark.parametrize(("path", "name"), [call for call in CALLS if call[1] != "nearest"])
def test_fused_call(path, name, form, kind, device):
    backend, inputs = TorchBackend(device), non_finite.fused(kind, form)
    value, offsets, logits, references, grad_output = (
        None if array is None else backend.put(array).requires_grad_()
        for array in (inputs.value, inputs.locations, inputs.weights, inputs.references, inputs.grad_output)
    )
    with PATHS[path]():
        output = ms_deform_attn_fused(value, LEVELS, None, references, offsets, logits, **VARIANTS[name])
    grads = gradients(output, (value, offsets, logits, references), grad_output.detach(), backend)
    non_finite.check_fused(backend.get(output), grads, inputs, ("float32",) * 2, **VARIANTS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS.tolist(), ids=str)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "nearest"])
def test_grid_sample_agrees(name, level, dtype, device):
    """At every location but NaN, with border; with zeros where nothing overflows, else grid_sample gives NaN."""
    variant = VARIANTS[name]
    padding_mode = variant.get("padding_mode", "zeros")
    far = torch.finfo(dtype).max * (0.4 if padding_mode == "border" else 0.01)
    infinite = (np.inf, -np.inf) if padding_mode == "border" else ()
    along = torch.tensor((far, -far, *infinite, 0.4, 0.6, 0.0, 1.0), dtype=dtype, device=device)
    H, W = level
    locations = torch.cartesian_prod(along, along)
    Q = len(locations)
    value = torch.randn(1, H * W, 1, 3, dtype=dtype, device=device)
    weights = torch.ones(1, Q, 1, 1, 1, dtype=dtype, device=device)
    got = ms_deform_attn(value, [level], None, locations.view(1, Q, 1, 1, 1, 2), weights, **variant)
    image = value.view(1, H, W, 3).permute(0, 3, 1, 2)
    align = variant.get("align_corners", False)
    with torch.backends.cudnn.flags(enabled=False):  # which gives NaN where both coordinates are far away
        want = F.grid_sample(image, (2 * locations - 1)[None, None], padding_mode=padding_mode, align_corners=align)
    torch.testing.assert_close(got, want[0, :, 0].T[None])
