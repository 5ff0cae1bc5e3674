"""Every private symbol of torch that this package uses, and what serves where a release of torch lacks it.

A fallback uses public functions alone. Where torch has no public function that answers a question, the fallback assumes
the answer that is always right: calls then go through the registered operators, which costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _private(path: str) -> Any:
    """What torch has at `path`, or None."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _assume_true() -> bool:
    return True


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


#: Address of the current stream of a CUDA device. The private function makes no stream object.
current_stream: Callable[[int], int] = _private("_C._cuda_getCurrentRawStream") or _public_stream

#: Truthy where a dispatch mode is active, or may be.
dispatch_modes: Callable[[], Any] = _private("_C._len_torch_dispatch_stack") or _assume_true


def tracing() -> bool:
    """Whether ``torch.jit.trace`` records the calls of this thread."""
    # torch.jit documents it, and its __all__ leaves it out.
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


# A trace warns where it reads numbers. torch.jit's __all__ leaves it out.
TracerWarning: type[Warning] = torch.jit.TracerWarning  # pyright: ignore[reportPrivateImportUsage]


def _public_tracing() -> bool | None:
    return tracing() or None


_tracing: Callable[[], Any] = _private("_C._get_tracing_state") or _public_tracing
_profiler_enabled: Callable[[], bool] | None = _private("_C._autograd._profiler_enabled")
_interpreter: Callable[[], Any] | None = _private("_C._functorch.peek_interpreter_stack")
_TensorGuards: Any = _private("_C._dynamo.guards.TensorGuards")


def _observed() -> bool:
    return _profiler_enabled() or forward_ad._current_level >= 0  # type: ignore[misc]


#: Whether a profiler or a level of forward-mode gradients is active, or may be: tensors do not show these.
observed: Callable[[], bool] = _observed
if _profiler_enabled is None or not hasattr(forward_ad, "_current_level"):
    observed = _assume_true


_keeps_graph: Callable[[], bool] | None = _private("_C._autograd._get_current_graph_task_keep_graph")


def graph_is_kept() -> bool:
    """Whether the backward that runs may run again (``retain_graph=True``). True where torch does not say."""
    return _keeps_graph is None or _keeps_graph()


def forward_mode() -> bool:
    """Whether a level of forward-mode gradients is active, and torch has what the checks under it need."""
    needed = (_without_transforms, _is_wrapped, _wrapped_tensor, _mapped_dimension, _detect_fake_mode)
    return getattr(forward_ad, "_current_level", -1) >= 0 and None not in needed


def under_transform() -> bool:
    """Whether this runs inside vmap, grad or another transform of torch.func, or may."""
    return _interpreter is None or _interpreter() is not None


_EAGER_TYPES = (Tensor, torch.nn.Parameter)


def has_elements(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its elements: it is no wrapper, and no operation is pending."""
    if type(tensor) not in _EAGER_TYPES or tensor.is_neg():
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # of a transformation's wrapper
        return False


def eager(*tensors: Tensor) -> bool:
    """Whether nothing but eager execution, with or without autograd, sees a call of this thread with these tensors."""
    if dispatch_modes() or under_transform() or _tracing() is not None or observed():
        return False
    return all(map(has_elements, tensors))


def all_known(tensors: Iterable[Tensor]) -> bool:
    """Whether the elements of tensors are known now, be it after pending operations."""
    try:
        known = all(type(one) in _EAGER_TYPES and one.data_ptr() >= 0 for one in tensors)
    except RuntimeError:  # of a transformation's wrapper
        return False
    return known and not (dispatch_modes() or under_transform() or _tracing() is not None)


_without_transforms: Callable[[], Any] | None = _private("_C._DisableFuncTorch")
_is_wrapped: Any = _private("_C._functorch.is_functorch_wrapped_tensor")
_wrapped_tensor: Any = _private("_C._functorch.get_unwrapped")
_mapped_dimension: Any = _private("_C._functorch.maybe_get_bdim")  # -1 of a wrapper that is not vmap's
_detect_fake_mode: Any = _private("_guards.detect_fake_mode")


def without_transforms() -> contextlib.AbstractContextManager[Any]:
    """What is made inside this context is no tensor of a transform of torch.func around it, where that is possible."""
    return _without_transforms() if _without_transforms else contextlib.nullcontext()


def _unwrapped(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor inside the wrappers of torch.func, and which of its dimensions vmap maps over, the outermost last."""
    mapped: list[int] = []
    while _is_wrapped(tensor):
        mapped.insert(0, _mapped_dimension(tensor))
        tensor = _wrapped_tensor(tensor)
    return tensor, [dim for dim in mapped if dim >= 0]


def without_wrappers(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func; the dimensions that vmap maps over come first.

    Like :func:`fake`, for use where :func:`forward_mode` is true.
    """
    inside, mapped = _unwrapped(tensor)
    with without_transforms():
        for outer, dim in enumerate(mapped):
            inside = inside.movedim(outer + dim, 0)
    return inside


def fake(tensors: Iterable[Tensor]) -> bool:
    """Whether fake tensors, which have shapes and no elements, take part."""
    return _detect_fake_mode([_unwrapped(one)[0] for one in tensors]) is not None


def layout_check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """One C call that compares the layouts of other tensors with those of `tensors`; None without a public equivalent.

    It compares Python types, dispatch keys, dtypes, devices, sizes, strides and whether a gradient is required.
    """
    if _TensorGuards is None:
        return None
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its Python part, which prepares for the transforms of torch.func."""
    if _private("autograd.function._SingleLevelFunction") is None:
        return function.apply
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_BelowAutograd: Any = _private("_C._AutoDispatchBelowAutograd")
_get_single_level: Callable[[], bool] | None = _private("_C._functorch.get_single_level_autograd_function_allowed")
_set_forward_mode: Any = _private("autograd.forward_ad._set_fwd_grad_enabled")
_set_single_level: Any = _private("_C._functorch.set_single_level_autograd_function_allowed")


def differentiable_kernel(
    operator: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any] | None:
    """A kernel of the dispatcher's key Autograd; None where a release of torch lacks the means.

    ``save(ctx, inputs, output)`` saves what ``differentiate(ctx, *grads)`` needs.
    """
    get_allowed, set_allowed = _get_single_level, _set_single_level
    if not (_BelowAutograd and get_allowed and set_allowed and _set_forward_mode):
        return None

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # `apply` switches gradients off, which the outer levels of torch.func may want.
            with _BelowAutograd(), torch.enable_grad(), _set_forward_mode(True):
                output = operator(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    apply = direct_apply(Differentiable)

    def kernel(*inputs: Any) -> Any:
        if not (torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in inputs)):
            with _BelowAutograd():
                return operator(*inputs)
        # The dispatcher has entered the level of torch.func that this call belongs to.
        allowed = get_allowed()
        set_allowed(True)
        try:
            return apply(*inputs)
        finally:
            set_allowed(allowed)

    return kernel


_ExcludeKeys: Any = _private("_C._ExcludeDispatchKeyGuard")
_KeySet: Any = _private("_C.DispatchKeySet")
_Key: Any = _private("_C.DispatchKey")
_AUTOCAST = None
#: The dispatcher's keys of autocast, one per type of device.
autocast_keys: tuple[str, ...] = ("AutocastCUDA", "AutocastCPU")
if _ExcludeKeys and _KeySet and _Key:
    _names = (f"Autocast{kind}" for kind in ("CUDA", "CPU", "XPU", "MPS", "HPU", "IPU", "PrivateUse1"))
    _keys = {name: getattr(_Key, name, None) for name in _names}
    autocast_keys = tuple(name for name, key in _keys.items() if key is not None)
    _AUTOCAST = functools.reduce(operator.or_, (_KeySet(_keys[name]) for name in autocast_keys))


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """No rule of autocast applies inside this context."""
    if _AUTOCAST is not None:
        return _ExcludeKeys(_AUTOCAST)
    stack = contextlib.ExitStack()
    for device_type in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def _public_check(condition: Any, message: Callable[[], str]) -> None:
    if not condition:
        raise RuntimeError(message())


#: ``check(condition, message)`` raises RuntimeError, and becomes an assertion of programs with sizes from data.
check: Callable[[Any, Callable[[], str]], None] = _private("_check") or _public_check
