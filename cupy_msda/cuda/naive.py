"""``CUPY_MSDA_KERNELS=naive``: the kernels of ``naive.cu`` instead of the fast ones, for a user who suspects these.

They have one thread per output channel, take every variant as an argument, and need memory for float32 sums of all
gradients of 16-bit arrays.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import arrays, variables
from ..arrays import item_size
from ..call import SIXTEEN_BIT, Problem, Wanted
from . import plan
from .axes import aligned
from .kernel_spec import KernelSpec
from .launch import PreparedLaunch
from .level_tables import device_table
from .naive_specs import NaiveBackwardSpec, NaiveForwardSpec, NaiveFusedBackwardSpec, NaiveMaterialiseSpec, NaiveSpec
from .session import Result, Session
from .steps import Addresses

# Launches `threads` threads of a kernel with the words of its parameters.
Launch = Callable[..., None]


def selected() -> bool:
    """Whether the environment asks for these kernels.

    Raises
    ------
    ValueError
        For a value of ``CUPY_MSDA_KERNELS`` other than ``fast`` and ``naive``.
    """
    setting = variables.setting("CUPY_MSDA_KERNELS") or "fast"
    if setting not in ("fast", "naive"):
        raise ValueError(f"CUPY_MSDA_KERNELS: expected 'fast' or 'naive', got {setting!r}")
    return setting == "naive"


def specs(problem: Problem) -> dict[str, KernelSpec]:
    """The kernels that this problem can need, by name. Those of a fused call leave plain locations to the others."""
    of_samples = {
        "value_dtype": problem.value_dtype,
        "location_dtype": problem.location_dtype,
        "reference_dtype": problem.fused.dtype if problem.fused else "float32",
    }
    plain = of_samples
    if problem.fused:
        plain = of_samples | {"location_dtype": problem.accumulator_dtype}
    kinds: dict[type[NaiveSpec], dict[str, str]] = {
        NaiveForwardSpec: plain,
        NaiveBackwardSpec: plain,
        NaiveMaterialiseSpec: of_samples,
        NaiveFusedBackwardSpec: of_samples,
    }
    return {kind.kernel: kind(**axes) for kind, axes in kinds.items()}


def problem_words(problem: Problem, metadata: tuple[int, ...], points: int, lengths: int) -> tuple[int, ...]:
    """The words of the kernels' `naive_problem`; `points` and `lengths` are addresses."""
    fused, strides, variant = problem.fused, problem.strides, problem.variant
    return (
        *metadata, points, lengths, problem.N, problem.S, problem.M, problem.D, problem.K, problem.Q, strides.image,
        strides.pixel, strides.head, variant.nearest, variant.padding_mode == "border", variant.align_corners,
        fused.coordinates if fused else 0, fused.levels if fused else 0, problem.packed,
    )  # fmt: skip


def forward(session: Session, output: Result) -> None:
    """Fills `output`."""
    problem, stream = session.problem, session.stream
    points = device_table(problem.points, session.device, stream)
    words = problem_words(problem, tuple(session.metadata()), points, session.lengths())
    locations, weights = session.locations.data, session.weights
    workspace = None  # alive until all is queued
    if problem.fused:
        layout = Workspace()
        at_locations, at_weights = _materialised(layout, problem)
        workspace = Result((layout.nbytes // 4,), "float32", session.operands.value)
        launch = _launcher(problem, NaiveMaterialiseSpec, session.device)
        made = workspace.data + at_locations, workspace.data + at_weights
        references = session.references.data if session.references else 0
        launch(problem.N * problem.Q * problem.M, stream, *words, references, locations, weights, *made)
        locations, weights = made
    launch = _launcher(problem, NaiveForwardSpec, session.device)
    count = problem.N * problem.Q * problem.M * problem.D
    launch(count, stream, *words, session.value.data, locations, weights, output.data)


class Workspace:
    """Places in device memory that is allocated at once."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, count: int, dtype: str) -> int:
        """The first byte of `count` numbers."""
        at = self.nbytes
        self.nbytes += aligned(count * item_size(dtype), 256)
        return at


class NaiveBackward:
    """The gradients of one problem that are wanted; used like :class:`cupy_msda.cuda.steps.PreparedBackward`.

    Raises
    ------
    NotImplementedError
        For a deterministic backward: these sums have no order.
    """

    def __init__(self, problem: Problem, wanted: Wanted, stream: int) -> None:
        """On the device of the problem, which must be current."""
        if problem.deterministic:
            raise NotImplementedError(
                "deterministic: expected False with CUPY_MSDA_KERNELS=naive, whose sums have no order, got True"
            )
        self._problem, self._wanted = problem, wanted
        self._device = problem.device[1]
        self._points = device_table(problem.points, self._device, stream)
        samples, dtype, layout = problem.N * problem.Q * problem.M * problem.K, problem.accumulator_dtype, Workspace()
        self._locations, self._weights = _materialised(layout, problem) if problem.fused else (0, 0)
        # Sums apart from the results, where these have another dtype or come by another kernel.
        apart = problem.fused is not None or problem.location_dtype in SIXTEEN_BIT
        sizes = (problem.N * problem.S * problem.M * problem.D, 2 * samples, samples)
        self._sums = [
            layout.take(size, dtype) if asked and other else None
            for size, asked, other in zip(
                sizes, wanted, (problem.value_dtype in SIXTEEN_BIT, apart, apart), strict=False
            )
        ]
        self._sizes = sizes
        self.workspace = layout.nbytes

    def run(self, stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        problem, wanted, samples = self._problem, self._wanted, addresses
        words = problem_words(problem, tuple(metadata), self._points, addresses.lengths)
        if problem.fused:
            samples = addresses._replace(
                locations=addresses.workspace + self._locations, weights=addresses.workspace + self._weights
            )
            launch = _launcher(problem, NaiveMaterialiseSpec, self._device)
            given = (addresses.references, addresses.locations, addresses.weights, samples.locations, samples.weights)
            launch(problem.N * problem.Q * problem.M, stream, *words, *given)
        results = (addresses.grad_value, addresses.grad_locations, addresses.grad_weights)
        sums = [
            0 if not asked else result if at is None else addresses.workspace + at
            for result, at, asked in zip(results, self._sums, wanted, strict=False)
        ]
        fill = arrays.require_cupy("an array on a CUDA device").cuda.runtime.memsetAsync
        for size, sum_ in zip(self._sizes, sums, strict=True):
            if sum_:
                fill(sum_, 0, size * item_size(problem.accumulator_dtype), stream)
        launch = _launcher(problem, NaiveBackwardSpec, self._device)
        inputs = (samples.value, samples.locations, samples.weights, samples.grad_output)
        launch(problem.N * problem.Q * problem.M * problem.D, stream, *words, *inputs, *sums)
        if problem.fused:
            launch = _launcher(problem, NaiveFusedBackwardSpec, self._device)
            known = (addresses.references, addresses.locations, samples.weights, sums[1], sums[2])
            grads = (addresses.grad_references, addresses.grad_locations, addresses.grad_weights)
            launch(problem.N * problem.Q, stream, *words, *known, *grads)
        dtypes = (problem.value_dtype, problem.location_dtype, problem.location_dtype)
        for number, (size, sum_, result, dtype) in enumerate(zip(self._sizes, sums, results, dtypes, strict=True)):
            if sum_ and sum_ != result and not (problem.fused and number):
                _run(plan.cast_gradient(dtype, size), self._device)(stream, sum_, result, size)


def _materialised(layout: Workspace, problem: Problem) -> tuple[int, int]:
    """Places of locations and weights."""
    samples, dtype = problem.N * problem.Q * problem.M * problem.K, problem.accumulator_dtype
    return layout.take(2 * samples, dtype), layout.take(samples, dtype)


def _launcher(problem: Problem, kind: type[NaiveSpec], device: int) -> Launch:
    """``launch(threads, stream, *words)`` of a kernel."""
    spec = specs(problem)[kind.kernel]

    def launch(threads: int, stream: int, *words: int) -> None:
        _run(plan.over_elements(spec, threads), device)(stream, *words)

    return launch


def _run(launch: plan.Launch, device: int) -> Callable[..., None]:
    return PreparedLaunch(launch, device).run
