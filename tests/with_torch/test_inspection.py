"""The samples that `inspect` records of one call, against plain loops, and which calls it sees."""

import numpy as np
import pytest
import torch

from cupy_msda.torch import (
    MSDeformAttnFunction,
    MultiScaleDeformableAttention,
    extension,
    inspect,
    mmcv,
    ms_deform_attn,
    ms_deform_attn_fused,
    transformers,
)
from tests.helpers import reference
from tests.helpers.torch_calls import LEVELS, PIXELS, Calls, attention_module, module_inputs, tensors

Q = 5


def plain_inputs(dtype=torch.float64):
    value, _, _, locations, weights, _ = tensors("cpu", dtype)
    return value, LEVELS, None, locations, weights


def fused_inputs(coordinates=2, levels=2, points=6):
    """With `points` of all levels in one dimension, or three in each of two levels."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, Q, 2, *((2, 3) if points == 6 else (points,)))
    value = torch.randn(2, PIXELS, 2, 4, generator=generator).double()
    references = torch.rand(2, Q, levels, coordinates, generator=generator).double()
    offsets = torch.randn(*shape, 2, generator=generator).double()
    return value, LEVELS, None, references, offsets, torch.randn(shape, generator=generator).double()


def recorded(function, inputs, queries=None, **options):
    with inspect(Calls(function, **options), queries=queries) as records:
        Calls(function, **options)(*inputs)  # of another model
        assert not records
    model = Calls(function, **options)
    with inspect(model, queries=queries) as records:
        model(*inputs)
    (record,) = records
    return record


def loops(inputs, points=(3, 3)):
    """Locations and weights of a fused call, by the formula."""
    references, offsets, logits = (tensor.detach().numpy() for tensor in inputs[3:6])
    return reference.locations_and_weights(LEVELS, references, offsets, logits, points)


def assert_samples(record, locations, weights):
    np.testing.assert_allclose(record.sampling_locations.flatten(), np.ravel(locations), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(record.attention_weights.flatten(), np.ravel(weights), rtol=1e-12, atol=1e-12)


def test_a_plain_call_is_recorded_as_it_is():
    inputs = plain_inputs()
    record = recorded(ms_deform_attn, inputs)
    assert torch.equal(record.sampling_locations, inputs[3])
    assert torch.equal(record.attention_weights, inputs[4])
    assert record.reference_points is None


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_fused_call_is_recorded_by_its_formula(coordinates, levels):
    inputs = fused_inputs(coordinates, levels)
    record = recorded(ms_deform_attn_fused, inputs)
    assert record.sampling_locations.shape == (2, Q, 2, 2, 3, 2)
    assert record.attention_weights.shape == (2, Q, 2, 2, 3)
    assert_samples(record, *loops(inputs))
    assert torch.equal(record.reference_points, inputs[3])


def test_a_packed_call_has_the_samples_of_the_fused_one():
    inputs = fused_inputs()
    packed = torch.cat((inputs[4].flatten(3), inputs[5].flatten(3)), -1)
    assert_samples(recorded(ms_deform_attn_fused, (*inputs[:4], packed)), *loops(inputs))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_points_per_level_are_one_dimension(coordinates):
    inputs = fused_inputs(coordinates, points=5)
    record = recorded(ms_deform_attn_fused, inputs, num_points=np.array([4, 1]))
    assert record.num_points == (4, 1)
    assert record.sampling_locations.shape == (2, Q, 2, 5, 2)
    assert_samples(record, *loops(inputs, (4, 1)))


def test_a_record_repeats_its_call():
    """The plain operator of the recorded samples gives the output of the fused one."""
    inputs = fused_inputs(4, points=5)
    record = recorded(ms_deform_attn_fused, inputs, num_points=[4, 1])
    samples = (record.sampling_locations, record.attention_weights)
    have = ms_deform_attn(inputs[0], record.spatial_shapes, None, *samples, num_points=record.num_points)
    torch.testing.assert_close(have, ms_deform_attn_fused(*inputs, num_points=[4, 1]))


def test_only_the_chosen_queries_are_recorded():
    inputs = fused_inputs()
    record = recorded(ms_deform_attn_fused, inputs, queries=[4, 1])
    locations, weights = loops(inputs)
    assert record.queries == (4, 1)
    assert_samples(record, locations[:, [4, 1]], weights[:, [4, 1]])
    assert torch.equal(record.reference_points, inputs[3][:, [4, 1]])


def test_queries_that_are_padding_have_no_samples():
    record = recorded(ms_deform_attn_fused, fused_inputs(), queries=[0, 3], query_lengths=[2, 4])
    assert record.sampling_locations.isnan().flatten(2).all(-1).tolist() == [[False, True], [False, False]]
    torch.testing.assert_close(record.attention_weights.sum((2, 3, 4)), torch.tensor([[2.0, 0], [2, 2]]).double())


def test_sizes_are_ints_of_python():
    inputs = plain_inputs()
    record = recorded(ms_deform_attn, (inputs[0], torch.tensor(LEVELS, dtype=torch.int32), *inputs[2:]))
    assert record.spatial_shapes == LEVELS
    assert {type(size) for row in record.spatial_shapes for size in row} == {int}
    assert record.num_points == (2, 2)


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_option_that_says_where_the_corners_are_is_recorded(align_corners):
    assert recorded(ms_deform_attn, plain_inputs(), align_corners=align_corners).align_corners is align_corners


@pytest.mark.parametrize(
    ("dtype", "recorded_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_samples_have_the_dtype_of_the_arithmetic(dtype, recorded_dtype):
    inputs = [part.to(dtype) if isinstance(part, torch.Tensor) else part for part in fused_inputs()]
    record = recorded(ms_deform_attn_fused, inputs)
    samples = (record.sampling_locations, record.attention_weights, record.reference_points)
    assert {tensor.dtype for tensor in samples} == {recorded_dtype}
    locations, weights = loops([part.double() if isinstance(part, torch.Tensor) else part for part in inputs])
    np.testing.assert_allclose(record.sampling_locations.flatten(), locations.ravel(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(record.attention_weights.flatten(), weights.ravel(), rtol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_records_are_detached_copies(inference):
    inputs = plain_inputs()
    model = Calls(ms_deform_attn)
    with inspect(model) as records, torch.inference_mode(inference):
        model(*inputs)
    for tensor, given in ((records[0].sampling_locations, inputs[3]), (records[0].attention_weights, inputs[4])):
        assert not tensor.requires_grad
        assert not tensor.is_inference()
        assert tensor.data_ptr() != given.data_ptr()


def test_a_call_without_queries_is_recorded():
    inputs = [part[:, :0] if i > 2 else part for i, part in enumerate(fused_inputs())]
    assert recorded(ms_deform_attn_fused, inputs).attention_weights.shape == (2, 0, 2, 2, 3)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_layer_records_what_it_projects(coordinates):
    layer, inputs = attention_module(), module_inputs(coordinates)
    with inspect(layer) as records:
        layer(*inputs)
    offsets = layer.sampling_offsets(inputs[0]).view(2, Q, 2, 6, 2)
    logits = layer.attention_weights(inputs[0]).view(2, Q, 2, 6)
    assert_samples(records[0], *loops((None, None, None, inputs[1], offsets, logits)))


ENTRANCES = {
    "apply": lambda v, s, t, x, w: MSDeformAttnFunction.apply(v, s, t, x, w, 64),
    "extension": lambda v, s, t, x, w: extension.ms_deform_attn_forward(v.detach(), s, t, x.detach(), w.detach(), 64),
    "kernel layer": lambda v, s, t, x, w: MultiScaleDeformableAttention()(v, s, LEVELS, t, x, w, 64),
    "mmcv": lambda v, s, t, x, w: mmcv.MultiScaleDeformableAttnFunction.apply(v, s, t, x, w, 64),
    "mmcv on a CPU": lambda v, s, t, x, w: mmcv.multi_scale_deformable_attn_pytorch(v, s, x, w),
    "transformers": lambda v, s, t, x, w: transformers.multi_scale_deformable_attention(v, s, x, w),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_is_seen(name):
    value, shapes, starts, locations, weights, _ = tensors("cpu", starts=True)
    record = recorded(ENTRANCES[name], (value, shapes, starts, locations, weights))
    assert torch.equal(record.sampling_locations, locations)
    assert torch.equal(record.attention_weights, weights)


UNREADABLE = {
    "vmap": lambda inputs: torch.vmap(lambda w: ms_deform_attn(*inputs[:4], w))(torch.stack([inputs[4]] * 2)),
    "grad": lambda inputs: torch.func.grad(lambda v: ms_deform_attn(v, *inputs[1:]).sum())(inputs[0]),
    "meta": lambda inputs: ms_deform_attn(
        *(part.to("meta") if isinstance(part, torch.Tensor) else part for part in inputs)
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_tensors_without_elements_are_not_recorded(name):
    model = Calls(lambda *_: UNREADABLE[name](plain_inputs()))
    with inspect(model) as records:
        model()
    assert not records
