"""Rules of the rooms: which way imports go, what is pure, how large files and functions are, and which words they use.

A new room takes a place in LAYERS. A function with more than seven parameters, or a file of more than 400 lines, needs
an entry in the list of exceptions and a reason.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "cupy_msda"
FRAMEWORKS = ("cupy", "torch", "jax", "matplotlib", "PIL", "ml_dtypes", "tqdm")
# From top to bottom. A module imports its own room and lower layers; rooms of one layer do not import each other.
LAYERS = (
    ("__main__",),
    ("cli", "plot"),
    ("torch", "jax"),
    ("__init__",),
    ("explanation",),
    ("api", "cuda.warmup", "cuda.tuner"),
    ("cuda.workloads",),
    ("sizes",),
    ("validate",),
    ("options", "plausibility", "shapes"),
    ("cpu", "cuda"),
    ("call",),
    ("arrays",),
    ("requirements", "variables", "version"),
)
# These import the standard library and each other, and `arrays` for its types.
PURE = re.compile(
    r"call|cuda\.(axes|cost_model|gpu|heuristics|index_width|kernel_spec|lanes|launch_tables|naive_specs|plan"
    r"|plan_backward|reasons|sorted_heuristics|sorted_specs|specs|tuner\.(candidates|search)"
    r"|tuning\.(applied|file_format|tuned))"
    r"|arrays\.dlpack"
)
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(path for path in (ROOT / "cuda_src").rglob("*") if path.suffix in (".cu", ".cuh"))

MAX_LINES = 400
LONG_FILES: set[str] = set()
MAX_PARAMETERS = 7
# Public functions, whose parameters are the contract; and functions whose parameters a framework dictates.
MANY_PARAMETERS = {
    "api.ms_deform_attn",
    "api.ms_deform_attn_backward",
    "api.ms_deform_attn_fused",
    "api.ms_deform_attn_fused_backward",
    "jax.functional.ms_deform_attn",
    "jax.functional.ms_deform_attn_fused",
    "torch.autograd._Attention.forward",
    "torch.functional.ms_deform_attn",
    "torch.functional.ms_deform_attn_fused",
    "torch.mmcv._backward",
}
PRIVATE_WORDS = set(
    """
    ahead alone aside beside bin bins joined merged own piece pieces quick recall recipe recipes screened sliced
    together turn turns
    """.split()  # noqa: SIM905
)


def name_of(path: Path) -> str:
    """The name of a module inside the package, with dots; the package itself is ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def room_of(module: str) -> tuple[int, str]:
    """Layer and room of a module, by the longest entry that contains it."""
    found = [
        (len(room), layer, room)
        for layer, rooms in enumerate(LAYERS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    assert found, f"{module} has no layer"
    _, layer, room = max(found)
    return layer, room


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not is_type_checking(node):
            yield from run_time_nodes(node)


def modules_of(module: str, node: ast.ImportFrom) -> Iterator[str]:
    """The modules of this package that a relative import in `module` reads."""
    path = MODULES[module]
    package = path.relative_to(PACKAGE).parts[:-1]
    base = package[: len(package) - (node.level - 1)]
    target = [*base, *(node.module.split(".") if node.module else [])]
    for alias in node.names:
        full, parent = ".".join([*target, alias.name]), ".".join(target)
        yield full if full in MODULES else (parent or "__init__")


def imports_of(module: str, nodes: Iterator[ast.AST] | None = None) -> tuple[set[str], set[str]]:
    """Modules of this package, and top-level modules of others, that `module` imports."""
    inside, outside = set(), set()
    for node in nodes or run_time_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside |= set(modules_of(module, node))
        elif isinstance(node, ast.ImportFrom) and node.module:
            outside.add(node.module.partition(".")[0])
    return inside, outside


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    layer, room = room_of(module)
    for imported in imports_of(module)[0]:
        lower, other = room_of(imported)
        assert other == room or lower > layer, f"{module} imports {imported}"


def test_no_module_imports_itself_through_others():
    graph = {module: imports_of(module)[0] - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_room_of_a_framework_imports_it(module):
    room = module.partition(".")[0]
    outside = imports_of(module)[1]
    assert "torch" not in outside or room == "torch"
    assert "jax" not in outside or room == "jax"
    assert "cupy" not in outside  # arrays.require_cupy imports it where a call needs it
    if room not in ("torch", "jax"):
        at_import = imports_of(module, iter(ast.parse(MODULES[module].read_text()).body))[1]
        assert at_import <= {*sys.stdlib_module_names, "numpy", *(["numba"] if in_compiled_tier(module) else [])}
    assert "numba" not in outside or in_compiled_tier(module)


def in_compiled_tier(module: str) -> bool:
    return module.startswith("cpu.compiled")


@pytest.mark.parametrize("module", ["cpu.compiled.kernels", "cpu.compiled.front_end"])
def test_a_file_of_compiled_kernels_imports_no_other(module):
    """numba's cache is as old as the kernel's file, whatever has changed in others."""
    assert not imports_of(module)[0]


@pytest.mark.parametrize("module", [module for module in MODULES if PURE.fullmatch(module)])
def test_pure_module_imports_no_framework(module):
    inside, outside = imports_of(module)
    assert outside <= sys.stdlib_module_names
    assert all(PURE.fullmatch(name) or name == "arrays" for name in inside)


def test_pure_modules_exist():
    pure = {module for module in MODULES if PURE.fullmatch(module)}
    assert {"call", "arrays.dlpack", "cuda.plan"} <= pure


def test_only_kernels_compiles():
    users = {module for module, path in MODULES.items() if "RawModule" in path.read_text()}
    assert users == {"cuda.kernels"}


def output_of(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


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


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES or str(path.relative_to(ROOT)) in LONG_FILES, f"{lines} lines"


def functions_of(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{prefix}.{node.name}" if named else prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from functions_of(node, name)


def parameters_of(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in named if argument and argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("module", MODULES)
def test_functions_take_few_parameters(module):
    functions = functions_of(ast.parse(MODULES[module].read_text()), module)
    many = {name: len(parameters_of(node)) for name, node in functions if len(parameters_of(node)) > MAX_PARAMETERS}
    assert set(many) <= MANY_PARAMETERS, many


def test_exceptions_are_needed():
    """An entry whose function is gone or takes few parameters, or whose file is short, leaves the list."""
    long = {
        name
        for module, path in MODULES.items()
        for name, node in functions_of(ast.parse(path.read_text()), module)
        if len(parameters_of(node)) > MAX_PARAMETERS
    }
    assert long >= MANY_PARAMETERS
    assert all(len((ROOT / path).read_text().splitlines()) > MAX_LINES for path in LONG_FILES)


def words_of(identifier: str) -> set[str]:
    """The words of a name in snake_case or CamelCase."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_"))


def names_defined_in(path: Path) -> set[str]:
    """Names of files, functions, classes, parameters and variables."""
    names = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def identifiers_in(path: Path) -> set[str]:
    """Identifiers of a CUDA source, without its comments."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return {path.stem, *re.findall(r"[A-Za-z_]\w*", code)}


@pytest.mark.parametrize("path", [*FILES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_in_the_terms_of_the_field(path):
    """The glossary in docs/internals.md has the term for each private word."""
    names = names_defined_in(path) if path.suffix == ".py" else identifiers_in(path)
    private = {name for name in names if words_of(name) & PRIVATE_WORDS}
    assert not private, f"private words in {sorted(private)}"


@pytest.mark.parametrize("path", [*FILES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_measured_times_are_in_the_documentation(path):
    """Sources give the reason, docs/performance/ the number."""
    found = re.findall(r"\d ?(?:us|µs|microseconds|ms)\b.*", path.read_text())
    assert not found


def test_no_test_module_imports_another():
    names = {path.stem for path in TESTS if path.stem.startswith("test_")}
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not imported & names, f"{path.relative_to(ROOT)} imports {imported & names}"
