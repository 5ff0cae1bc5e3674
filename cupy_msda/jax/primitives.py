"""The operator as primitives of JAX, with the rules of every transformation.

``forward`` computes the output. Its tangent is another primitive, ``tangent``, which is linear in the tangents of the
inputs. Functions of JAX compute it. Its transpose is the primitive ``backward``: one call of the kernels, for the
gradients that are needed and no others. So reverse mode costs a forward and a backward, and forward mode and higher
derivatives work too. Under ``vmap`` the new dimension becomes a part of N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import reference
from .compat import Primitive, abstract, ad, batching, mlir, needs_devices
from .lowering import lowering
from .operation import METADATA, Operation
from .sharding import result_roles, spec_of

forward_p = Primitive("ms_deform_attn")
tangent_p = Primitive("ms_deform_attn_tangent")
backward_p = Primitive("ms_deform_attn_backward")
backward_p.multiple_results = True


# Shapes and dtypes.


def _forward_aval(*inputs: Any, operation: Operation) -> Any:
    return _avals(inputs, operation)[0]


def _tangent_aval(*arrays: Any, operation: Operation, names: tuple[str, ...]) -> Any:
    return _avals(arrays[len(names) :], operation)[0]


def _avals(arrays: Sequence[Any], operation: Operation) -> list[Any]:
    value = arrays[operation.roles.index("value")]
    shapes = {name: aval.shape for name, aval in zip(operation.roles, arrays, strict=True)}
    dtypes = {name: aval.dtype for name, aval in zip(operation.roles, arrays, strict=True)}
    images, _, heads, _ = value.sharding.spec
    return [
        abstract(shape, dtype, spec_of(role, len(shape), images, heads), value)
        for role, (shape, dtype) in zip(result_roles(operation), operation.results(shapes, dtypes), strict=True)
    ]


def _backward_avals(*arrays: Any, operation: Operation) -> list[Any]:
    return _avals(arrays, operation)


forward_p.def_abstract_eval(_forward_aval)
tangent_p.def_abstract_eval(_tangent_aval)
backward_p.def_abstract_eval(_backward_avals)


# Calls outside of jit are compiled by themselves.
_forward = jax.jit(lambda operation, *inputs: forward_p.bind(*inputs, operation=operation), static_argnums=0)
_tangent = jax.jit(
    lambda operation, names, *arrays: tangent_p.bind(*arrays, operation=operation, names=names), static_argnums=(0, 1)
)
_backward = jax.jit(lambda operation, *arrays: backward_p.bind(*arrays, operation=operation), static_argnums=0)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    with jax.disable_jit(False):  # else its body would come here again
        return function(*arguments)


forward_p.def_impl(lambda *inputs, operation: _compiled(_forward, operation, *inputs))
tangent_p.def_impl(lambda *arrays, operation, names: _compiled(_tangent, operation, names, *arrays))
backward_p.def_impl(lambda *arrays, operation: _compiled(_backward, operation, *arrays))


# Derivatives.


def _forward_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, operation: Operation) -> tuple[Any, Any]:
    output = forward_p.bind(*primals, operation=operation)
    constant: tuple[str, ...] = ()
    if operation.variant.nearest:  # the pixel does not change with the location; a packed array holds logits too
        constant = ("references",) if operation.packed else ("references", "locations")
    known = {
        name: tangent
        for name, tangent in zip(operation.inputs, tangents, strict=True)
        if name in operation.differentiable and name not in constant and not isinstance(tangent, ad.Zero)
    }
    if not known:
        return output, ad.Zero(jax.typeof(output))
    return output, tangent_p.bind(*known.values(), *primals, operation=operation, names=tuple(known))


def _tangent_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, operation: Operation, names: tuple[str, ...]
) -> tuple[Any, Any]:
    return _jvp(functools.partial(reference.tangent, operation, names), primals, tangents)


def _backward_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, operation: Operation) -> tuple[Any, Any]:
    results = backward_p.bind(*primals, operation=operation)
    return results, _jvp(functools.partial(reference.backward, operation), primals, tangents)[1]


def _jvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``jax.jvp`` of a function of JAX, with respect to the arrays that have tangents."""
    places = [place for place, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_these(*changed: Any) -> Any:
        given = list(primals)
        for place, array in zip(places, changed, strict=True):
            given[place] = array
        return function(*given)

    return jax.jvp(of_these, [primals[place] for place in places], [tangents[place] for place in places])


def _tangent_transpose(cotangent: Any, *arrays: Any, operation: Operation, names: tuple[str, ...]) -> list[Any]:
    wanted = [name for name, array in zip(names, arrays, strict=False) if isinstance(array, ad.UndefinedPrimal)]
    cotangents: list[Any] = [None] * len(arrays)
    if isinstance(cotangent, ad.Zero):
        for place, array in enumerate(arrays[: len(names)]):
            if isinstance(array, ad.UndefinedPrimal):
                cotangents[place] = ad.Zero(array.aval)
        return cotangents
    backward = operation.backward(wanted)
    gradients = backward_p.bind(cotangent, *arrays[len(names) :], operation=backward)
    for name, gradient in zip(backward.gradients, gradients, strict=True):
        if name in wanted:
            cotangents[names.index(name)] = gradient
    return cotangents


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose


# vmap.


def _fold(primitive: Any, roles: Callable[..., Sequence[str]]) -> Callable[..., Any]:
    """The rule of a primitive whose arrays have these roles: the mapped dimension becomes a part of N."""

    def rule(arrays: Sequence[Any], dimensions: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        mapped = zip(arrays, dimensions, strict=True)
        size = next(array.shape[dimension] for array, dimension in mapped if dimension is not None)
        folded, images = [], 0
        for role, array, dimension in zip(roles(**params), arrays, dimensions, strict=True):
            if role in METADATA:
                if dimension is not None:
                    raise NotImplementedError(
                        "spatial_shapes, level_start_index: expected the same for all elements of a vmap, got mapped "
                        "arrays: pass them with in_axes=None"
                    )
                folded.append(array)
                continue
            if dimension is None:
                array = jnp.broadcast_to(array[None], (size, *array.shape))
            else:
                array = jnp.moveaxis(array, dimension, 0)
            images = array.shape[1]
            folded.append(array.reshape(size * images, *array.shape[2:]))
        made = primitive.bind(*folded, **params)
        several = primitive.multiple_results
        unfolded = [one.reshape(size, images, *one.shape[1:]) for one in (made if several else [made])]
        return (unfolded, [0] * len(unfolded)) if several else (unfolded[0], 0)

    return rule


batching.primitive_batchers[forward_p] = _fold(forward_p, lambda operation: operation.roles)
batching.primitive_batchers[tangent_p] = _fold(tangent_p, lambda operation, names: (*names, *operation.roles))
batching.primitive_batchers[backward_p] = _fold(backward_p, lambda operation: operation.roles)


# Compilation.

for _platform in ("cpu", "cuda"):
    mlir.register_lowering(forward_p, lowering(_platform, multiple_results=False), platform=_platform)
    mlir.register_lowering(backward_p, lowering(_platform, multiple_results=True), platform=_platform)
# Devices without kernels, and tangents.
mlir.register_lowering(
    forward_p,
    mlir.lower_fun(lambda *inputs, operation: reference.forward(operation, *inputs), multiple_results=False),
)
mlir.register_lowering(
    backward_p,
    mlir.lower_fun(lambda *arrays, operation: reference.backward(operation, *arrays), multiple_results=True),
)
mlir.register_lowering(
    tangent_p,
    mlir.lower_fun(
        lambda *arrays, operation, names: reference.tangent(operation, names, *arrays), multiple_results=False
    ),
)
for _primitive in (forward_p, backward_p):
    needs_devices(_primitive)
