"""Which launch configurations are worth a measurement: pure functions of a kernel's default and of the GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..gpu import Gpu
from ..kernel_spec import KernelSpec
from ..tuning.tuned import AXES, Axes

# Warps that a multiprocessor holds at a time: what occupancy and the registers of a thread follow from.
_RESIDENT_WARPS = (8, 12, 16, 20, 24, 32, 40, 48, 64)
# Blocks that are measured first.
_FIRST_BLOCKS = 16
# Fewer registers than this per thread spill in every kernel.
_FEWEST_REGISTERS = 32
_BLOCK_AXES = ("warps", "min_blocks")


def default_of(name: str, spec: KernelSpec) -> dict[str, int | str]:
    """The axes of `name` as a kernel has them that is planned without a measurement."""
    found = spec.axes()
    if "lane_groups" in found:
        found["lanes_per_query"] = int(found["lane_groups"]) * int(found["lanes"])  # type: ignore[arg-type]
    if name == "aggregated":
        found["aggregated_queries"] = int(found["query_tiles"]) * int(found["warps"]) * (32 // int(found["lanes"]))  # type: ignore[arg-type]
    if found.get("query_tiles") == 2:  # all samples of a query are unrolled then
        del found["unroll"]
    return {axis: found[axis] for axis, values in AXES[name].items() if found.get(axis) in values}  # type: ignore[misc]


def first(name: str, default: Axes, gpu: Gpu) -> list[Axes]:
    """What is measured first: the default, other blocks of it, and one other axis at a time; the nearest ones first."""
    blocks = [{**default, **block} for block in _blocks(name, default, gpu)[:_FIRST_BLOCKS]]
    others = [{**default, axis: value} for axis in _other_axes(name) for value in AXES[name][axis]]
    return _distinct([default, *others, *blocks])


def second(name: str, times: Mapping[tuple[tuple[str, int | str], ...], float], gpu: Gpu) -> list[Axes]:
    """What is measured next: the best blocks with the best values of the other axes, and what lies around the best."""
    ranked = [dict(key) for key in sorted(times, key=times.__getitem__)]
    best = ranked[0]
    combined = [
        {**block, axis: other[axis]}
        for block in ranked[:3]
        for other in ranked[:6]
        for axis in _other_axes(name)
        if axis in other
    ]
    around = [{**best, axis: value} for axis in _other_axes(name) for value in AXES[name][axis]]
    around += [{**best, **block} for block in _blocks(name, best, gpu)[:6]]
    return [axes for axes in _distinct([*combined, *around]) if frozen(axes) not in times]


def frozen(axes: Axes) -> tuple[tuple[str, int | str], ...]:
    """Axes as a key."""
    return tuple(sorted(axes.items()))


def _other_axes(name: str) -> list[str]:
    return [axis for axis in AXES[name] if axis not in _BLOCK_AXES]


def _blocks(name: str, default: Axes, gpu: Gpu) -> list[dict[str, int]]:
    """Blocks that the GPU holds, those of about as many resident warps as the default has first."""
    if "min_blocks" not in default:
        return []
    warps = int(default["warps"])
    resident = warps * int(default["min_blocks"])
    most = min(gpu.threads_per_multiprocessor, gpu.registers_per_multiprocessor // _FEWEST_REGISTERS) // 32
    found = []
    for per_block in (size for size in (warps // 2, warps, 2 * warps) if size in AXES[name]["warps"]):
        for held in sorted({*_RESIDENT_WARPS, resident}):
            blocks = held // per_block
            if held % per_block == 0 and held <= most and blocks <= gpu.blocks_per_multiprocessor:
                found.append({"warps": per_block, "min_blocks": blocks})
    found.sort(key=lambda block: abs(math.log(block["warps"] * block["min_blocks"] / resident)))
    return found


def _distinct(found: list[Axes]) -> list[Axes]:
    return list({frozen(axes): axes for axes in found}.values())
