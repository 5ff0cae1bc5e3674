"""Every path of a call by name, for one set of keywords: the array functions, and torch's eager, registered and
decomposed calls, plain and fused.

The keywords are those of ``ms_deform_attn``, with operands as NumPy arrays, and ``reference_points`` for fused calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cupy_msda
from cupy_msda.torch import decomposed, ms_deform_attn, ms_deform_attn_fused

OPERANDS = ("value", "sampling_locations", "attention_weights", "reference_points")
PLAIN_NAMES = {name: name for name in OPERANDS}
EXTENSION_NAMES = PLAIN_NAMES | {"sampling_locations": "sampling_loc", "attention_weights": "attn_weight"}
FUSED_NAMES = PLAIN_NAMES | {"sampling_locations": "sampling_offsets", "attention_weights": "attention_logits"}
N, M, D, L, P, Q = 2, 2, 8, 2, 2, 5
LEVELS = ((6, 7), (3, 4))
S = 6 * 7 + 3 * 4


class SeesOperators(TorchDispatchMode):
    """A mode that changes nothing: calls under it go through the registered operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Path(NamedTuple):
    """`call` takes the changed keywords of a call; `names` are what the path calls its arguments."""

    name: str
    names: dict[str, str]
    call: Callable[..., Any]
    takes_validate: bool = True

    def __str__(self) -> str:
        return self.name


def keywords() -> dict[str, Any]:
    """A right call."""
    rng = np.random.default_rng(0)
    return {
        "value": rng.standard_normal((N, S, M, D), np.float32),
        "spatial_shapes": LEVELS,
        "level_start_index": None,
        "sampling_locations": rng.random((N, Q, M, L, P, 2), np.float32),
        "attention_weights": rng.random((N, Q, M, L, P), np.float32),
        "reference_points": rng.random((N, Q, L, 2), np.float32),
    }


def _tensor(array: Any, device: str = "cpu", requires_grad: bool = False) -> Any:
    if type(array) is not np.ndarray or array.dtype == object:
        return array
    tensor = torch.from_numpy(array.copy()).to(device)
    return tensor.requires_grad_(requires_grad and tensor.is_floating_point())


def _given(changes: dict[str, Any], names: dict[str, str], put: Callable[[Any], Any]) -> dict[str, Any]:
    given = keywords() | changes
    if names is not FUSED_NAMES:
        del given["reference_points"]
    return {names.get(name, name): put(part) if name in OPERANDS else part for name, part in given.items()}


def _array(function: Callable[..., Any], names: dict[str, str], put: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda **changes: function(**_given(changes, names, put))


def _array_backward(function: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    def call(**changes: Any) -> Any:
        given = {"im2col_step": 64} | _given(changes, names, lambda array: array)
        locations = given[names["sampling_locations"]]
        images, queries = locations.shape[:2] if isinstance(locations, np.ndarray) else (N, Q)
        given.setdefault("grad_output", np.ones((images, queries, M * D), np.float32))
        return function(**given)

    return call


def _torch(fused: bool, device: str, requires_grad: bool = False, lengths: bool = False, mode: Any = None) -> Any:
    names = FUSED_NAMES if fused else PLAIN_NAMES
    function = ms_deform_attn_fused if fused else ms_deform_attn

    def call(**changes: Any) -> Any:
        given = _given(changes, names, lambda array: _tensor(array, device, requires_grad))
        if lengths and "query_lengths" not in given:
            operand = given[names["sampling_locations"]]
            given["query_lengths"] = [Q] * (len(operand) if isinstance(operand, torch.Tensor) and operand.ndim else N)
        if mode is None:
            return function(**given)
        with mode():
            return function(**given)

    return call


def paths(device: str = "cpu") -> list[Path]:
    """The paths with operands on `device`; the array functions of NumPy are always on the CPU."""
    found = []
    if device == "cpu":
        found = [
            Path("array", PLAIN_NAMES, _array(cupy_msda.ms_deform_attn, PLAIN_NAMES, lambda array: array)),
            Path("array_fused", FUSED_NAMES, _array(cupy_msda.ms_deform_attn_fused, FUSED_NAMES, lambda array: array)),
            Path(
                "array_backward", EXTENSION_NAMES,
                _array_backward(cupy_msda.ms_deform_attn_backward, EXTENSION_NAMES), takes_validate=False,
            ),
            Path(
                "array_fused_backward", FUSED_NAMES,
                _array_backward(cupy_msda.ms_deform_attn_fused_backward, FUSED_NAMES), takes_validate=False,
            ),
        ]  # fmt: skip
    found.append(
        Path(
            f"array_torch_{device}",
            PLAIN_NAMES,
            _array(cupy_msda.ms_deform_attn, PLAIN_NAMES, lambda array: _tensor(array, device)),
        )
    )
    forms = {
        "eager": {},
        "eager_with_gradients": {"requires_grad": True},
        "registered": {"lengths": True},
        "registered_with_gradients": {"lengths": True, "requires_grad": True},
        "under_a_mode": {"mode": SeesOperators},
        "decomposed": {"mode": decomposed},
        "decomposed_registered": {"mode": decomposed, "lengths": True},
    }
    for name, form in forms.items():
        for fused in (False, True):
            full = f"{name}{'_fused' if fused else ''}_{device}"
            found.append(Path(full, FUSED_NAMES if fused else PLAIN_NAMES, _torch(fused, device, **form)))
    return found
