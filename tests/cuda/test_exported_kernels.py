"""Exported forwards, run by a program in C without Python: the numbers of the package."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from cupy_msda.__main__ import main
from cupy_msda.cli.check import TOLERANCE
from cupy_msda.cuda import gpu
from tests.helpers import backends, exported_launcher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(exported_launcher.COMPILER is None, reason="needs a C compiler")]

LEVELS = ((24, 30), (12, 15), (6, 8))
TEXT = "levels=24x30,12x15,6x8"
SIZES = {
    "encoder": f"{TEXT} N=20",  # which fill a GPU, so that a warp takes several tiles of queries
    "decoder": f"{TEXT} Q=50",
    "points": f"{TEXT} Q=50 num_points=3,6,3",
    "border": f"{TEXT} Q=50 padding_mode=border",
    "ragged": f"{TEXT} Q=50 ragged=true",
    "fused": f"{TEXT} Q=50 reference_coordinates=2",
    "packed": f"{TEXT} Q=50 reference_coordinates=4 packed=true one_reference=true",
}
DTYPES = {"float32": "float32", "float16": "float16/float32", "bfloat16": "bfloat16"}
S, M, D = sum(h * w for h, w in LEVELS), 8, 32


@dataclasses.dataclass(frozen=True)
class Call:
    """Arrays by the names of ``cupy_msda_arguments``, the package's result in float64, and the sizes."""

    arrays: dict
    want: np.ndarray
    sizes: tuple[int, int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import cupy

    here = tmp_path_factory.mktemp("exported")
    architecture = int(cupy.cuda.Device(0).compute_capability)
    if architecture not in gpu.ARCHITECTURES:
        pytest.skip(f"sm_{architecture} is not in the list of architectures")
    sizes = [f"{name} {text}" for name, text in SIZES.items()]
    arguments = ["--sizes", *sizes, "--dtypes", *DTYPES.values(), "--arch", str(architecture), "--out", str(here)]
    assert main(["export-kernels", *arguments]) == 0
    return here


def drawn(name, dtype, N, Q):
    """A call of the sizes `name` in the dtypes that `dtype` stands for, and what the package makes of it."""
    value_dtype, _, location_dtype = DTYPES[dtype].partition("/")
    to_value, to_location = (
        np.dtype(ml_dtypes.bfloat16 if one == "bfloat16" else one) for one in (value_dtype, location_dtype or dtype)
    )
    rng = np.random.default_rng(5)
    points = (3, 6, 3) if name == "points" else (4, 4, 4)
    K, fused = sum(points), name in ("fused", "packed")
    arrays = {
        "value": rng.standard_normal((N, S, M, D)).astype(to_value),
        "spatial_shapes": np.array(LEVELS),
        "locations": rng.uniform(-0.1, 1.1, (N, Q, M, K, 2)).astype(to_location),
        "weights": rng.uniform(0, 0.2, (N, Q, M, K)).astype(to_location),
    }
    if fused:
        arrays["locations"] = (20 * arrays["locations"] - 10).astype(to_location)
        shape = (N, Q, 3, 2) if name == "fused" else (N, Q, 1, 4)
        arrays["references"] = rng.uniform(0.2, 0.8, shape).astype(to_location)
    if name == "ragged":
        arrays["query_lengths"] = np.array([Q, Q // 2] * N)[:N]
    options = {"num_points": points, "query_lengths": arrays.get("query_lengths")}
    options |= {"padding_mode": "border"} if name == "border" else {}
    want = computed(arrays, name, options)
    if name == "packed":
        offsets = arrays["locations"].reshape(N, Q, M, 2 * K)
        arrays["locations"] = np.concatenate((offsets, arrays.pop("weights")), -1)
    return Call(arrays, want, (N, S, Q))


def computed(arrays, name, options):
    """The package's output on the GPU, by the same kernels, in float64."""
    import torch

    from cupy_msda import torch as operator

    put = backends.TorchBackend("cuda").put
    value, locations, weights = (put(arrays[key]) for key in ("value", "locations", "weights"))
    middle = [put(arrays["references"])] if "references" in arrays else []
    function = operator.ms_deform_attn_fused if middle else operator.ms_deform_attn
    if name == "packed":
        locations, weights = torch.cat((locations.flatten(-2), weights), -1), None
    output = function(value, LEVELS, None, *middle, locations, weights, **options)
    return output.double().cpu().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_the_program_computes_what_the_package_computes(folder, tmp_path, name, dtype):
    value_dtype, _, location_dtype = DTYPES[dtype].partition("/")
    suffix = "_".join(dict.fromkeys((value_dtype, location_dtype or value_dtype)))
    program = exported_launcher.compile_program(folder, f"cupy_msda_{name}_{suffix}", exported_launcher.libcuda())
    for N, Q in ((2, S), (1, S), (3, S)) if name == "encoder" else ((2, 50), (3, 333)):
        call = drawn(name, dtype, N, Q)
        like = np.empty(call.want.shape, call.arrays["value"].dtype)
        output = exported_launcher.run_program(program, tmp_path, call.arrays, call.sizes, like)
        error = np.linalg.norm(output.astype(np.float64) - call.want) / np.linalg.norm(call.want)
        assert error < TOLERANCE[value_dtype]


def test_a_level_that_does_not_fit_gives_nan(folder, tmp_path):
    program = exported_launcher.compile_program(folder, "cupy_msda_decoder_float32", exported_launcher.libcuda())
    call = drawn("decoder", "float32", 2, 50)
    call.arrays["spatial_shapes"] = np.array([(24, 3000), *LEVELS[1:]])
    like = np.empty(call.want.shape, np.float32)
    output = exported_launcher.run_program(program, tmp_path, call.arrays, call.sizes, like)
    assert np.isnan(output).any()
