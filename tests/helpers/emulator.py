"""The CUDA sources on the CPU: compiled by g++ with cuda_on_cpu.h, launched as the planner says."""

import ctypes
import dataclasses
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from cupy_msda.call import ALL, PLAIN
from cupy_msda.cuda import kernels, plan, plan_backward
from tests.helpers import cases
from tests.helpers.calls import call_of

HERE = Path(__file__).parent
HEADERS = ("cuda_on_cpu.h", "emulator_harness.h")
KINDS = {
    "forward": 0,
    "backward": 1,
    "round": 2,
    "sort": 3,
    "sum": 4,
    "add": 5,
    "count": 6,
    "expand": 7,
    "references": 8,
}
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
CACHE = Path(tempfile.gettempdir()) / f"cupy_msda_emulator_{os.getuid()}"
COMPILER = shutil.which("g++")


class EmulatorError(AssertionError):
    """The emulator or a sanitizer found a fault."""


def build(key, text=None, sanitize=False):
    """The shared library of a specialisation, or with `sanitize` the executable. `text` replaces the CUDA source."""
    headers = "".join((HERE / name).read_text() for name in HEADERS)
    body = text if text is not None else kernels.source(key.kind)
    # Optimised, a sanitized build takes twice the time to make, and its run is no shorter for it.
    flags = ["-O0" if sanitize else "-O1", "-std=c++17", "-w", f"-I{HERE}", f"-DEMULATED_KIND={KINDS[key.kind]}"]
    flags += [option for option in kernels.options(key) if option.startswith("-D")]
    flags += [*SANITIZERS, "-DEMULATOR_MAIN"] if sanitize else ["-shared", "-fPIC"]
    name = hashlib.sha256(repr((headers, body, flags)).encode()).hexdigest()[:32]
    CACHE.mkdir(exist_ok=True)
    target = CACHE / name
    if not target.exists():
        program = f'#include "{HEADERS[0]}"\n{body}\n#include "{HEADERS[1]}"\n'
        temporary = target.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, "-x", "c++", "-", "-o", str(temporary)]
        result = subprocess.run(command, input=program, capture_output=True, text=True)
        if result.returncode:  # not an EmulatorError: a planted fault that does not compile has not been caught
            raise RuntimeError(result.stderr[:4000])
        temporary.rename(target)
    return target


def launch(described, arrays, S, Q, more=(), *, text=None, sanitize=False, order=0):
    """Run `described` (a plan.Launch) on `arrays` in place; None stands for a null pointer.

    `more` are the sizes that only some kernels have: value's image and head stride, and heads, of the forward and the
    backward; heads of the expansion; runs, capacity, first head, heads, first row, rows, parts of a piece of a
    summation.
    """
    target = build(described.key, text, sanitize)
    more = (*more, *(0,) * (7 - len(more)))
    sizes = [-1 if array is None else array.nbytes for array in arrays]
    numbers = np.array(
        [len(arrays), S, Q, *described.grid, described.block, described.shared, order, *more, *sizes], np.int64
    )
    if sanitize:
        _run_executable(target, numbers, arrays)
        return
    library = ctypes.CDLL(str(target))
    library.emulate.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p * len(arrays))(*(None if a is None else a.ctypes.data for a in arrays))
    wrong = library.emulate(numbers.ctypes.data_as(ctypes.c_void_p), pointers)
    if wrong:
        raise EmulatorError(wrong.decode())


def _run_executable(target, numbers, arrays):
    with tempfile.NamedTemporaryFile() as file:
        file.write(numbers.tobytes() + b"".join(b"" if a is None else a.tobytes() for a in arrays))
        file.flush()
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run([target, file.name], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise EmulatorError(result.stderr[:3000])
        data = Path(file.name).read_bytes()
    offset = numbers.nbytes
    for array in arrays:
        if array is not None:
            array[...] = np.frombuffer(data, array.dtype, array.size, offset).reshape(array.shape)
            offset += array.nbytes


def prepare(inputs, levels_on_device, variant, lengths=None):
    references = inputs.references if isinstance(inputs, cases.FusedInputs) else None
    variant = PLAIN._replace(**(variant or {}))
    found = call_of(*inputs[:6], references, variant=variant, query_lengths=lengths).problem
    levels = None if levels_on_device else found.levels
    return dataclasses.replace(found, device=("cuda", 0), levels=levels)


def _memory(value):
    """What lies in memory from the first element of a slice to its last."""
    if value.flags.c_contiguous:
        return value
    whole = value.base.reshape(-1)
    first = (value.ctypes.data - whole.ctypes.data) // value.itemsize
    last = sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)) // value.itemsize
    return whole[first : first + last + 1].copy()


def lengths_of(lengths):
    return None if lengths is None else np.array(lengths, np.int64)


def _samples(inputs):
    return [inputs.locations, inputs.weights, getattr(inputs, "references", None)]


def _metadata(found, described, inputs, shapes, starts):
    """The by-value struct (or a stand-in), and the device arrays that follow all others."""
    if not described.key.levels_on_device:
        return np.array(found.levels, np.int64), []
    if shapes is None:
        shapes, starts = inputs.shapes, inputs.starts
    starts = None if starts is None else np.array(starts, np.int64)
    return np.zeros(1, np.int64), [np.array(shapes, np.int64), starts]


def _poisoned(shape, dtype):
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


def forward(
    inputs,
    *,
    levels_on_device=False,
    shapes=None,
    starts=None,
    multiprocessors=132,
    variant=None,
    lengths=None,
    **options,
):
    """The forward kernel on NumPy inputs; `shapes` and `starts` replace the device metadata without any check."""
    found = prepare(inputs, levels_on_device, variant, lengths)
    described = plan.forward(found, 16, multiprocessors)
    metadata, device = _metadata(found, described, inputs, shapes, starts)
    output = _poisoned(found.output_shape, inputs.value.dtype)
    arrays = [_memory(inputs.value), metadata, *_samples(inputs), lengths_of(lengths), output, *device]
    launch(described, arrays, found.S, found.Q, plan.size_words(found)[2:], **options)
    return output


def backward(
    inputs,
    *,
    levels_on_device=False,
    shapes=None,
    starts=None,
    multiprocessors=132,
    variant=None,
    lengths=None,
    wanted=ALL,
    text_of_references=None,
    **options,
):
    """The backward kernels on NumPy inputs: gradients of value, locations and weights, as in cuda.py.

    With a front end, the gradient of the reference points comes last.
    """
    found = prepare(inputs, levels_on_device, variant, lengths)
    wanted = found.computed(wanted)
    described = plan.backward(found, 16, multiprocessors, wanted)
    metadata, device = _metadata(found, described, inputs, shapes, starts)
    total = np.zeros(inputs.value.shape, found.accumulator_dtype) if wanted.value else None
    samples = zip((inputs.locations, inputs.weights), wanted[1:3], strict=True)
    grads = [_poisoned(a.shape, a.dtype) if asked and a is not None else None for a, asked in samples]
    parts = None
    if wanted.references:
        shape = (found.N, found.Q, found.M, found.L, found.fused.coordinates)
        parts = _poisoned(shape, found.accumulator_dtype)
    arrays = [_memory(inputs.value), metadata, *_samples(inputs), lengths_of(lengths)]
    arrays += [inputs.grad_output, total, *grads, parts, *device]
    launch(described, arrays, found.S, found.Q, plan.size_words(found)[2:], **options)
    if wanted.value and inputs.value.dtype in (np.float16, ml_dtypes.bfloat16):
        options.pop("text", None)
        rounded = _poisoned(inputs.value.shape, inputs.value.dtype)
        launch(plan.round_gradient(found.value_dtype, total.size), [total, rounded], total.size, 0, **options)
        total = rounded
    if wanted.references:
        options.pop("text", None)
        grads.append(_poisoned(inputs.references.shape, inputs.references.dtype))
        summed = plan.sum_references(found)
        launch(summed, [parts, grads[-1]], grads[-1].size, 0, text=text_of_references, **options)
    return total, *grads


def summation(
    inputs, *, levels_on_device=False, shapes=None, starts=None, variant=None, lengths=None, texts=None, **options
):
    """The gradient of value without atomics, as in cupy_msda/backward.py."""
    found = prepare(inputs, levels_on_device, variant, lengths)
    planned = plan_backward.summation(found, 16)
    metadata, device = _metadata(found, planned.sort, inputs, shapes, starts)
    samples = _samples(inputs)
    expand = plan_backward.expansion(found)
    if expand:
        expanded = [_poisoned((found.N, found.Q, found.M, found.K, n), found.accumulator_dtype) for n in (2, 1)]
        arrays = [None, metadata, *samples, lengths_of(lengths), *expanded, *device]
        launch(expand, arrays, found.S, found.Q, (found.N * found.M,), text=(texts or {}).get("expand"), **options)
        samples = [*expanded, None]
    result = _poisoned(inputs.value.shape, inputs.value.dtype)
    begins = _poisoned((planned.heads, planned.runs, 2 * (planned.rows // planned.sum.key.rows) + 2), np.uint16)
    entries = _poisoned((planned.heads, planned.runs, planned.capacity, 4), found.accumulator_dtype)
    bounds = (planned.counts, planned.pieces, planned.sums, planned.nbytes)
    lists = [_poisoned(to - at, np.uint8) if planned.count else None for at, to in itertools.pairwise(bounds)]
    for head in range(0, found.N * found.M, planned.heads):
        for row in range(0, found.S, planned.rows):
            more = (planned.runs, planned.capacity, head, found.N * found.M, row, planned.rows, planned.piece)
            arrays = [None, metadata, *samples, lengths_of(lengths), begins, entries, lists[0], *device]
            launch(planned.sort, arrays, found.S, found.Q, more, text=(texts or {}).get("sort"), **options)
            if planned.count:
                text = (texts or {}).get("count")
                launch(planned.count, [begins, *lists[:2]], found.S, found.Q, more, text=text, **options)
            arrays = [inputs.grad_output, entries, begins, result, *lists]
            launch(planned.sum, arrays, found.S, found.Q, more, text=(texts or {}).get(planned.sum.key.kind), **options)
    return result


def force_index_64(monkeypatch, wide):
    """Make the planner choose 64-bit offsets, or not, whatever the sizes."""
    chosen_by_size = plan._launch

    def chosen(*arguments, **choices):
        found = chosen_by_size(*arguments, **choices)
        key = dataclasses.replace(found.key, index_64=wide)
        return dataclasses.replace(found, key=key, shared=plan.shared_bytes(key))

    monkeypatch.setattr(plan, "_launch", chosen)
