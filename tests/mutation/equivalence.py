"""Mutants that compile to what the original compiles to."""

from __future__ import annotations

import functools
import shutil
import tempfile
import types
from pathlib import Path

from cupy_msda.cuda import kernels
from tests.helpers import specialisations
from tests.kernels import machine_code

from .mutant import ROOT, Mutant

# The newest that the tests on a GPU run on, and the oldest, which has branches of its own.
ARCHITECTURES = (90, 75)


def is_equivalent(mutant: Mutant) -> bool:
    """Whether the bytecode, or the machine code of every budgeted kernel with the line, stays the same."""
    text = (ROOT / mutant.file).read_text()
    if not mutant.is_cuda:
        return _bytecode(text) == _bytecode(mutant.applied(text))
    name = mutant.file.removeprefix("cuda_src/")
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(shutil.copytree(ROOT / "cuda_src", Path(folder) / "cuda_src"))
        (changed / name).write_text(mutant.applied(text))
        return all(_same_code(spec, changed, arch) for arch in ARCHITECTURES for spec in _budgeted(arch))


@functools.cache
def _budgeted(architecture: int):
    return list(dict.fromkeys(specialisations.budgeted(architecture).values()))


def _same_code(spec, folder: Path, architecture: int) -> bool:
    sources = [kernels.source(spec.kernel), kernels.source_in(folder, spec.kernel)]
    if sources[0] == sources[1]:
        return True
    old, new = (
        machine_code.measure(kernels.prelude(spec) + source, tuple(specialisations.flags(architecture)), spec.function)
        for source in sources
    )
    return not machine_code.differs(old, new)


def _bytecode(text: str):
    return _plain(compile(text, "", "exec", dont_inherit=True))


def _plain(code: types.CodeType):
    constants = [_plain(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants, code.co_exceptiontable
