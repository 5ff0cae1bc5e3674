"""Problems with NaN, infinity and huge numbers in every input, on levels one pixel wide or high and on larger ones.

Each plain problem has every pair of the coordinates below, in head 0; a fused problem has random draws of them.
"""

import itertools

import numpy as np

from tests.helpers import cases
from tests.helpers.cases import FusedInputs, Inputs, dtype_of
from tests.helpers.tolerance import assert_close

LEVELS = np.array([(1, 1), (1, 5), (4, 1), (3, 4)])
PIXELS = int(LEVELS.prod(1).sum())
POINTS = 2  # of a fused problem
VARIANTS = {
    "zeros": {},
    "zeros, align_corners": {"align_corners": True},
    "border": {"padding_mode": "border"},
    "border, align_corners": {"padding_mode": "border", "align_corners": True},
    "nearest": {"interpolation": "nearest"},
}
# Fractions of a level that are no kink on any of the levels; 0 and 1 are exact.
ORDINARY = (0.4, 0.6)
SPECIAL = (np.nan, np.inf, -np.inf)
PLAIN_KINDS = {
    "locations": (),
    "NaN where no sample counts": ("weights", "grad_output"),
    "NaN in value": ("value", np.nan),
    "infinity in value": ("value", np.inf),
    "NaN in weights": ("weights", np.nan),
    "infinity in weights": ("weights", np.inf),
    "NaN in grad_output": ("grad_output", np.nan),
    "infinity in grad_output": ("grad_output", -np.inf),
}
FUSED_KINDS = ("samples", "masked logits", "logits", "NaN in value")
FUSED_FORMS = {
    "points": {"coordinates": 2, "levels": 4, "packed": False},
    "one point, packed": {"coordinates": 2, "levels": 1, "packed": True},
    "boxes": {"coordinates": 4, "levels": 4, "packed": False},
    "one box, packed": {"coordinates": 4, "levels": 1, "packed": True},
}


def huge(dtype):
    """A finite number that overflows in the dtype when it is multiplied by the size of a level."""
    return 0.8 * float(cases.dtype_of(dtype).type(np.finfo(dtype).max if dtype != "bfloat16" else 3e38))


def plain(kind, pair=("float32", "float32"), S=PIXELS, D=8, P=1) -> Inputs:
    """A problem of one image, 64 queries and 2 heads; `kind` is one of PLAIN_KINDS."""
    rng = np.random.default_rng(len(kind))
    value_dtype, dtype = map(dtype_of, pair)
    coordinates = (*SPECIAL, huge(pair[1]), -huge(pair[1]), 0.4, 0.0, 1.0)
    pairs = np.array(list(itertools.product(coordinates, repeat=2)))
    Q = len(pairs)
    locations = rng.choice(ORDINARY, (1, Q, 2, len(LEVELS), P, 2))
    locations[0, :, 0] = pairs[:, None, None]
    value = rng.standard_normal((1, S, 2, D)).astype(value_dtype)
    weights = rng.uniform(0.1, 1, locations.shape[:-1]).astype(dtype)
    grad_output = rng.standard_normal((1, Q, 2 * D)).astype(value_dtype)
    if kind == "NaN where no sample counts":
        nowhere = np.isnan(pairs).any(1)
        weights[0, nowhere, 0], grad_output[0, nowhere, :D] = np.nan, np.nan
    elif PLAIN_KINDS[kind]:
        name, special = PLAIN_KINDS[kind]
        if name == "value":  # a pixel of the last levels, and a channel of the first
            value[0, 0, 0, 3] = value[0, 7, 0, 1] = value[0, PIXELS - 1, 0] = special
        elif name == "weights":
            weights[0, 5::9, 0, 1:] = special
        else:
            grad_output[0, 7::11, 2] = special
    return Inputs(value, LEVELS, None, locations.astype(dtype), weights, grad_output)


def fused(kind, form, pair=("float32", "float32"), S=PIXELS, D=8) -> FusedInputs:
    """A problem of one image, 40 queries and 2 heads; `kind` is one of FUSED_KINDS, `form` one of FUSED_FORMS.

    A location stays below the largest number of its dtype: where it does not, the paths may differ.
    """
    rng = np.random.default_rng(len(kind + form))
    coordinates, reference_levels, packed = FUSED_FORMS[form].values()
    value_dtype, dtype = map(dtype_of, pair)
    Q, M, L = 40, 2, len(LEVELS)
    large = 3e3 if "16" in pair[1] else 1e15
    special = (*SPECIAL, large, -large)

    def draw(shape, ordinary, special, share):
        return np.where(rng.random(shape) < share, rng.choice(special, shape), rng.choice(ordinary, shape))

    references = draw((1, Q, reference_levels, coordinates), ORDINARY, special, 0.05)
    if coordinates == 4:
        references[..., 2:] = draw(references[..., 2:].shape, (0.5,), (*special, 0), 0.2)
    offsets = draw((1, Q, M, L, POINTS, 2), (-0.05, 0.0, 0.05), special, 0.1)
    logits = rng.standard_normal((1, Q, M, L, POINTS))
    if kind in ("masked logits", "logits"):
        logits[rng.random(logits.shape) < 0.3] = -np.inf
        logits[:, :, :, 3, 1] = 0
    if kind == "logits":
        logits[0, 0, 0], logits[0, 1, 0, 2, 1], logits[0, 2, 0, 1, 0] = -np.inf, np.inf, np.nan
        offsets[0, 3, 0], logits[0, 3, 0, 0, 0] = np.nan, np.nan  # no sample of this query and head counts
    value = rng.standard_normal((1, S, M, D)).astype(value_dtype)
    if kind == "NaN in value":
        value[0, PIXELS - 2, 0, 1] = np.nan  # of about half of the queries
    grad_output = rng.standard_normal((1, Q, M * D)).astype(value_dtype)
    offsets, logits = offsets.astype(dtype), logits.astype(dtype)
    if packed:
        offsets, logits = np.concatenate((offsets.reshape(1, Q, M, -1), logits.reshape(1, Q, M, -1)), -1), None
    return FusedInputs(value, LEVELS, None, offsets, logits, grad_output, references.astype(dtype))


def assert_same(got, want, dtype, what="output"):
    """Finite, and zero, where the reference is; and close to it there."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=f"{what} is finite")
    np.testing.assert_array_equal(got[want == 0], 0, err_msg=f"{what} is zero")
    if want[finite].any():  # nothing in the gradient of a location that is always clamped
        assert_close(np.where(finite, got, 0), np.where(finite, want, 0), dtype, what)


def check_plain(output, grads, inputs, pair, **variant):
    """Compare an output and its gradients, or those that are not None, with the reference; returns its gradients."""
    want_output, want = cases.expected(inputs, **variant)
    assert_same(output, want_output, pair[0])
    names = ("grad_value", "grad_sampling_loc", "grad_attn_weight")
    for name, got, exact, dtype in zip(names, grads, want, (pair[0], pair[1], pair[1]), strict=True):
        if got is not None:
            assert_same(got, exact, dtype, name)
    return want


def check_fused(output, grads, inputs, pair, **variant):
    """The same for the gradients of value, offsets, logits and references, in this order."""
    want_output, want = cases.expected_fused(inputs, **variant)
    assert_same(output, want_output, pair[0])
    dtypes = (pair[0], pair[1], pair[1], inputs.references.dtype.name)
    names = ("grad_value", "grad_offsets", "grad_logits", "grad_references")
    for name, got, exact, dtype in zip(names, grads, want, dtypes, strict=True):
        if got is not None and exact is not None:
            assert_same(got, exact, dtype, name)
    return want
