"""From a torch call to the kernels: `forward` and `backward` serve eager calls and the registered operators.

A repeated CUDA call, whose layout is known, costs its outputs, its launches and little more.

The first call of a layout (shapes, dtypes, devices, strides, host metadata) is validated, planned and compiled, and
leaves a :class:`LaunchPlan` in the plan cache. The key of the cache holds all that validation looks at, so a later call
with that key needs addresses alone. They come from ``Tensor.data_ptr``, which is much faster than DLPack. A repeated
call on the CPU goes to :mod:`.cpu_path`, and what has no key to :mod:`cupy_msda.api` every time. ``docs/performance``
has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import api, arrays, validate
from ..call import PLAIN, Arguments, Call, Problem, Variant, Wanted
from ..cuda import naive
from ..cuda import plan as planner
from ..cuda import run as cuda
from ..cuda.level_tables import level_table
from ..cuda.session import on_device
from ..cuda.steps import Addresses
from ..cuda.tuning import loaded
from . import compat, cpu_path
from .reference import Gradients

# What vector loads of the kernels need, and what torch's allocator gives.
ALIGNMENT = 16
# A model comes back to few layouts. One that never does must not fill the memory.
_MOST_PLANS = 4096


class LaunchPlan:
    """How to repeat the calls of one layout.

    The repeating functions are closures, whose variables are faster than attributes. This counts most in the backward:
    it runs in a thread of the autograd engine, where every lookup misses the caches.

    Attributes
    ----------
    forward : callable
        ``forward(value, shapes, starts, locations, weights, references=None)`` -> output, or None where an address is
        not aligned.
    levels : tuple of int
        Addresses of the level table where the metadata came from the host; empty where it is on the device.
    """

    __slots__ = ("_backwards", "_settings", "_strides", "deterministic", "forward", "levels", "problem")

    def __init__(self, problem: Problem, arguments: Arguments) -> None:
        value = arguments.value
        self.problem, self.deterministic = problem, arguments.deterministic
        device = problem.device[1]
        self.levels: tuple[int, ...] = ()
        if problem.levels is not None:
            with on_device(device):
                self.levels = level_table(problem.levels, device, compat.current_stream(device))
        # Metadata from the host is the problem's: the caller may change the lists that it came in.
        levels = problem.levels or ()
        self._settings = replace(
            arguments, value=None, reference_points=None, locations=None, weights=None,
            spatial_shapes=[(h, w) for h, w, _ in levels], level_start_index=[start for *_, start in levels],
        )  # fmt: skip
        self._strides = None if value.is_contiguous() else value.stride()
        self._backwards: dict[tuple[Wanted, bool], Callable[..., Gradients | None]] = {}
        # `empty_like` of an output without memory is faster than `new_empty`. A plan must own no memory: it may come
        # from the pool of a CUDA graph.
        like = value.detach().new_empty(()).expand(problem.output_shape)
        like.untyped_storage().resize_(0)
        self.forward = self._forward(like)

    def arguments(
        self, value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Any, references: Tensor | None
    ) -> Arguments:
        """The arguments of a call of this layout."""
        arguments = replace(
            self._settings, value=value, locations=locations, weights=weights, reference_points=references
        )
        return arguments if self.levels else replace(arguments, spatial_shapes=shapes, level_start_index=starts)

    def backward(self, wanted: Wanted) -> Callable[..., Gradients | None]:
        """``backward(grad_output, value, shapes, starts, locations, weights, references=None)`` -> the gradients that
        are wanted, or None where a saved tensor came back with strides, or an address is not aligned.
        """
        deterministic = self.deterministic
        if deterministic is None:  # torch's own switch, as it stands when the backward runs
            deterministic = _wants_determinism()
        key = (wanted, deterministic)
        repeat = self._backwards.get(key)
        if repeat is None:
            repeat = self._backwards[key] = self._backward(*key)
        return repeat

    def _forward(self, like_output: Tensor) -> Callable[..., Tensor | None]:
        levels, sizes, device = self.levels, planner.size_words(self.problem), self.problem.device[1]
        packed, to_logits = _packing(self.problem)
        get_device, set_device = device_functions()
        empty_like, stream_of = torch.empty_like, compat.current_stream
        with on_device(device):
            if self.deterministic is None:
                run = cuda.switched_forward(self.problem, ALIGNMENT, stream_of(device), _wants_determinism)
            else:
                run = cuda.prepare_forward(self.problem, ALIGNMENT, stream_of(device)).run

        def forward(
            value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Any, references: Tensor | None = None
        ) -> Tensor | None:
            at_value, at_locations = value.data_ptr(), locations.data_ptr()
            at_weights = 0 if packed else weights.data_ptr()
            at_references = 0 if references is None else references.data_ptr()
            if (at_value | at_locations | at_weights | at_references) % ALIGNMENT:
                return None
            if packed:
                at_weights = at_locations + to_logits
            output = empty_like(like_output)
            metadata = levels or (shapes.data_ptr(), starts.data_ptr())
            # Also gives a thread that has never used CUDA its context, which a launch by the driver does not.
            before = get_device()
            set_device(device)
            try:
                run(
                    stream_of(device), at_value, *metadata, at_locations, at_weights, at_references, 0,
                    output.data_ptr(), *sizes,
                )  # fmt: skip
            finally:
                if before != device:
                    set_device(before)
            return output

        return forward

    def _backward(self, wanted: Wanted, deterministic: bool) -> Callable[..., Gradients | None]:
        levels, device = self.levels, self.problem.device[1]
        problem = replace(self.problem, deterministic=deterministic)
        packed, to_logits = _packing(problem)
        wanted = problem.computed(wanted)
        get_device, set_device = device_functions()
        empty_like, empty, stream_of = torch.empty_like, torch.empty, compat.current_stream
        with on_device(device):
            steps = cuda.prepare_backward(problem, ALIGNMENT, stream_of(device), wanted)
        run, need = steps.run, steps.workspace
        strides, contiguous = self._strides, torch.contiguous_format
        grad_value, grad_locations, grad_weights, grad_references = wanted

        def backward(
            grad_output: Tensor,
            value: Tensor,
            shapes: Any,
            starts: Any,
            locations: Tensor,
            weights: Any,
            references: Tensor | None = None,
        ) -> Gradients | None:
            if not (locations.is_contiguous() and (packed or weights.is_contiguous())):
                return None
            if not (references is None or references.is_contiguous()):
                return None
            if not value.is_contiguous() if strides is None else value.stride() != strides:
                return None
            grad_output = grad_output.contiguous()
            at_value, at_locations, at_grad_output = value.data_ptr(), locations.data_ptr(), grad_output.data_ptr()
            at_weights = 0 if packed else weights.data_ptr()
            at_references = 0 if references is None else references.data_ptr()
            if (at_value | at_locations | at_weights | at_references | at_grad_output) % ALIGNMENT:
                return None
            of_value = of_locations = of_weights = of_references = None
            at_grad_value = at_grad_locations = at_grad_weights = at_grad_references = at_workspace = 0
            if grad_value:
                of_value = empty_like(value, memory_format=contiguous)
                at_grad_value = of_value.data_ptr()
            if need:
                workspace = empty(need, dtype=torch.uint8, device=value.device)
                at_workspace = workspace.data_ptr()
            if grad_locations:
                of_locations = empty_like(locations)
                at_grad_locations = of_locations.data_ptr()
            if packed:
                at_weights = at_locations + to_logits
                at_grad_weights = at_grad_locations + to_logits if grad_weights else 0
            elif grad_weights:
                of_weights = empty_like(weights)
                at_grad_weights = of_weights.data_ptr()
            if grad_references and references is not None:
                of_references = empty_like(references)
                at_grad_references = of_references.data_ptr()
            metadata = levels or (shapes.data_ptr(), starts.data_ptr())
            before = get_device()
            set_device(device)
            try:
                addresses = Addresses(
                    at_value, at_locations, at_weights, at_references, 0, at_grad_output, at_grad_value,
                    at_grad_locations, at_grad_weights, at_grad_references, at_workspace,
                )  # fmt: skip
                run(stream_of(device), metadata, addresses)
            finally:
                if before != device:
                    set_device(before)
            return of_value, of_locations, of_weights, of_references

        return backward


def _packing(problem: Problem) -> tuple[bool, int]:
    """Whether offsets and logits are one array, and the bytes in it before the first logits."""
    return problem.packed, 2 * problem.K * arrays.item_size(problem.location_dtype) if problem.packed else 0


_wants_determinism = torch.are_deterministic_algorithms_enabled


def device_functions() -> tuple[Callable[[], int], Callable[[int], None]]:
    """CUDA's functions that get and set the current device."""
    runtime = arrays.require_cupy("a CUDA tensor").cuda.runtime
    return runtime.getDevice, runtime.setDevice


# The plan cache, by layout.
plans: dict[tuple[Any, ...] | None, LaunchPlan] = {}
# What was called last, newest first: (matches, plan, im2col_step, deterministic, whether an input requires a gradient).
# `matches` is one C call that compares layouts; it costs a third of a key. Each form of call passes it other tensors.
RecentCall = tuple[Callable[..., bool], LaunchPlan, Any, Any, bool]
WITH_WEIGHTS, WITH_LOGITS, PACKED = "weights", "logits", "packed"
recent: dict[str, tuple[RecentCall, ...]] = {WITH_WEIGHTS: (), WITH_LOGITS: (), PACKED: ()}
# The layers of a model come back to about as many layouts.
_MOST_RECENT = 4


def _forget() -> None:
    plans.clear()
    for form in recent:
        recent[form] = ()


loaded.when_changed(_forget)


def forward(
    arguments: Arguments, remember: bool = True, wanted: Wanted | None = None
) -> tuple[Tensor, LaunchPlan | cpu_path.RecordedPlan | None]:
    """The output, recording no gradient, and the plan of the backward where there is one.

    Where the plan cache has the layout and `remember` is True, the layout is among the recent ones from then on.
    `wanted` are the gradients that autograd will ask for.
    """
    key = layout_key(arguments)
    plan = plans.get(key)
    if plan is not None:
        if remember:
            _remember(plan, arguments)
        output = plan.forward(
            arguments.value, arguments.spatial_shapes, arguments.level_start_index, arguments.locations,
            arguments.weights, arguments.reference_points,
        )  # fmt: skip
        if output is not None:
            return output, plan
    problem, call = cpu_path.problems.get(key) if arguments.value.is_cpu else None, None
    if problem is None:
        call = validate.read(arguments)
        problem = call.problem
    way = cpu_path.chosen_way(problem, wanted)
    composed = cpu_path.composed(problem, arguments, wanted, way) if way else None
    if composed is not None:
        cpu_path.remember(key, problem)
        return composed
    if call is None:
        return cpu_path.forward(problem, arguments), None
    output = api.forward(call)
    if key is not None and plan is None and _repeatable(call):
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = LaunchPlan(call.problem, arguments)
    else:
        cpu_path.remember(key, call.problem)
    return output, plan


def backward(arguments: Arguments, grad_output: Tensor, wanted: Wanted) -> Gradients:
    """The gradients that are wanted."""
    key = layout_key(arguments)
    plan = plans.get(key)
    if plan is not None and grad_output.dtype is arguments.value.dtype:
        grads = plan.backward(wanted)(
            grad_output, arguments.value, arguments.spatial_shapes, arguments.level_start_index, arguments.locations,
            arguments.weights, arguments.reference_points,
        )  # fmt: skip
        if grads is not None:
            return grads
    problem = cpu_path.problems.get(key) if arguments.value.is_cpu else None
    if problem is not None and _is_gradient(grad_output, arguments, problem):
        return cpu_path.backward(problem, arguments, grad_output, wanted)
    of_value, of_locations, of_weights, of_references = api.backward(validate.read(arguments, grad_output, wanted))
    return of_value, of_locations, of_weights, of_references


def _is_gradient(grad_output: Tensor, arguments: Arguments, problem: Problem) -> bool:
    """Whether `grad_output` is as validation wants it, and memory holds its elements."""
    return (
        compat.has_elements(grad_output)
        and grad_output.is_cpu
        and grad_output.dtype is arguments.value.dtype
        and grad_output.shape == problem.output_shape
    )


def _remember(plan: LaunchPlan, arguments: Arguments) -> None:
    if plan.levels or arguments.variant != PLAIN:
        return
    given = (
        arguments.value, arguments.locations, arguments.weights, arguments.reference_points, arguments.spatial_shapes,
        arguments.level_start_index,
    )  # fmt: skip
    tensors = [tensor for tensor in given if tensor is not None]
    matches = compat.layout_check(tensors)
    if matches is not None:
        differentiable = any(tensor.requires_grad for tensor in tensors)
        entry = (matches, plan, arguments.im2col_step, arguments.deterministic, differentiable)
        form = (PACKED if arguments.packed else WITH_LOGITS) if arguments.fused else WITH_WEIGHTS
        recent[form] = (entry, *recent[form][: _MOST_RECENT - 1])


def layout_key(arguments: Arguments) -> tuple[Any, ...] | None:
    """What a launch plan for these arguments depends on; None where there can be none."""
    if arguments.validate or arguments.query_lengths is not None:
        return None
    value, locations, weights, references = (
        arguments.value, arguments.locations, arguments.weights, arguments.reference_points
    )  # fmt: skip
    shapes, starts = arguments.spatial_shapes, arguments.level_start_index
    im2col_step, deterministic, variant = arguments.im2col_step, arguments.deterministic, arguments.variant
    others = [(t.shape, t.dtype, t.get_device()) if t is not None else None for t in (weights, references)]
    if not (locations.is_contiguous() and all(t is None or t.is_contiguous() for t in (weights, references))):
        return None
    # Equal is not enough: True == 1, and validation refuses one of them.
    if not (type(im2col_step) is int and (deterministic is None or type(deterministic) is bool)):
        return None
    if variant is not PLAIN and not _hashable(variant):
        return None
    metadata: tuple[Any, ...] | None
    if type(shapes) is Tensor and type(starts) is Tensor and shapes.is_cuda and starts.is_cuda:
        if not (shapes.is_contiguous() and starts.is_contiguous()):
            return None
        metadata = (
            shapes.shape, shapes.dtype, shapes.get_device(), starts.shape, starts.dtype, starts.get_device()
        )  # fmt: skip
    else:  # the plan holds the numbers
        metadata = _host_metadata(*(_as_list(part) for part in (shapes, starts)))
        if metadata is None:
            return None
    return (
        value.shape, value.dtype, value.get_device(), None if value.is_contiguous() else value.stride(),
        locations.shape, locations.dtype, locations.get_device(),
        *others, metadata, im2col_step, deterministic, variant,
    )  # fmt: skip


def _as_list(metadata: Any) -> Any:
    return metadata.tolist() if type(metadata) is Tensor and not metadata.is_cuda else metadata


def _hashable(variant: Variant) -> bool:
    """Whether a variant can be part of a key: it has only types that validation accepts."""
    num_points, interpolation, padding_mode, align_corners = variant
    if not (type(interpolation) is str and type(padding_mode) is str and type(align_corners) is bool):
        return False
    return num_points is None or (type(num_points) is tuple and all(type(number) is int for number in num_points))


def _host_metadata(shapes: Any, starts: Any) -> tuple[Any, ...] | None:
    """Metadata given as sequences of ints, as part of a key; None for anything else."""
    if type(shapes) not in (list, tuple) or not (starts is None or type(starts) in (list, tuple)):
        return None
    try:
        rows = (*map(tuple, shapes), tuple(starts or ()))
    except TypeError:
        return None
    if any(type(number) is not int for row in rows for number in row):
        return None
    return (*rows, starts is None)


def _repeatable(call: Call) -> bool:
    """Whether launches need no more than addresses: no empty problem, and nothing to convert or copy."""
    problem, operands = call.problem, call.operands
    if problem.device[0] != "cuda" or problem.empty or naive.selected():
        return False
    if not operands.value.contiguous and problem.value_strides is None:
        return False
    if problem.levels is not None:
        return True
    return all(
        part is not None and part.dtype == "int64" and part.device == problem.device
        for part in (operands.shapes, operands.starts)
    )
