"""How a call is divided between devices: by images and by heads, which need nothing of each other.

Everything else is replicated. A gradient of reference points is the sum over heads: over the devices, where these hold
different heads.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from .operation import METADATA, Operation

Execute = Callable[..., list[jax.Array]]


def partitioned(operation: Operation, execute: Execute) -> Execute:
    """`execute`, which computes the results of `operation`, as a function that XLA divides between devices."""

    @custom_partitioning
    def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(execute(*arrays))

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        images, heads = _axes(operation, arguments, mesh)
        place = functools.partial(_sharding, mesh=mesh, images=images, heads=heads)

        def on_one_device(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            made = list(execute(*arrays))
            if heads and "references" in operation.gradients:
                index = operation.gradients.index("references")
                made[index] = jax.lax.psum(made[index], heads)
            return tuple(made)

        of_results = [
            place(role, len(result.shape)) for role, result in zip(result_roles(operation), results, strict=True)
        ]
        of_arguments = [
            place(role, len(argument.shape)) for role, argument in zip(operation.roles, arguments, strict=True)
        ]
        return mesh, on_one_device, tuple(of_results), tuple(of_arguments)

    def infer(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        images, heads = _axes(operation, arguments, mesh)
        return tuple(
            _sharding(role, len(result.shape), mesh=mesh, images=images, heads=heads)
            for role, result in zip(result_roles(operation), results, strict=True)
        )

    def rule(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
        return _rule(operation, [list(one.shape) for one in arguments], [list(one.shape) for one in results])

    whole.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return whole


def result_roles(operation: Operation) -> tuple[str, ...]:
    """What the results are, in their order."""
    return ("output",) if operation.wanted is None else operation.gradients


def _dimension_of_heads(role: str) -> int | None:
    if role in ("references", "lengths", *METADATA):
        return None
    return 2  # of value [N, S, M, D], samples [N, Q, M, ...], output [N, Q, M*D]


def _axes(operation: Operation, arguments: Sequence[Any], mesh: Any) -> tuple[Any, Any]:
    """The axes of the mesh that divide images and heads: those of value, or of the first array that is divided.

    None where they do not divide them evenly: devices that divide the channels M*D do not always divide the heads.
    """
    images = heads = None
    sizes = next(arguments[place].shape for place, role in enumerate(operation.roles) if _has_heads(role))
    for role in ("value", "grad_output", "locations", "weights", "references"):
        if role not in operation.roles:
            continue
        sharding = arguments[operation.roles.index(role)].sharding
        spec = (*getattr(sharding, "spec", ()), None, None, None)
        images = images or spec[0]
        if _dimension_of_heads(role) is not None:
            heads = heads or spec[2]
    used = set(images if isinstance(images, tuple) else (images,))
    if used & set(heads if isinstance(heads, tuple) else (heads,)) - {None}:
        heads = None
    return _if_even(images, sizes[0], mesh), _if_even(heads, sizes[2], mesh)


def _has_heads(role: str) -> bool:
    """Whether the arrays have the dimensions N and M as the first and the third one."""
    return role in ("value", "locations", "weights")


def _if_even(axes: Any, size: int, mesh: Any) -> Any:
    of_axes = axes if isinstance(axes, tuple) else (axes,)
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in of_axes) == 0 else None


def spec_of(role: str, rank: int, images: Any, heads: Any) -> tuple[Any, ...]:
    """The axes of the mesh that divide each dimension of an array."""
    spec: list[Any] = [None] * rank
    if role not in METADATA:
        spec[0] = images
        dimension = _dimension_of_heads(role)
        if dimension is not None:
            spec[dimension] = heads
    return tuple(spec)


def _sharding(role: str, rank: int, *, mesh: Any, images: Any, heads: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec_of(role, rank, images, heads)))


def _rule(operation: Operation, arguments: list[list[int]], results: list[list[int]]) -> Any:
    """The same as a rule of Shardy: a letter per dimension, alike where the dimensions are divided alike."""
    fresh = (f"r{number}" for number in range(100))

    def letters(role: str, shape: list[int]) -> str:
        made = [next(fresh) for _ in shape]
        if role not in METADATA:
            made[0] = "n"
            heads = _dimension_of_heads(role)
            if heads is not None:
                made[heads] = "(m d)" if role in ("output", "grad_output") else "m"
        return " ".join(made)

    left = ", ".join(letters(role, shape) for role, shape in zip(operation.roles, arguments, strict=True))
    right = ", ".join(letters(role, shape) for role, shape in zip(result_roles(operation), results, strict=True))
    rule = f"{left} -> {right}"
    # Shardy wants them in the order in which they appear.
    replicated = [factor for factor in dict.fromkeys(re.findall(r"\w+", rule)) if factor not in ("n", "m")]
    sizes = {"d": arguments[operation.roles.index("value")][3]} if "d" in replicated else {}
    return rule, {"need_replication_factors": tuple(replicated)} | sizes
