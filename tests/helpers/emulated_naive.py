"""naive.cu and the Python code that launches it, on the CPU: memory is NumPy's, launches are emulated."""

import ctypes
from types import SimpleNamespace

import numpy as np

from cupy_msda import arrays
from cupy_msda.call import ALL
from cupy_msda.cuda import naive
from cupy_msda.cuda.steps import Addresses
from tests.helpers import emulator

# What the words of a launch may point into.
_arrays = []


def address(array):
    if array is None:
        return 0
    _arrays.append(array)
    return array.ctypes.data


def device(monkeypatch):
    """A fixture: launches by the emulator, on addresses of this process."""
    _arrays.clear()

    def table(numbers, device, stream):
        return address(np.array(numbers, np.int64))

    class Result:
        def __init__(self, shape, dtype, like):
            self.array = np.full(shape, np.nan, dtype)
            self.data = address(self.array)

    runtime = SimpleNamespace(memsetAsync=lambda at, byte, nbytes, stream: ctypes.memset(at, byte, nbytes))
    monkeypatch.setattr(arrays, "require_cupy", lambda what: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(naive, "device_table", table)
    monkeypatch.setattr(naive, "Result", Result)
    monkeypatch.setattr(naive, "_run", lambda planned, device: lambda stream, *words: emulator.run(planned, words))


def launch_on_arrays(planned, words, **options):
    """As emulator.run, with options of emulator.launch, on the arrays that the words point into."""
    left = iter(words)
    arguments = {
        parameter.name: [_argument(next(left)) for _ in range(count)]
        for parameter, count in zip(planned.spec.parameters, planned.spec.words(), strict=True)
    }
    emulator.launch(planned, arguments, **options)


def _argument(word):
    for array in _arrays:
        if 0 <= word - array.ctypes.data < array.nbytes:
            return emulator.Inside(array, word - array.ctypes.data)
    return word


def metadata_of(problem):
    table = np.array(problem.levels, np.int64).reshape(-1, 3)
    return [np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2])]


def weights_of(problem, locations, weights):
    inside = 2 * problem.K * locations.itemsize if problem.packed else None
    return address(weights) if inside is None else address(locations) + inside


def forward(inputs, lengths=None, **variant):
    problem = emulator.prepare(inputs, False, variant, lengths)
    output = np.full(problem.output_shape, np.nan, inputs.value.dtype)
    shapes, starts = metadata_of(problem)
    valid = emulator.lengths_of(lengths)
    references = getattr(inputs, "references", None)
    session = SimpleNamespace(
        problem=problem,
        stream=0,
        device=0,
        operands=SimpleNamespace(value=None),
        metadata=lambda: (address(shapes), address(starts)),
        lengths=lambda: address(valid),
        value=SimpleNamespace(data=address(inputs.value)),
        locations=SimpleNamespace(data=address(inputs.locations)),
        weights=weights_of(problem, inputs.locations, inputs.weights),
        references=None if references is None else SimpleNamespace(data=address(references)),
    )
    naive.forward(session, SimpleNamespace(data=address(output)))
    return output


def backward(inputs, lengths=None, wanted=None, **variant):
    """Gradients of value, locations, weights and references. Without `wanted`: of all that there are."""
    problem = emulator.prepare(inputs, False, variant, lengths)
    references = getattr(inputs, "references", None)
    computed = problem.computed(wanted or ALL._replace(references=references is not None))
    like = (inputs.value, inputs.locations, inputs.weights, references)
    grads = [
        np.full(array.shape, np.nan, array.dtype) if asked and array is not None else None
        for array, asked in zip(like, computed, strict=True)
    ]
    shapes, starts = metadata_of(problem)
    valid = emulator.lengths_of(lengths)
    steps = naive.NaiveBackward(problem, computed, 0)
    workspace = np.full(steps.workspace // 4, np.nan, np.float32)
    addresses = Addresses(
        value=address(inputs.value),
        locations=address(inputs.locations),
        weights=weights_of(problem, inputs.locations, inputs.weights),
        references=address(references),
        lengths=address(valid),
        grad_output=address(inputs.grad_output),
        grad_value=address(grads[0]),
        grad_locations=address(grads[1]),
        grad_weights=weights_of(problem, grads[1], grads[2]) if grads[1] is not None else address(grads[2]),
        grad_references=address(grads[3]),
        workspace=address(workspace),
    )
    steps.run(0, (address(shapes), address(starts)), addresses)
    return grads
