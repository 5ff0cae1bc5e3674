"""Nothing but the neighbours of the samples is read: all other pixels, heads and images hold NaN.

Lanes without a query, samples beyond the last one and masked neighbours have the weight 0, and 0 times NaN is NaN.
"""

import numpy as np
import pytest

from cupy_msda.cuda import plan
from cupy_msda.cuda.gpu import H100, Gpu
from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

# The last chunk of samples is not full, a warp has lanes without a query, pixels are queries in one and in two tiles,
# several heads share a warp, channels take several tiles, blocks aggregate.
CASES = [
    Case("tail_of_a_chunk", levels=((4, 5), (3, 3), (2, 2)), N=3, M=2, D=4, P=25, queries=5),
    Case("tail_of_the_queries", levels=((5, 6), (3, 3)), N=3, M=2, D=16, P=1, queries=37),
    Case("pixels", levels=((9, 11), (4, 5), (2, 2)), N=3, M=2, D=32, P=3, queries=None),
    Case("heads_of_a_warp", levels=((9, 11), (4, 5)), N=3, M=8, D=16, queries=None),
    Case("channel_tiles", levels=((4, 5),), N=3, M=1, D=260, P=3, queries=3),
    Case("aggregated", levels=((5, 6), (2, 2)), N=3, M=2, D=32, P=3, queries=70),
    Case("points", levels=((5, 6), (2, 2)), N=3, M=2, D=8, queries=7, variant={"num_points": (1, 4)}),
    Case("nearest", levels=((5, 6), (2, 2)), N=3, M=2, D=8, queries=7, variant={"interpolation": "nearest"}),
]


def with_nan_elsewhere(inputs, variant):
    """The samples of head 0 of image 1 keep their numbers; NaN is wherever these have no neighbour, and in the rest."""
    ones = inputs._replace(
        weights=np.ones_like(inputs.weights, np.float64), grad_output=np.ones_like(inputs.grad_output, np.float64)
    )
    read = cases.expected(ones, **variant)[1][0] != 0
    read[[0, 2]], read[:, :, 1:] = False, False
    value = np.where(read, inputs.value, np.nan).astype(inputs.value.dtype)
    return inputs._replace(value=value)


IN_SIXTEEN_BITS = [(case, gpu, "float16") for case in CASES[1:4] for gpu in (SMALL_GPU, H100)]


@pytest.mark.parametrize(
    ("case", "gpu", "dtype"),
    [*((case, gpu, "float32") for case in CASES for gpu in (SMALL_GPU, H100)), *IN_SIXTEEN_BITS],
    ids=lambda part: {SMALL_GPU: "throughput", H100: "latency"}[part] if isinstance(part, Gpu) else str(part),
)
def test_only_neighbours_of_samples_are_read(case, gpu, dtype):
    inputs = case.inputs(dtype, seed=51)
    inputs.locations[:] *= 0.3  # so that some pixels have no sample
    want_output, want_grads = cases.expected(inputs, **case.variant)
    isolated = with_nan_elsewhere(inputs, case.variant)
    assert np.isnan(isolated.value[1, :, 0]).any()
    options = {"gpu": gpu, "variant": case.variant}
    output = emulator.forward(isolated, **options).reshape(case.N, -1, case.M, case.D)
    assert_close(output[1, :, 0], want_output.reshape(output.shape)[1, :, 0], dtype)
    for got, want in list(zip(emulator.backward(isolated, **options), want_grads, strict=True))[1:]:
        assert_close(got[1, :, 0], want[1, :, 0], dtype)


def test_the_cases_take_the_ways_that_they_name():
    def spec(case, gpu):
        return plan.forward(emulator.prepare(case.inputs(), False, case.variant), 16, gpu).spec

    assert 75 % spec(CASES[0], H100).queries.chunk
    assert spec(CASES[2], SMALL_GPU).queries.query_tiles == 2
    assert spec(CASES[3], SMALL_GPU).heads_per_warp > 1
    assert spec(CASES[4], H100).channels.channel_tiles > 1


@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["throughput", "latency"])
@pytest.mark.parametrize("x", [-0.5 / 8, 8.5 / 8, -1.0, 2.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_on_the_edge_and_outside_read_nothing(axis, x, gpu):
    """-1 and W pixels are out of bounds: no NaN of the value reaches any result, though a neighbour would be inside."""
    case = Case("edge", levels=((8, 8),), N=2, M=2, D=8, P=4, queries=None)
    inputs = case.inputs(seed=52)
    inputs.locations[..., axis] = x
    inputs.value[:] = np.nan
    assert not emulator.forward(inputs, gpu=gpu).any()
    grads = [*emulator.backward(inputs, gpu=gpu), emulator.summation(inputs)]
    assert not any(grad.any() for grad in grads)
