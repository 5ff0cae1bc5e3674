"""Faults that show in a variant, with ragged queries or in a fused call. Each turns a check of
test_planted_faults.py red."""

from tests.helpers.faults import Fault

DIFFERENT_POINTS = {"num_points": (2, 5)}
NEAREST = {"interpolation": "nearest"}
BORDER = {"padding_mode": "border"}
CORNERS = {"align_corners": True}

# (variant, fault)
VARIANTS = {
    "points of the first level for all levels": (
        DIFFERENT_POINTS, Fault("forward", "first.of[l] + config::points(l)", "first.of[l] + config::points(0)"),
    ),
    "first point of a level in the level before": (
        DIFFERENT_POINTS, Fault("backward", "k >= first_samples.of[l]", "k > first_samples.of[l]"),
    ),
    "nearest pixel to the upper left": (NEAREST, Fault("forward", "scale) + (acc_t)0.5)", "scale))")),
    "nearest with a gradient of locations": (NEAREST, Fault("backward", "!config::nearest && p > 0", "p > 0")),
    "border without a clamp": (BORDER, Fault("forward", "px = clamp_to_level(px, level.w);", "")),
    "clamp to the size, not to the last pixel": (
        BORDER, Fault("forward", "round_down(size - 1, last)", "round_down(size, last)"),
    ),
    "fraction beyond the border": (
        BORDER, Fault("forward", "if (pixel_slope(y, level.h) == 0) cell.fraction_y = 0;", ""),
    ),
    "gradient beyond the border": (BORDER, Fault("backward", "p > 0 && p < last_pixel(size) ?", "true ?")),
    "edges of pixels for their centres": (CORNERS, Fault("forward", "config::align_corners ? size - 1 : size", "size")),
    "shift by half a pixel": (CORNERS, Fault("backward", "config::align_corners ? (acc_t)0 :", "")),
}  # fmt: skip

# Where only the first queries of each image are valid.
RAGGED = {
    "all queries valid": Fault("forward", "q >= valid_queries(lengths, work.image, Q) ?", "q > Q ?"),
    "length of the first image": Fault(
        "forward", "valid_queries(lengths, work.image, Q) ?", "valid_queries(lengths, 0, Q) ?"
    ),
    "no output for queries that are not valid": Fault(
        "forward", "const index_t number = decoded_query(q);", "const index_t number = q;"
    ),
    "no gradients for queries that are not valid": Fault(
        "backward",
        "decoded_query(q) < 0 || k >= K) continue;\n        sample_gradient",
        "q < 0 || k >= K) continue;\n        sample_gradient",
    ),
    "contributions of queries that are not valid": Fault(
        "bucket_sort", "valid_queries(lengths, work.image, (index_t)Q) * K;", "Q * K;"
    ),
}

# In a fused call: (whether offsets and logits are one array, fault).
FUSED = {
    "softmax over half of the lanes": (
        False,
        Fault("forward", "mask < lanes_per_pair; mask *= 2) x +=", "mask < lanes_per_pair / 2; mask *= 2) x +="),
    ),
    "softmax without its division": (False, Fault("forward", "raw.weight[first + t] *= scale;", ";")),
    "softmax over lanes without a sample": (False, Fault("forward", "k < K ? logit : lowest", "logit")),
    "reference point of the first level": (
        False, Fault("forward", "(config::reference_levels > 1 ? MSDA_LEVEL_OF(k) : 0)", "0"),
    ),
    "height of the box for its width": (
        False, Fault("forward", "widen(box.element[0])", "widen(box.element[1])"),
    ),
    "offsets at the pitch of an array of their own": (
        True, Fault("forward", "config::packed ? 3 : 2", "config::packed ? 2 : 2"),
    ),
    "gradient of a logit without the sum over the query": (
        False, Fault("backward", "(grad[t].attention - sum)", "grad[t].attention"),
    ),
    "gradient of an offset per pixel": (
        False, Fault("backward", "grad[t].x * factor_of(grad[t].x, scale.x)", "grad[t].x"),
    ),
    "gradient of a reference point by one sample": (
        False, Fault("backward", "k < first_sample_of(l + 1); ++k", "k < first_sample_of(l) + 1; ++k"),
    ),
    "gradient of a box without its offset": (
        False, Fault("backward", "factor_of(grad[t].x, widen(raw.xy[first + t].element[0]))", "1"),
    ),
    "reference points without the last head": (
        False, Fault("reduce_references", "m < config::M", "m < config::M - 1"),
    ),
    "sort without a softmax": (False, Fault("bucket_sort", "if constexpr (fused) softmax(raw[i]);", "")),
    "materialised weight of another sample": (
        False, Fault("materialise", "weights[element] =", "weights[element ^ 1] ="),
    ),
}  # fmt: skip

# With NaN and infinity, found by test_non_finite.py: (variant, form of a fused call or None, fault).
NON_FINITE = {
    "no pixel between the ends of a level of one": (
        "border, align_corners", None, Fault("forward", "size > 1 ? size - 1 : 1", "size - 1"),
    ),
    "the same in a fused call": (
        "border, align_corners", "points", Fault("forward", "size > 1 ? size - 1 : 1", "size - 1"),
    ),
    "gradients of no pixel between the ends of a level": (
        "border, align_corners", None, Fault("backward", "size > 1 ? size - 1 : 1", "size - 1"),
    ),
    "NaN clamped to the first pixel": (
        "border", None, Fault("forward", "px == px && py == py && level.w > 0", "level.w > 0"),
    ),
    "weight of a sample out of bounds": (
        "border", None, Fault("forward", "cell.in_bounds ? attention : (acc_t)0", "attention"),
    ),
    "weight of a masked sample": (
        "zeros", None, Fault("forward", "mask ? attention : level.w ? (acc_t)0 : quiet_nan()", "attention"),
    ),
    "fraction of an infinite coordinate": (
        "border", None, Fault("forward", "if (pixel_slope(x, level.w) == 0) cell.fraction_x = 0;", ""),
    ),
    "gradient of a clamped location": (
        "border", None, Fault("backward", "if (!clamped || slope_x != 0) grad.x", "grad.x"),
    ),
    "infinite box times no gradient": ("zeros", "boxes", Fault("backward", "grad == 0 ? (acc_t)0 : factor", "factor")),
    "NaN of a softmax left out where the block aggregates": (
        "zeros", "points", Fault("backward", "if constexpr (fused) sample.attention = point.attention;", ""),
    ),
}  # fmt: skip
