"""Importing the package imports NumPy alone, and the rooms depend on each other one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "cupy_msda"
FRAMEWORKS = ("cupy", "torch", "jax", "matplotlib", "PIL", "ml_dtypes", "tqdm")
# Who may import whom inside the package: only rooms further down this list.
ROOMS = (
    "__main__", "demo", "environment", "golden", "torch", "__init__", "ahead", "api", "cuda", "backward", "launch",
    "aside", "cpu_front", "cpu", "cpu_forward", "cpu_backward", "cpu_cells", "cpu_rows", "kernels", "plan_backward",
    "plan", "problem", "arrays", "dlpack",
)  # fmt: skip
TORCH_ROOMS = (
    "extension", "transformers", "mmcv", "patches", "__init__", "modules", "front_end", "functional",
    "front_operators", "operators", "quick", "compositions",
)  # fmt: skip
FILES = sorted(PACKAGE.glob("*.py"))
TORCH_FILES = sorted((PACKAGE / "torch").glob("*.py"))


def imports(path):
    """(module, levels up to the package it is looked for in, 0 outside) for every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name, node.level) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0], 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_data_goes_one_way(path):
    for module, level in imports(path):
        if level and module in ROOMS:
            assert ROOMS.index(module) > ROOMS.index(path.stem), f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", TORCH_FILES, ids=lambda p: p.stem)
def test_data_goes_one_way_in_torch(path):
    for module, level in imports(path):
        if level == 1:
            assert TORCH_ROOMS.index(module) > TORCH_ROOMS.index(path.stem), f"{path.stem} imports {module}"
        elif level == 2:
            assert ROOMS.index(module) > ROOMS.index("torch"), f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", FILES + TORCH_FILES, ids=lambda p: p.stem)
def test_only_the_torch_room_imports_torch(path):
    found = {module for module, level in imports(path) if level == 0}
    assert "torch" not in found or path in TORCH_FILES
    assert not found & {"cupy", "jax"}
    if path.stem in ("problem", "plan", "plan_backward", "dlpack"):
        assert not found & set(FRAMEWORKS)


def output_of(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.strip()


def test_import_loads_no_framework():
    code = f"import cupy_msda, sys; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    assert output_of(code) == "[]"


def test_numpy_call_loads_no_framework():
    code = (
        "import numpy as np, sys, cupy_msda;"
        "out = cupy_msda.ms_deform_attn(np.ones((1, 6, 1, 2)), [(2, 3)], None, np.full((1, 1, 1, 1, 1, 2), 0.5),"
        " np.ones((1, 1, 1, 1, 1)));"
        f"print(out.tolist(), [m for m in {FRAMEWORKS!r} if m in sys.modules])"
    )
    assert output_of(code) == "[[[1.0, 1.0]]] []"
