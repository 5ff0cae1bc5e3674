"""Layers: the attention module of Deformable DETR, and the bare operator as a kernel layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .dtypes import agreed_dtypes
from .functional import ms_deform_attn, ms_deform_attn_fused


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Zhu et al. 2021, section 4.1).

    Parameters have the names, shapes and initial values of the module of Deformable DETR, so its checkpoints load:
    ``sampling_offsets``, ``attention_weights``, ``value_proj``, ``output_proj``. The softmax and the locations are
    computed by the operator, in float32 at least, since 16 bits cannot address the pixels of a wide level.

    Parameters
    ----------
    d_model : int
        Channels C of queries, values and the output; a multiple of `n_heads`.
    n_levels, n_heads, n_points : int
        L, M and P of the operator.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model: expected a multiple of n_heads = {n_heads}, got {d_model}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.im2col_step = 64
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * samples)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points of head m lie 1, 2, ... P pixels away in direction 2 pi m / M, with equal weights (appendix A.4)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(self.n_heads, self.n_levels, self.n_points, 2).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Any,
        input_level_start_index: Any,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to points around its reference.

        Parameters
        ----------
        query : Tensor [N, Q, C]
            What the offsets and the weights are projected from.
        reference_points : Tensor [N, Q, L, 2] or [N, Q, L, 4]
            (x, y) of each query in each level, 0 to 1 over the level without its padding; or boxes (x, y, width,
            height), whose points spread over half a box.
        input_flatten : Tensor [N, S, C]
            Feature levels, flattened.
        input_spatial_shapes, input_level_start_index
            Metadata as for :func:`ms_deform_attn`: [L, 2] of (H, W), and [L] or None.
        input_padding_mask : Tensor [N, S] of bool, optional
            True for padding, whose values count as 0.

        Returns
        -------
        Tensor [N, Q, C]

        Raises
        ------
        ValueError
            When the last dimension of reference_points is neither 2 nor 4.
        """
        N, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.view(N, -1, M, self.d_model // M)
        offsets = self.sampling_offsets(query).view(N, Q, M, L, P, 2)
        logits = self.attention_weights(query).view(N, Q, M, L, P)
        (references,) = agreed_dtypes(value, reference_points)
        offsets, logits = agreed_dtypes(value, offsets, logits)
        attended = ms_deform_attn_fused(
            value, input_spatial_shapes, input_level_start_index, references, offsets, logits, self.im2col_step
        )
        return self.output_proj(attended)


class MultiScaleDeformableAttention(nn.Module):
    """The operator as a layer without state, with the signature that transformers 5 maps kernels onto."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """:func:`ms_deform_attn`; `value_spatial_shapes_list` repeats `value_spatial_shapes` and is not used."""
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step
        )
