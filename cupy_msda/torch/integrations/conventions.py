"""The calling conventions of multi-scale deformable attention in models: parameters by name, and layouts of tensors.

A function is taken for a candidate by its name and by the names of its parameters; which layouts it takes is found out
by :mod:`.probe`, and what it computes as well.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In names of functions, autograd functions and layers. Self-attention of Deformable DETR has it from the model alone.
NAME = re.compile(r"deform(?!able_?detr)\w*att", re.IGNORECASE)
# What a parameter is, by its names in the code bases. `sizes` are level sizes as numbers, `shapes` may be a tensor.
ROLES = {
    "value": ("value",),
    "shapes": ("value_spatial_shapes", "spatial_shapes", "input_spatial_shapes", "value_shapes"),
    "sizes": ("value_spatial_shapes_hw", "value_spatial_shapes_list"),
    "starts": ("value_level_start_index", "level_start_index", "input_level_start_index"),
    "locations": ("sampling_locations", "sampling_loc"),
    "weights": ("attention_weights", "attn_weight", "attn_weights"),
    "num_points": ("num_points_list",),
    "im2col_step": ("im2col_step",),
}
REQUIRED = ("value", "shapes", "locations", "weights")
# Parameters that choose between documented ways of computing or of handing over, and their values.
CHOICES = {"method": ("default", "discrete"), "value_shape": ("default", "reshape")}

# Layouts of value, in the notation of the contract.
PIXELS_FIRST, HEADS_FIRST, PER_LEVEL = "[N, S, M, D]", "[N, M, D, S]", "L times [N, M, D, H*W]"


class Layout(NamedTuple):
    """The form of one call.

    Attributes
    ----------
    value : str
        PIXELS_FIRST, HEADS_FIRST or PER_LEVEL.
    locations_by_level, weights_by_level : bool
        Whether levels and points are two axes, [..., L, P], or one, [..., L*P].
    choices : tuple
        The values of the parameters of :data:`CHOICES`, in their order there.
    """

    value: str
    locations_by_level: bool
    weights_by_level: bool
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        points = {True: "L, P", False: "L*P"}
        parts = [f"value {self.value}", f"locations [N, Q, M, {points[self.locations_by_level]}, 2]"]
        parts.append(f"weights [N, Q, M, {points[self.weights_by_level]}]")
        return ", ".join([*parts, *map(str, self.choices)])


class Samples(NamedTuple):
    """A call in the contract's terms; `num_points` is None where levels and points are two axes."""

    value: Tensor
    shapes: Any
    starts: Any
    locations: Tensor
    weights: Tensor
    num_points: tuple[int, ...] | None


@dataclass(frozen=True)
class Signature:
    """The parameters of a candidate.

    Attributes
    ----------
    names, keywords : tuple of str
        Parameters that are given by position or by name, with the receiver of a method, and those by name only.
    roles : mapping
        From a role to the name of its parameter.
    choices : tuple of str
        Parameters of :data:`CHOICES` that it has.
    others : mapping
        Parameters without a role, and their defaults. A call that gives them another value is not understood.
    defaults : mapping
        The defaults of all parameters that have one.
    """

    names: tuple[str, ...]
    keywords: tuple[str, ...]
    roles: Mapping[str, str]
    choices: tuple[str, ...]
    others: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def is_extension(self) -> bool:
        """Whether the parameters are those of Deformable DETR's extension, whose layout is known."""
        return {"starts", "im2col_step"} <= self.roles.keys() and not self.choices and "num_points" not in self.roles

    def by_name(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by the names of their parameters."""
        return {**self.defaults, **dict(zip(self.names, arguments, strict=False)), **named}

    def call(self, function: Callable[..., Any], named: Mapping[str, Any]) -> Any:
        """Call by position, as models do: a decorator may hand nothing else on."""
        return function(*(named[name] for name in self.names), **{name: named[name] for name in self.keywords})

    def given(self, named: Mapping[str, Any], role: str) -> Any:
        """The argument in a role, or None."""
        return named.get(self.roles[role]) if role in self.roles else None

    def layout(self, named: Mapping[str, Any], of_tensors: str) -> Layout:
        """The form of a call; `of_tensors` is the layout of a value that is one tensor."""
        value = PER_LEVEL if isinstance(named[self.roles["value"]], list | tuple) else of_tensors
        locations, weights = named[self.roles["locations"]], named[self.roles["weights"]]
        choices = tuple(named[name] for name in self.choices)
        return Layout(value, locations.ndim == 6, weights.ndim == 5, choices)

    def samples(self, named: Mapping[str, Any], layout: Layout) -> Samples:
        """The arguments of a call in the contract's terms. Nothing is copied but a value that is in parts."""
        value, locations = named[self.roles["value"]], named[self.roles["locations"]]
        weights = named[self.roles["weights"]]
        sizes, points = self.given(named, "sizes"), self.given(named, "num_points")
        shapes = named[self.roles["shapes"]] if sizes is None else sizes
        if layout.value == PER_LEVEL:
            value = torch.cat(list(value), -1)
        if layout.value != PIXELS_FIRST:
            value = value.permute(0, 3, 1, 2)
        if points is not None:
            locations = locations.flatten(3, 4) if layout.locations_by_level else locations
            weights = weights.flatten(3, 4) if layout.weights_by_level else weights
            points = tuple(points)
        else:
            levels = (len(shapes), -1)
            locations = locations if layout.locations_by_level else locations.unflatten(3, levels)
            weights = weights if layout.weights_by_level else weights.unflatten(3, levels)
        return Samples(value, shapes, self.given(named, "starts"), locations, weights, points)


def read_signature(function: Callable[..., Any], is_method: bool = False) -> Signature | str:
    """The parameters of a candidate, or why they follow no documented pattern.

    A method has a receiver as its first parameter, and so has the forward of an autograd function.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
        of_wrapper = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return "its parameters are not known"
    # A decorator may have parameters of its own.
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {p.name for p in parameters}
    parameters += [p for p in of_wrapper if p.name not in known and p.kind not in several]
    receiver = tuple(p.name for p in parameters[:1]) if is_method else ()
    parameters = parameters[len(receiver) :]
    if any(p.kind in (*several, p.POSITIONAL_ONLY) for p in parameters):
        return "it takes parameters without names"
    names = [p.name for p in parameters]
    keywords = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    by_name = {name: role for role, names in ROLES.items() for name in names}
    roles = {by_name[name]: name for name in names if name in by_name}
    if missing := [role for role in REQUIRED if role not in roles]:
        wanted = ", ".join(ROLES[role][0] for role in missing)
        return f"it has no parameter {wanted} (other names: docs/models.md), but ({', '.join(names)})"
    choices = tuple(name for name in names if name in CHOICES)
    others = {p.name: p.default for p in parameters if p.name not in by_name and p.name not in CHOICES}
    if unknown := [name for name, default in others.items() if default is inspect.Parameter.empty]:
        return f"it demands {' and '.join(unknown)}, which is in no documented pattern"
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    by_position = (*receiver, *(name for name in names if name not in keywords))
    return Signature(by_position, keywords, roles, choices, others, defaults)
