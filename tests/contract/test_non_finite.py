"""NaN, infinity and huge numbers in every input reach what uses them, and nothing else, on every backend."""

import itertools
import warnings

import numpy as np
import pytest

from tests.helpers import non_finite
from tests.helpers.checks import run_fused, run_operator
from tests.helpers.non_finite import FUSED_FORMS, FUSED_KINDS, PLAIN_KINDS, VARIANTS

pytestmark = pytest.mark.sanitizer

PAIRS = (("float32", "float32"), ("float64", "float64"), ("float16", "float16"), ("bfloat16", "float32"))


@pytest.fixture(autouse=True)
def strict():
    """A caller who turns NumPy's warnings into errors."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_call(main_backend, name, kind, pair):
    inputs = non_finite.plain(kind, pair)
    output, grads = run_operator(main_backend, inputs, **VARIANTS[name])
    with np.errstate(all="ignore"):
        non_finite.check_plain(output, grads, inputs, pair, **VARIANTS[name])


FORMS_AND_PAIRS = [
    *itertools.product(FUSED_FORMS, PAIRS[:1]),
    *itertools.product(("boxes", "one point, packed"), PAIRS[1:]),
]


@pytest.mark.parametrize(("form", "pair"), FORMS_AND_PAIRS, ids=str)
@pytest.mark.parametrize("kind", FUSED_KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_fused_call(main_backend, name, kind, form, pair):
    inputs = non_finite.fused(kind, form, pair)
    output, (of_value, of_references, *of_samples) = run_fused(main_backend, inputs, **VARIANTS[name])
    with np.errstate(all="ignore"):
        non_finite.check_fused(output, (of_value, *of_samples, of_references), inputs, pair, **VARIANTS[name])
