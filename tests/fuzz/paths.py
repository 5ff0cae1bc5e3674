"""The paths of a call on the CPU: each gives output and gradients of one Case, or the error that it raised."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cupy_msda
from cupy_msda.cpu import backward, cells, forward, tasks
from cupy_msda.cpu.tier import compiled_tier
from cupy_msda.torch import cpu_path, decomposed, ms_deform_attn, ms_deform_attn_fused

from .compare import Outcome
from .draw import Case
from .passing import Memory, Passed, change, from_torch, passed

# With these, calls of a few samples take every loop of the NumPy path more than once.
SMALL_BLOCKS = {
    forward: {"GATHERED_BYTES": 64, "LOCATED_SAMPLES": 4},
    backward: {"SUMMED_BYTES": 64, "SORTED_SAMPLES": 8, "PLACED_SAMPLES": 4, "ALL_LEVELS_SAMPLES": 16},
    cells: {"MAX_GROUP": 2, "MAX_PASSES": 2},
    tasks: {"TASK_SAMPLES": 8, "TASK_SUM_BYTES": 1 << 12},
}
COMPILED = compiled_tier()
if COMPILED:
    SMALL_BLOCKS[COMPILED] = {"TASK_SAMPLES": 8, "BLOCK_SAMPLES": 8, "ONE_BLOCK_SAMPLES": 4}


GET: dict[str, Callable[[Any], np.ndarray]] = {
    "numpy": np.asarray,
    "torch": from_torch,
    "cupy": lambda array: array.get(),
}


class SeesOperators(TorchDispatchMode):
    """A mode that changes nothing: calls under it go through the registered operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def run_array(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The array functions, forward and backward, for the arrays of the case's framework."""
    call = passed(case, memory, case.framework, device=device)
    outcome, before = Outcome(), _on_device(call)
    keywords = call.keywords | {"validate": case.seed % 3 == 0 and not case.on_device}
    get = GET[case.framework]
    fused = case.form.fused
    output = (cupy_msda.ms_deform_attn_fused if fused else cupy_msda.ms_deform_attn)(*call.arguments(), **keywords)
    _check_output(case, outcome, output, call.arrays["value"])
    outcome.results["output"] = get(output)
    keywords = dict(call.keywords)
    im2col_step = keywords.pop("im2col_step")
    function = cupy_msda.ms_deform_attn_fused_backward if fused else cupy_msda.ms_deform_attn_backward
    arguments = call.arguments()
    grads = function(*arguments, call.grad_output, im2col_step, **keywords)
    names = ("value", "references", "locations", "weights") if fused else ("value", "locations", "weights")
    for name, grad in zip(names, grads, strict=True):
        if name not in call.arrays:
            if grad is not None:
                outcome.wrong.append(f"{name}: expected None in a packed call, got {type(grad).__name__}")
            continue
        _check_gradient(outcome, name, grad, call.arrays[name])
        if not _is_contiguous(grad):  # what the registered operators say to torch.compile
            outcome.wrong.append(f"gradient of {name}: not contiguous")
        outcome.results[name] = get(grad)
    _check_inputs(outcome, before, call)
    return outcome


def run_eager(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The torch function with torch's autograd."""
    return _differentiate(case, passed(case, memory, "torch", device=device), public_function(case))


def run_registered(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The operators of torch's dispatcher: by name, or by the torch function under a mode or a transformation."""
    if case.registered == "direct":
        call = passed(case, memory, "torch", tensors_only=True, device=device)
        return _differentiate(case, call, _operator(case), saves=not (case.changes == "shapes" and _by_sizes(case)))
    call = passed(case, memory, "torch", device=device)
    if case.registered == "mode":
        with SeesOperators():
            return _differentiate(case, call, public_function(case))
    return _differentiate(case, call, public_function(case), transformed=True)


def run_decomposed(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The torch function inside `decomposed()`, with torch's autograd."""
    with decomposed():
        return _differentiate(case, passed(case, memory, "torch", device=device), public_function(case), saves=False)


def run_compiled(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The torch function under torch.compile."""
    torch._dynamo.reset()
    function = public_function(case)

    def between_others(call: Passed) -> Any:
        """With something to compile before and after the operator, which changes no number."""
        return function(call._replace(arrays={name: tensor * 1 for name, tensor in call.arrays.items()})) * 1

    chosen = between_others if case.seed % 2 else function
    # Whatever it compiles, inductor takes the memory of a lazy view for its numbers, and may read an array of NumPy
    # again in the backward.
    layouts = {name: layout for name, layout in case.layouts.items() if layout != "negated"}
    read_again = case.changes is not None and case.forms.get(case.changes, "").startswith("array")
    case = replace(case, layouts=layouts, changes=None if read_again else case.changes)
    return _differentiate(case, passed(case, memory, "torch", device=device), torch.compile(chosen, fullgraph=True))


def run_numpy(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The array functions by the NumPy tier, where the compiled one would run by itself."""
    with _numpy_tier():
        return run_array(case, memory, device)


def run_bags(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The torch function by the NumPy tier, which takes `embedding_bag` wherever it can run."""
    with _numpy_tier(), mock.patch.object(cpu_path, "cheapest", lambda *call: "bags" if "bags" in call[2] else None):
        return run_eager(case, memory, device)


def run_grid_sample(case: Case, memory: Memory, device: str = "cpu") -> Outcome:
    """The torch function by the NumPy tier, which takes `grid_sample` wherever it can run."""
    take = mock.patch.object(cpu_path, "cheapest", lambda *call: "grid_sample" if "grid_sample" in call[2] else None)
    with _numpy_tier(), take:
        return run_eager(case, memory, device)


def _numpy_tier() -> Any:
    return mock.patch.dict(os.environ, CUPY_MSDA_CPU="numpy")


PATHS: dict[str, Callable[..., Outcome]] = {
    "array": run_array,
    "eager": run_eager,
    "registered": run_registered,
    "decomposed": run_decomposed,
    "numpy": run_numpy,
    "bags": run_bags,
    "grid_sample": run_grid_sample,
    "compiled": run_compiled,
}


def run_paths(case: Case, names: Sequence[str], device: str = "cpu") -> dict[str, Outcome]:
    """The outcome of each path."""
    memory = Memory(case)
    outcomes = {}
    for name in names:
        with _settings(case):
            try:
                outcome = PATHS[name](case, memory, device)
            except Exception as error:
                outcome = Outcome(error=error)
        outcome.wrong += [f"{written}: written to" for written in memory.written()]
        outcome.results = canonical(case, outcome.results)
        outcomes[name] = outcome
    return outcomes


def public_function(case: Case) -> Callable[[Passed], Any]:
    """The torch function of a call, with its keywords."""
    function = ms_deform_attn_fused if case.form.fused else ms_deform_attn

    def call_it(call: Passed) -> Any:
        return function(*call.arguments(), **call.keywords)

    return call_it


def _operator(case: Case) -> Callable[[Passed], Any]:
    operators = torch.ops.cupy_msda
    function = operators.ms_deform_attn_fused if case.form.fused else operators.ms_deform_attn
    form = case.form

    def call_it(call: Passed) -> Any:
        arguments, sizes = list(call.arguments()), None
        if _by_sizes(case):
            arguments[1], sizes = None, [size for level in case.levels for size in level]
        points = list(form.points) if form.per_level else None
        settings = (case.im2col_step, case.deterministic, points, *form.variant.values(), call.lengths, sizes)
        return function.default(*arguments, *settings)

    return call_it


def _by_sizes(case: Case) -> bool:
    """Whether the operator gets level sizes as numbers, as from compiled code that has them so."""
    return case.seed % 4 == 0 and not case.on_device


def _vjp(function: Callable[[Passed], Any], call: Passed, leaves: dict[str, Any]) -> Any:
    def of_leaves(*tensors: Any) -> Any:
        return function(call._replace(arrays=call.arrays | dict(zip(leaves, tensors, strict=True))))

    return torch.func.vjp(of_leaves, *leaves.values())


def _differentiate(
    case: Case, call: Passed, function: Callable[[Passed], Any], transformed: bool = False, saves: bool = True
) -> Outcome:
    """Output, and gradients of the inputs that are wanted.

    `transformed`: by torch.func.vjp. `saves`: tensors of metadata are saved for the backward, which sees a change.
    """
    outcome, before = Outcome(), _on_device(call)
    wanted = [name for name in case.wanted if name in call.arrays]
    pull_back: Any = None
    if transformed and wanted:
        leaves = {name: call.arrays[name] for name in wanted}
        output, pull_back = _vjp(function, call, leaves)
    else:
        leaves = {name: call.arrays[name].detach().requires_grad_() for name in wanted}
        call = call._replace(arrays=call.arrays | leaves)
        with torch.inference_mode() if not wanted and case.seed % 2 else contextlib.nullcontext():
            output = function(call)
        if output.requires_grad != bool(wanted):
            outcome.wrong.append(f"output: requires_grad is {output.requires_grad}, wanted are {wanted}")
    _check_output(case, outcome, output, call.arrays["value"])
    outcome.results["output"] = from_torch(output)
    if not wanted:
        return outcome
    changed = change(case, call) if case.changes else None
    seen = isinstance(changed, torch.Tensor)
    if seen and pull_back is not None:
        return outcome  # "as autograd's saved tensors do": under torch.func these do not see a change
    try:
        if pull_back is not None:
            grads = pull_back(call.grad_output)
        else:
            grads = torch.autograd.grad(output, list(leaves.values()), call.grad_output)
    except RuntimeError as error:
        # The contract: a tensor of metadata that is changed in place raises, as autograd's saved tensors do.
        if seen and "modified by an inplace operation" in str(error):
            return outcome
        raise
    if seen and saves and changed.numel():
        outcome.wrong.append(f"{case.changes}: changed in place before the backward, which raises nothing")
    for name, grad in zip(leaves, grads, strict=True):
        _check_gradient(outcome, name, grad, call.arrays[name])
        outcome.results[name] = from_torch(grad)
    _check_inputs(outcome, before, call)
    return outcome


def _on_device(call: Passed) -> dict[str, bytes]:
    """The bytes of the inputs that lie on a GPU; :class:`Memory` sees what lies on the host."""
    if str(call.arrays["value"].device) == "cpu":
        return {}
    get = from_torch if isinstance(call.arrays["value"], torch.Tensor) else GET["cupy"]
    return {name: get(array).tobytes() for name, array in call.arrays.items()}


def _check_inputs(outcome: Outcome, before: dict[str, bytes], call: Passed) -> None:
    if before:
        after = _on_device(call)
        outcome.wrong += [f"{name}: written to" for name in before if before[name] != after[name]]


def _check_output(case: Case, outcome: Outcome, output: Any, value: Any) -> None:
    sizes = case.sizes
    shape = (sizes["N"], sizes["Q"], sizes["M"] * sizes["D"])
    if tuple(output.shape) != shape:
        outcome.wrong.append(f"output: shape {list(output.shape)}, expected {list(shape)}")
    if output.dtype != value.dtype:
        outcome.wrong.append(f"output: dtype {output.dtype}, expected {value.dtype}")
    if type(output) is not type(value) or str(output.device) != str(value.device):
        outcome.wrong.append(f"output: {type(output).__name__} on {output.device}")
    if not _is_contiguous(output):
        outcome.wrong.append("output: not contiguous")


def _is_contiguous(array: Any) -> bool:
    return array.is_contiguous() if isinstance(array, torch.Tensor) else array.flags.c_contiguous


def _check_gradient(outcome: Outcome, name: str, grad: Any, like: Any) -> None:
    if grad is None or grad.shape != like.shape or grad.dtype != like.dtype or str(grad.device) != str(like.device):
        got = None if grad is None else f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        outcome.wrong.append(f"gradient of {name}: expected {like.dtype} {list(like.shape)}, got {got}")


def canonical(case: Case, results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Results in the shapes of Case."""
    sizes, found = case.sizes, dict(results)
    if case.form.packed and "locations" in found:
        both, K = found.pop("locations"), sizes["K"]
        found |= {"locations": both[..., : 2 * K], "weights": both[..., 2 * K :]}
    shapes = {name: array.shape for name, array in case.arrays.items()}
    shapes["output"] = tuple(sizes[name] for name in "NQMD")
    return {name: np.ascontiguousarray(result).reshape(shapes[name]) for name, result in found.items()}


@contextlib.contextmanager
def _settings(case: Case) -> Iterator[None]:
    """Small blocks where the case asks for them, and no warnings."""
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The sums of torch's own functions have an order of their own; two paths take them.
        stack.enter_context(mock.patch.object(cpu_path, "cheapest", return_value=None))
        if case.small_blocks:
            for module, numbers in SMALL_BLOCKS.items():
                stack.enter_context(mock.patch.multiple(module, **numbers))
        yield
