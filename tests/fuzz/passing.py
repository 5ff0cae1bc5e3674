"""The arrays and metadata of a Case as a caller passes them: strides, views, frameworks, kinds of sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from .draw import Case


class Passed(NamedTuple):
    """The differentiable inputs by name, the metadata, and the keywords of the public functions."""

    arrays: dict[str, Any]
    shapes: Any
    starts: Any
    lengths: Any
    grad_output: Any
    keywords: dict[str, Any]

    @property
    def fused(self) -> bool:
        return "references" in self.arrays

    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of the function of this call, up to im2col_step."""
        arrays = self.arrays
        samples = (arrays["locations"], arrays.get("weights"))
        if self.fused:
            samples = (arrays["references"], *samples)
        return (arrays["value"], self.shapes, self.starts, *samples)


def shaped(case: Case) -> dict[str, np.ndarray]:
    """The arrays in the shapes of the contract: levels apart or not, offsets and logits in one array or not."""
    form, arrays = case.form, dict(case.arrays)
    N, Q, M, K = arrays["weights"].shape
    arrays["grad_output"] = arrays["grad_output"].reshape(N, Q, M * form.D)
    if form.packed:
        offsets = arrays["locations"].reshape(N, Q, M, 2 * K)
        arrays["locations"] = np.concatenate((offsets, arrays.pop("weights")), -1)
    elif not form.per_level:
        P = form.points[0] if form.points else 1
        arrays["locations"] = arrays["locations"].reshape(N, Q, M, len(form.points), P, 2)
        arrays["weights"] = arrays["weights"].reshape(N, Q, M, len(form.points), P)
    return arrays


class Memory:
    """The inputs of a case with their layouts, as NumPy arrays, and whether a call has written to them."""

    def __init__(self, case: Case) -> None:
        dense = shaped(case)
        self.arrays = {name: laid_out(array, case.layouts.get(name, "contiguous")) for name, array in dense.items()}
        self._before = {name: _bits(array) for name, array in self.arrays.items() if array.size < 100_000}

    def written(self) -> list[str]:
        """The inputs whose bits are not those of the beginning."""
        return [name for name, before in self._before.items() if not np.array_equal(before, _bits(self.arrays[name]))]


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in another layout. What lies between them is NaN."""
    kind, _, axis = layout.partition(":")
    if kind == "transposed":
        order = np.random.default_rng(array.size).permutation(array.ndim)
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if kind == "sliced":  # every second entry of the first axes, and a margin at the last
        wide = np.full((*(2 * n for n in array.shape[:-1]), array.shape[-1] + 3), np.nan, array.dtype)
        view = wide[(*(slice(1, None, 2) for _ in array.shape[:-1]), slice(1, array.shape[-1] + 1))]
    elif kind == "interleaved":  # one of the two results of a projection
        wide = np.full((*array.shape[:2], 2, *array.shape[2:]), np.nan, array.dtype)
        view = wide[:, :, 1]
    elif kind == "offset":  # contiguous, and not aligned
        wide = np.full(array.size + 3, np.nan, array.dtype)
        view = wide[1 : array.size + 1].reshape(array.shape)
    elif kind == "reversed":
        view = np.full(array.shape, np.nan, array.dtype)[(slice(None, None, -1),) * array.ndim]
    elif kind == "expanded":
        whole = np.ascontiguousarray(array.take([0], int(axis)))
        strides = tuple(0 if at == int(axis) else step for at, step in enumerate(whole.strides))
        return np.lib.stride_tricks.as_strided(whole, array.shape, strides)
    else:
        return array.copy(order="C")
    view[...] = array
    return view


def _bits(array: np.ndarray) -> np.ndarray:
    return array.copy(order="C").view(np.dtype(f"u{array.itemsize}")) if array.size else np.empty(0)


def to_torch(array: np.ndarray, layout: str = "", device: str = "cpu") -> torch.Tensor:
    """The array as a tensor over the same memory, where torch has its strides."""
    if min(array.strides, default=0) < 0:
        array = array.copy(order="C")
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    tensor = tensor if device == "cpu" else _moved(tensor, device)
    if layout == "negated":  # a view whose numbers are the negatives of what lies in memory
        tensor = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    return tensor


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy with the same strides on a device."""
    if not tensor.numel():
        return tensor.to(device)
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    offset = tensor.storage_offset() % 4  # alignment
    whole = torch.zeros(extent + offset, dtype=tensor.dtype, device=device)
    whole[offset:] = memory.to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), offset)


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the host in the tensor's dtype."""
    tensor = tensor.detach().resolve_neg().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def metadata(numbers: Any, form: str, width: int = 0, device: str = "cpu") -> Any:
    """Numbers, or rows of `width` numbers, as a list, tuple, array or tensor. None stays None."""
    if numbers is None:
        return None
    kind, _, dtype = form.partition(":")
    if kind in ("list", "tuple"):
        make = list if kind == "list" else tuple
        return make(make(row) if width else row for row in numbers)
    strided = dtype == "strided"
    array = np.array(numbers, np.int64 if strided or not dtype else dtype).reshape((-1, width) if width else -1)
    if strided:
        wide = np.full((len(array), 2, *array.shape[1:]), 77, np.int64)
        wide[:, 1] = array
        array = wide[:, 1] if len(array) % 2 else np.asfortranarray(wide[:, 1])
    if kind != "tensor":
        return array
    return to_torch(array) if device == "cpu" else _moved(to_torch(array), device)


def passed(case: Case, memory: Memory, framework: str, tensors_only: bool = False, device: str = "cpu") -> Passed:
    """The call in a framework: "numpy", "torch" or "cupy".

    `tensors_only`: metadata are tensors, as the registered operators take them.
    """
    arrays: dict[str, Any] = dict(memory.arrays)
    if framework == "torch":
        arrays = {name: to_torch(array, case.layouts.get(name, ""), device) for name, array in arrays.items()}
    if framework == "cupy":
        import cupy

        arrays = {name: cupy.asarray(array) for name, array in arrays.items()}
    place = device if case.on_device else "cpu"

    def given(name: str, numbers: Any, width: int = 0) -> Any:
        form = case.forms.get(name, "list")
        if tensors_only and not form.startswith("tensor"):
            form = f"tensor:{form.partition(':')[2]}".rstrip(":")
        return metadata(numbers, form, width, place)

    form = case.form
    keywords = form.variant | {"deterministic": case.deterministic, "im2col_step": case.im2col_step}
    if form.per_level:
        keywords["num_points"] = (tuple if case.forms["num_points"] == "tuple" else list)(form.points)
    lengths = given("lengths", case.lengths)
    if lengths is not None:
        keywords["query_lengths"] = lengths
    grad_output = arrays.pop("grad_output")
    return Passed(arrays, given("shapes", case.levels, 2), given("starts", case.starts), lengths, grad_output, keywords)


def change(case: Case, call: Passed) -> Any:
    """Change one piece of metadata in place, between forward and backward, and return it."""
    target = {"shapes": call.shapes, "starts": call.starts, "lengths": call.lengths}[case.changes]
    if isinstance(target, list):
        for at, row in enumerate(target):
            if isinstance(row, list):
                row[:] = [1] * len(row)
            else:
                target[at] = type(row)() if isinstance(row, tuple) else 0
    elif isinstance(target, np.ndarray):
        target[...] = 1 if case.changes == "shapes" else 0
    elif isinstance(target, torch.Tensor):
        target.fill_(1 if case.changes == "shapes" else 0)
    return target
