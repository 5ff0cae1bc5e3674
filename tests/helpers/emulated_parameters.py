"""What the kernels expect of the addresses of their parameters: there where they are read, and aligned for vectors."""

from typing import NamedTuple

from cupy_msda.arrays import item_size
from cupy_msda.call import accumulator_of

# Null where nothing reads or writes it, which only the launch knows.
_OPTIONAL = {"queue", "chunk_sums", "of_locations", "of_weights"}
# Read or written by vectors of channels, where the kernel has these.
_BY_CHANNELS = {"value", "output", "grad_output", "grad_value"}
_PAIRS = {"locations", "offsets"}


def _item_size(parameter, axes):
    """Bytes of an element, or 1 of what is no number."""
    value = axes.get("value_dtype", "float32")
    dtypes = {
        "value_t": value,
        "acc_t": accumulator_of(value),
        "location_t": axes.get("location_dtype"),
        "reference_t": axes.get("reference_dtype"),
        "float": "float32",
    }
    dtype = dtypes.get(parameter.type.removeprefix("const ").removesuffix("*"))
    return item_size(dtype) if dtype else 1


def _needed(parameter, axes):
    if parameter.name == "lengths":
        return bool(axes.get("ragged"))
    if parameter.name == "references":
        return bool(axes.get("reference_coordinates"))
    return axes.get(parameter.name, not parameter.name.startswith("grad_")) and parameter.name not in _OPTIONAL


def _alignment(parameter, axes):
    size = _item_size(parameter, axes)
    if parameter.name in _BY_CHANNELS:
        return min(16, size * axes.get("vec", 1))
    return size * (2 if parameter.name in _PAIRS else 1)


class Requirement(NamedTuple):
    """Whether an array must be there, and the bytes that its address must be a multiple of."""

    needed: bool
    alignment: int

    def check(self, what, address):
        what = f"{what} of {address:#x}"
        assert address or not self.needed, f"{what}: expected an address"
        assert address % self.alignment == 0, f"{what}: expected a multiple of {self.alignment}"


def requirements(spec):
    """Of each parameter that is an array, by its name."""
    axes = spec.config()
    arrays = [parameter for parameter in spec.parameters if parameter.is_array]
    return {one.name: Requirement(_needed(one, axes), _alignment(one, axes)) for one in arrays}
