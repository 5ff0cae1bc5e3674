"""The layer as torch expects a module to be: construction, initial values, copies, casts, and odd sizes."""

import copy
import inspect
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, skip_init

from cupy_msda.torch import MSDeformAttn
from tests.helpers.torch_calls import PIXELS, attention_module, module_inputs

SIZES = {"d_model": 16, "n_levels": 2, "n_heads": 2, "n_points": 3}
RANDOM = ("value_proj.weight", "output_proj.weight")


def fill(layer, number):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(number)


def is_initial(layer, scale=1.0):
    """Whether the parameters have the initial values of the paper, the offsets times `scale`."""
    want = MSDeformAttn(**SIZES)
    return all(
        bool(parameter.any()) and parameter.unique().numel() > 9
        if name in RANDOM
        else torch.equal(parameter, want.get_parameter(name) * (scale if name == "sampling_offsets.bias" else 1))
        for name, parameter in layer.named_parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_dtype_are_those_asked_for(device, dtype):
    layer = MSDeformAttn(**SIZES, device=device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(device, dtype)}


def test_device_and_dtype_are_torchs_defaults_otherwise():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        layer = MSDeformAttn(**SIZES)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_offsets_start_at_the_same_numbers_in_every_dtype(dtype):
    bias = MSDeformAttn(**SIZES, dtype=dtype).sampling_offsets.bias
    assert torch.equal(bias, MSDeformAttn(**SIZES).sampling_offsets.bias.to(dtype))


def test_initial_values_do_not_depend_on_the_default_device():
    layer = MSDeformAttn(**SIZES)
    fill(layer, 7)
    with torch.device("meta"):
        layer.reset_parameters()
    assert is_initial(layer)


def test_skip_init_gives_a_layer_on_the_device_asked_for():
    layer = skip_init(MSDeformAttn, 16, n_levels=2, n_heads=2, n_points=3, device="cpu", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("cpu", torch.float64)}
    layer.reset_parameters()
    assert is_initial(layer.float())


@pytest.mark.parametrize("name", ["reset_parameters", "_reset_parameters"])
def test_both_names_give_the_initial_values(name):
    """Deformable DETR and its successors call ``_reset_parameters``, torch ``reset_parameters``."""
    layer = MSDeformAttn(**SIZES)
    fill(layer, 7)
    assert not is_initial(layer)
    getattr(layer, name)()
    assert is_initial(layer)


def scaling(*names, through=None):
    """A subclass that overrides `names`: offsets three times as far. It calls the method `through` of its base."""

    def scaled(name):
        def reset(self):
            getattr(super(Scaled, self), through or name)()
            with torch.no_grad():
                self.sampling_offsets.bias.mul_(3)

        return reset

    Scaled = type("Scaled", (MSDeformAttn,), {name: scaled(name) for name in names})
    return Scaled


@pytest.mark.parametrize(
    "names", [("reset_parameters", "_reset_parameters"), ("_reset_parameters", "reset_parameters")]
)
def test_a_reset_may_call_the_one_of_the_other_name(names):
    own, other = names
    calls = []

    def reset(self):
        calls.append(own)
        self._reset_parameters() if other == "_reset_parameters" else self.reset_parameters()

    layer = type("Layer", (MSDeformAttn,), {own: reset})(16, 2, 2, 3)
    assert len(calls) == (own == "reset_parameters")
    assert layer.sampling_offsets.bias.any()


@pytest.mark.parametrize("through", [None, "reset_parameters", "_reset_parameters"])
@pytest.mark.parametrize(
    "names", [("reset_parameters",), ("_reset_parameters",), ("reset_parameters", "_reset_parameters")], ids=str
)
def test_a_subclass_may_override_either_name(names, through):
    Scaled = scaling(*names, through=through)
    assert is_initial(Scaled(**SIZES), scale=3)

    class Further(Scaled):
        pass

    for name in ("reset_parameters", "_reset_parameters"):
        layer = Further(**SIZES)
        fill(layer, 7)
        getattr(layer, name)()
        assert is_initial(layer, scale=3)


@pytest.mark.parametrize("order", ["modules", "apply"])
def test_resetting_every_module_in_any_order_gives_the_initial_values(order):
    """Loops over ``modules()`` reset the layer before its projections, ``apply`` after them."""
    model = nn.Sequential(MSDeformAttn(**SIZES))
    fill(model, 7)

    def reset(module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    if order == "modules":
        for module in model.modules():
            reset(module)
    else:
        model.apply(reset)
    assert is_initial(model[0])


def test_random_initial_values_are_those_of_the_module_of_deformable_detr():
    """Four linear layers in the order of their names, and then the projections of values and of the output."""
    torch.manual_seed(5)
    for outputs in (24, 12, 16, 16):
        nn.Linear(16, outputs)
    value_proj, output_proj = (nn.init.xavier_uniform_(torch.empty(16, 16)) for _ in range(2))
    torch.manual_seed(5)
    layer = MSDeformAttn(**SIZES)
    assert torch.equal(layer.value_proj.weight, value_proj)
    assert torch.equal(layer.output_proj.weight, output_proj)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same(copied):
    layer, inputs = attention_module(), module_inputs()
    other = copied(layer)
    assert torch.equal(other(*inputs), layer(*inputs))
    other.reset_parameters()
    assert is_initial(other.float())


def test_a_saved_layer_and_its_state_come_back():
    layer, inputs = attention_module(), module_inputs()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), layer(*inputs))
    other = attention_module(seed=1)
    assert not torch.equal(other(*inputs), layer(*inputs))
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other(*inputs), layer(*inputs))


@pytest.mark.parametrize(
    "cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda layer: layer.to(torch.float32)]
)
def test_a_cast_layer_computes_in_its_dtype(cast):
    layer, (query, references, memory, *metadata) = attention_module(), module_inputs()
    want = layer(query, references, memory, *metadata)
    layer = cast(layer)
    dtype = layer.value_proj.weight.dtype
    have = layer(query.to(dtype), references.to(torch.float32), memory.to(dtype), *metadata)
    assert have.dtype is dtype
    torch.testing.assert_close(have.double(), want, rtol=0.05, atol=0.05)


def test_the_representation_has_the_sizes():
    first, *others = repr(MSDeformAttn(**SIZES)).splitlines()
    assert first == "MSDeformAttn("
    assert others[0].strip() == "d_model=16, n_levels=2, n_heads=2, n_points=3"
    assert others[1].strip() == "(sampling_offsets): Projection(in_features=16, out_features=24, bias=True)"


def test_a_parametrised_projection_takes_part():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, inputs = attention_module(), module_inputs()
    want = copy.deepcopy(layer)
    with torch.no_grad():
        want.value_proj.weight.mul_(2)
    parametrize.register_parametrization(layer.value_proj, "weight", Twice())
    output = layer(*inputs)
    assert torch.equal(output, want(*inputs))
    output.sum().backward()
    assert layer.value_proj.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("sizes", [{"N": 0}, {"Q": 0}, {"N": 0, "Q": 0}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_no_images_or_no_queries_give_an_empty_output_and_gradients_of_zero(sizes, padded):
    layer, inputs = attention_module(), module_inputs(**sizes)
    padding = (torch.zeros(inputs[2].shape[:2], dtype=torch.bool),) if padded else ()
    output = layer(*inputs, *padding)
    assert output.shape == (*inputs[0].shape[:2], 16)
    output.sum().backward()
    assert not any(parameter.grad.any() for parameter in layer.parameters())


def test_padding_everywhere_leaves_the_bias():
    layer, inputs = attention_module(), module_inputs()
    output = layer(*inputs, torch.ones(2, PIXELS, dtype=torch.bool))
    torch.testing.assert_close(output, layer.output_proj.bias.expand_as(output))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"n_heads": 0}, "n_heads: expected an int of at least 1, got 0"),
        ({"n_heads": -2}, "n_heads: expected an int of at least 1, got -2"),
        ({"d_model": 0}, "d_model: expected an int of at least 1, got 0"),
        ({"n_levels": -1}, "n_levels: expected an int of at least 0, got -1"),
        ({"n_points": -4}, "n_points: expected an int of at least 0, got -4"),
        ({"d_model": 17}, "d_model: expected a multiple of n_heads = 2, got 17"),
    ],
    ids=str,
)
def test_sizes_that_make_no_layer_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        MSDeformAttn(**(SIZES | sizes))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("wrong", [2.0, "2", None, True, torch.tensor(2.0)], ids=repr)
def test_sizes_that_are_no_ints_are_refused(name, wrong):
    with pytest.raises(TypeError, match=f"^{name}: expected an int, got "):
        MSDeformAttn(**(SIZES | {name: wrong}))


def test_sizes_may_be_ints_of_other_libraries():
    layer = MSDeformAttn(np.int64(16), np.int32(2), torch.tensor(2), np.uint8(3))
    assert repr(layer) == repr(MSDeformAttn(**SIZES))
    assert {type(size) for size in (layer.d_model, layer.n_levels, layer.n_heads, layer.n_points)} == {int}


@pytest.mark.parametrize("none", ["n_levels", "n_points"])
def test_a_layer_without_samples_gives_its_bias(none):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about initial values of no elements
        layer = MSDeformAttn(**(SIZES | {none: 0})).double()
    query, references, memory, shapes, starts = module_inputs()
    if none == "n_levels":
        references, shapes, starts = references[:, :, :0], shapes[:0], starts[:0]
    output = layer(query, references, memory, shapes, starts)
    torch.testing.assert_close(output, layer.output_proj.bias.expand_as(output))


def test_device_and_dtype_are_keywords():
    parameters = inspect.signature(MSDeformAttn).parameters
    assert list(parameters) == ["d_model", "n_levels", "n_heads", "n_points", "device", "dtype"]
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("device", "dtype"))
