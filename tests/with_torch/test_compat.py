"""Private symbols of torch are used in one file, and calls are right without each of them."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cupy_msda.arrays import frameworks
from cupy_msda.torch import compat

ROOM = Path(compat.__file__).parent
REPOSITORY = ROOM.parent.parent
FILES = [path for path in sorted(ROOM.rglob("*.py")) if path.name != "compat.py"]


def private_symbols():
    """The paths below torch that compat.py looks up."""
    for node in ast.walk(ast.parse((ROOM / "compat.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_private":
            yield ast.literal_eval(node.args[0])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            yield f"autograd.{ast.unparse(node.args[0])}.{ast.literal_eval(node.args[1])}"


SYMBOLS = sorted(set(private_symbols()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_symbols_of_torch_are_in_compat_alone(path):
    tree, torch_names = ast.parse(path.read_text()), {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch" and not node.level:
            torch_names |= {alias.asname or alias.name for alias in node.names}
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [part for part in parts if part.startswith("_")], ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert ast.unparse(node).partition(".")[0] not in torch_names, ast.unparse(node)


# Runs in a child for each symbol, which is missing while compat.py is imported.
SCRIPT = """
import os, sys, traceback
from types import ModuleType, SimpleNamespace
import torch
torch.compile(torch.sin, backend="aot_eager")(torch.ones(1))  # imports the compiler once for all children

def check():
    from cupy_msda.torch import compat, decomposed, fast_path, ms_deform_attn, ms_deform_attn_fused
    from tests.helpers.torch_calls import assert_same, results, tensors

    def all_gradients(function):
        arguments = tensors("cpu", torch.float64, starts=True)
        return results(function, arguments)

    def fused(value, shapes, starts, locations, weights):
        references = torch.full((2, 5, 2, 2), 0.4, dtype=torch.float64)
        return ms_deform_attn_fused(value, shapes, starts, references, locations, weights)

    for function in (ms_deform_attn, fused):
        with decomposed():
            want = all_gradients(function)
        for _ in range(3):
            assert_same(all_gradients(function), want)
    value, shapes, starts, locations, weights, _ = tensors("cpu", torch.float64, starts=True)
    few = value[:1].detach(), locations[:1, :2].detach(), weights[:1, :2].detach()
    leaves = [tensor.clone().requires_grad_() for tensor in few]
    call = lambda v, x, w: ms_deform_attn(v, shapes, starts, x, w)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    # Transforms
    grads = torch.func.grad(lambda *a: call(*a).square().sum(), (0, 1, 2))(*few)
    assert_same(grads, torch.autograd.grad(call(*leaves).square().sum(), leaves))
    mapped = torch.vmap(lambda w: call(few[0], few[1], w))(torch.stack((few[2], few[2] * 2)))
    assert_same([mapped[1]], [call(few[0], few[1], few[2] * 2)])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(few[0], few[0])
        tangent = torch.autograd.forward_ad.unpack_dual(call(dual, *few[1:])).tangent
        assert_same([tangent], [call(*few)])
    # Modes and the profiler
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        seen = []
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))
    with Recorder() as recorder:
        call(*few)
    assert "cupy_msda.ms_deform_attn.default" in recorder.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*few)
    assert "cupy_msda::ms_deform_attn" in {event.key for event in profile.key_averages()}
    # Autocast
    half = [few[0].half(), few[1].float(), few[2].half()]
    with torch.autocast("cpu", torch.float16):
        output = call(*half)
    assert output.dtype is torch.float16
    assert_same([output.double()], [call(*few)], 1e-2)
    # Compilation, and shapes without data
    compiled = torch.compile(lambda *a: call(*a) * 2, fullgraph=True, backend="aot_eager")
    assert_same([compiled(*few)], [call(*few) * 2])
    meta = [tensor.to("meta") for tensor in (value, shapes, starts, locations[:, :, :1], weights)]
    try:
        torch.ops.cupy_msda.ms_deform_attn(*meta)
    except RuntimeError as error:
        assert "sampling_locations: expected shape [N, Q, M, L, P, 2]" in str(error), error
    else:
        raise AssertionError("a wrong shape is not refused")
    # What a machine without a GPU does not use
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=10 + device)
    if path == "_C._cuda_getCurrentRawStream":
        assert compat.current_stream(2) == 12
    if path == "_C._dynamo.guards.TensorGuards":
        assert compat.layout_check([value]) is None

def run():
    *parents, name = path.split(".")
    owner = torch
    for parent in parents:
        owner = getattr(owner, parent)
    held = getattr(owner, name, None)
    if hasattr(owner, name):
        delattr(owner, name)
    # Of the package, compat alone is imported without the symbol: torch itself may need it.
    import cupy_msda
    package = ModuleType("cupy_msda.torch")
    package.__path__ = [os.path.join(cupy_msda.__path__[0], "torch")]
    sys.modules[package.__name__] = package
    from cupy_msda.torch import compat
    assert compat._private(path) is None
    if held is not None:
        setattr(owner, name, held)
    del sys.modules[package.__name__]
    import cupy_msda.torch
    cupy_msda.torch.compat = compat
    assert cupy_msda.torch.fast_path.compat is compat
    check()

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(path, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def without_each():
    """Exit codes of the script by symbol, and what it wrote."""
    command = [sys.executable, "-c", SCRIPT, *SYMBOLS]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=600)
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_calls_are_right_without_a_private_symbol(without_each, symbol):
    codes, errors = without_each
    assert codes.get(symbol) == "0", errors


def test_the_stream_of_a_tensor_needs_no_private_symbol(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=10 + device))
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    assert frameworks.TorchFramework().stream(("cuda", 2)) == 12
    assert compat._public_stream(3) == 13
