"""What a kernel is made of: its compile-time axes, its parameters and its shared memory, each written once.

A :class:`KernelSpec` is one specialisation of one kernel. From it follow the head of the CUDA source (``struct
config``), the 64-bit words of a launch, the entry point of the emulator and the size of the shared memory. The specs
are in ``specs.py``, ``sorted_specs.py`` and ``naive_specs.py``. To add an axis, add a field there and use
``config::<field>`` in the CUDA source. To add a parameter, add a line to ``parameters`` there and the parameter to the
CUDA signature; of an array, say in ``indices`` or ``long_arrays`` how the kernel counts its elements.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from .gpu import Gpu
from .index_width import INT, LONG, Index, Sizes

# A value of an axis: a number, the points of each level, or a dtype by its name.
Axis = bool | int | str | tuple[int, ...]


class Parameter(NamedTuple):
    """A parameter of a kernel: its name and its C++ type without qualifiers of the pointer. It takes `words` words."""

    name: str
    type: str
    words: int = 1

    @property
    def is_array(self) -> bool:
        return self.type.endswith("*")


def parameters(*declarations: str) -> tuple[Parameter, ...]:
    """Parameters of one 64-bit word each, from their C++ declarations."""
    split = (declaration.rpartition(" ") for declaration in declarations)
    return tuple(Parameter(name, type_) for type_, _, name in split)


@dataclass(frozen=True, kw_only=True)
class AxisGroup:
    """Axes that belong together: the fields of a subclass, which may be groups themselves."""

    def axes(self) -> dict[str, Axis]:
        """The axes by name, those of groups among them."""
        found: dict[str, Axis] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= value.axes() if isinstance(value, AxisGroup) else {field.name: value}
        return found

    def derived(self) -> dict[str, Axis]:
        """Members of ``config`` that follow from the axes."""
        found: dict[str, Axis] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= value.derived() if isinstance(value, AxisGroup) else {}
        return found

    def with_axes(self, **changes: Axis) -> Self:
        """The same with other values on some axes, whatever group they are in."""
        unknown = changes.keys() - self.axes().keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}: expected axes of it, got {', '.join(sorted(unknown))}")
        new: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, AxisGroup):
                new[field.name] = value.with_axes(**{name: changes[name] for name in value.axes() if name in changes})
            elif field.name in changes:
                new[field.name] = changes[field.name]
        return dataclasses.replace(self, **new)


@dataclass(frozen=True, kw_only=True)
class KernelSpec(AxisGroup):
    """One specialisation of one kernel. Each kernel is a subclass; its fields are the axes of this kernel and no
    others.

    Attributes
    ----------
    kernel : str
        Name of the kernel. Its CUDA function is ``msda_<kernel>``.
    file : str
        Where the function is, in ``cuda_src``.
    parameters : tuple of Parameter
        In the order of the CUDA signature.
    threads : int
        Threads of a block.
    shared_bytes : int or None
        Dynamic shared memory of a block; None where it depends on more than the axes.
    fixed : mapping
        Members of ``config`` that shared headers read and on which this kernel has no choice.
    long_arrays : tuple of str
        The arrays whose elements are counted in 64 bits in every specialisation. :meth:`indices` has the others.
    leaves_l1 : bool
        Whether the driver is asked to leave the shared memory that the resident blocks do not need to the L1 cache.
    """

    kernel: ClassVar[str]
    file: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    fixed: ClassVar[dict[str, Axis]] = {}
    long_arrays: ClassVar[tuple[str, ...]] = ()
    leaves_l1: ClassVar[bool] = False

    @property
    def function(self) -> str:
        """Name of the CUDA function."""
        return f"msda_{self.kernel}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int | None:
        """Dynamic shared memory of a block; None where it depends on more than the axes."""
        return 0

    @property
    def min_blocks(self) -> int:
        """Blocks that the registers leave room for on a multiprocessor."""
        return int(self.axes().get("min_blocks", 1))  # type: ignore[arg-type]

    def resident_blocks(self, gpu: Gpu) -> int:
        """Blocks on a multiprocessor at a time."""
        return min(self.min_blocks, gpu.resident_blocks(self.threads, self.shared_bytes or 0))

    @property
    def index_bits(self) -> int:
        """Bits of the kernels' `index_t`."""
        return LONG if self.axes().get("wide_index") else INT

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        """What the kernel counts in a type that may be too narrow.

        The elements of an array, those of one image, have its name. What follows from sizes is in the symbols of the
        contract.
        """
        return {}

    def exceeded(self, sizes: Sizes) -> dict[str, Index]:
        """Those of :meth:`indices` that do not fit into their type."""
        return {name: index for name, index in self.indices(sizes).items() if not index.fits}

    def words(self) -> tuple[int, ...]:
        """64-bit words of each parameter."""
        return tuple(parameter.words for parameter in self.parameters)

    def config(self) -> dict[str, Axis]:
        """The members of ``struct config``."""
        members = self.fixed | self.axes() | self.derived()
        if self.shared_bytes:
            members["shared_bytes"] = self.shared_bytes
        return members

    def __str__(self) -> str:
        return f"{self.kernel}[{', '.join(f'{name}={value}' for name, value in self.axes().items())}]"
