"""What the kernels expect of the addresses of their parameters: there where they are read, and aligned for vectors."""

from cupy_msda.arrays import item_size
from cupy_msda.call import accumulator_of

# Null where nothing reads or writes it, which only the launch knows.
_OPTIONAL = {"counts", "list", "chunk_sums", "of_locations", "of_weights"}
# Read or written by vectors of channels, where the kernel has these.
_BY_CHANNELS = {"value", "output", "grad_output", "grad_value"}
_PAIRS = {"locations", "offsets"}


def _item_size(spec, parameter):
    """Bytes of an element, or 1 of what is no number."""
    axes = spec.config()
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


def needed(spec, parameter):
    """Whether the parameter of an array must be an address."""
    axes = spec.config()
    if parameter.name == "lengths":
        return bool(axes.get("ragged"))
    if parameter.name == "references":
        return bool(axes.get("reference_coordinates"))
    return axes.get(parameter.name, not parameter.name.startswith("grad_")) and parameter.name not in _OPTIONAL


def alignment(spec, parameter):
    """Bytes that the address must be a multiple of."""
    size = _item_size(spec, parameter)
    if parameter.name in _BY_CHANNELS:
        return min(16, size * spec.config().get("vec", 1))
    return size * (2 if parameter.name in _PAIRS else 1)


def check(spec, parameter, address):
    """AssertionError for an address that the kernel cannot take."""
    what = f"{spec.kernel}: {parameter.name} of {address:#x}"
    assert address or not needed(spec, parameter), f"{what}: expected an address"
    assert address % alignment(spec, parameter) == 0, f"{what}: expected a multiple of {alignment(spec, parameter)}"
