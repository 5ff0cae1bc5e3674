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
    name = "numpy"

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


_CPU = [NumPyBackend()]
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
MAIN_BACKENDS = CPU_BACKENDS[:1] + CUDA_BACKENDS[:1]
