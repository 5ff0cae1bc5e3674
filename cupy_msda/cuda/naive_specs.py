"""The kernels of ``naive.cu``: no axes but the dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .kernel_spec import KernelSpec, Parameter, parameters

# Members of the kernels' `naive_problem`, 64 bits each, in its order.
PROBLEM_WORDS = (
    "shapes", "starts", "points", "lengths", "N", "S", "M", "D", "K", "Q", "image_stride", "pixel_stride",
    "head_stride", "nearest", "border", "align_corners", "reference_coordinates", "reference_levels", "packed",
)  # fmt: skip
_PROBLEM = Parameter("p", "const naive_problem", words=len(PROBLEM_WORDS))


@dataclass(frozen=True, kw_only=True)
class NaiveSpec(KernelSpec):
    """A kernel of ``naive.cu``."""

    file: ClassVar[str] = "naive.cu"

    def __init_subclass__(cls) -> None:
        cls.long_arrays = tuple(one.name for one in cls.parameters if one.is_array)  # every index is a `long long`

    value_dtype: str
    location_dtype: str
    reference_dtype: str

    @property
    def threads(self) -> int:
        return 256


class NaiveForwardSpec(NaiveSpec):
    """The output."""

    kernel: ClassVar[str] = "naive_forward"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _PROBLEM,
        *parameters(
            "const value_t* value", "const location_t* locations", "const location_t* weights", "value_t* output"
        ),
    )


class NaiveBackwardSpec(NaiveSpec):
    """The gradients of value, locations and weights, added to arrays of zeros."""

    kernel: ClassVar[str] = "naive_backward"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _PROBLEM,
        *parameters(
            "const value_t* value",
            "const location_t* locations",
            "const location_t* weights",
            "const value_t* grad_output",
            "acc_t* grad_value",
            "acc_t* grad_locations",
            "acc_t* grad_weights",
        ),
    )


class NaiveMaterialiseSpec(NaiveSpec):
    """Locations and weights of a fused call."""

    kernel: ClassVar[str] = "naive_materialise"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _PROBLEM,
        *parameters(
            "const reference_t* references",
            "const location_t* offsets",
            "const location_t* logits",
            "acc_t* locations",
            "acc_t* weights",
        ),
    )


class NaiveFusedBackwardSpec(NaiveSpec):
    """The gradients of reference points, offsets and logits, from those of locations and weights."""

    kernel: ClassVar[str] = "naive_fused_backward"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _PROBLEM,
        *parameters(
            "const reference_t* references",
            "const location_t* offsets",
            "const acc_t* weights",
            "const acc_t* of_locations",
            "const acc_t* of_weights",
            "reference_t* grad_references",
            "location_t* grad_offsets",
            "location_t* grad_logits",
        ),
    )
