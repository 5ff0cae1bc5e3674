"""Provenance of a result: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "cupy-msda",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "jax",
    "numpy",
    "torch",
    "triton",
    "torch-ms-deform-attn",
    "transformers",
)


def provenance(device: str) -> dict[str, Any]:
    """GPU, driver, CUDA, versions, commit and date."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("MSDA_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "max_clock_mhz": _output("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"),
            "cuda": torch.version.cuda,
        }
    else:
        found |= {"cpu": _cpu(), "threads": torch.get_num_threads()}
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip().partition("\n")[0]  # nvidia-smi prints a line per GPU; the first is used


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
