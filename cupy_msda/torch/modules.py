"""Layers: the attention module of Deformable DETR, and the bare operator as a kernel layer."""

import importlib
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from .dtypes import agreed_dtypes
from .functional import ms_deform_attn, ms_deform_attn_fused
from .layer_checks import attend, check_inputs

# No postponed annotations: torch.fx writes them into the code of traced layers, which lacks the imports that they need.

_RESET_NAMES = ("reset_parameters", "_reset_parameters")


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
    device, dtype
        Of the parameters, as for :class:`torch.nn.Linear`.

    Notes
    -----
    A subclass may override ``reset_parameters`` or ``_reset_parameters``, its name in Deformable DETR: the other name
    then means the same method.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model, n_heads = _size("d_model", d_model, 1), _size("n_heads", n_heads, 1)
        n_levels, n_points = _size("n_levels", n_levels, 0), _size("n_points", n_points, 0)
        if d_model % n_heads:
            raise ValueError(f"d_model: expected a multiple of n_heads = {n_heads}, got {d_model}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.im2col_step = 64
        samples = n_heads * n_levels * n_points
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        reset_offsets = partial(_reset_offsets, sizes=(n_heads, n_levels, n_points))
        self.sampling_offsets = Projection(reset_offsets, d_model, 2 * samples, **place)
        self.attention_weights = Projection(_reset_to_zeros, d_model, samples, **place)
        self.value_proj = Projection(_reset_to_xavier, d_model, d_model, **place)
        self.output_proj = Projection(_reset_to_xavier, d_model, d_model, **place)
        self.reset_parameters()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        overridden = [name for name in _RESET_NAMES if name in vars(cls)]
        if len(overridden) == 1:
            reset = vars(cls)[overridden[0]]
            # What calls the other name adds to it.
            if not set(_RESET_NAMES) & set(getattr(getattr(reset, "__code__", None), "co_names", ())):
                for name in _RESET_NAMES:
                    setattr(cls, name, reset)

    def reset_parameters(self) -> None:
        """Points of head m lie 1, 2, ... P pixels away in direction 2 pi m / M, with equal weights (appendix A.4).

        Parameters may be sharded (DTensor): they get the values of unsharded ones.
        """
        _reset_offsets(self.sampling_offsets, (self.n_heads, self.n_levels, self.n_points))
        _reset_to_zeros(self.attention_weights)
        for projection in (self.value_proj, self.output_proj):
            _reset_to_xavier(projection)

    _reset_parameters = reset_parameters

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"

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
        TypeError, ValueError
            As :func:`ms_deform_attn_fused`, in the names of these arguments.
        """
        M, L, P = self.n_heads, self.n_levels, self.n_points
        compiling = torch.compiler.is_compiling()
        if not compiling:
            check_inputs(
                (self.d_model, L), query, reference_points, input_flatten, input_spatial_shapes,
                input_level_start_index, input_padding_mask,
            )  # fmt: skip
        value = _without_padding(self.value_proj(input_flatten), input_padding_mask)
        # torch.onnx.export(dynamo=False) makes the number of images a constant after `unflatten`.
        value = value.view(value.shape[0], value.shape[1], M, self.d_model // M)
        N, Q = query.shape[0], query.shape[1]
        offsets = self.sampling_offsets(query).view(N, Q, M, L, P, 2)
        logits = self.attention_weights(query).view(N, Q, M, L, P)
        (references,) = agreed_dtypes(value, reference_points)
        offsets, logits = agreed_dtypes(value, offsets, logits)
        attended = (ms_deform_attn_fused if compiling else attend)(
            value, input_spatial_shapes, input_level_start_index, references, offsets, logits, self.im2col_step
        )
        return self.output_proj(attended)


class Projection(nn.Linear):
    """A linear layer of :class:`MSDeformAttn`, which knows its initial values.

    Code that makes parameters on the meta device resets the modules that hold them, and not the layer around them.

    Parameters
    ----------
    reset : callable
        ``reset(projection)`` sets the initial values.
    in_features, out_features, **options
        As for :class:`torch.nn.Linear`.
    """

    def __init__(self, reset: Callable[[nn.Linear], None], in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self._reset = reset

    def reset_parameters(self) -> None:
        """Set the initial values."""
        # During construction those of torch: the random numbers that follow are then those of Deformable DETR.
        reset = self.__dict__.get("_reset")
        if reset is None:
            super().reset_parameters()
        else:
            reset(self)


def _reset_offsets(projection: nn.Linear, sizes: tuple[int, int, int]) -> None:
    """Initial values of the offsets, for (M, L, P)."""
    M, L, P = sizes
    nn.init.zeros_(projection.weight)
    angle = torch.arange(M, dtype=torch.float32, device="cpu") * (2 * math.pi / M)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    distance = torch.arange(1, P + 1, dtype=torch.float32, device="cpu")
    offsets = direction[:, None, None, :] * distance[:, None]
    with torch.no_grad():
        projection.bias.copy_(_replicated(offsets.expand(M, L, P, 2).reshape(-1), projection.bias))


def _replicated(values: Tensor, parameter: Tensor) -> Tensor:
    """`values`, the same in every process, as what can be copied into `parameter`, which may be sharded (DTensor)."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return values
    kind: Any = next(cls for cls in type(parameter).__mro__ if cls.__name__ == "DTensor")
    home: Any = importlib.import_module(kind.__module__)  # not the same in every release of torch
    return kind.from_local(values, mesh, [home.Replicate()] * mesh.ndim, run_check=False)


def _reset_to_zeros(projection: nn.Linear) -> None:
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)


def _reset_to_xavier(projection: nn.Linear) -> None:
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)


def _without_padding(value: Tensor, mask: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor):  # in symbolic tracing, which does not know whether there is a mask
        return handle_torch_function(_without_padding, (value,), value, mask)
    return value if mask is None else value.masked_fill(mask[..., None], 0.0)


def _size(name: str, size: Any, least: int) -> int:
    """`size` as an int."""
    try:
        number = None if isinstance(size, bool) else operator.index(size)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an int, got {size!r}")
    if number < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {number}")
    return number


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
