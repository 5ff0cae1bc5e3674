"""Hugging Face transformers served by this operator: its models as they are, with unchanged checkpoints.

transformers computes multi-scale deformable attention in three forms: layers named ``MultiScaleDeformableAttention``, a
function ``multi_scale_deformable_attention``, and ``multi_scale_deformable_attention_v2`` with a number of points per
level. :func:`patch` replaces all three in one call. :func:`register_kernel` is for the ``kernels`` package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .dtypes import agreed_dtypes
from .functional import ms_deform_attn
from .integrations.patch import Patch
from .integrations.transformers import KernelRepository, serve_function, serve_layer
from .modules import MultiScaleDeformableAttention

FAMILIES = (
    "d_fine",
    "deformable_detr",
    "deimv2",
    "grounding_dino",
    "lw_detr",
    "mask2former",
    "mm_grounding_dino",
    "omdet_turbo",
    "oneformer",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
)
_LAYER = MultiScaleDeformableAttention.__name__
_METHODS = {"default": "bilinear", "discrete": "nearest"}


def multi_scale_deformable_attention(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """:func:`ms_deform_attn` by the signature of Mask2Former and OneFormer in transformers; levels are contiguous."""
    locations, weights = agreed_dtypes(value, sampling_locations, attention_weights)
    return ms_deform_attn(value, value_spatial_shapes, None, locations, weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """:func:`ms_deform_attn` by the signature of RT-DETRv2, D-FINE and DEIMv2 in transformers.

    value [N, S, M, D], sampling_locations [N, Q, M, sum(num_points_list), 2]. The method 'discrete' takes the nearest
    pixel and gives the locations no gradient.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")
    if method == "discrete":
        sampling_locations = sampling_locations.detach()
    locations, weights = agreed_dtypes(value, sampling_locations, attention_weights)
    return ms_deform_attn(
        value,
        value_spatial_shapes,
        None,
        locations,
        weights,
        num_points=list(num_points_list),
        interpolation=_METHODS[method],
    )


_FUNCTIONS = (multi_scale_deformable_attention, multi_scale_deformable_attention_v2)


def patch(*families: str) -> Patch:
    """Serve the models of transformers by this operator, those that exist already and those to come.

    Tensors on devices without kernels (see :func:`cupy_msda.torch.ms_deform_attn`) are left to the model's own code.

    Parameters
    ----------
    *families : str
        Names of model folders, such as ``"deformable_detr"``; by default all of :data:`FAMILIES` that the installed
        transformers has. Their modeling files are imported.

    Returns
    -------
    Patch
        A context manager; :meth:`Patch.undo` restores everything.

    Raises
    ------
    ModuleNotFoundError
        Without transformers, or for a family that it does not have.
    RuntimeError
        Where the installed transformers calls its attention with other parameters than this function knows; nothing is
        replaced then.

    Notes
    -----
    Models that ``torch.compile`` has compiled follow. :func:`cupy_msda.torch.patch` serves these models too, and those
    of any other code base. Where a layer has other parameters than expected, that one keeps it, and this one raises.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
    done = Patch()
    try:
        for family in families or FAMILIES:
            name = f"transformers.models.{family}.modeling_{family}"
            if not families and importlib.util.find_spec(f"transformers.models.{family}") is None:
                continue
            module = importlib.import_module(name)
            if hasattr(module, _LAYER):
                serve_layer(done, getattr(module, _LAYER), MultiScaleDeformableAttention)
            for function in _FUNCTIONS:
                if hasattr(module, function.__name__):
                    serve_function(done, module, function)
    except BaseException:
        done.undo()
        raise
    return done


def register_kernel() -> None:
    """Make the ``kernels`` package use this operator where a model asks for ``MultiScaleDeformableAttention`` kernels.

    For ``model.set_use_kernels(True)`` or ``from_pretrained(..., use_kernels=True)``. transformers registers its own
    kernels again on every ``train()`` and ``eval()``, for the device type ``cuda`` alone; this one is registered for a
    range of compute capabilities, which goes before that and stays.

    Raises
    ------
    ModuleNotFoundError
        Without the ``kernels`` package.
    """
    if importlib.util.find_spec("kernels") is None:
        raise ModuleNotFoundError("kernels is not installed: pip install kernels")
    kernels = importlib.import_module("kernels")
    device = kernels.Device(type="cuda", properties=kernels.CUDAProperties(min_capability=75, max_capability=999))
    kernels.register_kernel_mapping({_LAYER: {device: KernelRepository(MultiScaleDeformableAttention)}})
