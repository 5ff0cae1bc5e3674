"""A deformable DETR encoder layer in plain JAX, with an operator to choose, and the same layer in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from cupy_msda.jax import ms_deform_attn_fused
from cupy_msda.torch import MSDeformAttn

Levels = Sequence[tuple[int, int]]
Parameters = dict[str, jax.Array]
# ``operator(value, levels, references, offsets, logits)`` -> [N, Q, C]
Operator = Callable[[jax.Array, Levels, jax.Array, jax.Array, jax.Array], jax.Array]
CHANNELS, HEADS, POINTS, HIDDEN = 256, 8, 4, 1024


def with_kernels(value: jax.Array, levels: Levels, references: Any, offsets: Any, logits: Any) -> jax.Array:
    """The operator of this package."""
    return ms_deform_attn_fused(value, levels, None, references, offsets, logits)


def with_gather(value: jax.Array, levels: Levels, references: Any, offsets: Any, logits: Any) -> jax.Array:
    """The operator as JAX users write it: four gathers per level, and a weighted sum."""
    N, _, M, D = value.shape
    Q, P = offsets.shape[1], offsets.shape[4]
    weights = jax.nn.softmax(logits.reshape(N, Q, M, -1)).reshape(logits.shape)
    output, start = jnp.zeros((N, M, Q, D), value.dtype), 0
    for level, (H, W) in enumerate(levels):
        pixels = value[:, start : start + H * W].transpose(0, 2, 1, 3)  # [N, M, H*W, D]
        start += H * W
        location = references[:, :, None, level, None] + offsets[:, :, :, level] / jnp.array([W, H], value.dtype)
        x, y = location[..., 0] * W - 0.5, location[..., 1] * H - 0.5
        x0, y0 = jnp.floor(x), jnp.floor(y)
        for column in (x0, x0 + 1):
            for row in (y0, y0 + 1):
                inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
                weight = weights[:, :, :, level] * (1 - abs(x - column)) * (1 - abs(y - row)) * inside
                index = (jnp.clip(row, 0, H - 1) * W + jnp.clip(column, 0, W - 1)).astype(jnp.int32)
                flat = index.transpose(0, 2, 1, 3).reshape(N, M, Q * P, 1)
                found = jnp.take_along_axis(pixels, flat, axis=2).reshape(N, M, Q, P, D)
                output = output + jnp.einsum("nqmp,nmqpd->nmqd", weight, found)
    return output.transpose(0, 2, 1, 3).reshape(N, Q, M * D)


def reference_points(levels: Levels) -> np.ndarray:
    """The centres of all pixels, for each level [1, Q, L, 2]."""
    centres = [
        np.stack(np.meshgrid((np.arange(W) + 0.5) / W, (np.arange(H) + 0.5) / H), -1).reshape(-1, 2) for H, W in levels
    ]
    points = np.concatenate(centres)[None, :, None]
    return np.broadcast_to(points, (1, points.shape[1], len(levels), 2)).astype(np.float32)


class TorchLayer(nn.Module):
    """The layer in torch, whose parameters the JAX layer gets."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.attention = MSDeformAttn(CHANNELS, len(levels), HEADS, POINTS)
        self.first, self.second = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)

    def forward(self, features: torch.Tensor, references: torch.Tensor, shapes: Any, starts: Any) -> torch.Tensor:
        features = self.norm1(features + self.attention(features, references, features, shapes, starts))
        return self.norm2(features + self.second(torch.relu(self.first(features))))


def parameters_of(layer: nn.Module) -> Parameters:
    """The same parameters for the JAX layer."""
    return {name: jnp.asarray(value.detach().float().cpu().numpy()) for name, value in layer.state_dict().items()}


def apply(operator: Operator, levels: Levels, given: Parameters, features: Any, references: Any) -> jax.Array:
    """The layer in JAX."""
    N, S, C = features.shape
    L = len(levels)

    def linear(name: str, array: jax.Array) -> jax.Array:
        return array @ given[f"{name}.weight"].T + given[f"{name}.bias"]

    def norm(name: str, array: jax.Array) -> jax.Array:
        centred = array - array.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * given[f"{name}.weight"] + given[f"{name}.bias"]

    value = linear("attention.value_proj", features).reshape(N, S, HEADS, C // HEADS)
    offsets = linear("attention.sampling_offsets", features).reshape(N, S, HEADS, L, POINTS, 2)
    logits = linear("attention.attention_weights", features).reshape(N, S, HEADS, L, POINTS)
    points = jnp.broadcast_to(references, (N, S, L, 2))
    attended = linear("attention.output_proj", operator(value, levels, points, offsets, logits))
    features = norm("norm1", features + attended)
    return norm("norm2", features + linear("second", jax.nn.relu(linear("first", features))))


def jax_step(operator: Operator, levels: Levels, rate: float = 1e-3) -> Callable[..., Any]:
    """``step(parameters, features, references)`` -> new parameters and the loss, compiled."""

    def loss(given: Parameters, features: jax.Array, references: jax.Array) -> jax.Array:
        return (apply(operator, levels, given, features, references) ** 3).mean()

    def step(given: Parameters, features: jax.Array, references: jax.Array) -> tuple[Parameters, jax.Array]:
        found, gradients = jax.value_and_grad(loss)(given, features, references)
        return {name: value - rate * gradients[name] for name, value in given.items()}, found

    return jax.jit(step)


def torch_step(layer: TorchLayer, levels: Levels, rate: float = 1e-3) -> Callable[..., torch.Tensor]:
    """The same step in torch."""
    device = next(layer.parameters()).device
    shapes = torch.tensor(levels, device=device)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, fused=device.type == "cuda")

    def step(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        found = (layer(features, references.expand(len(features), -1, -1, -1), shapes, starts) ** 3).mean()
        found.backward()
        optimizer.step()
        return found.detach()

    return step


def relative_difference(one: float, other: float) -> float:
    """Of two losses."""
    return abs(one - other) / max(abs(one), abs(other), math.ulp(1.0))
