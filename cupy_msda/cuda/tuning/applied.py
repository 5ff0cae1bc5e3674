"""Looks up what tuning has set, and puts blocks and lanes into an entry of a launch table.

Other axes, such as query tiles and the way of a backward, are taken where they are planned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ...call import Problem, Wanted
from ..axes import VECTOR_BYTES
from ..gpu import Gpu
from ..launch_tables import Bounds, ForwardEntry
from .tuned import Axes

AnyBounds = TypeVar("AnyBounds", bound=Bounds)


def axes_of(name: str, problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted | None = None) -> Axes:
    """What the measured choices set. They are measured with whole vectors, and hold for these alone."""
    return gpu.choices.axes(name, problem, wanted) if alignment >= VECTOR_BYTES else {}


def block(entry: AnyBounds, axes: Axes) -> AnyBounds:
    """An entry with the measured axes of a block."""
    return replace(entry, **{axis: int(axes[axis]) for axis in ("warps", "min_blocks", "unroll") if axis in axes})


def forward(entry: ForwardEntry, axes: Axes) -> ForwardEntry:
    """An entry of the forward with measured axes. Lane groups do not share samples with masked neighbours."""
    entry = block(entry, axes)
    if "lanes_per_query" in axes and not entry.masked_neighbours:
        entry = replace(entry, lanes_per_query=int(axes["lanes_per_query"]))
    return entry
