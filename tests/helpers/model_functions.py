"""Stand-ins for the functions by which models compute this operator, one per calling convention.

Each has the name and the parameters of a code base, and computes by torch's grid_sample. They are made anew by each
call of a maker, as functions of a module that is in ``sys.modules`` while a test runs.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def composition(value, shapes, locations, weights, padding_mode="zeros", align_corners=False):
    """value [N, S, M, D]; locations and weights are one [N, Q, M, P, 2] and [N, Q, M, P] per level."""
    N, _, M, D = value.shape
    start, output = 0, 0
    for (height, width), at, weight in zip(shapes, locations, weights, strict=True):
        height, width = int(height), int(width)
        level = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(N * M, D, height, width)
        grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)
        sampled = functional.grid_sample(
            level, grid, padding_mode=padding_mode, align_corners=align_corners, mode="bilinear"
        )
        output = output + (sampled * weight.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        start += height * width
    return output.unflatten(0, (N, M)).flatten(1, 2).transpose(1, 2).contiguous()


def nearest(value, shapes, locations, weights):
    """As :func:`composition`, with the pixel that RT-DETRv2's method "discrete" takes."""
    start, output = 0, 0
    for (height, width), at, weight in zip(shapes, locations, weights, strict=True):
        height, width = int(height), int(width)
        x = (at[..., 0] * width + 0.5).long().clamp(0, width - 1)
        y = (at[..., 1] * height + 0.5).long().clamp(0, height - 1)
        pixel = (start + y * width + x).transpose(1, 2).flatten(2)
        rows = value.transpose(1, 2).gather(2, pixel[..., None].expand(*pixel.shape, value.shape[3]))
        rows = rows.unflatten(2, at.shape[1:2] + at.shape[3:4])
        output = output + (rows * weight.transpose(1, 2)[..., None]).sum(3)
        start += height * width
    return output.transpose(1, 2).flatten(2)


def pixels_first(padding_mode="zeros", align_corners=False):
    """mmcv, Grounding DINO, detrex, RT-DETR v1, TadTR; with padding "border" PDVC."""

    def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        return composition(
            value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights.unbind(3), padding_mode,
            align_corners,
        )  # fmt: skip

    return multi_scale_deformable_attn_pytorch


def one_axis():
    """ultralytics 8.4."""

    def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        points = sampling_locations.shape[3] // len(value_spatial_shapes)
        return composition(
            value, value_spatial_shapes, sampling_locations.split(points, 3), attention_weights.split(points, 3)
        )

    return multi_scale_deformable_attn_pytorch


def heads_first():
    """rfdetr 1.11 and LW-DETR."""

    def ms_deform_attn_core_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw=None
    ):
        shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
        locations = sampling_locations.flatten(3, -2).unflatten(3, (len(shapes), -1))
        weights = attention_weights.unflatten(3, (len(shapes), -1))
        assert value.ndim == 4
        return composition(value.permute(0, 3, 1, 2), shapes, locations.unbind(3), weights.unbind(3))

    return ms_deform_attn_core_pytorch


def points_per_level(value_per_level=False):
    """RT-DETRv2; with a value per level D-FINE, DEIM and DEIMv2."""

    def deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
    ):
        if value_per_level:
            value = torch.cat(value, -1).permute(0, 3, 1, 2)
        compute = {"default": composition, "discrete": nearest}[method]
        locations = sampling_locations.split(num_points_list, 3)
        return compute(value, value_spatial_shapes, locations, attention_weights.split(num_points_list, 3))

    return deformable_attention_core_func_v2


def either_value():
    """Forks of D-FINE whose functions take both kinds of value."""
    by_pixels, by_level = points_per_level(), points_per_level(value_per_level=True)

    def deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default",
        value_shape="default",
    ):  # fmt: skip
        compute = by_level if value_shape == "default" else by_pixels
        return compute(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)

    return deformable_attention_core_func_v2


def autograd_function(can_run=None, has_backward=True):
    """Deformable DETR's; without a backward dinov2's, and dinov3's, whose backward needs the extension."""

    class MSDeformAttnFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                    im2col_step):  # fmt: skip
            if can_run is not None and not can_run(value):
                raise RuntimeError("Not implemented on the CPU")
            inputs = (value, sampling_locations, attention_weights)
            ctx.save_for_backward(*inputs)
            ctx.shapes = value_spatial_shapes
            return composition(value, value_spatial_shapes, inputs[1].unbind(3), inputs[2].unbind(3))

        if has_backward:

            @staticmethod
            @once_differentiable
            def backward(ctx, grad_output):
                with torch.enable_grad():
                    value, locations, weights = leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                    output = composition(value, ctx.shapes, locations.unbind(3), weights.unbind(3))
                    grads = torch.autograd.grad(output, leaves, grad_output)
                return grads[0], None, None, *grads[1:], None

    return MSDeformAttnFunction


def layer():
    """transformers' layer without parameters."""

    class MultiScaleDeformableAttention(torch.nn.Module):
        def forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
                    sampling_locations, attention_weights, im2col_step):  # fmt: skip
            return composition(
                value, value_spatial_shapes_list, sampling_locations.unbind(3), attention_weights.unbind(3)
            )

    return MultiScaleDeformableAttention


# ---- calls by the conventions --------------------------------------------------------------------------------

LEVELS = [(6, 7), (3, 4)]
N, M, D, Q = 2, 3, 8, 5


def samples(points=(3, 3), dtype=torch.float64):
    """value [N, S, M, D], locations [N, Q, M, L*P, 2], weights [N, Q, M, L*P] and grad_output."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [drawn(N, 54, M, D), 1.4 * drawn(N, Q, M, sum(points), 2) - 0.2, drawn(N, Q, M, sum(points))]
    return *(leaf.requires_grad_() for leaf in leaves), drawn(N, Q, M * D)


def by_level(tensor):
    return tensor.unflatten(3, (2, -1))


def with_heads_first(value):
    return value.permute(0, 2, 3, 1)


def per_level(value):
    return list(with_heads_first(value).split([h * w for h, w in LEVELS], -1))


def same(tensor):
    return tensor


SHAPES = torch.tensor(LEVELS)
V2 = {"num_points_list": [4, 2]}
# Maker; value, locations and weights in its layout; level sizes; other arguments.
CONVENTIONS = {
    "Grounding DINO, detrex, RT-DETR, TadTR": (pixels_first, same, by_level, by_level, SHAPES, {}),
    "PDVC": (lambda: pixels_first("border"), same, by_level, by_level, SHAPES, {}),
    "align_corners": (lambda: pixels_first("zeros", True), same, by_level, by_level, SHAPES, {}),
    "ultralytics 8.4": (one_axis, same, same, same, LEVELS, {}),
    "LW-DETR": (heads_first, with_heads_first, by_level, same, SHAPES, {}),
    "LW-DETR, sizes": (heads_first, with_heads_first, by_level, same, SHAPES, {"value_spatial_shapes_hw": LEVELS}),
    "LW-DETR, export": (heads_first, with_heads_first, same, same, SHAPES, {"value_spatial_shapes_hw": LEVELS}),
    "RT-DETRv2": (points_per_level, same, same, same, LEVELS, V2),
    "RT-DETRv2, discrete": (points_per_level, same, same, same, LEVELS, V2 | {"method": "discrete"}),
    "D-FINE, DEIM, DEIMv2": (lambda: points_per_level(True), per_level, same, same, LEVELS, V2),
    "D-FINE, discrete": (
        lambda: points_per_level(True), per_level, same, same, LEVELS, V2 | {"method": "discrete"},
    ),
    "both values, pixels": (either_value, same, same, same, LEVELS, V2 | {"value_shape": "reshape"}),
    "both values, levels": (either_value, per_level, same, same, LEVELS, V2),
}  # fmt: skip


def arguments_of(convention, leaves):
    """Positional and named arguments of a call by a convention, from :func:`samples`."""
    _, of_value, of_locations, of_weights, shapes, others = CONVENTIONS[convention]
    value, locations, weights = leaves
    return (of_value(value), shapes, of_locations(locations), of_weights(weights)), others


def points_of(convention):
    """Points of each level."""
    return tuple(CONVENTIONS[convention][-1].get("num_points_list", (3, 3)))
