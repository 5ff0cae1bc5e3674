"""The README's snippets run as they stand, one after another."""

import re
from pathlib import Path

import pytest

from tests.helpers import backends

README = Path(__file__).parent.parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.gpu_if_present
def test_snippets_run():
    assert len(SNIPPETS) == 8
    names = {}
    for snippet in SNIPPETS:
        if "import cupy\n" in snippet and not backends.GPU:
            continue
        exec(compile(snippet, str(README), "exec"), names)
    assert names["output"].shape == (2, 100, 256)
    assert names["value"].grad is not None
    names["extension"].uninstall()


@pytest.mark.parametrize(
    "name",
    [
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "docs/demo.jpg",
        "benchmarks/results/benchmark.png",
        "benchmarks/results/backward.png",
        "benchmarks/results/fused.png",
        "benchmarks/results/models.png",
        "benchmarks/results/overhead.png",
        "benchmarks/results/detector.png",
        "benchmarks/results/scaling.png",
    ],
)
def test_linked_files_exist(name):
    assert (README.parent / name).is_file()
