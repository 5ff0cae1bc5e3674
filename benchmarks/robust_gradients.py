"""Random weights with which rounding errors do not decide a model's gradients, so that two runs can be compared."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def make_gradients_robust(model: nn.Module) -> None:
    """Move the sampling offsets of an untrained model, and give its convolutions He's weights.

    Untrained offsets are whole pixels: every sample of an encoder lies on a pixel centre, where rounding picks the
    one-sided derivative. With smaller weights of convolutions activations vanish.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter += 0.3 * torch.randn_like(parameter)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
