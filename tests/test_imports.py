"""Importing the package imports NumPy alone, and the rooms depend on each other one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cupy_msda"
FRAMEWORKS = ("cupy", "torch", "jax", "matplotlib", "PIL", "ml_dtypes")
# Who may import whom inside the package: only rooms further down this list.
ROOMS = (
    "__main__", "demo", "environment", "golden", "torch", "__init__", "api", "cuda", "cpu", "kernels", "plan",
    "problem", "interop", "dlpack",
)  # fmt: skip


def imports(path):
    """(module, is it inside the package) for every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name, True) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0], False


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_data_goes_one_way(path):
    for module, inside in imports(path):
        if inside and module in ROOMS:
            assert ROOMS.index(module) > ROOMS.index(path.stem), f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_only_torch_py_imports_torch(path):
    found = {module for module, inside in imports(path) if not inside}
    assert "torch" not in found or path.stem == "torch"
    assert not found & {"cupy", "jax"}
    if path.stem in ("problem", "plan", "dlpack"):
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
