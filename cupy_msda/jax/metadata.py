"""Metadata of a call: numbers of the operation where the host knows them, otherwise arrays of 32-bit words.

The kernels read int64, which JAX has under ``jax_enable_x64`` alone. Two int32 are one int64 in memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_traced_or_on_gpu(metadata: jax.Array) -> bool:
    """Whether the numbers of `metadata` are not known to the host."""
    return isinstance(metadata, Tracer) or any(device.platform != "cpu" for device in metadata.devices())


def words(metadata: Any) -> jax.Array:
    """The int64 numbers of `metadata` as pairs of int32 [..., 2], the lower one first."""
    if not isinstance(metadata, jax.Array):
        numbers = np.ascontiguousarray(metadata, np.int64)
        return jnp.asarray(numbers.view(np.int32).reshape(*numbers.shape, 2))
    if metadata.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(metadata, jnp.int32)
    signed = jnp.issubdtype(metadata.dtype, jnp.signedinteger)
    low = jax.lax.bitcast_convert_type(metadata, jnp.int32) if metadata.dtype == jnp.uint32 else None
    low = metadata.astype(jnp.int32) if low is None else low
    return jnp.stack([low, low >> 31 if signed else jnp.zeros_like(low)], -1)


def numbers(words: jax.Array) -> jax.Array:
    """The int32 numbers of pairs of words; -1 for what needs more bits."""
    low, high = words[..., 0], words[..., 1]
    return jnp.where(high == low >> 31, low, -1)
