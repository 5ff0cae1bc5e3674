"""Calls of torch that differ in one thing, and what a call does on an emulated GPU: for tests of the plan cache."""

import contextlib
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from tests.helpers.emulated_gpu import Fill
from tests.helpers.emulated_torch import deterministic_algorithms

LEVELS = ((6, 7), (3, 4))


@dataclass(frozen=True)
class Layout:
    """A call without its numbers.

    `double`: all dtypes are float64. `elsewhere` is the tensor that is on the other device, and `broken` the one that
    has a query, a pixel or a level too many.
    """

    form: str = "plain"
    N: int = 2
    Q: int = 5
    M: int = 3
    D: int = 8
    P: int = 2
    levels: tuple = LEVELS
    starts: tuple | None = (0, 42)
    metadata: str = "int64"
    coordinates: int = 2
    reference_levels: int = 2
    value_dtype: torch.dtype = torch.float32
    sample_dtype: torch.dtype = torch.float32
    reference_dtype: torch.dtype = torch.float32
    double: bool = False
    strides: str = "contiguous"
    unaligned: str = ""
    device: int = 0
    elsewhere: str = ""
    im2col_step: object = 64
    deterministic: object = None
    switch: bool = False
    num_points: tuple | None = None
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: object = False
    of_value: bool = True
    of_locations: bool = True
    of_weights: bool = True
    of_references: bool = True
    no_grad: bool = False
    parameter: bool = False
    lengths: tuple | None = None
    broken: str = ""


# Other values of each field than those of Layout(). Some are refused, as they must be after every other call.
OTHERS = {
    "form": ("fused", "packed"),
    "N": (1, 3),
    "Q": (4, 10),
    "M": (1,),
    "D": (4, 0),
    "P": (3,),
    "levels": (((7, 6), (3, 4)), ((6, 7), (4, 3)), ((6, 7), (3, 3)), ((0, 7), (3, 4))),
    "starts": (None, (), (0, 41), (12, 0), (0, 50)),
    "metadata": (
        "int32",
        "list",
        "host int64",
        "host int32",
        "shapes on the host",
        "starts on the host",
        "shapes in int32",
        "starts in int32",
        "strided shapes",
        "strided starts",
    ),
    "coordinates": (4,),
    "reference_levels": (1,),
    "value_dtype": (torch.float16, torch.bfloat16, torch.float64),
    "sample_dtype": (torch.float16, torch.float64),
    "reference_dtype": (torch.float16,),
    "double": (True,),
    "strides": ("heads first", "channels", "wide"),
    "unaligned": ("value", "locations", "grad_output"),
    "device": (1,),
    "elsewhere": ("value", "locations", "weights", "references", "shapes", "starts", "metadata"),
    "im2col_step": (32, 0, 64.0, True),
    "deterministic": (False, True, 1),
    "switch": (True,),
    "num_points": ((2, 2), (1, 3)),
    "interpolation": ("nearest",),
    "padding_mode": ("border",),
    "align_corners": (True, 1),
    "of_value": (False,),
    "of_locations": (False,),
    "of_weights": (False,),
    "of_references": (False,),
    "no_grad": (True,),
    "parameter": (True,),
    "lengths": ((5, 5), (3, 0)),
    "broken": ("value", "locations", "weights", "references", "shapes"),
}
assert list(OTHERS) == [field.name for field in fields(Layout)]
# Only these say something different in these forms.
_IN_FUSED = ("coordinates", "reference_levels", "reference_dtype", "of_references")
# More bases: of calls that are not refused, and of metadata that a launch plan holds.
_BASES = {
    "interpolation": ({"of_locations": False, "of_references": False},),
    "sample_dtype": ({"value_dtype": torch.float16},),
    "reference_dtype": ({"value_dtype": torch.float16},),
    "levels": ({"metadata": "list"},),
    "starts": ({"metadata": "list"}, {"metadata": "list", "starts": None}),
}
# What a base is drawn from: calls that are not refused.
_DRAWN = {
    "Q": (5, 7), "metadata": ("int64", "list", "int32"), "starts": ((0, 42), None, (4, 0)),
    "strides": ("contiguous", "heads first"), "device": (0, 1), "deterministic": (None, True),
    "padding_mode": ("zeros", "border"), "of_value": (True, False), "of_weights": (True, False),
    "value_dtype": (torch.float32, torch.float16), "coordinates": (2, 4), "im2col_step": (64, 1),
}  # fmt: skip


def drawn(form, seed):
    """A layout of this form whose other fields are drawn."""
    rng = np.random.default_rng(seed)
    return Layout(form, **{name: values[rng.integers(len(values))] for name, values in _DRAWN.items()})


def pairs(form, name):
    """Two layouts that differ in this field alone, for several bases and each other value."""
    if form == "plain" and name in _IN_FUSED:
        return
    bases = [Layout(form), *(replace(Layout(form), **given) for given in _BASES.get(name, ()))]
    for base in (*bases, drawn(form, list(OTHERS).index(name))):
        for value in (getattr(Layout(), name), *OTHERS[name]):
            other = replace(base, **{name: value})
            if repr(other) != repr(base):  # True == 1, and one of them is refused
                yield base, other


class Call:
    """One call of a layout, with tensors of its own, whose names are in `tensors`."""

    def __init__(self, torch_gpu, layout):
        self.torch_gpu, self.layout = torch_gpu, layout
        N, Q, M, L = layout.N, layout.Q, layout.M, len(layout.levels)
        S = 54 + (layout.broken == "value")
        points = layout.num_points or (layout.P,) * L
        samples = (sum(points),) if layout.num_points else (L, layout.P)
        of_samples = {"locations": (*samples, 2), "weights": samples}
        if layout.form == "packed":
            of_samples = {"locations": (3 * sum(points),)}
        shapes = {name: (N, Q + (layout.broken == name), M, *shape) for name, shape in of_samples.items()}
        shapes["value"] = (N, S, M, layout.D)
        if layout.form != "plain":
            queries = Q + (layout.broken == "references")
            shapes["references"] = (N, queries, layout.reference_levels, layout.coordinates)
        shapes["grad_output"] = (N, Q, M * layout.D)
        self.tensors = {name: self._tensor(name, shape) for name, shape in shapes.items()}
        self.shapes, self.starts = self._metadata()

    def _tensor(self, name, shape):
        layout, put, device = self.layout, self.torch_gpu.put, self._device_of(name)
        dtypes = {"locations": layout.sample_dtype, "weights": layout.sample_dtype}
        dtype = (dtypes | {"references": layout.reference_dtype}).get(name, layout.value_dtype)
        tensor = torch.rand(shape).to(torch.float64 if layout.double else dtype)
        if name == "value" and layout.strides != "contiguous":
            axes = {"heads first": (1, 2), "channels": (2, 3), "wide": (0, 0)}[layout.strides]
            tensor = tensor.transpose(*axes).contiguous().transpose(*axes)
            if layout.strides == "wide":
                tensor = torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]
        if layout.unaligned == name:
            whole = put(torch.cat((tensor.flatten(), tensor.flatten()[:1])), device)
            tensor = whole[1:].view(tensor.shape)
        else:
            tensor = put(tensor, device)
        if layout.parameter:
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        return tensor.requires_grad_(getattr(layout, f"of_{name}", False))

    def _device_of(self, name):
        layout = self.layout
        moved = layout.elsewhere == name or (layout.elsewhere == "metadata" and name in ("shapes", "starts"))
        return 1 - layout.device if moved else layout.device

    def _metadata(self):
        layout = self.layout
        shapes = [list(level) for level in (*layout.levels, *[(1, 1)] * (layout.broken == "shapes"))]
        starts = None if layout.starts is None else list(layout.starts)
        if layout.metadata == "list":
            return shapes, starts
        found = []
        for name, numbers in (("shapes", shapes), ("starts", starts)):
            narrow = layout.metadata in ("int32", "host int32", f"{name} in int32")
            tensor = None if numbers is None else torch.tensor(numbers, dtype=torch.int32 if narrow else torch.int64)
            if layout.metadata not in ("host int64", "host int32", f"{name} on the host"):
                tensor = self.torch_gpu.put(tensor, self._device_of(name))
            if layout.metadata == f"strided {name}" and tensor is not None:
                tensor = self.torch_gpu.put(torch.stack((tensor, tensor), -1), layout.device)[..., 0]
            found.append(tensor)
        return found

    def run(self):
        """Output and gradients by their names."""
        layout, tensors = self.layout, self.tensors
        samples = (self.shapes, self.starts, tensors["locations"], tensors.get("weights"))
        options = {name: getattr(layout, name) for name in ("im2col_step", "deterministic", "num_points")}
        options |= {name: getattr(layout, name) for name in ("interpolation", "padding_mode", "align_corners")}
        options["query_lengths"] = layout.lengths and list(layout.lengths)[: layout.N]
        with deterministic_algorithms(layout.switch), torch.no_grad() if layout.no_grad else contextlib.nullcontext():
            if layout.form == "plain":
                output = ms_deform_attn(tensors["value"], *samples, **options)
            else:
                output = ms_deform_attn_fused(
                    tensors["value"], *samples[:2], tensors["references"], *samples[2:], **options
                )
            leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
            grads = ()
            if output.requires_grad:
                grads = torch.autograd.grad(output, list(leaves.values()), tensors["grad_output"])
        return {"output": output} | {f"of {name}": grad for name, grad in zip(leaves, grads, strict=False)}

    def outcome(self):
        """What a call does, without addresses: its results, its launches and its memsets; or how it is refused."""
        gpu = self.torch_gpu.gpu
        del gpu.launches[:], gpu.fills[:]
        try:
            results = self.run()
        except Exception as error:
            return type(error), str(error)
        gpu.check()
        places = {}
        for name, tensor in (self.tensors | results).items():
            allocation = gpu.memory.at(tensor.untyped_storage().data_ptr())
            places[allocation.address if allocation else 0] = name
        described = {
            name: (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
            for name, tensor in results.items()
        }
        done = [self._without_addresses(one, places) for one in (*gpu.launches, *gpu.fills)]
        return described, done

    def _without_addresses(self, one, places):
        gpu = self.torch_gpu.gpu
        on_side = one.stream != gpu.streams.current(one.device)
        if isinstance(one, Fill):
            return self._place(one.address, places), one.nbytes, on_side, one.device
        words = tuple(word if word < 2**32 else self._place(word, places) for word in one.words)
        return one.spec, one.grid, one.threads, one.shared_bytes, on_side, one.device, words, one.integers

    def _place(self, address, places):
        """Whose memory this is, and where in it."""
        allocation = self.torch_gpu.gpu.memory.at(address)
        return places.get(allocation.address, "of the call"), address - allocation.address
