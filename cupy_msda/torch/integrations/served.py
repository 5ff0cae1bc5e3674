"""What takes the place of a function of a model: it serves the calls that it understands, and counts them all."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..devices import serves
from ..dtypes import agreed_dtypes
from ..functional import ms_deform_attn
from .conventions import Layout, Signature
from .patch import count_call
from .probe import Finding, Meaning
from .receivers import Receivers
from .report import Line

# How far the first call of a function that only runs on a GPU may be from the operator, by the norm of the output. The
# extension computes coordinates in value's dtype.
FIRST_CALL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
TOLERANCE_16_BIT = 5e-2
DIFFERS = "its first call had another result"


class Served:
    """Calls the operator where the layout of a call is known to mean the same, and the original elsewhere.

    Attributes
    ----------
    name : str
        ``module.name`` of the original.
    calls : int
        Calls that the operator has served. Compiled code does not count its calls.
    left : Counter
        Calls that went to the original, by the reason.
    is_verified : bool
        False until the first call of a function that could not be compared before.
    is_active : bool
        False after the patch is undone. Then this calls the original.
    """

    def __init__(
        self,
        name: str,
        original: Callable[..., Any],
        signature: Signature,
        finding: Finding,
        receivers: Receivers | None = None,
    ) -> None:
        self.name, self.original, self.signature, self.finding = name, original, signature, finding
        self.receivers = receivers
        self.calls = 0
        self.left: Counter[str] = Counter()
        self.is_verified = finding.is_verified
        self.differs = False
        self.is_active = True

    # A redirected method hands its own `self` over by name.
    def __call__(served, /, *arguments: Any, **named: Any) -> Any:  # pyright: ignore[reportSelfClsParameterName]
        signature, given = served.signature, named
        named = signature.by_name(arguments, given)
        finding = served.finding
        if served.receivers is not None:
            finding = served.receivers.finding(named[signature.names[0]])
        if reason := served._reason_to_leave(arguments, named, finding):
            if not torch.compiler.is_compiling():
                served.left[reason] += 1
            return served.original(*arguments, **given)
        layout = signature.layout(named, finding.of_tensors)
        if not served.is_verified:
            return served._first_call(named, layout)
        served._count()
        return _operator(signature, named, layout, finding.layouts[layout])

    def line(self, calls: int, left: Counter[str]) -> Line:
        """Its line of a report, without so many calls and calls that were left."""
        if self.differs:
            return Line(self.name, "kept", reason=DIFFERS)
        layouts = " or ".join(
            ", ".join([str(layout), *(f"{option}={value!r}" for option, value in meaning.options.items())])
            for layout, meaning in self.finding.layouts.items()
        )
        remarks = _left_calls(self.left - left)
        if not self.is_verified:
            remarks.append("to be compared at its first call")
        elif not self.finding.is_verified:
            remarks.append(self.finding.problem or "compared at its first call")
        elif not self.finding.gradients:
            remarks.append("its gradients could not be compared")
        return Line(self.name, "served", layouts, self.calls - calls, "; ".join(remarks))

    def _count(self) -> None:
        if count_call():
            self.calls += 1

    def _reason_to_leave(self, arguments: tuple[Any, ...], named: Mapping[str, Any], finding: Finding) -> str:
        """Why the original has to answer a call, or nothing."""
        signature = self.signature
        if not self.is_active:
            return "the patch is undone"
        if self.differs:
            return DIFFERS
        if len(arguments) > len(signature.names) or any(name not in named for name in signature.names):
            return "it is called with other arguments"
        for name, default in signature.others.items():
            if named[name] is not default and not _equal(named[name], default):
                return f"{name} is given"
        value, locations, weights = (named[signature.roles[role]] for role in ("value", "locations", "weights"))
        first = value[0] if isinstance(value, list | tuple) and value else value
        if not all(hasattr(tensor, "ndim") for tensor in (first, locations, weights)):
            return "it is called with what is no tensor"
        if not serves(first):
            return "its device has no kernels"
        layout = signature.layout(named, finding.of_tensors)
        if self.receivers is not None and not finding.is_verified:
            return "an object that could not be compared"
        if layout not in finding.layouts:
            return f"unknown layout: {layout}" if finding.layouts else finding.problem
        if not self.is_verified and (torch.compiler.is_compiling() or _is_capturing()):
            return "to be compared at its first call, outside of torch.compile and CUDA graphs"
        return ""

    def _first_call(self, named: Mapping[str, Any], layout: Layout) -> Any:
        """Compare with the original, which could not run where it was found."""
        ours = _operator(self.signature, named, layout, self.finding.layouts[layout])
        try:
            with torch.no_grad():
                theirs = self.signature.call(self.original, named)
        except Exception as error:
            self.finding.problem = f"the original raised {type(error).__name__}: {error}"
            self.is_verified = True
            self._count()
            return ours
        if not ours.norm() > 0:  # nothing can be seen there
            return self.signature.call(self.original, named)
        self.is_verified = True
        tolerance = FIRST_CALL_TOLERANCE.get(ours.dtype, TOLERANCE_16_BIT)
        if theirs.shape == ours.shape and (theirs - ours).norm() <= tolerance * ours.norm():
            self.finding.problem = ""
            self._count()
            return ours
        self.differs = True
        self.left[DIFFERS] += 1
        warnings.warn(f"cupy_msda does not serve {self.name}: {DIFFERS}", stacklevel=3)
        return self.signature.call(self.original, named)


class CompiledOperator:
    """A function of a compiled extension, served on devices with kernels.

    Attributes
    ----------
    name, calls
        As of :class:`Served`.
    """

    def __init__(self, name: str, ours: Callable[..., Any], original: Callable[..., Any]) -> None:
        self.name, self.ours, self.original = name, ours, original
        self.calls = 0
        self.left: Counter[str] = Counter()
        self.is_active = True

    def __call__(self, value: Tensor, *arguments: Any, **named: Any) -> Any:
        if not self.is_active or not serves(value):
            self.left["its device has no kernels"] += 1
            return self.original(value, *arguments, **named)
        if count_call():
            self.calls += 1
        return self.ours(value, *arguments, **named)

    def line(self, calls: int, left: Counter[str]) -> Line:
        """As of :class:`Served`."""
        remarks = "; ".join(_left_calls(self.left - left))
        return Line(self.name, "served", "the compiled operator, by its parameters", self.calls - calls, remarks)


def _operator(signature: Signature, named: Mapping[str, Any], layout: Layout, meaning: Meaning) -> Tensor:
    if not meaning.has_gradient and torch.is_grad_enabled():
        with torch.no_grad():
            return _operator(signature, named, layout, meaning)
    call = signature.samples(named, layout)
    locations, weights = agreed_dtypes(call.value, call.locations, call.weights)
    if "interpolation" in meaning.options:  # the nearest pixel has no gradient for locations
        locations = locations.detach()
    starts = call.starts if meaning.uses_starts else None
    return ms_deform_attn(
        call.value, call.shapes, starts, locations, weights, num_points=call.num_points, **meaning.options
    )


def _left_calls(since: Counter[str]) -> list[str]:
    return [f"{count} calls went to the original: {reason}" for reason, count in since.items()]


def _equal(given: Any, default: Any) -> bool:
    return type(given) is type(default) and isinstance(given, bool | int | float | str) and given == default


def _is_capturing() -> bool:
    """Whether a CUDA graph is recorded: what is compared would have to be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
