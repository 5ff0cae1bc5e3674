"""python docs/execute_notebooks.py [NAME...]: run the notebooks from top to bottom, and keep their outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run, and without times, which would differ in every run."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = KERNEL
    options = {"timeout": 300, "kernel_name": "python3", "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **options).execute()
    return notebook


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            nbformat.write(executed(path), path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
