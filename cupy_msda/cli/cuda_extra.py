"""Which of the extras ``cuda12`` and ``cuda13`` goes with the torch of this environment."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

#: The oldest driver of each extra, by the major version of CUDA.
DRIVERS = {12: 525, 13: 580}
_BY_DRIVER = f"cuda13 with a driver from {DRIVERS[13]} on, cuda12 with one from {DRIVERS[12]} on"


def describe() -> str:
    """The extra to install, and why."""
    version = cuda_of_torch()
    if version is None:
        return f"{_BY_DRIVER} (no torch for CUDA is installed)"
    major = int(version.partition(".")[0])
    if major not in DRIVERS:
        return f"none: torch is built for CUDA {version}, expected 12 or 13"
    return f"cuda{major}, because torch is built for CUDA {version}; the driver must be {DRIVERS[major]} or newer"


def cuda_of_torch() -> str | None:
    """``torch.version.cuda``, read from its file, because importing torch takes seconds; None without CUDA."""
    try:
        spec = importlib.util.find_spec("torch")
    except ValueError:  # something put a module without a specification into sys.modules
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
            value = getattr(node, "value", None)
            return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
    return None
