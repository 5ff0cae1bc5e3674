"""Replaces ``MultiScaleDeformableAttention``, the compiled extension of Deformable DETR and its successors.

DINO, Mask2Former and Grounding DINO ``import MultiScaleDeformableAttention as MSDA`` (or find it under another name)
and call its two functions from an autograd function of their own. After :func:`install` that import finds this module,
and nothing is compiled.
"""

from __future__ import annotations

import sys
from types import ModuleType

from ..api import ms_deform_attn_backward, ms_deform_attn_forward

__all__ = ["install", "ms_deform_attn_backward", "ms_deform_attn_forward", "uninstall"]


def install(name: str = "MultiScaleDeformableAttention") -> ModuleType:
    """Make ``import`` find this module under the name of the extension, and return it.

    Parameters
    ----------
    name : str
        ``"groundingdino._C"`` for Grounding DINO's own repository.

    Raises
    ------
    RuntimeError
        Where another module of that name is imported already: what holds it would go on using it.
    """
    ours = sys.modules[__name__]
    found = sys.modules.setdefault(name, ours)
    if found is not ours:
        raise RuntimeError(
            f"{name} is imported already, from {getattr(found, '__file__', 'elsewhere')}: call install before that"
        )
    package, _, attribute = name.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], attribute, ours)
    return ours


def uninstall(name: str = "MultiScaleDeformableAttention") -> None:
    """Undo :func:`install`; what has imported the module keeps it."""
    if sys.modules.get(name) is sys.modules[__name__]:
        del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if package in sys.modules:
            delattr(sys.modules[package], attribute)
