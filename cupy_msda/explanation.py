"""`explain`: which path and which kernels a call takes, why, and what would make it faster."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import api, arrays, validate
from .arrays import View, item_size
from .call import ALL, FUSED_NAMES, Arguments, Operands, Problem, Variant, Wanted
from .cpu import tier
from .cuda import gpu as gpus
from .cuda import naive, reasons, session
from .cuda.axes import VECTOR_BYTES
from .cuda.gpu import Gpu
from .cuda.reasons import ExplainedKernel, Floor, Rates
from .cuda.tuning import loaded
from .options import requested_variant
from .sizes import Sizes, problems_of, read_dtypes

_L1_BYTES_PER_CLOCK = 128


@dataclass(frozen=True)
class Explanation:
    """What a call does. ``str`` and ``print`` show all of it."""

    call: str
    path: str
    tuned: str
    floors: tuple[tuple[str, Floor], ...]
    kernels: tuple[tuple[str, ExplainedKernel], ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("call", self.call), ("path", self.path)]
        if self.kernels:
            rows.append(("tuned", self.tuned))
        rows += [(direction, _text_of_floor(found)) for direction, found in self.floors]
        for direction, kernel in self.kernels:
            first, *others = _text_of_kernel(kernel)
            rows += [(f"{direction}:", first), *(("", line) for line in others)]
        rows += [("" if number else "faster", f"- {text}") for number, text in enumerate(self.advice)]
        return "\n".join(f"{name:12}{text}".rstrip() for name, text in rows)


def _text_of_floor(found: Floor) -> str:
    times = {"memory": found.memory_us, "the L1 caches": found.l1_us}
    return ", ".join(
        [f"{found.nbytes / 1e6:.1f} MB at least", *(f"{us:.1f} us for {what}" for what, us in times.items() if us)]
    )


def _text_of_kernel(kernel: ExplainedKernel) -> list[str]:
    launch, measured = kernel.launch, kernel.measured
    grid = "x".join(map(str, launch.grid))
    axes = " ".join(f"{axis}={value}{'*' * (axis in measured)}" for axis, value in kernel.configuration.items())
    return [
        f"{kernel.name}, grid {grid}, {launch.threads} threads, {launch.shared_bytes} bytes of shared memory",
        *([f"  {axes}"] if axes else []),
        *(f"  - {reason}" for reason in kernel.reasons),
    ]


def explain(
    *arguments: Any,
    dtype: str = "float32",
    backward: bool = True,
    gpu: int | None = None,
    **options: Any,
) -> Explanation:
    """Say which path and which kernels a call takes, why each was chosen, and what would make it faster.

    Nothing is computed, compiled or copied to the GPU.

    Parameters
    ----------
    *arguments
        The arguments of :func:`cupy_msda.ms_deform_attn` or of :func:`cupy_msda.ms_deform_attn_fused`, arrays of any
        framework, or one :class:`cupy_msda.Sizes`.
    dtype : str
        Of value, with sizes; "float16/float32" for float32 locations and reference points, as in autocast.
    backward : bool
        Explain the backward with all gradients too.
    gpu : int, optional
        With sizes, the compute capability to explain for, 80 for 8.0. The GPU need not be here. None: the current
        device, or the CPU on a machine without one.
    **options
        The keywords of the function: `num_points`, `deterministic` and the others.

    Returns
    -------
    Explanation
        Its text is what ``print`` shows.

    Raises
    ------
    TypeError, ValueError
        As the function itself, and for a `gpu` that is too old.
    """
    if len(arguments) == 1 and isinstance(arguments[0], Sizes):
        deterministic = options.pop("deterministic", False)
        if options:
            raise TypeError(f"{next(iter(options))}: expected a field of Sizes, got a keyword besides them")
        return _of_sizes(arguments[0], dtype, backward, gpu, bool(deterministic))
    if len(arguments) == 1:
        raise TypeError(f"expected the arguments of ms_deform_attn, or one Sizes, got {type(arguments[0]).__name__}")
    if gpu is not None:
        raise TypeError(f"gpu: expected None with arrays, whose device is explained, got {gpu!r}; pass Sizes")
    call = validate.read(_arguments(arguments, options))
    problem, operands = call.problem, call.operands
    if problem.device[0] != "cuda":
        return Explanation(_described(problem), f"CPU, {tier.describe()}", "no", (), (), ())
    device = problem.device[1]
    with session.on_device(device):
        on, name, rates = loaded.gpu_of(device), loaded.name_of(device), _rates(device)
    copied = _copies(problem, operands)
    alignment = VECTOR_BYTES if _copies_value(problem, operands) else session.alignment_of(operands.value.data)
    if problem.fused is None:
        samples = [view.data for view in (operands.locations, operands.weights) if view.contiguous]
        alignment = min(alignment, session.alignment_of(*samples))
    return _explanation(problem, alignment, on, rates, (f"cuda:{device}, {name}", backward, copied))


def _arguments(arguments: Sequence[Any], options: dict[str, Any]) -> Arguments:
    """The call of one of the two functions, by its own signature."""
    names = {"reference_points", "sampling_offsets", "attention_logits"} & options.keys()
    fused = bool(names) or (
        len(arguments) > 3 and len(getattr(arguments[3], "shape", None) or np.shape(arguments[3])) == 4
    )
    function = api.ms_deform_attn_fused if fused else api.ms_deform_attn
    given = inspect.signature(function).bind(*arguments, **options)
    given.apply_defaults()
    found = given.arguments
    settings = {
        "im2col_step": found["im2col_step"],
        "variant": requested_variant(
            found["num_points"], found["interpolation"], found["padding_mode"], found["align_corners"]
        ),
        "query_lengths": found["query_lengths"],
        "deterministic": found["deterministic"],
        "validate": found["validate"],
    }
    metadata = (found["value"], found["spatial_shapes"], found["level_start_index"])
    if not fused:
        return Arguments(*metadata, None, found["sampling_locations"], found["attention_weights"], **settings)
    samples = (found["reference_points"], found["sampling_offsets"], found["attention_logits"])
    return Arguments(*metadata, *samples, **settings, names=FUSED_NAMES)


def _of_sizes(
    sizes: Sizes, dtype: str, backward: bool, architecture: int | None, deterministic: bool = False
) -> Explanation:
    value, locations = read_dtypes("dtype", dtype)
    problem = replace(problems_of([sizes], [f"{value}/{locations or value}"], 0)[0], deterministic=deterministic)
    if architecture is None:
        reason = arrays.cuda_unavailable()
        if reason is not None:
            return Explanation(_described(problem), f"CPU, {tier.describe()}; {reason}", "no", (), (), ())
        device: int = arrays.require_cupy("explain").cuda.runtime.getDevice()
        name = f"cuda:{device}, {loaded.name_of(device)}"
        return _explanation(problem, VECTOR_BYTES, loaded.gpu_of(device), _rates(device), (name, backward, []))
    on, name = _absent(architecture)
    return _explanation(problem, VECTOR_BYTES, on, Rates(0, 0), (name, backward, []))


def _absent(architecture: int) -> tuple[Gpu, str]:
    """A GPU that need not be here, and what to call it."""
    if isinstance(architecture, bool) or not isinstance(architecture, int) or architecture < 10:
        raise ValueError(f"gpu: expected a compute capability as an int, such as 86 for 8.6, got {architecture!r}")
    try:
        on = gpus.described(architecture)
    except ValueError as error:
        raise ValueError(f"gpu: {error}") from None
    if gpus.is_listed(architecture):
        return on, "a GPU that is not here"
    return on, "a GPU that is not here, with the limits of the nearest one that is listed"


def _explanation(
    problem: Problem, alignment: int, on: Gpu, rates: Rates, about: tuple[str, bool, list[str]]
) -> Explanation:
    name, backward, advice = about
    path = f"CUDA kernels on {name} (sm_{on.architecture}, {on.multiprocessors} multiprocessors)"
    if problem.empty:
        return Explanation(_described(problem), f"{path}: nothing to compute, the results are zeros", "no", (), (), ())
    if naive.selected():
        advice = ["CUPY_MSDA_KERNELS=naive runs the reference kernels: unset it", *advice]
        return Explanation(_described(problem), f"reference {path}", "no", (), (), tuple(advice))
    wanted = problem.computed(ALL._replace(references=problem.fused is not None))
    directions: list[tuple[str, Wanted | None]] = [("forward", None), *([("backward", wanted)] if backward else [])]
    kernels = [("forward", kernel) for kernel in reasons.forward(problem, alignment, on)]
    if backward:
        kernels += [("backward", kernel) for kernel in reasons.backward(problem, alignment, on, wanted)]
    return Explanation(
        _described(problem),
        path,
        _tuned(problem, alignment, on, wanted if backward else None),
        tuple((direction, reasons.floor(problem, which, rates)) for direction, which in directions),
        tuple(kernels),
        tuple([*advice, *_advice(problem, alignment, on)]),
    )


def _described(problem: Problem) -> str:
    function = "ms_deform_attn" if problem.fused is None else "ms_deform_attn_fused"
    dtypes = " and ".join(dict.fromkeys((problem.value_dtype, problem.location_dtype)))
    points = f"P={problem.P}" if problem.P else f"points={','.join(map(str, problem.points))}"
    sizes = f"N={problem.N} S={problem.S} Q={problem.Q} M={problem.M} D={problem.D} L={problem.L} {points}"
    options = [f"{name}={value}" for name, value in zip(Variant._fields[1:], problem.variant[1:], strict=True)]
    chosen = [text for text, value in zip(options, problem.variant[1:], strict=True) if value not in Variant()[1:]]
    flags = [word for word, is_so in (("ragged", problem.ragged), ("deterministic", problem.deterministic)) if is_so]
    return ", ".join([f"{function} of {dtypes}", sizes, *chosen, *flags])


def _tuned(problem: Problem, alignment: int, on: Gpu, wanted: Wanted | None) -> str:
    if not on.choices:
        return "no: `python -m cupy_msda tune` or cupy_msda.tune measures launch configurations on this GPU"
    if alignment < VECTOR_BYTES:
        return f"not for this call, whose addresses are multiples of {alignment} bytes only"
    found = []
    for name, of in (("forward", None), ("samples", wanted and wanted._replace(value=False)), ("grad_value", wanted)):
        entry = on.choices.entry(name, problem, of)
        if entry is not None:
            found.append(f"{name} {entry.default_us:.1f} us by default, {entry.tuned_us:.1f} us tuned")
    return "; ".join(found) + " (axes with *)" if found else "not for calls of these or of similar sizes"


def _copies_value(problem: Problem, operands: Operands) -> bool:
    return problem.value_strides is None and not operands.value.contiguous


def _copies(problem: Problem, operands: Operands) -> list[str]:
    """What every call copies."""
    found = []
    if _copies_value(problem, operands):
        found.append(
            f"value is copied in every call, because its D channels are not contiguous (strides "
            f"{list(operands.value.strides)}): lay it out as [N, S, M, D]"
        )
    names = ("sampling_offsets", "attention_logits") if problem.fused else ("sampling_locations", "attention_weights")
    given: list[tuple[str, View | None]] = [(names[0], operands.locations), ("reference_points", operands.references)]
    if not problem.packed:
        given.append((names[1], operands.weights))
    for name, view in given:
        if view is not None and not (view.contiguous and view.data % (2 * item_size(view.dtype)) == 0):
            found.append(f"{name} is copied in every call, because it is not contiguous: strides {list(view.strides)}")
    for name, view in (("spatial_shapes", operands.shapes), ("level_start_index", operands.starts)):
        if view is not None and (view.dtype != "int64" or view.device != problem.device):
            found.append(f"{name} is converted in every call: pass int64 on value's device, or the sizes as numbers")
    lengths = operands.lengths
    if lengths is not None and lengths.device[0] == "cpu":
        found.append("query_lengths are copied to the GPU in every call: pass int64 on value's device")
    return found


def _advice(problem: Problem, alignment: int, on: Gpu) -> list[str]:
    """What the call itself could change."""
    found, item = [], item_size(problem.value_dtype)
    if alignment < VECTOR_BYTES:
        found.append(
            f"an array begins at a multiple of {alignment} bytes: slices at multiples of {VECTOR_BYTES} bytes are "
            f"read in whole vectors"
        )
    if problem.stride_alignment < VECTOR_BYTES:
        found.append(
            f"the strides of value are multiples of {problem.stride_alignment} bytes: {VECTOR_BYTES} are faster"
        )
    wide = VECTOR_BYTES // item
    if problem.D % wide:
        found.append(f"D = {problem.D}: channels in multiples of {wide} are read in whole vectors")
    if problem.value_dtype == "float64":
        found.append("float64 is for checks: float32 is many times as fast")
    elif problem.value_dtype == "float32":
        found.append("a value in float16 or bfloat16 halves the bytes; sums stay in float32")
    if problem.deterministic:
        found.append("deterministic=True sorts the gradient of value, which takes longer than the fastest way may")
    if problem.levels is None:
        found.append("the sizes of the levels are on the GPU: nothing to gain, but errors in them give NaN")
    return found


def _rates(device: int) -> Rates:
    """By the attributes of a device; 0 for those that its driver does not give."""
    found: Any = arrays.require_cupy("explain").cuda.Device(device).attributes
    memory = 2 * 1000 * found.get("MemoryClockRate", 0) * found.get("GlobalMemoryBusWidth", 0) / 8
    clock = 1000 * found.get("ClockRate", 0)
    return Rates(memory, clock * found["MultiProcessorCount"] * _L1_BYTES_PER_CLOCK)
