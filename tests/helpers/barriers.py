"""Every barrier and fence of cuda_src, found in the sources, and the sources without one of them."""

import functools
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from cupy_msda.cuda import kernels
from cupy_msda.cuda.specs import KERNELS

BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|__threadfence\(\);|__syncthreads_or(?=\()")


class Barrier(NamedTuple):
    """A barrier of a file of cuda_src: its number among those of the file, and its place in the text."""

    file: str
    number: int
    begin: int
    end: int

    def __str__(self):
        return f"{self.file} {self.number}"

    def removed(self, folder):
        """The sources without it, by kernel, of those that include the file. `folder` takes a copy of cuda_src."""
        shutil.copytree(kernels.source_folder(), folder, dirs_exist_ok=True)
        text = _text(self.file)
        (Path(folder) / self.file).write_text(text[: self.begin] + text[self.end :])
        found = {kernel: kernels.source_in(Path(folder), kernel) for kernel in KERNELS}
        return {kernel: text for kernel, text in found.items() if text != kernels.source(kernel)}


@functools.cache
def _text(file):
    return (kernels.source_folder() / file).read_text()


def all_barriers():
    folder = kernels.source_folder()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".cu", ".cuh"))
    found = ((name, enumerate(BARRIER.finditer(_text(name)))) for name in names)
    return [Barrier(name, number, *match.span()) for name, matches in found for number, match in matches]


def line_of_change(kernel, text):
    """The line, from 1 on, in which `text` differs from the source of the kernel."""
    pairs = zip(kernels.source(kernel).splitlines(), text.splitlines(), strict=True)
    return next(number for number, (one, other) in enumerate(pairs, 1) if one != other)
