"""An import stub in the environment: programs that nobody edits find the stand-in for a compiled extension.

Two files in the folder of installed packages: a ``.pth`` file, which Python reads when it starts, and the module that
it imports. That module is small and imports nothing until one of its names is imported.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

_STUB = "cupy_msda_extension_names"
_TEMPLATE = '''\
"""Written by `python -m cupy_msda.torch.extension`: importing one of NAMES gives cupy_msda. `--remove` deletes this."""

import sys

NAMES = {names!r}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in NAMES:
            return None
        from importlib.util import find_spec, spec_from_loader

        return spec_from_loader(name, self) if find_spec("cupy_msda") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        from cupy_msda.torch import extension

        sys.modules[module.__name__] = extension


sys.meta_path.insert(0, Finder())
'''


def folder() -> Path:
    """Where this environment has its packages."""
    return Path(sysconfig.get_path("purelib"))


def installed(where: Path) -> tuple[str, ...]:
    """The names that the stub of a folder has."""
    stub = where / f"{_STUB}.py"
    if not stub.exists():
        return ()
    for statement in ast.parse(stub.read_text()).body:
        if isinstance(statement, ast.Assign):
            return tuple(ast.literal_eval(statement.value))
    return ()


def write(where: Path, names: tuple[str, ...]) -> list[Path]:
    """Write a stub for these names and no others; without names, remove it. Returns its files."""
    stub, start = where / f"{_STUB}.py", where / f"{_STUB}.pth"
    if names:
        stub.write_text(_TEMPLATE.format(names=names))
        start.write_text(f"import {_STUB}\n")
    else:
        for file in (start, stub):
            file.unlink(missing_ok=True)
    return [stub, start]
