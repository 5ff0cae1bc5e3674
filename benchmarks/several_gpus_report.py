"""The table of training on several GPUs, for docs/several_gpus.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "compiled": "compiled DDP"}


def several_gpus_table(record: Mapping[str, Any], where: str) -> str:
    """Markdown: images per second of each mode, how many times those of one process, and what else was shown."""
    rows = [one for one in record["records"] if "images_per_second" in one]
    single = {one["mode"]: one["images_per_second"] for one in rows if one["processes"] == 1}
    lines = [
        "| | processes | images per second | scaling efficiency | gradient error |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in sorted(rows, key=lambda one: (list(NAMES).index(one["mode"]), one["processes"])):
        speed, processes = one["images_per_second"], one["processes"]
        efficiency = f"{speed / (processes * single[one['mode']]):.0%}" if one["mode"] in single else ""
        cells = (NAMES[one["mode"]], processes, f"{speed:.1f}", efficiency, f"{one['gradient_error']:.0e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"{_sizes(rows)} {_first_call(record)}{_tests(record)}{where}"])


def _sizes(rows: list[Mapping[str, Any]]) -> str:
    found = {(one["images_per_process"], *one["size"]) for one in rows}
    images = ", ".join(f"{N} of {H} x {W}" for N, H, W in sorted(found))
    return (
        f"Images per process: {images}, float32. Gradient error: ||g - h|| / ||h||, where h are the gradients of one "
        "process that has all images."
    )


def _first_call(record: Mapping[str, Any]) -> str:
    found = [one for one in record["records"] if one["mode"] == "first call"]
    return "".join(
        f"The first call of {one['processes']} processes at once on {one['gpus']} GPUs, with {one['cached_before']} "
        f"kernels in the cache: {one['first_call_s']:.1f} s in the slowest; a later one "
        f"{1e3 * one['second_call_s']:.1f} milliseconds; the results differ by {one['largest_difference']:.0e}. "
        for one in found
    )


def _tests(record: Mapping[str, Any]) -> str:
    tests = record["tests"]
    return f"Tests that need two GPUs: {', '.join(tests['summary'])}. " if tests else ""
