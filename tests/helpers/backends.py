"""Frameworks and devices on which tests call the operator: each makes arrays from NumPy inputs, and back."""

import importlib.util

import ml_dtypes
import numpy as np


def has_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return cupy.cuda.is_available()


GPU = has_gpu()


class NumPyBackend:
    """NumPy arrays, by the tier of the CPU path that runs by itself or by the one that `tier` names."""

    def __init__(self, tier: str | None = None) -> None:
        self.name, self.tier = tier or "numpy", tier

    def put(self, array):
        return None if array is None else array

    def get(self, array):
        return np.asarray(array)


class TorchBackend:
    def __init__(self, device: str) -> None:
        self.name, self.device = f"torch-{device}", device

    def put(self, array):
        import torch

        if array is None:
            return None
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(array.copy()).to(self.device)

    def get(self, array):
        import torch

        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()


class CuPyBackend:
    name = "cupy"

    def put(self, array):
        import cupy

        return None if array is None else cupy.asarray(array)

    def get(self, array):
        return array.get()


class JaxBackend:
    def __init__(self, device: str) -> None:
        self.name, self.device = f"jax-{device}", device

    def put(self, array):
        import jax

        jax.config.update("jax_enable_x64", True)
        if array is None:
            return None
        return jax.device_put(array, jax.devices("cpu" if self.device == "cpu" else "gpu")[0])

    def get(self, array):
        return np.asarray(array)


# Both tiers of the CPU path take the whole matrix; the other frameworks take the one that runs by itself.
_TIERS = [NumPyBackend("numpy")]
if importlib.util.find_spec("numba"):
    _TIERS.append(NumPyBackend("numba"))
_CPU = [*_TIERS]
_CUDA = []
if importlib.util.find_spec("torch"):
    _CPU.append(TorchBackend("cpu"))
    if GPU:
        _CUDA.append(TorchBackend("cuda"))
if GPU:
    _CUDA.append(CuPyBackend())
if importlib.util.find_spec("jax"):
    _CPU.append(JaxBackend("cpu"))
    if GPU:
        _CUDA.append(JaxBackend("cuda"))
CPU_BACKENDS, CUDA_BACKENDS = tuple(_CPU), tuple(_CUDA)
BACKENDS = CPU_BACKENDS + CUDA_BACKENDS
# The kernels are the same for every framework: dtypes and sizes run on one backend of each device.
MAIN_BACKENDS = (*_TIERS, *CUDA_BACKENDS[:1])
