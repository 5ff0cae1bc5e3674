"""CUDA tensors on an emulated GPU: tensors of torch's CPU backend in device memory, which say that they are on "cuda".

What Python asks a tensor is answered by its address. What torch's C++ asks, such as the autograd engine and the
dispatcher, sees a tensor on the CPU.
"""

import contextlib
from dataclasses import replace

import torch

from cupy_msda.arrays.frameworks import TorchFramework
from cupy_msda.torch import compat, cpu_path, fast_path
from tests.helpers import emulated_gpu


class EmulatedTorch:
    """Tensors of an :class:`~tests.helpers.emulated_gpu.EmulatedGpu`."""

    def __init__(self, gpu):
        self.gpu, self._without_memory = gpu, {}

    def device_of(self, tensor):
        """The number of the device of a tensor, or None."""
        try:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # a wrapper
            return None
        allocation = self.gpu.memory.at(address) if address else None
        if allocation is not None:
            return allocation.device
        _, device = self._without_memory.get(storage._cdata, (None, None))
        return device

    def empty(self, shape, dtype, device):
        """A tensor in new memory, which is filled with NaN."""
        count = torch.Size(shape).numel()
        memory = self.gpu.memory.allocate(max(count, 1) * dtype.itemsize, device)
        return torch.from_numpy(memory).view(dtype)[:count].view(tuple(shape))

    @torch.no_grad()
    def put(self, tensor, device=0, requires_grad=False):
        """A copy in device memory, in the same layout; None stays None."""
        if tensor is None:
            return None
        span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        whole = self.empty((span if tensor.numel() else 0,), tensor.dtype, device)
        copied = whole.as_strided(tensor.shape, tensor.stride())
        copied.copy_(tensor)
        self.gpu.streams.arrive(device)
        return copied.requires_grad_(requires_grad)

    def mark(self, tensor, device):
        """Says that a tensor is on a device whose storage can lose its memory."""
        storage = tensor.untyped_storage()
        self._without_memory[storage._cdata] = (storage, device)
        return tensor


def _ask(torch_gpu, name, answer):
    """A property of tensors that has another answer for those on a device."""
    real = getattr(torch.Tensor, name)

    def get(tensor):
        device = torch_gpu.device_of(tensor)
        return real.__get__(tensor) if device is None else answer(device)

    return property(get)


def _copying(torch_gpu, name):
    """A method of tensors whose result, if it is a copy, is in the device memory of its tensor."""
    real = getattr(torch.Tensor, name)

    def method(tensor, *args, **kwargs):
        result, device = real(tensor, *args, **kwargs), torch_gpu.device_of(tensor)
        if device is None or result.requires_grad or torch_gpu.device_of(result) is not None:
            return result
        return torch_gpu.empty(result.shape, result.dtype, device).copy_(result)

    return method


def _cuda_index(args, kwargs):
    """The number of the CUDA device that is among the arguments of a function, or None."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.device) and argument.type == "cuda":
            return argument.index
    return None


def _methods(torch_gpu):
    """Methods of tensors by their names."""
    to, get_device, new_empty = torch.Tensor.to, torch.Tensor.get_device, torch.Tensor.new_empty
    copying_to = _copying(torch_gpu, "to")

    def method_to(tensor, *args, **kwargs):
        device = _cuda_index(args, kwargs)
        if device is None:
            return copying_to(tensor, *args, **kwargs)
        dtypes = [argument for argument in args if isinstance(argument, torch.dtype)]
        copied = to(tensor, *dtypes)
        return copied if torch_gpu.device_of(copied) == device else torch_gpu.put(copied.contiguous(), device)

    def method_get_device(tensor):
        device = torch_gpu.device_of(tensor)
        return get_device(tensor) if device is None else device

    def method_new_empty(tensor, *args, **kwargs):
        made, device = new_empty(tensor, *args, **kwargs), torch_gpu.device_of(tensor)
        return made if device is None else torch_gpu.mark(made, device)

    def method_cpu(tensor):
        torch_gpu.gpu.check()
        return to(tensor, "cpu", copy=True)

    return {
        "to": method_to,
        "get_device": method_get_device,
        "new_empty": method_new_empty,
        "cpu": method_cpu,
        "clone": _copying(torch_gpu, "clone"),
        "contiguous": _copying(torch_gpu, "contiguous"),
        "is_cuda": _ask(torch_gpu, "is_cuda", lambda device: True),
        "device": _ask(torch_gpu, "device", lambda device: torch.device("cuda", device)),
    }


def _functions(torch_gpu):
    """Functions of torch by their names."""
    empty, empty_like = torch.empty, torch.empty_like

    def function_empty(*shape, **kwargs):
        device = _cuda_index((), kwargs)
        if device is None:
            return empty(*shape, **kwargs)
        sizes = shape[0] if not isinstance(shape[0], int) else shape
        return torch_gpu.empty(sizes, kwargs["dtype"], device)

    def function_empty_like(tensor, **kwargs):
        device = torch_gpu.device_of(tensor)
        like = empty_like(tensor, **kwargs)
        if device is None:
            return like
        return torch_gpu.empty((like.numel(),), like.dtype, device).as_strided(like.shape, like.stride())

    return {"empty": function_empty, "empty_like": function_empty_like}


def _layout_check(torch_gpu):
    """That of torch, and of devices."""
    real = compat.layout_check

    def layout_check(tensors):
        check, devices = real(tensors), [torch_gpu.device_of(tensor) for tensor in tensors]
        if check is None:
            return None
        return lambda *others: check(*others) and [torch_gpu.device_of(other) for other in others] == devices

    return layout_check


def _view(torch_gpu):
    """That of torch's framework; DLPack has no address of an empty tensor."""
    real = TorchFramework.view

    def view(framework, array):
        found, device = real(framework, array), torch_gpu.device_of(array)
        return found if device is None else replace(found, device=("cuda", device))

    return view


def install(monkeypatch, **options):
    """An :class:`EmulatedTorch`; its `gpu` takes the place of CuPy, and `options` are those of the GPU."""
    gpu = emulated_gpu.install(monkeypatch, **options)
    gpu.streams.cupy_is_apart = True
    torch_gpu = EmulatedTorch(gpu)
    for name, method in _methods(torch_gpu).items():
        monkeypatch.setattr(torch.Tensor, name, method)
    for name, function in _functions(torch_gpu).items():
        monkeypatch.setattr(torch, name, function)
    monkeypatch.setattr(TorchFramework, "view", _view(torch_gpu))
    monkeypatch.setattr(TorchFramework, "stream", lambda self, device: gpu.streams.current(device[1]))
    monkeypatch.setattr(compat, "current_stream", gpu.streams.current)
    monkeypatch.setattr(compat, "layout_check", _layout_check(torch_gpu))
    forget_plans(monkeypatch)
    return torch_gpu


def forget_plans(monkeypatch):
    """Empty caches of layouts."""
    monkeypatch.setattr(fast_path, "plans", {})
    monkeypatch.setattr(cpu_path, "problems", {})
    for form in fast_path.recent:
        monkeypatch.setitem(fast_path.recent, form, ())


@contextlib.contextmanager
def deterministic_algorithms(wanted):
    """torch's own switch."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted is before:
        yield
        return
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def fixture(monkeypatch):
    """For ``pytest.fixture``: checked once more at the end."""
    torch_gpu = install(monkeypatch)
    yield torch_gpu
    torch_gpu.gpu.check()
