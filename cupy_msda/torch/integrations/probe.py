"""What a candidate computes: called with small random inputs in float64, and compared with the operator."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..functional import ms_deform_attn
from .conventions import CHOICES, HEADS_FIRST, PER_LEVEL, PIXELS_FIRST, Layout, Signature
from .patch import uncounted

N, M, D, Q = 2, 3, 5, 7
LEVELS = ((6, 9), (4, 5))
# Samples reach furthest beyond the edges of the smallest levels: half a level at one pixel, a whole one at two pixels
# with align_corners.
SMALL_LEVELS = ((1, 2), (2, 1))
EVEN_POINTS, UNEVEN_POINTS = (4, 4), (1, 3)
# Options of the operator that a candidate may have built in. Nearest is what the method "discrete" means.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"padding_mode": "border"},
    {"align_corners": True},
    {"padding_mode": "border", "align_corners": True},
    {"interpolation": "nearest"},
)
TOLERANCE = 1e-9


# What a candidate raises that was found by the parameters of the extension and cannot run on a CPU.
_NOT_ON_A_CPU = (RuntimeError, NotImplementedError, AssertionError, AttributeError, NameError, ImportError)


class Meaning(NamedTuple):
    """What a call of one layout computes.

    Attributes
    ----------
    options : dict
        Of the operator.
    uses_starts : bool
        Whether it respects level_start_index; otherwise each level follows the one before it.
    has_gradient : bool
        Whether its output requires a gradient where its inputs do.
    """

    options: dict[str, Any]
    uses_starts: bool
    has_gradient: bool


@dataclass
class Finding:
    """The layouts in which a candidate computes the operator, and what it computes in each.

    Attributes
    ----------
    of_tensors : str
        The layout of a value that is one tensor.
    gradients : bool
        Whether its gradients have been compared; some candidates have none on a CPU.
    is_verified : bool
        False where the candidate cannot run on a CPU and has the parameters of the extension, whose layout is known.
    problem : str
        Why there are no layouts.
    """

    layouts: dict[Layout, Meaning] = field(default_factory=dict)
    of_tensors: str = PIXELS_FIRST
    gradients: bool = True
    is_verified: bool = True
    problem: str = ""


def probe(candidate: Callable[..., Any], signature: Signature, receiver: Any = None) -> Finding:
    """Call a candidate in every documented layout that its parameters allow; a method with a copy of `receiver`.

    Random generators, inputs and the modes of torch are afterwards as they were before.
    """
    found = Finding()
    try:
        with _undisturbed():
            points = UNEVEN_POINTS if "num_points" in signature.roles else EVEN_POINTS
            calls = _Calls(candidate, signature, _Inputs(points), receiver)
            wide = _Calls(candidate, signature, _WideInputs(points), receiver)
            for layout in _layouts(signature):
                if layout.value == HEADS_FIRST and any(one.value == PIXELS_FIRST for one in found.layouts):
                    continue
                _try(calls, wide, layout, found)
    except Exception as error:  # in a mode of torch that has no numbers, such as that of fake tensors
        return Finding(problem=f"it could not be compared: {type(error).__name__}: {error}")
    return found


def _layouts(signature: Signature) -> Iterator[Layout]:
    if signature.is_extension:
        yield Layout(PIXELS_FIRST, True, True)
        return
    by_level = [(False, False)] if "num_points" in signature.roles else [(True, True), (True, False), (False, False)]
    choices = [CHOICES[name] for name in signature.choices]
    for value in (PIXELS_FIRST, HEADS_FIRST, PER_LEVEL):
        for samples in by_level:
            for chosen in itertools.product(*choices):
                yield Layout(value, *samples, chosen)


@dataclass(frozen=True)
class _Calls:
    """Calls of a candidate with drawn inputs."""

    candidate: Callable[..., Any]
    signature: Signature
    inputs: _Inputs
    receiver: Any

    def call(self, layout: Layout, leaves: list[Tensor]) -> Any:
        """With level sizes in a tensor, and with numbers where that fails."""
        try:
            return self._call(layout, leaves, torch.tensor(self.inputs.levels))
        except Exception:
            return self._call(layout, leaves, list(self.inputs.levels))

    def _call(self, layout: Layout, leaves: list[Tensor], shapes: Any) -> Any:
        named = self.inputs.named(self.signature, layout, [leaf * 1 for leaf in leaves], shapes)
        if self.receiver is not None:
            named[self.signature.names[0]] = copy.deepcopy(self.receiver)
        return self.signature.call(self.candidate, named)


def _try(calls: _Calls, wide: _Calls, layout: Layout, found: Finding) -> None:
    """Add the layout to what is found if the results are the operator's in one of its variants, with both inputs."""
    leaves = calls.inputs.leaves()
    try:
        output = calls.call(layout, leaves)
    except Exception as error:
        found.problem = found.problem or f"it raised {type(error).__name__}: {error}"
        if calls.signature.is_extension and isinstance(error, _NOT_ON_A_CPU):
            found.layouts[layout], found.gradients, found.is_verified = Meaning({}, True, True), False, False
        return
    if not isinstance(output, Tensor) or output.shape != (N, Q, M * D):
        found.problem = found.problem or "its output is not [N, Q, M*D]"
        return
    grads = _gradients(output, leaves, calls.inputs.grad_output)
    for uses_starts, options in itertools.product(
        (True, False) if "starts" in calls.signature.roles else (False,), VARIANTS
    ):
        exact, exact_grads = calls.inputs.expected(options, uses_starts)
        if not _close(output.detach(), exact):
            continue
        if grads is not None and not all(map(_close, grads, exact_grads)):
            found.problem = "its output is the operator's, its gradients are not"
            return
        if not _agrees(wide, layout, options, uses_starts):
            found.problem = "it computes something else with negative or large numbers, or far outside of the levels"
            return
        found.layouts[layout] = Meaning(options, uses_starts, output.requires_grad)
        found.gradients = found.gradients and grads is not None
        if layout.value != PER_LEVEL:
            found.of_tensors = layout.value
        return
    found.problem = "it computes something else"


def _agrees(calls: _Calls, layout: Layout, options: dict[str, Any], uses_starts: bool) -> bool:
    """Whether output and gradients, where it has any, are those of the operator in this variant."""
    leaves = calls.inputs.leaves()
    try:
        output = calls.call(layout, leaves)
    except Exception:
        return False
    exact, exact_grads = calls.inputs.expected(options, uses_starts)
    if not isinstance(output, Tensor) or output.shape != exact.shape or not _close(output.detach(), exact):
        return False
    grads = _gradients(output, leaves, calls.inputs.grad_output)
    return grads is None or all(map(_close, grads, exact_grads))


def _gradients(output: Tensor, leaves: list[Tensor], grad_output: Tensor) -> list[Tensor] | None:
    """None where the candidate has none."""
    try:
        grads = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
    except Exception:
        return None
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]


def _close(have: Tensor, want: Tensor) -> bool:
    return bool((have - want).norm() <= TOLERANCE * want.norm())


class _Inputs:
    """A problem whose samples lie inside and just outside of the levels, and what the operator makes of it."""

    levels: tuple[tuple[int, int], ...] = LEVELS

    def __init__(self, points: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = points
        self._expected: dict[str, tuple[Tensor, list[Tensor]]] = {}

        def drawn(*shape: int) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator)

        sizes = [height * width for height, width in self.levels]
        # The second level comes first.
        self.starts = (sizes[1], 0)
        self._value = self._signed(drawn(N, sum(sizes), M, D))
        self._locations = self._around(drawn(N, Q, M, sum(points), 2))
        self._weights = self._weighing(drawn(N, Q, M, sum(points)))
        self.grad_output = self._signed(drawn(N, Q, M * D))

    @staticmethod
    def _signed(drawn: Tensor) -> Tensor:
        return drawn - 0.5

    @staticmethod
    def _around(drawn: Tensor) -> Tensor:
        return 1.6 * drawn - 0.3

    @staticmethod
    def _weighing(drawn: Tensor) -> Tensor:
        return drawn

    def leaves(self) -> list[Tensor]:
        """Value [N, S, M, D], locations [N, Q, M, L*P, 2] and weights [N, Q, M, L*P]."""
        return [tensor.clone().requires_grad_() for tensor in (self._value, self._locations, self._weights)]

    def named(self, signature: Signature, layout: Layout, tensors: list[Tensor], shapes: Any) -> dict[str, Any]:
        """The arguments of a candidate by the names of its parameters."""
        value, locations, weights = tensors
        arguments: dict[str, Any] = {
            "value": _value_in(layout.value, value, self.levels),
            "shapes": shapes,
            "sizes": list(self.levels),
            "starts": torch.tensor(self.starts),
            "locations": locations.unflatten(3, (len(self.levels), -1)) if layout.locations_by_level else locations,
            "weights": weights.unflatten(3, (len(self.levels), -1)) if layout.weights_by_level else weights,
            "num_points": list(self.points),
            "im2col_step": 64,
        }
        named = {signature.roles[role]: part for role, part in arguments.items() if role in signature.roles}
        return named | dict(zip(signature.choices, layout.choices, strict=True)) | dict(signature.others)

    def expected(self, options: dict[str, Any], with_starts: bool) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients of the operator."""
        key = f"{options}, {with_starts}"
        if key not in self._expected:
            leaves = self.leaves()
            value, locations, weights = leaves
            if "interpolation" in options:
                locations = locations.detach()
            starts = self.starts if with_starts else None
            output = ms_deform_attn(value, self.levels, starts, locations, weights, num_points=self.points, **options)
            grads = _gradients(output, leaves, self.grad_output)
            assert grads is not None
            self._expected[key] = output.detach(), grads
        return self._expected[key]


class _WideInputs(_Inputs):
    """Numbers of every magnitude and sign: what a candidate clamps or masks shows.

    Apart from :class:`_Inputs`, because beside a large number no difference of a small one shows.
    """

    levels = SMALL_LEVELS

    @staticmethod
    def _signed(drawn: Tensor) -> Tensor:
        """With magnitudes from 0.1 to 10**4."""
        return _spread(drawn, -1, 4)

    @staticmethod
    def _around(drawn: Tensor) -> Tensor:
        """Half of the coordinates are in the level, the others up to ten levels away from it, on either side."""
        return 0.5 + 0.5 * _spread(drawn, -1.3, 1.3)

    @staticmethod
    def _weighing(drawn: Tensor) -> Tensor:
        """With magnitudes from 0.1 to 100."""
        return _spread(drawn, -1, 2)


def _spread(drawn: Tensor, low: float, high: float) -> Tensor:
    """Uniform numbers in [0, 1) as numbers of both signs with uniform logarithms, in powers of ten."""
    signed = 2 * drawn - 1
    return signed.sign() * 10 ** (low + (high - low) * signed.abs())


def _value_in(layout: str, value: Tensor, levels: tuple[tuple[int, int], ...]) -> Any:
    """Value [N, S, M, D] in another layout."""
    if layout == PIXELS_FIRST:
        return value
    heads_first = value.permute(0, 2, 3, 1).contiguous()
    return heads_first if layout == HEADS_FIRST else list(heads_first.split([h * w for h, w in levels], -1))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients are on, autocast, warnings and another default device are off; random generators are restored."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        uncounted(),
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002
