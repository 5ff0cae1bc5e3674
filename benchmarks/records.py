"""The recorded results: which is the newest, where it was made, and the list of all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
# What the records of a name hold; a name stands for all that begin with it, and the longest counts.
CONTENTS = {
    "backward": "the backward by wanted gradients, deterministic, with skewed locations; memory",
    "benchmark": "forward and backward on the workloads, with floors and the other implementations",
    "checks": "tests and compute-sanitizer, before `gpu_tests`",
    "cpu": "forward and backward on a CPU",
    "detector": "training of a small detector",
    "front_end": "the fused operator against torch's softmax and arithmetic before the plain one",
    "fused": "the fused operator against torch's softmax and arithmetic before the plain one",
    "fuzz": "drawn calls, each compared with the contract (`python -m tests.fuzz`)",
    "gpu_tests": "all GPU tests, and compute-sanitizer",
    "grid": "drawn cells on a GPU, with the peers",
    "grid_cpu": "drawn cells on a CPU, before the compiled tier",
    "grid_numba": "drawn cells on a CPU, the compiled tier, with the peers",
    "grid_numpy": "drawn cells on a CPU, NumPy's tier, with the peers",
    "host_time": "host time of a torch call",
    "jax": "host time, kernel time and a training step in JAX and torch",
    "models": "whole models, original and patched",
    "mutation": "drawn changes of the sources, and which of them the tests find (`python -m tests.mutation`)",
    "overhead": "host time of a torch call",
    "release_jobs": "the jobs of the workflows, in fresh environments",
    "repaired": "tuning from a launch table that was spoilt on purpose",
    "removals": "the cost of five features, each taken out ([removals](decisions.md#removals))",
    "rooms": "the workloads before and after the sources were rewritten",
    "sanitizers": "every budgeted specialisation under compute-sanitizer",
    "scaling": "CPU time over Q, N and P",
    "served_models": "models of other packages, served and compared on a CPU",
    "several_gpus": "DDP, FSDP2 and compiled DDP of a served model, on one GPU and on two",
    "shapes": "other D, L and P",
    "startup": "the time of a first call",
    "tuning": "tuned cells against the default, measured in another process",
}


def files(patterns: Iterable[str]) -> list[Path]:
    """The recorded results whose names match one of `patterns`."""
    return [path for pattern in patterns for path in RESULTS.glob(pattern)]


def latest(patterns: Iterable[str], device: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The newest of these results, of a device (cpu, cuda) if one is given."""
    results = [(path, json.loads(path.read_text())) for path in files(patterns)]
    found = [(path, result) for path, result in results if device in (None, result["provenance"]["device"])]
    return max(found, key=lambda one: one[1]["provenance"]["date"])


def recorded(where: dict[str, Any], *paths: Path) -> str:
    """The sentence on date, files, machine and versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    machine = (
        f"{where['gpu']}, driver {where['driver'].partition(chr(10))[0]}, CUDA {where['cuda']}"
        if where["device"] == "cuda"
        else f"{where['cpu']}, {where['threads']} threads"
    )
    names = ", ".join(f"`benchmarks/results/{path.name}`" for path in paths)
    return f"Recorded {where['date'][:10]} in {names}: {machine}, {versions}."


def records_table() -> str:
    """Markdown: every record with its date, commit and machine."""
    lines = ["| file | what | date | commit | machine |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        where = result.get("provenance", result)
        machine = where.get("gpu") or where.get("cpu", "")
        cells = (path.name, content_of(path.stem), where["date"][:10], where.get("commit", "")[:7], machine)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def content_of(stem: str) -> str:
    """What the records of a name hold."""
    names = [name for name in CONTENTS if stem == name or stem.startswith(f"{name}_")]
    if not names:
        raise ValueError(f"{stem}.json: expected a name from {', '.join(CONTENTS)}; add it to CONTENTS in {__file__}")
    return CONTENTS[max(names, key=len)]
