"""What a call must give, in float64 from the formula of the contract, and how far rounding may move each number.

It shares no code with the package; tests/helpers/reference.py, which is loops, checks it. A sample whose coordinates
lie closer to a kink than rounding can tell is on either side of it: `possible` pixels are those of both sides,
`definite` ones are of both. `xp` is NumPy or CuPy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.helpers.tolerance import TOLERANCE

from .draw import Case, Form
from .result import LIMIT, Expected, module_of

# How much rounding moves a pixel coordinate, in units of the last place of its largest term.
ROUNDINGS = 8


class _Axis(NamedTuple):
    """The pixels around each sample along one axis [..., O], by the role that they can have."""

    pixel: Any
    weight: Any
    slope: Any  # the derivative of the weight by the pixel coordinate
    actual: Any
    possible: Any
    definite: Any
    size: Any
    uncertain: Any  # how far rounding moves the coordinate; [...] as the next ones
    free: Any  # not clamped: the location moves the sample
    maybe_free: Any
    ambiguous: Any
    anywhere: Any  # rounding moves the coordinate by pixels: huge terms have cancelled


class _Samples(NamedTuple):
    """Locations [N, Q, M, K, 2], weights, and how exact they are."""

    locations: Any
    scale: Any  # the largest term of a location
    exact: Any
    weights: Any
    weight_error: Any  # relative
    steps: Any  # location per offset


def expected(case: Case, levels: Any = None) -> dict[str, Expected]:
    """Output and gradients of a case, in the shapes of :class:`Case`.

    `levels` replaces (H, W, start) of each level where these are metadata on a device, which may be bad: None.
    """
    with np.errstate(all="ignore"):
        return _expected(case, levels)


def _expected(case: Case, levels: Any) -> dict[str, Expected]:
    form, arrays = case.form, case.arrays
    xp = module_of(arrays["locations"])
    if 0 in case.sizes.values():  # the contract: an empty output, or zeros, whatever the other arrays hold
        shapes = {name: array.shape for name, array in arrays.items()}
        shapes["output"] = shapes.pop("grad_output")
        return {name: Expected.zeros(xp, shape) for name, shape in shapes.items()}
    if levels is None:
        levels = [(h, w, start) for (h, w), start in zip(case.levels, case.contiguous_starts, strict=True)]
    wide = {name: array.astype(np.float64) for name, array in arrays.items() if name != "value"}
    level_of = form.level_of_samples
    table = np.array([(1, 1, 0) if level is None else level for level in levels], np.int64).reshape(-1, 3)
    H, W, start = (xp.asarray(column) for column in table[level_of].T)
    bad = xp.asarray(np.array([level is None for level in levels], bool)[level_of])
    epsilon = 2.0**-53 if form.dtypes[0] == "float64" else 2.0**-24
    samples = _samples(xp, form, wide, xp.asarray(level_of), xp.stack((W, H), -1).astype(np.float64), epsilon)
    N, Q = samples.weights.shape[:2]
    valid = xp.ones((N, Q), bool)
    if case.lengths is not None:
        lengths = np.clip(np.array(case.lengths, object), 0, Q).astype(np.int64)
        valid = xp.asarray(np.arange(Q) < lengths[:, None])
    columns, rows = (_axis(xp, form, samples, at, size, epsilon) for at, size in ((0, W), (1, H)))
    weights = xp.where(valid[:, :, None, None], samples.weights, 0)
    pixels = _Pixels(xp, columns, rows, valid[:, :, None, None] & ~bad)
    grad_output = xp.where(valid[:, :, None, None], wide["grad_output"], 0)
    found = _results(xp, case, samples._replace(weights=weights), pixels, start, W, grad_output)
    if bad.any():
        found = _with_bad_levels(xp, found, bad, valid)
    if form.fused:
        found = _fused_gradients(xp, form, found, samples, wide, level_of)
    found = {name: _finished(xp, one, form, name, valid) for name, one in found.items()}
    if bool((columns.anywhere | rows.anywhere).any()) or _zero_times_overflow(xp, form, wide, W, H):
        return {name: one.opened(xp) for name, one in found.items()}
    return found


def _zero_times_overflow(xp: Any, form: Form, wide: dict[str, Any], W: Any, H: Any) -> bool:
    """Whether W - 1 = 0 or H - 1 = 0 multiplies what overflows in some orders of the arithmetic of a fused call."""
    if not (form.fused and form.align_corners):
        return False
    one_pixel = xp.stack((W, H), -1) == 1
    return bool((one_pixel & (abs(wide["locations"]) > 1e18)).any())


def _samples(xp: Any, form: Form, wide: dict[str, Any], level_of: Any, extent: Any, epsilon: float) -> _Samples:
    single = np.float64 if form.dtypes[0] == "float64" else np.float32

    def is_exact(numbers: Any) -> Any:
        # float64 has no wider dtype to compare with: numbers of float32 leave room for their products.
        narrow = np.float32 if single is np.float64 else single
        return numbers.astype(narrow).astype(np.float64) == numbers

    locations, weights = wide["locations"], wide["weights"]
    exact = is_exact(locations)
    if not form.fused:
        return _Samples(locations, abs(locations), exact, weights, 0.0, None)
    references = wide["references"][:, :, level_of if form.reference_levels > 1 else level_of * 0][:, :, None]
    points = xp.asarray(form.points_of_samples)[:, None]
    if form.coordinates == 4:
        steps = references[..., 2:] * 0.5 / points
        power = (points & (points - 1)) == 0
    else:
        steps = 1 / extent
        power = (extent.astype(np.int64) & (extent.astype(np.int64) - 1)) == 0
    offsets, move = locations, locations * steps
    locations = references[..., :2] + move
    locations = xp.where(abs(locations) > LIMIT["float32"], xp.copysign(np.inf, locations), locations) if (
        single is np.float32
    ) else locations  # fmt: skip
    exact = (power | (offsets == 0)) & is_exact(offsets) & is_exact(references[..., :2]) & is_exact(locations)
    exact = exact & is_exact(move) & is_exact(xp.broadcast_to(steps, move.shape))
    # The kernels add an offset in pixels, whose product with W - 1 may need more bits than the location in pixels does.
    factor = extent - 1 if form.align_corners else extent
    exact = exact & is_exact(move * factor) & ((offsets == 0) | is_exact(steps * factor))
    largest = weights.max(-1, keepdims=True) if weights.size else weights[..., :1]
    distance = abs(weights - largest)
    weights = xp.exp(weights - largest)
    weights = weights / weights.sum(-1, keepdims=True)
    error = ROUNDINGS * epsilon * (2 + xp.where(xp.isfinite(distance), distance, 0))
    scale = xp.maximum(abs(references[..., :2]), abs(move))
    return _Samples(locations, scale, exact, weights, error, steps)


def _axis(xp: Any, form: Form, samples: _Samples, at: int, size: Any, epsilon: float) -> _Axis:
    """The pixels along x (`at` 0) or y (1) of samples in levels of `size` pixels [K]."""
    nearest, border = form.interpolation == "nearest", form.padding_mode == "border"
    x, scale, exact = samples.locations[..., at], samples.scale[..., at], samples.exact[..., at]
    factor = (size - 1 if form.align_corners else size).astype(np.float64)
    shift = 0.5 if nearest else 0.0 if form.align_corners else -0.5
    p = x * factor + shift
    narrow = np.float32
    for step in (x * factor, 2 * x - 1, p):
        exact = exact & (step.astype(narrow).astype(np.float64) == step)
    uncertain = ROUNDINGS * epsilon * (scale * factor + size + 1)
    margin = xp.where(exact, 0, uncertain)
    low, high = p - margin, p + margin
    widest = (p - uncertain, p + uncertain)
    if nearest or border:
        p, low, high = (xp.where(xp.isinf(x), x, q) for q in (p, low, high))
        inside = maybe_inside = surely_inside = ~xp.isnan(p)
        free, maybe_free, surely_free = ((a > 0) & (b < size - 1) for a, b in ((p, p), (high, low), (low, high)))
        p, low, high = (xp.clip(q, 0, size - 1) for q in (p, low, high))
        uncertain = xp.clip(widest[1], 0, size - 1) - xp.clip(widest[0], 0, size - 1)
    else:
        inside, maybe_inside, surely_inside = ((a > -1) & (b < size) for a, b in ((p, p), (high, low), (low, high)))
        free = maybe_free = surely_free = xp.ones_like(inside)
    anywhere = maybe_inside & (high - low > 1)
    p, low, high = (xp.where(maybe_inside & ~anywhere & xp.isfinite(q), q, 0) for q in (p, low, high))
    base, first, last = (xp.floor(q).astype(np.int64) for q in (p, low, high))
    if nearest:
        free = maybe_free = surely_free = xp.zeros_like(inside)
    ambiguous = (maybe_inside & (first != last)) | (maybe_inside ^ surely_inside) | (maybe_free ^ surely_free)
    reach = 0 if nearest else 1
    around = xp.arange(-1, 2 + reach) if bool(ambiguous.any()) else xp.arange(0, 1 + reach)
    pixel = base[..., None] + around
    exists = (pixel >= 0) & (pixel < size[:, None])
    actual = exists & inside[..., None] & (around >= 0) & (around <= reach)
    possible = exists & maybe_inside[..., None] & (pixel >= first[..., None]) & (pixel <= last[..., None] + reach)
    definite = exists & surely_inside[..., None] & (pixel >= last[..., None]) & (pixel <= first[..., None] + reach)
    fraction = (p - base)[..., None]
    weight = xp.where(around == 0, 1.0 if nearest else 1 - fraction, xp.where(around == 1, fraction, 0.0))
    slope = xp.where(around == 0, -1.0, xp.where(around == 1, 1.0, 0.0)) + xp.zeros_like(weight)
    uncertain = xp.where(maybe_inside & xp.isfinite(uncertain), xp.minimum(uncertain, size + 1), 0)
    return _Axis(
        pixel, weight, slope, actual, possible, definite, factor, uncertain, free, maybe_free, ambiguous, anywhere
    )


class _Pixels:
    """The pixels around each sample [N, Q, M, K, rows, columns]."""

    def __init__(self, xp: Any, columns: _Axis, rows: _Axis, valid: Any) -> None:
        self.columns, self.rows = columns, rows
        valid = xp.broadcast_to(valid, columns.uncertain.shape)[..., None, None]
        self.actual, self.possible, self.definite = (
            getattr(rows, name)[..., :, None] & getattr(columns, name)[..., None, :] & valid
            for name in ("actual", "possible", "definite")
        )
        self.weight = rows.weight[..., :, None] * columns.weight[..., None, :]
        # Rounding moves a weight by as much as the coordinates; at a kink, nearest and slopes take another pixel.
        self.uncertain = (rows.uncertain + columns.uncertain)[..., None, None]
        self.ambiguous = (rows.ambiguous | columns.ambiguous)[..., None, None]


def _results(
    xp: Any, case: Case, samples: _Samples, pixels: _Pixels, start: Any, width: Any, grad_output: Any
) -> dict[str, Expected]:
    """Output and gradients of value, locations and weights of a call that is plain by now."""
    form, value = case.form, case.arrays["value"]
    columns, rows = pixels.columns, pixels.rows
    N, S, M, D = value.shape
    Q, K = grad_output.shape[1], start.shape[0]
    shape = (N, Q, M, K, rows.pixel.shape[-1], columns.pixel.shape[-1])
    index = start[:, None, None] + rows.pixel[..., :, None] * width[:, None, None] + columns.pixel[..., None, :]
    index = xp.where(pixels.possible, index, 0)
    if S:
        image, head = xp.arange(N).reshape(-1, 1, 1, 1, 1, 1), xp.arange(M).reshape(1, 1, -1, 1, 1, 1)
        vectors = value[image, index, head].astype(np.float64)
    else:
        vectors = xp.zeros((*shape, D))
    a = samples.weights[..., None, None]
    g = grad_output[:, :, :, None, None, None]
    tolerances = {name: TOLERANCE[form.dtype_of(name)] for name in ("value", "weights")}
    jump = 1.1 if form.interpolation == "nearest" else 0.0
    uncertain = pixels.uncertain + jump * pixels.ambiguous
    error = {name: (t + _last(samples.weight_error)) * pixels.weight + uncertain for name, t in tolerances.items()}
    tiny = np.finfo(np.float64 if form.dtypes[0] == "float64" else np.float32).tiny
    limit = LIMIT["float64" if form.dtypes[0] == "float64" else "float32"] / 16

    vague = pixels.ambiguous | ((abs(a) < tiny) & (a != 0))  # zero times infinity or not

    def result(
        terms: Any, factors: tuple, magnitude: Any, relative: Any, axes: tuple[int, ...], common: Any = None
    ) -> Expected:
        """A sum of `terms` over the pixels; `factors` are what is multiplied, `magnitude` its size.

        `common` is a factor of several terms: some paths add up or subtract the others first.
        """
        tail = (...,) + (None,) * (terms.ndim - pixels.actual.ndim)
        actual, possible, definite = (mask[tail] for mask in (pixels.actual, pixels.possible, pixels.definite))
        bad, nan = (_any(xp, [test(factor) for factor in factors]) for test in (lambda f: ~xp.isfinite(f), xp.isnan))
        magnitude = xp.where(possible & ~bad, magnitude, 0)
        loose = vague[tail] if common is None else vague[tail] | xp.isinf(common)
        found = Expected(
            xp.where(actual, terms, 0), relative[tail] * magnitude, definite & nan, definite & bad, possible & bad,
            possible & bad & loose,
        )  # fmt: skip
        if axes:
            found, magnitude = found.summed(axes), magnitude.sum(axes)
        return found._replace(open=found.open | (magnitude > limit))

    w = pixels.weight[..., None]
    found = {}
    size_a = _finite(xp, abs(a)) + tiny
    output = result(
        a[..., None] * w * vectors, (a[..., None], vectors), size_a[..., None] * _finite(xp, abs(vectors)),
        error["value"], (3, 4, 5), common=a[..., None],
    )  # fmt: skip
    found["output"] = output
    products = a[..., None] * w * g
    of_value = result(
        products, (a[..., None], g), size_a[..., None] * _finite(xp, abs(g)), error["value"], (), common=a[..., None]
    )  # fmt: skip
    found["value"] = _scattered(xp, of_value, index, pixels, (N, S, M, D))
    dots = (g * vectors).sum(-1)
    bad_dots = (~xp.isfinite(g) | ~xp.isfinite(vectors)).any(-1)
    nan_dots = (xp.isnan(g) | xp.isnan(vectors)).any(-1)
    marker = xp.where(nan_dots, np.nan, xp.where(bad_dots, np.inf, 0))
    size_dots = (_finite(xp, abs(g)) * _finite(xp, abs(vectors))).sum(-1)
    found["weights"] = result(pixels.weight * dots, (marker,), size_dots, error["weights"], (4, 5), common=marker)
    products = xp.where(pixels.possible, _finite(xp, xp.maximum(size_a, 1) * size_dots), 0)
    overflows = ~(products.sum((4, 5)) <= limit)  # also where a slope of 0 follows
    by_axis = []
    for axis, other, along in ((columns, rows, -1), (rows, columns, -2)):
        across = -3 - along
        slope = xp.expand_dims(axis.slope, across) * xp.expand_dims(other.weight, along)
        factor = (axis.size * axis.free)[..., None, None]
        relative = tolerances["weights"] + _last(samples.weight_error) + 2 * pixels.ambiguous
        relative = relative * xp.expand_dims(other.weight, along) + pixels.uncertain + 2 * pixels.ambiguous
        one = result(slope * a * dots * factor, (marker, a), size_a * size_dots * axis.size[:, None, None], relative,
                     (4, 5), common=xp.where(xp.isinf(a), a, marker))  # fmt: skip
        # With zeros padding and align_corners, a location on one pixel moves nothing either: 0 times NaN is 0 or NaN.
        surely = axis.free & ~axis.ambiguous & (axis.size > 0)
        # The contract: the gradient of a clamped location is 0, whatever the pixels hold.
        one = one._replace(
            numbers=xp.where(axis.free & pixels.actual.any((-2, -1)), one.numbers, 0),
            bound=xp.where(axis.maybe_free, one.bound, 0),
            nan=one.nan & surely,
            not_finite=one.not_finite & surely,
            open=(one.open | overflows) & axis.maybe_free,
        )
        by_axis.append(one)
    found["locations"] = Expected(*(xp.stack(parts, -1) for parts in zip(*by_axis, strict=True)))
    return found


def _last(numbers: Any) -> Any:
    return numbers if isinstance(numbers, float) else numbers[..., None, None]


def _finite(xp: Any, numbers: Any) -> Any:
    return xp.where(xp.isfinite(numbers), numbers, 0)


def _any(xp: Any, masks: list[Any]) -> Any:
    found = masks[0]
    for mask in masks[1:]:
        found = found | mask
    return found


def _scattered(xp: Any, terms: Expected, index: Any, pixels: _Pixels, shape: tuple[int, int, int, int]) -> Expected:
    """The sum per pixel of what each sample and neighbour adds [N, Q, M, K, rows, columns, D]."""
    N, S, M, D = shape
    image, head = xp.arange(N).reshape(-1, 1, 1, 1, 1, 1), xp.arange(M).reshape(1, 1, -1, 1, 1, 1)
    flat = ((image * S + index) * M + head)[pixels.possible]
    stacked = xp.stack([part.astype(np.float64) for part in terms], -1)[pixels.possible]
    total = xp.zeros((N * S * M, D, len(terms)))
    xp.add.at(total, flat, stacked)
    total = total.reshape(N, S, M, D, len(terms))
    return Expected(total[..., 0], total[..., 1], *(total[..., at] > 0 for at in (2, 3, 4, 5)))


def _with_bad_levels(xp: Any, found: dict[str, Expected], bad: Any, valid: Any) -> dict[str, Expected]:
    """A bad level on the device: NaN for the output and for its locations and weights, nothing for value."""
    everywhere = valid[:, :, None, None]
    masks = {"output": everywhere, "locations": (everywhere & bad)[..., None], "weights": everywhere & bad}
    result = dict(found)
    for name, mask in masks.items():
        one = found[name]
        mask = xp.broadcast_to(mask, one.numbers.shape) & ~xp.zeros_like(one.nan)
        result[name] = Expected(
            xp.where(mask, np.nan, one.numbers), one.bound, *(flag | mask for flag in one[2:])
        )  # fmt: skip
    return result


def _fused_gradients(
    xp: Any, form: Form, found: dict[str, Expected], samples: _Samples, wide: dict[str, Any], level_of: np.ndarray
) -> dict[str, Expected]:
    """The gradients of offsets, logits and references by the chain rule."""
    of_locations, of_weights = found["locations"], found["weights"]
    result = dict(found)
    result["locations"] = of_locations.scaled(samples.steps)
    parts = [of_locations]
    if form.coordinates == 4:
        points = xp.asarray(form.points_of_samples)[:, None]
        parts.append(of_locations.scaled(wide["locations"] * 0.5 / points))
    per_sample = Expected(*(xp.concatenate(part, -1).sum(2) if part[0].dtype != bool else
                            xp.concatenate(part, -1).any(2) for part in zip(*parts, strict=True)))  # fmt: skip
    groups = [xp.asarray(np.flatnonzero(level_of == level)) for level in range(form.reference_levels)]
    if form.reference_levels == 1:
        groups = [xp.arange(len(level_of))]
    per_level = [Expected(*(part[:, :, group] for part in per_sample)).summed(2) for group in groups]
    result["references"] = Expected(*(xp.stack(part, 2) for part in zip(*per_level, strict=True)))
    a = samples.weights
    size_a = _finite(xp, abs(a))
    inner = (a * of_weights.numbers).sum(-1, keepdims=True)
    size = _finite(xp, abs(of_weights.numbers))
    relative = TOLERANCE[form.dtype_of("weights")] + samples.weight_error
    bound = of_weights.bound + relative * size
    bound = size_a * (bound + (size_a * bound).sum(-1, keepdims=True))
    odd = (xp.isnan(a), *(~xp.isfinite(a),) * 2, xp.zeros_like(a) > 0)
    masks = (
        xp.broadcast_to((mask | of_a).any(-1, keepdims=True), a.shape)
        for mask, of_a in zip(of_weights[2:], odd, strict=True)
    )
    result["weights"] = Expected(a * (of_weights.numbers - inner), bound, *masks)
    return result


def _finished(xp: Any, one: Expected, form: Form, name: str, valid: Any) -> Expected:
    """With what the dtype of the result adds: overflow, and numbers next to zero."""
    dtype = form.dtype_of("output" if name == "value" else name)
    floor = {"float16": 2.0**-24, "float64": 1e-300}.get(dtype, 1e-36)
    numbers, bound, limit = one.numbers, one.bound + floor, LIMIT[dtype]
    size = abs(numbers)
    if name == "references":  # summed in the dtype of the accumulator, and cast to their own
        bound = bound + TOLERANCE[dtype] * _finite(xp, size)
    overflows = ~one.open & (size - bound > limit * (1 + 2.0**-11))
    maybe = ~one.open & ~(size + bound <= limit)
    found = one._replace(bound=bound, not_finite=one.not_finite | overflows, open=one.open | maybe)
    if name != "value":  # the padding of a ragged call has zeros
        padding = ~valid.reshape(*valid.shape, *(1,) * (numbers.ndim - 2))
        found = Expected(
            xp.where(padding, 0, found.numbers), xp.where(padding, 0, bound), *(mask & ~padding for mask in found[2:])
        )
    return found
