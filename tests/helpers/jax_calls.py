"""Calls of the JAX functions with the inputs of the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from cupy_msda.jax import ms_deform_attn, ms_deform_attn_fused
from tests.helpers.cases import Case, to_fused

SMALL = Case("small", levels=((4, 5), (3, 2)), M=2, D=4, queries=3)
FORMS = {
    "plain": None,
    "fused": {"coordinates": 2},
    "boxes": {"coordinates": 4},
    "packed": {"coordinates": 2, "levels": 1, "packed": True},
}


def enable_x64(enabled):
    """The context with or without 64-bit types, which older versions of JAX have among the experiments."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64 as experimental

    return experimental(enabled)


def inputs_of(case, form=None, pair=("float32", "float32"), seed=0):
    inputs = case.inputs(*pair, seed=seed)
    return inputs if form is None else to_fused(inputs, num_points=case.variant.get("num_points"), seed=seed, **form)


def function_of(inputs, shapes=None, starts=None, **options):
    """The operator as a function of its differentiable arrays, and these, by name in the order of the function."""
    shapes = inputs.shapes.tolist() if shapes is None else shapes
    starts = inputs.starts if starts is None else starts
    arrays = {"value": inputs.value, "locations": inputs.locations}
    if inputs.weights is not None:
        arrays["weights"] = inputs.weights
    if not hasattr(inputs, "references"):
        return lambda *given: ms_deform_attn(given[0], shapes, starts, *given[1:], **options), arrays
    arrays["references"] = inputs.references

    def fused(value, offsets, *given):
        *logits, references = given
        return ms_deform_attn_fused(value, shapes, starts, references, offsets, *logits, **options)

    return fused, arrays


def output_and_gradients(function, arrays, grad_output, jit=True):
    """The output, and the gradients by the names of `arrays`."""

    def both(*given):
        output, pullback = jax.vjp(function, *given)
        return output, pullback(jnp.asarray(grad_output))

    output, gradients = (jax.jit(both) if jit else both)(*map(jnp.asarray, arrays.values()))
    return np.asarray(output), dict(zip(arrays, map(np.asarray, gradients), strict=True))


def primitives_of(function, *arrays):
    """The names of all primitives of a traced function, those of loops and calls inside too."""
    found = []

    def read(jaxpr):
        for equation in jaxpr.eqns:
            found.append(equation.primitive.name)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    read(inner if hasattr(inner, "eqns") else inner.jaxpr)

    read(jax.make_jaxpr(function)(*arrays).jaxpr)
    return found
