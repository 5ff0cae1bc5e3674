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
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cupy_msda.call import ALL, PLAIN
from cupy_msda.cuda import kernels, plan, plan_backward, sorted_heuristics
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.index_width import Index
from cupy_msda.cuda.specs import KERNELS
from tests.helpers import access_log, cases
from tests.helpers.calls import call_of

HERE = Path(__file__).parent
HEADERS = ("cuda_on_cpu.h", "emulator_harness.h", "access_log.h")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
CACHE = Path(tempfile.gettempdir()) / f"cupy_msda_emulator_{os.getuid()}"
COMPILER = shutil.which("g++")
#: A GPU of one multiprocessor, which a few queries fill.
SMALL_GPU = dataclasses.replace(H100, multiprocessors=1)


class EmulatorError(AssertionError):
    """The emulator or a sanitizer found a fault."""


class Inside(NamedTuple):
    """An address inside an array: `offset` bytes from its beginning."""

    array: np.ndarray
    offset: int


def build(spec, text=None, sanitize=False, log=None):
    """The shared library of a specialisation, or with `sanitize` or `log` the executable.

    `text` replaces the CUDA source. `log` is an access_log.Log, which finds data races.
    """
    headers = [(HERE / name).read_text() for name in HEADERS]
    body = _body(spec, text)
    # Optimised, a sanitized build takes twice the time to make, and its run is no shorter for it.
    flags = ["-O0" if sanitize else "-O1", "-std=c++17", "-w", "-g1", f"-I{HERE}", f"-DEMULATED_KERNEL={spec.function}"]
    flags += ["-DEMULATOR_MAIN"] if sanitize or log else ["-shared", "-fPIC"]
    flags += SANITIZERS if sanitize else access_log.FLAGS if log else ()
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
        if log:
            access_log.link(COMPILER, temporary, CACHE)
        temporary.rename(target)
    return target


def _body(spec, text):
    """The program between the headers of the emulator."""
    return kernels.prelude(spec) + (text if text is not None else kernels.source(spec.kernel))


def launch(planned, arguments, *, text=None, sanitize=False, log=None, order=0):
    """Run `planned` (a plan.Launch) on arrays in place.

    `arguments` holds the parameters by name: a number, an array, :class:`Inside` an array, None for a null pointer, or
    a list of these for a parameter of several words.
    """
    names = [parameter.name for parameter in planned.spec.parameters]
    if list(arguments) != names:
        raise TypeError(f"{planned.spec.kernel}: expected the parameters {names}, got {list(arguments)}")
    words, arrays, addresses = _words(arguments.values())
    if len(words) != sum(planned.spec.words()):
        raise TypeError(f"{planned.spec.kernel}: expected {sum(planned.spec.words())} words, got {len(words)}")
    target = build(planned.spec, text, sanitize, log=log)
    sizes = [array.nbytes for array in arrays]
    head = [len(words), len(arrays), len(addresses), *planned.grid, planned.threads, planned.shared_bytes, order]
    numbers = np.array([*head, *words, *sizes, *itertools.chain(*addresses)], np.int64)
    if sanitize or log:
        try:
            printed = _run_executable(target, numbers, arrays)
        except EmulatorError as error:
            if not log:
                raise
            names = [next(name for name, value in arguments.items() if _has(value, array)) for array in arrays]
            raise EmulatorError(access_log.explained(str(error), target, names, _body(planned.spec, text))) from None
        if log:
            log.add_reached(planned.spec, printed)
        return
    library = ctypes.CDLL(str(target))
    library.emulate.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    wrong = library.emulate(numbers.ctypes.data_as(ctypes.c_void_p), pointers)
    if wrong:
        raise EmulatorError(wrong.decode())


def run(planned, words):
    """Run `planned` on words whose addresses are those of this process, which nothing checks."""
    head = [len(words), 0, 0, *planned.grid, planned.threads, planned.shared_bytes, 0]
    numbers = np.array([*head, *words], np.int64)
    library = ctypes.CDLL(str(build(planned.spec)))
    library.emulate.restype = ctypes.c_char_p
    wrong = library.emulate(numbers.ctypes.data_as(ctypes.c_void_p), None)
    if wrong:
        raise EmulatorError(wrong.decode())


def _words(arguments):
    """The words of a launch, its arrays, and (word, array, offset) of each word that is an address."""
    words, arrays, addresses = [], [], []
    for argument in arguments:
        for word in argument if isinstance(argument, list) else [argument]:
            array, offset = word if isinstance(word, Inside) else (word, 0)
            if not isinstance(array, np.ndarray):
                words.append(word or 0)
                continue
            known = [number for number, other in enumerate(arrays) if other is array]
            if not known:
                known = [len(arrays)]
                arrays.append(array)
            addresses.append((len(words), known[0], offset))
            words.append(0)
    return words, arrays, addresses


def _has(argument, array):
    """Whether an argument is this array, or one of its words is an address in it."""
    words = argument if isinstance(argument, list) else [argument]
    return any((word.array if isinstance(word, Inside) else word) is array for word in words)


def _run_executable(target, numbers, arrays):
    """Runs on the arrays in place. Returns what it prints."""
    with tempfile.NamedTemporaryFile() as file:
        count = np.array([numbers.size], np.int64)
        file.write(count.tobytes() + numbers.tobytes() + b"".join(array.tobytes() for array in arrays))
        file.flush()
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run([target, file.name], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise EmulatorError(result.stderr[:3000] or f"ended with {result.returncode}")
        data = Path(file.name).read_bytes()
    offset = count.nbytes + numbers.nbytes
    for array in arrays:
        array[...] = np.frombuffer(data, array.dtype, array.size, offset).reshape(array.shape)
        offset += array.nbytes
    return result.stdout


def prepare(inputs, metadata_on_device, variant, lengths=None):
    """The Problem of NumPy inputs, as if they were on a GPU."""
    references = inputs.references if isinstance(inputs, cases.FusedInputs) else None
    variant = PLAIN._replace(**(variant or {}))
    found = call_of(*inputs[:6], references, variant=variant, query_lengths=lengths).problem
    levels = None if metadata_on_device else found.levels
    return dataclasses.replace(found, device=("cuda", 0), levels=levels)


def _memory(value):
    """What lies in memory from the first element of a slice to its last."""
    if value.flags.c_contiguous:
        return value
    whole = value.base.reshape(-1)
    first = (value.ctypes.data - whole.ctypes.data) // value.itemsize
    last = sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)) // value.itemsize
    return whole[first : first + last + 1].copy()


def is_dense(found):
    """Whether the backward of these tests aggregates: where value vectors get many samples, however small the call."""
    return found.Q * found.K >= 4 * found.S


def lengths_of(lengths):
    """Query lengths as the kernels take them."""
    return None if lengths is None else np.array(lengths, np.int64)


def _weights(found, locations, weights):
    """Weights or logits, or where these are in one array with the offsets."""
    if locations is None or not found.packed:
        return weights
    return Inside(locations, 2 * found.K * locations.itemsize)


def _metadata(found, inputs, shapes, starts):
    """Shapes and starts: of the levels that validation has read, or as the caller gave them."""
    if found.levels is not None:
        table = np.array(found.levels, np.int64).reshape(-1, 3)
        return [np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2])]
    if shapes is None:
        shapes, starts = inputs.shapes, inputs.starts
    return [np.array(shapes, np.int64), None if starts is None else np.array(starts, np.int64)]


def _inputs(found, inputs, lengths, metadata):
    """The parameters that describe the samples."""
    return {
        "metadata": metadata,
        "locations": inputs.locations,
        "weights": _weights(found, inputs.locations, inputs.weights),
        "references": getattr(inputs, "references", None),
        "lengths": lengths_of(lengths),
    }


def _sizes(found):
    return dict(zip(("S", "Q", "image_stride", "head_stride", "heads"), plan.size_words(found), strict=True))


def _poisoned(shape, dtype):
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


def forward(
    inputs, *, metadata_on_device=False, shapes=None, starts=None, gpu=H100, variant=None, lengths=None, **options
):
    """The forward kernel on NumPy inputs; `shapes` and `starts` replace the device metadata without any check."""
    found = prepare(inputs, metadata_on_device, variant, lengths)
    output = _poisoned(found.output_shape, inputs.value.dtype)
    arguments = {"value": _memory(inputs.value)}
    arguments |= _inputs(found, inputs, lengths, _metadata(found, inputs, shapes, starts))
    launch(plan.forward(found, 16, gpu), arguments | {"output": output} | _sizes(found), **options)
    return output


def backward(
    inputs,
    *,
    metadata_on_device=False,
    shapes=None,
    starts=None,
    gpu=H100,
    variant=None,
    lengths=None,
    wanted=ALL,
    text_of_references=None,
    **options,
):
    """The backward kernels on NumPy inputs: gradients of value, locations and weights, as in cuda/steps.py.

    In a fused call, the gradient of the reference points comes last.
    """
    found = prepare(inputs, metadata_on_device, variant, lengths)
    wanted = found.computed(wanted)
    total = np.zeros(inputs.value.shape, found.accumulator_dtype) if wanted.value else None
    samples = zip((inputs.locations, inputs.weights), wanted[1:3], strict=True)
    grads = [_poisoned(a.shape, a.dtype) if asked and a is not None else None for a, asked in samples]
    parts = None
    if wanted.references:
        shape = (found.N, found.Q, found.M, found.L, found.fused.coordinates)
        parts = _poisoned(shape, found.accumulator_dtype)
    arguments = {"value": _memory(inputs.value)}
    arguments |= _inputs(found, inputs, lengths, _metadata(found, inputs, shapes, starts))
    arguments |= {"grad_output": inputs.grad_output, "grad_value": total, "grad_locations": grads[0]}
    arguments |= {"grad_weights": _weights(found, *grads), "grad_references": parts}
    launch(plan.backward(found, 16, gpu, wanted, is_dense(found)), arguments | _sizes(found), **options)
    options.pop("text", None)
    if wanted.value and inputs.value.dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = _poisoned(inputs.value.shape, inputs.value.dtype)
        cast = plan.cast_gradient(found.value_dtype, total.size)
        launch(cast, {"source": total, "target": narrow, "count": total.size}, **options)
        total = narrow
    if wanted.references:
        grads.append(_poisoned(inputs.references.shape, inputs.references.dtype))
        arguments = {"per_head": parts, "grad_references": grads[-1], "count": grads[-1].size}
        launch(plan.reduce_references(found), arguments, text=text_of_references, **options)
    return total, *grads


def summation(
    inputs, *, metadata_on_device=False, shapes=None, starts=None, variant=None, lengths=None, texts=None, **options
):
    """The gradient of value without atomics, as in cuda/steps.py. `texts` replaces sources, by the kernel's name."""
    found = prepare(inputs, metadata_on_device, variant, lengths)
    planned = plan_backward.summation(found, 16, H100)
    samples = _inputs(found, inputs, lengths, _metadata(found, inputs, shapes, starts))

    def run(one, arguments):
        launch(one, arguments, text=(texts or {}).get(one.spec.kernel), **options)

    if sorted_heuristics.is_materialised(found):
        locations, weights = (
            _poisoned((found.N, found.Q, found.M, found.K, n), found.accumulator_dtype) for n in (2, 1)
        )
        arguments = {"offsets": samples["locations"], "metadata": samples["metadata"], "logits": samples["weights"]}
        arguments |= {name: samples[name] for name in ("references", "lengths")}
        arguments |= {"locations": locations, "weights": weights, "S": found.S, "Q": found.Q}
        run(plan.materialise(found), arguments | {"heads": found.N * found.M})
        samples |= {"locations": locations, "weights": weights, "references": None}
    result = _poisoned(inputs.value.shape, inputs.value.dtype)
    segments = _poisoned((planned.heads, planned.runs, 2 * planned.buckets + 2), np.uint16)
    contributions = _poisoned((planned.heads, planned.runs, planned.capacity, 4), found.accumulator_dtype)
    table = _poisoned(planned.contributions - planned.table, np.uint8)
    queue, sums = (
        _poisoned(to - at, np.uint8) if planned.queued else None
        for at, to in ((planned.queue, planned.sums), (planned.sums, planned.nbytes))
    )
    sizes = {"S": found.S, "Q": found.Q}
    sort_inputs = {"locations": samples.pop("locations"), "metadata": samples.pop("metadata")} | samples
    written = {"segment_starts": segments, "contributions": contributions, "table": table, "queue": queue}
    per_bucket = {"contributions_per_bucket": planned.contributions_per_bucket}
    for head, row in itertools.product(range(0, found.N * found.M, planned.heads), range(0, found.S, planned.pixels)):
        slab = {"first_head": head, "heads": found.N * found.M, "first_pixel": row, "buckets": planned.buckets}
        run(
            planned.sort,
            sort_inputs | written | {"queued": planned.queued} | per_bucket | sizes | slab | {"pixels": planned.pixels},
        )
        arguments = {"grad_output": inputs.grad_output, "contributions": contributions, "segment_starts": segments}
        arguments |= (
            {"grad_value": result, "table": table} | sizes | {"runs": planned.runs, "capacity": planned.capacity}
        )
        run(planned.reduce, arguments | slab | {"queue": queue, "chunk_sums": sums, "chunk_size": planned.chunk_size})
    return result


def force_wide_index(monkeypatch, wide):
    """Make the planner choose 64-bit indices, or not, whatever the sizes."""

    def indices(spec, sizes):
        return {} if spec.axes().get("wide_index", wide) == wide else {"forced": Index(2**32, 32)}

    for kind in KERNELS.values():
        monkeypatch.setattr(kind, "indices", indices)
