"""The drawn changes: which there are, that each is a change of the code, and that no line is preferred."""

import ast
import subprocess
from collections import Counter

import pytest

from tests.mutation import __main__ as command_line
from tests.mutation import cuda_operators, python_operators
from tests.mutation.mutant import ROOT, Mutant, draw

PYTHON = '''
def plan(sizes, cached, key):
    """Docstring: 1 + 1."""
    if sizes.P < 4 and not sizes.ragged:
        cached[(sizes.strides, sizes.dtype)] = launch(sizes.N, sizes.M, wide=sizes.wide)
    total += min(sizes.Q, 2) // 3
    raise ValueError(f"expected {1 + 1}")
'''
CUDA = """
// a comment: 1 + 1
#if MSDA_PTX
    asm_add(x, 1 + 1);
#else
    if (i < n && !idle) total += (long long)width * min(x, y);
    __syncthreads();
#endif
"""


def changes(module, text):
    return {(mutant.operator, mutant.before, mutant.after) for mutant in module.mutants_of("file", text)}


@pytest.mark.parametrize(
    "change",
    [
        ("comparison", " < ", " <= "),
        ("dropped operand", "sizes.P < 4 and not sizes.ragged", "((sizes.P < 4))"),
        ("dropped not or minus", "not sizes.ragged", "sizes.ragged"),
        ("dropped part of a key", "(sizes.strides, sizes.dtype)", "(sizes.strides,)"),
        ("swapped arguments", "sizes.N, sizes.M", "sizes.M, sizes.N"),
        ("argument None", "wide=sizes.wide", "wide=None"),
        ("min and max", "min", "max"),
        ("arithmetic", " // ", " * "),
        ("constant", "4", "5"),
        ("dropped statement", "total += min(sizes.Q, 2) // 3", "pass"),
        ("dropped statement", 'raise ValueError(f"expected {1 + 1}")', "pass"),
    ],
    ids=lambda change: change[0],
)
def test_python_is_changed(change):
    assert change in changes(python_operators, PYTHON)


@pytest.mark.parametrize(
    "change",
    [
        ("comparison", "<", "<="),
        ("dropped operand", "&& !idle", ""),
        ("width of a cast", "long long", "int"),
        ("swapped arguments", "x, y", "y, x"),
        ("min and max", "min", "max"),
        ("negated condition", "i < n && !idle", "!(i < n && !idle)"),
        ("arithmetic", "+=", "-="),
        ("dropped barrier", "__syncthreads();", ";"),
    ],
    ids=lambda change: change[0],
)
def test_cuda_is_changed(change):
    assert change in changes(cuda_operators, CUDA)


@pytest.mark.parametrize(("module", "text"), [(python_operators, PYTHON), (cuda_operators, CUDA)])
def test_comments_messages_and_ptx_stay(module, text):
    lines = text.splitlines()
    kept = {number for number, line in enumerate(lines, 1) if "1 + 1" in line and "raise" not in line}
    assert not kept & {mutant.line for mutant in module.mutants_of("file", text)}


def test_python_mutants_are_programs():
    text = (ROOT / "cupy_msda" / "torch" / "fast_path.py").read_text()
    for mutant in python_operators.mutants_of("fast_path.py", text):
        changed = mutant.applied(text)
        assert changed != text
        ast.parse(changed)


def test_a_draw_takes_each_line_once_before_any_twice():
    mutants = [Mutant("file", line, 0, f"operator {n}", "a", "b") for line in range(5) for n in range(line + 1)]
    drawn = draw(mutants, seed=3)
    assert Counter(mutant.line for mutant in drawn[:5]) == Counter(range(5))
    assert sorted(drawn, key=str) == sorted(mutants, key=str)
    assert drawn == draw(mutants, seed=3)
    assert drawn != draw(mutants, seed=4)


def test_a_mutant_of_another_text_is_refused():
    (mutant,) = (m for m in python_operators.mutants_of("file", PYTHON) if m.operator == "min and max")
    with pytest.raises(LookupError, match="is not the file"):
        mutant.applied(f"#{PYTHON}")


def test_mutants_of_changed_lines(tmp_path, monkeypatch):
    """Against the revision before a line was added, changed or removed."""

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "cupy_msda/a.py"
    source.parent.mkdir()
    (tmp_path / "cuda_src").mkdir()
    source.write_text("a = 1\nb = 2\nc = 3\nd = 4\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "before")
    source.write_text("a = 1\nb = 5\nc = 3\nnew = 6\nd = 4\n")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.changed_lines("HEAD") == {"cupy_msda/a.py": {2, 4}}
    found = command_line.drawn("python", 1, "HEAD")
    assert {mutant.line for mutant in found} == {2, 4}
