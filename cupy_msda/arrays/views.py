"""One array as the operator sees it: an address and a layout, without its framework's own type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .dlpack import contiguous_strides

if TYPE_CHECKING:
    from .frameworks import Framework

# Kind ("cpu" or "cuda") and index of a device.
Device = tuple[str, int]
_ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def item_size(dtype: str) -> int:
    """Bytes of one element of a dtype that the operator supports."""
    return _ITEM_SIZE[dtype]


@dataclass(frozen=True)
class View:
    """Address, shape, strides in elements, dtype and device of one array.

    `array` is the caller's. Together with `capsule`, which a DLPack producer returned, it keeps the memory alive.
    """

    data: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device
    framework: Framework
    array: Any = field(repr=False)
    capsule: Any = field(default=None, repr=False)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = contiguous_strides(self.shape)
        dimensions = zip(self.shape, self.strides, expected, strict=True)
        return 0 in self.shape or all(n == 1 or stride == needed for n, stride, needed in dimensions)
