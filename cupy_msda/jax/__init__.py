"""Multi-scale deformable attention as a function of JAX: under ``jit``, ``grad``, ``vmap`` and sharding."""

from ..requirements import install as _install

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError(
        f"cupy_msda.jax needs JAX, which is not installed: {_install('jax')}", name="jax"
    ) from error

from .functional import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
