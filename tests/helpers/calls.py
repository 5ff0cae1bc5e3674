"""Validated calls from arrays, for tests of what is below the public functions."""

from cupy_msda import validate
from cupy_msda.call import ALL, FUSED_NAMES, OPERATOR_NAMES, PLAIN, Arguments


def call_of(value, shapes, starts, locations, weights, grad_output=None, references=None, wanted=ALL, **options):
    """The Call of these inputs; `variant` is a Variant, the other options are fields of Arguments."""
    options.setdefault("variant", PLAIN)
    names = OPERATOR_NAMES if references is None else FUSED_NAMES
    arguments = Arguments(value, shapes, starts, references, locations, weights, names=names, **options)
    return validate.read(arguments, grad_output, wanted)
