"""Hugging Face transformers served by this operator: its models as they are, with unchanged checkpoints.

transformers computes multi-scale deformable attention in three forms: layers named ``MultiScaleDeformableAttention``, a
function ``multi_scale_deformable_attention``, and ``multi_scale_deformable_attention_v2`` with points of their own a
level. :func:`patch` replaces all three, in one call; :func:`register_kernel` is the way of the ``kernels`` package.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .functional import ms_deform_attn
from .integrations.patch import Patch
from .modules import MultiScaleDeformableAttention
from .operators import agreed_dtypes

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
_LAYER = "MultiScaleDeformableAttention"
# Under this name some layers keep the function that they found when they were made.
_KEPT = "ms_deformable_attn_core"
# And under this one, while they are served, the function that they answer with.
_SERVED = "_cupy_msda_core"
_METHODS = {"default": "bilinear", "discrete": "nearest"}


def multi_scale_deformable_attention(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """:func:`ms_deform_attn` by the signature of Mask2Former and OneFormer in transformers; levels are packed."""
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


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (multi_scale_deformable_attention, multi_scale_deformable_attention_v2)
}


def patch(*families: str) -> Patch:
    """Serve the models of transformers by this operator, those that exist already and those to come.

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
    What was compiled before goes on with what it was compiled with, and so may a new model of the same class, because
    ``torch.compile`` keeps code by class: patch first, or call ``torch.compiler.reset()`` after patching. (Mask2Former
    and OneFormer look their function up in every call: they follow.)
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
                _serve_layer(done, getattr(module, _LAYER))
            for function in _FUNCTIONS:
                if hasattr(module, function):
                    _serve_function(done, module, function)
    except BaseException:
        done.undo()
        raise
    return done


def _serve_layer(done: Patch, layer: type[nn.Module]) -> None:
    done.served.append(f"{layer.__module__}.{layer.__name__}")
    if layer.forward is MultiScaleDeformableAttention.forward:
        return  # an outer patch did
    _check_signature(layer.forward, MultiScaleDeformableAttention.forward)
    done.replace(layer, "forward", MultiScaleDeformableAttention.forward)


def _serve_function(done: Patch, module: ModuleType, name: str) -> None:
    original, ours = getattr(module, name), _FUNCTIONS[name]
    done.served.append(f"{module.__name__}.{name}")
    if original is ours:
        return
    _check_signature(original, ours)
    done.replace(module, name, ours)
    for layer in vars(module).values():
        if isinstance(layer, type) and layer.__module__ == module.__name__ and _keeps_function(layer):
            done.add(layer, _SERVED, staticmethod(ours))
            done.add(layer, _KEPT, _served_attribute(original, ours))


def _keeps_function(layer: type) -> bool:
    return issubclass(layer, nn.Module) and _KEPT in layer.__init__.__code__.co_names


def _served_attribute(original: Callable[..., Tensor], ours: Callable[..., Tensor]) -> property:
    """An attribute of layers that keeps the original, and answers with ours, or with what it has been given since.

    The answer has a name of its own: torch 2.11's compiler takes a look into ``layer.__dict__`` for this attribute, and
    never ends.
    """

    def keep(layer: nn.Module, function: Callable[..., Tensor]) -> None:
        layer.__dict__[_KEPT] = original if function is ours else function
        if function in (original, ours):
            layer.__dict__.pop(_SERVED, None)
        else:
            layer.__dict__[_SERVED] = function

    return property(lambda layer: getattr(layer, _SERVED), keep)


def _check_signature(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    have, want = (list(inspect.signature(function).parameters) for function in (theirs, ours))
    if have != want:
        raise RuntimeError(
            f"{theirs.__module__}.{theirs.__qualname__}: expected the parameters {', '.join(want)}, got "
            f"{', '.join(have)}: this transformers is not known to cupy_msda"
        )


class _KernelRepository:
    """The layer as the ``kernels`` package asks for it: loaded from here, not from a hub."""

    layer_name = _LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __repr__(self) -> str:
        return f"`cupy_msda.torch` (layer `{self.layer_name}`)"


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
    kernels.register_kernel_mapping({_LAYER: {device: _KernelRepository()}})
