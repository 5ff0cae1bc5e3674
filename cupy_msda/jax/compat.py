"""The versions of JAX that the package knows, and every symbol of JAX that is not in its documentation."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["Primitive", "abstract", "ad", "batching", "follows_handlers", "mlir", "needs_devices", "varying_alike"]

# The first version that is known, and the first one that is not: tested from 0.6.2 to 0.11.2.
KNOWN = ((0, 6), (0, 12))


def follows_handlers(version: tuple[int, ...]) -> bool:
    """Whether a version of JAX calls the handlers of this package; a warning says so where it does not."""
    oldest, too_new = KNOWN
    if oldest <= version[:2] < too_new:
        return True
    numbers = [".".join(map(str, limit)) for limit in (oldest, too_new)]
    warnings.warn(
        f"cupy_msda.jax knows JAX from {numbers[0]} to before {numbers[1]}, not {'.'.join(map(str, version))}: calls "
        "go through jax.pure_callback and are computed on the CPU, which is slow; install a version that it knows",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def needs_devices(primitive: Any) -> None:
    """Tells JAX that the lowering of `primitive` has to know the devices, as that of ``custom_partitioning`` has."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import dispatch

        dispatch.prim_requires_devices_during_lowering.add(primitive)


def _variance(aval: Any) -> frozenset[Any]:
    """The axes of the mesh of a ``shard_map`` along which an abstract array varies."""
    manual = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if manual is None else manual.varying


def varying_alike(arrays: list[Any]) -> list[Any]:
    """`arrays`, which all vary along every axis of a ``shard_map`` along which one of them does."""
    variances = [_variance(jax.typeof(array)) for array in arrays]
    axes = frozenset().union(*variances)
    return [_varying(array, axes - known) for array, known in zip(arrays, variances, strict=True)]


def _varying(array: Any, axes: frozenset[Any]) -> Any:
    if not axes:
        return array
    lax: Any = jax.lax
    return lax.pcast(array, tuple(axes), to="varying") if hasattr(lax, "pcast") else lax.pvary(array, tuple(axes))


def abstract(shape: tuple[Any, ...], dtype: Any, spec: tuple[Any, ...], like: Any) -> Any:
    """An abstract array on the mesh of the abstract array `like`, divided by `spec`, and varying as that one does."""
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, jax.sharding.PartitionSpec(*spec))
    named = "manual_axis_type" if hasattr(like, "manual_axis_type") else "vma"
    variance = {named: getattr(like, named)} if hasattr(like, named) else {}
    return ShapedArray(shape, dtype, sharding=sharding, **variance)
