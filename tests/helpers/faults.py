"""Faults that tests plant into the CUDA sources."""

from typing import NamedTuple

from cupy_msda.cuda import kernels


class Fault(NamedTuple):
    """A fault of a kernel: a text that its source has once, and what it becomes."""

    kernel: str
    text: str
    replacement: str

    def planted(self):
        """The source of the kernel with the fault.

        What a source no longer has cannot be planted: a LookupError, which no test takes for a fault that is caught.
        """
        source = kernels.source(self.kernel)
        if (found := source.count(self.text)) != 1:
            raise LookupError(f"{self.kernel}: expected once in the source, found {found} times: {self.text!r}")
        return source.replace(self.text, self.replacement)
