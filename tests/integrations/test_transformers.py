"""Models of transformers give the same numbers and gradients when this operator serves them."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("transformers")

import cupy_msda.torch
from cupy_msda.torch import modules, ms_deform_attn
from cupy_msda.torch import transformers as serve
from cupy_msda.torch.integrations import patch as patches
from tests.helpers.cases import Case
from tests.helpers.torch_calls import tensors_of
from tests.helpers.transformers_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")


def build(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # what starts at zero must not hide a difference
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval(), inputs


def run(model, inputs):
    """Outputs that depend on parameters, and every parameter's gradient of one number made of all of them."""
    model.zero_grad(set_to_none=True)
    outputs = [t for t in model(**inputs).to_tuple() if torch.is_tensor(t) and t.requires_grad and t.numel()]
    weight = [torch.linspace(0.5, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    sum((t * w).masked_fill(~t.isfinite(), 0).sum() for t, w in zip(outputs, weight, strict=True)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients


def assert_same(have, want):
    """Outputs to 1e-9; gradients to 1e-9 of the largest, because sums that cancel are noise."""
    for a, b in zip(have[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert have[1].keys() == want[1].keys()
    largest = max(gradient.norm() for gradient in want[1].values())
    assert largest > 0
    for name, gradient in want[1].items():
        assert (have[1][name] - gradient).norm() <= 1e-9 * largest, name


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_gives_the_same_outputs_and_gradients(name, monkeypatch):
    family = name.removesuffix("_discrete")
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        pytest.skip("this transformers has no such family")
    model, inputs = build(name)
    want = run(model, inputs)
    calls = []
    for module in (serve, modules):
        monkeypatch.setattr(module, "ms_deform_attn", lambda *a, **k: calls.append(1) or ms_deform_attn(*a, **k))
    with serve.patch(family):
        assert_same(run(model, inputs), want)
    assert calls, "the patched model did not use the operator"
    calls.clear()
    assert_same(run(model, inputs), want)
    assert not calls, "the model still uses the operator"


@pytest.mark.parametrize("name", ["deformable_detr", pytest.param("mask2former", marks=pytest.mark.long), "d_fine"])
def test_the_general_patch_serves_them_too(name):
    model, inputs = build(name)
    want = run(model, inputs)
    with cupy_msda.torch.patch(model) as patch:
        assert_same(run(model, inputs), want)
        assert sum(line.calls for line in patch.report()) >= 2


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_patched_16_bit_model_gives_outputs_of_the_same_shapes(name, how):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = model.to(dtype).eval()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def outputs():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return [tensor for tensor in model(**inputs).to_tuple() if torch.is_tensor(tensor)]

    want = outputs()
    with serve.patch(name.removesuffix("_discrete")):
        have = outputs()
    # Not the dtype: under autocast grid_sample answers in float32, the operator in the dtype of value.
    assert [t.shape for t in have] == [t.shape for t in want]
    assert all(a.isfinite().sum() == b.isfinite().sum() for a, b in zip(have, want, strict=True))


ARGUMENTS = ("value", "value_spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")


def families(attribute):
    found = []
    for family in serve.FAMILIES:
        if importlib.util.find_spec(f"transformers.models.{family}"):
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            if hasattr(module, attribute):
                found.append(family)
    return found


def modeling(family):
    return sys.modules[f"transformers.models.{family}.modeling_{family}"]


def gradients(output, inputs, grad_output):
    leaves = [inputs[name] for name in ("value", "sampling_locations", "attention_weights")]
    return [output, *torch.autograd.grad(output, leaves, grad_output)]


@pytest.mark.parametrize("family", families("MultiScaleDeformableAttention"))
def test_a_patched_layer_gives_the_same_outputs_and_gradients(family):
    *found, grad_output = tensors_of(Case("layer"), dtype=torch.float64)
    inputs = dict(zip(ARGUMENTS, found, strict=True))
    layer = modeling(family).MultiScaleDeformableAttention()
    sizes = [tuple(row) for row in inputs["value_spatial_shapes"].tolist()]

    def call():
        output = layer(**inputs, value_spatial_shapes_list=sizes, im2col_step=64)
        return gradients(output, inputs, grad_output)

    want = call()
    with serve.patch(family) as patch:
        assert patch.served == [f"transformers.models.{family}.modeling_{family}.MultiScaleDeformableAttention"]
        for have, exact in zip(call(), want, strict=True):
            torch.testing.assert_close(have, exact)


@pytest.mark.parametrize("family", families("multi_scale_deformable_attention"))
@pytest.mark.parametrize("as_list", [True, False])
def test_a_patched_function_gives_the_same_outputs_and_gradients(family, as_list):
    *found, grad_output = tensors_of(Case("function"), dtype=torch.float64)
    inputs = dict(zip(ARGUMENTS, found, strict=True))
    inputs.pop("level_start_index")
    if as_list:
        inputs["value_spatial_shapes"] = [tuple(row) for row in inputs["value_spatial_shapes"].tolist()]

    def call():
        return gradients(modeling(family).multi_scale_deformable_attention(**inputs), inputs, grad_output)

    want = call()
    with serve.patch(family):
        for have, exact in zip(call(), want, strict=True):
            torch.testing.assert_close(have, exact)


@pytest.mark.parametrize("family", families("multi_scale_deformable_attention_v2"))
@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("points", [[3, 6], [4, 4]], ids=str)
def test_a_patched_function_with_points_per_level_gives_the_same_outputs_and_gradients(family, method, points):
    variant = {"num_points": tuple(points)} | ({"interpolation": "nearest"} if method == "discrete" else {})
    value, shapes, _, locations, weights, grad_output = tensors_of(Case("v2", variant=variant), dtype=torch.float64)
    arguments = (value, shapes.tolist(), locations, weights, points, method)
    leaves = [tensor for tensor in (value, locations, weights) if tensor.requires_grad]

    def call():
        output = modeling(family).multi_scale_deformable_attention_v2(*arguments)
        return [output, *torch.autograd.grad(output, leaves, grad_output)]

    want = call()
    with serve.patch(family):
        for have, exact in zip(call(), want, strict=True):
            torch.testing.assert_close(have, exact)


def test_the_discrete_method_gives_locations_no_gradient():
    value, shapes, _, locations, weights, _ = tensors_of(Case("v2", variant={"num_points": (2, 2)}))
    output = serve.multi_scale_deformable_attention_v2(value, shapes, locations, weights, [2, 2], "discrete")
    assert torch.autograd.grad(output.sum(), locations, allow_unused=True) == (None,)


def test_another_method_is_refused():
    value, shapes, _, locations, weights, _ = tensors_of(Case("v2", variant={"num_points": (2, 2)}))
    with pytest.raises(ValueError, match="method: expected 'default' or 'discrete', got 'cubic'"):
        serve.multi_scale_deformable_attention_v2(value, shapes, locations, weights, [2, 2], "cubic")


def functions_and_attributes():
    """All that patch may touch, by name, and the code of functions."""
    found = {}
    for family in serve.FAMILIES:
        name = f"transformers.models.{family}.modeling_{family}"
        if importlib.util.find_spec(f"transformers.models.{family}"):
            for key, owner in vars(importlib.import_module(name)).items():
                found[f"{name}.{key}"] = owner
                if isinstance(owner, type) and owner.__module__ == name:
                    found |= {f"{name}.{key}.{k}": v for k, v in vars(owner).items()}
    return found | {f"{name}, code": v.__code__ for name, v in found.items() if hasattr(v, "__code__")}


def test_undo_restores_everything():
    before = functions_and_attributes()
    model, _ = build("d_fine")
    kept = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    with serve.patch() as outer:
        assert len(outer.served) >= len(serve.FAMILIES) - 1
        with serve.patch():
            pass
        changed = {name for name, found in functions_and_attributes().items() if found is not before.get(name)}
        assert len([name for name in changed if name.endswith("code")]) >= len(serve.FAMILIES) - 1
    after = functions_and_attributes()
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert {name: dict(vars(layer)) for name, layer in model.named_modules()} == kept


def test_a_model_that_is_made_while_patched_is_restored_too():
    with serve.patch("d_fine"):
        model, inputs = build("d_fine")
        run(model, inputs)
    before = patches.served_calls()
    run(model, inputs)
    assert patches.served_calls() == before


@pytest.mark.parametrize("first", [0, 1])
def test_patches_are_undone_in_any_order(first):
    code = modeling("d_fine").multi_scale_deformable_attention_v2.__code__
    patches_of_both = [serve.patch("d_fine"), serve.patch("d_fine")]
    patches_of_both[first].undo()
    assert modeling("d_fine").multi_scale_deformable_attention_v2.__code__ is not code
    patches_of_both[1 - first].undo()
    assert modeling("d_fine").multi_scale_deformable_attention_v2.__code__ is code


def test_unknown_family_is_refused():
    with pytest.raises(ModuleNotFoundError, match="no_such_detr"):
        serve.patch("no_such_detr")


def test_other_parameters_are_refused_and_nothing_stays_replaced(monkeypatch):
    before = modeling("rt_detr").MultiScaleDeformableAttention.forward.__code__
    monkeypatch.setattr(modeling("mask2former"), "multi_scale_deformable_attention", lambda value, more: None)
    with pytest.raises(RuntimeError, match=r"expected the parameters value, value_spatial_shapes, .*, got value, more"):
        serve.patch("rt_detr", "mask2former")
    assert modeling("rt_detr").MultiScaleDeformableAttention.forward.__code__ is before


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        serve.patch()
    with pytest.raises(ModuleNotFoundError, match="pip install kernels"):
        serve.register_kernel()


def test_kernels_package_takes_the_layer(monkeypatch):
    kernels = pytest.importorskip("kernels")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    @kernels.use_kernel_forward_from_hub("MultiScaleDeformableAttention")
    class Layer(torch.nn.Module):
        def forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
                    sampling_locations, attention_weights, im2col_step):  # fmt: skip
            raise AssertionError("the kernel was not used")

    class Other:
        layer_name = "MultiScaleDeformableAttention"

        def load(self):
            raise AssertionError("what transformers registers went before")

    with kernels.use_kernel_mapping({}):
        serve.register_kernel()
        # What transformers does on every train() and eval().
        kernels.register_kernel_mapping({"MultiScaleDeformableAttention": {"cuda": Other()}})
        for mode in (kernels.Mode.TRAINING, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE):
            model = kernels.kernelize(torch.nn.Sequential(Layer()), mode=mode, device="cuda")
            value, shapes, starts, locations, weights, _ = tensors_of(Case("layer"))
            output = model[0](value, shapes, shapes.tolist(), starts, locations, weights, 64)
            assert torch.equal(output, ms_deform_attn(value, shapes, starts, locations, weights))


@pytest.mark.long
@pytest.mark.parametrize("name", ["d_fine", "rt_detr"])
def test_a_patched_model_compiles(name):
    torch._dynamo.reset()
    model, inputs = build(name)
    with torch.no_grad():
        want = model(**inputs).logits
        with serve.patch(name):
            have = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)
