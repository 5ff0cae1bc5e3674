"""Inputs and results of one problem on the GPU, and calls of a configuration on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ... import arrays
from ...call import Problem, Wanted
from .. import plan
from ..axes import VECTOR_BYTES
from ..gpu import Gpu
from ..launch import PreparedLaunch
from ..level_tables import device_table, level_table
from ..steps import Addresses, PreparedBackward
from .inputs import Inputs, are_pixels, from_bits, levels_of, nbytes_of
from .targets import Candidate

# Bytes of the inputs of all sets, as a multiple of the L2 cache: a model's arrays are mostly not there.
_TIMES_L2, _MOST_SETS = 2, 4
# Of each result, so many elements at the beginning and at the end are compared.
_COMPARED = 1 << 20
# Norm of the difference of two results over the norm of one.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


class DeviceArrays:
    """Inputs of a problem on the current device, in several sets, and its results."""

    def __init__(self, problem: Problem, on: Gpu, stream: Any) -> None:
        self._cupy, self.problem, self.stream = arrays.require_cupy("tune"), problem, stream
        self._levels = problem.levels or levels_of(problem.S, problem.L)
        device = problem.device[1]
        self.metadata = tuple(level_table(self._levels, device, 0))
        self.lengths = device_table((problem.Q,) * problem.N, device, 0) if problem.ragged else 0
        count = max(1, min(_MOST_SETS, -(-_TIMES_L2 * on.l2_bytes // max(1, nbytes_of(problem)))))
        self.sets = [self._uploaded(Inputs(problem, self._levels, seed)) for seed in range(count)]
        self._results = {name: self._empty(array) for name, array in self.sets[0].items()}

    def _uploaded(self, inputs: Inputs) -> dict[str, Any]:
        """The arrays of all images, each in one dimension."""
        found = {
            name: self._cupy.empty(self.problem.N * image.size, image.dtype) for name, image in inputs.arrays.items()
        }
        for name, image in inputs.arrays.items():
            self._upload(image, found[name])
        return found

    def _upload(self, image: np.ndarray, to: Any) -> None:
        """The array of one image, to all images."""
        flat = np.ascontiguousarray(image).reshape(-1)
        for n in range(self.problem.N):
            to[n * flat.size : (n + 1) * flat.size].set(flat, stream=self.stream)
        self.stream.synchronize()

    @property
    def can_cluster(self) -> bool:
        """Whether the reference points may lie elsewhere: they are not the pixels."""
        return not are_pixels(self.problem, self._levels)

    @contextlib.contextmanager
    def clustered(self) -> Iterator[None]:
        """All samples in a part of the image meanwhile."""
        try:
            self._move(clustered=True)
            yield
        finally:
            self._move(clustered=False)

    def _move(self, *, clustered: bool) -> None:
        for seed, arrays_of_set in enumerate(self.sets):
            moved = Inputs(self.problem, self._levels, seed, clustered).arrays
            for name in arrays_of_set.keys() & {"locations", "references"}:
                self._upload(moved[name], arrays_of_set[name])

    def _empty(self, like: Any) -> Any:
        return self._cupy.empty(like.shape[0], like.dtype)

    def runs(self, candidate: Candidate) -> tuple[list[Callable[[], None]], Any]:
        """A function per set of inputs that queues the launches of a candidate, and the memory that they use.

        Compiles what is not compiled.
        """
        device, wanted = self.problem.device[1], candidate.target.wanted
        if wanted is None:
            launch = PreparedLaunch(candidate.launches[0], device)
            return [self._forward(launch, inputs) for inputs in self.sets], None
        steps = PreparedBackward(
            self.problem, VECTOR_BYTES, candidate.gpu, wanted, lambda launch: PreparedLaunch(launch, device)
        )
        workspace = self._cupy.empty(steps.workspace, np.uint8) if steps.workspace else None
        at = 0 if workspace is None else workspace.data.ptr
        return [self._backward(steps, at, wanted, inputs) for inputs in self.sets], workspace

    def _addresses(self, inputs: dict[str, Any]) -> tuple[int, int, int, int, int]:
        value, locations = inputs["value"].data.ptr, inputs["locations"].data.ptr
        weights = locations + self._to_logits if self.problem.packed else inputs["weights"].data.ptr
        references = inputs["references"].data.ptr if "references" in inputs else 0
        return value, locations, weights, references, self.lengths

    @property
    def _to_logits(self) -> int:
        return 2 * self.problem.K * arrays.item_size(self.problem.location_dtype)

    def _forward(self, launch: PreparedLaunch, inputs: dict[str, Any]) -> Callable[[], None]:
        value, *samples = self._addresses(inputs)
        words = (value, *self.metadata, *samples, self._results["grad_output"].data.ptr, *plan.size_words(self.problem))
        return lambda: launch.run(self.stream.ptr, *words)

    def _backward(
        self, steps: PreparedBackward, workspace: int, wanted: Wanted, inputs: dict[str, Any]
    ) -> Callable[[], None]:
        results = {name: array.data.ptr for name, array in self._results.items()}
        weights = results["locations"] + self._to_logits if self.problem.packed else results["weights"]
        addresses = Addresses(
            *self._addresses(inputs),
            grad_output=inputs["grad_output"].data.ptr,
            grad_value=results["value"] if wanted.value else 0,
            grad_locations=results["locations"] if wanted.locations else 0,
            grad_weights=weights if wanted.weights else 0,
            grad_references=results.get("references", 0) if wanted.references else 0,
            workspace=workspace,
        )
        return lambda: steps.run(self.stream.ptr, self.metadata, addresses)

    def results(self, candidate: Candidate) -> dict[str, np.ndarray]:
        """What a candidate writes, as numbers: parts of the results, which were NaN before."""
        runs, memory = self.runs(candidate)
        fill = self._cupy.cuda.runtime.memsetAsync
        for array in self._results.values():
            fill(array.data.ptr, 0xFF, array.shape[0] * array.dtype.itemsize, self.stream.ptr)
        runs[0]()
        self.stream.synchronize()
        del memory
        dtypes = {"value": self.problem.value_dtype, "grad_output": self.problem.value_dtype}
        if self.problem.fused:
            dtypes["references"] = self.problem.fused.dtype
        found = {}
        for name, array in self._results.items():
            parts = [array[:_COMPARED].get(), array[-_COMPARED:].get()]
            found[name] = from_bits(np.concatenate(parts), dtypes.get(name, self.problem.location_dtype))
        return found

    def agree(self, one: Candidate, other: Candidate) -> bool:
        """Whether two candidates have the same results, but for rounding."""
        want, have = self.results(one), self.results(other)
        tolerance = max(_TOLERANCE[dtype] for dtype in (self.problem.value_dtype, self.problem.location_dtype))
        return all(_close(have[name], want[name], tolerance) for name in want)


def _close(have: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(have)):
        return False
    difference = np.linalg.norm(have[finite] - want[finite])
    return bool(difference <= tolerance * np.linalg.norm(want[finite]))
