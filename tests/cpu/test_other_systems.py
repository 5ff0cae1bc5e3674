"""The NumPy and torch paths and the command line without what only Linux has, as on macOS and Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Other packages are imported before that: they have their own ways on these systems.
WITHOUT_LINUX = """
import builtins, io, os, signal, sys, tempfile
import numpy as np
{imports}
for name in (
    "sched_getaffinity", "register_at_fork", "fork", "forkpty", "uname", "getuid", "geteuid", "getloadavg", "sysconf",
    "posix_fallocate", "memfd_create", "mkfifo", "chown", "killpg", "setsid", "get_terminal_size",
):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGPIPE", "SIGKILL", "SIGHUP", "SIGALRM", "alarm", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
opened = io.open

def without_linux(file, *arguments, **named):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(file)
    return opened(file, *arguments, **named)

builtins.open = io.open = without_linux
{code}
"""
NUMPY = """
import cupy_msda

value, locations, weights = np.ones((3, 6, 2, 4)), np.full((3, 900, 2, 1, 2, 2), 0.5), np.ones((3, 900, 2, 1, 2))
arguments = (value, [(2, 3)], None, locations, weights)
output = cupy_msda.ms_deform_attn(*arguments)
grads = cupy_msda.ms_deform_attn_backward(*arguments, np.ones_like(output), 64)
print(output.mean(), *(grad.shape for grad in grads))
"""
TORCH = """
from cupy_msda.torch import MSDeformAttn, ms_deform_attn, patch

layer = MSDeformAttn(16, 2, 2, 3)
with patch(layer):
    output = layer(torch.rand(2, 5, 16), torch.rand(2, 5, 2, 2), torch.rand(2, 54, 16), [(6, 7), (3, 4)], None)
output.sum().backward()
print(tuple(output.shape), layer.value_proj.weight.grad.isfinite().all().item())
"""
COMMANDS = """
from cupy_msda.__main__ import main

print(main(["info"]), main(["demo", "--backend", "cpu", "--out", tempfile.mkdtemp() + "/out.png"]))
"""


def run(imports, code):
    program = WITHOUT_LINUX.format(imports=imports, code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_numpy_path():
    assert run("", NUMPY) == "2.0 (3, 6, 2, 4) (3, 900, 2, 1, 2, 2) (3, 900, 2, 1, 2)"


def test_the_torch_functions():
    pytest.importorskip("torch")
    assert run("import torch", TORCH) == "(2, 5, 16) True"


def test_the_commands():
    pytest.importorskip("matplotlib")
    assert run("import matplotlib.pyplot, PIL.Image", COMMANDS) == "0 0"
