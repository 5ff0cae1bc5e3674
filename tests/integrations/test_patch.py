"""cupy_msda.torch.patch finds the operator in any model, serves what computes the same, and says what it does not."""

import functools
import importlib
import inspect
import random
import sys
import textwrap
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import cupy_msda.torch
from cupy_msda.torch.integrations import conventions
from tests.helpers import model_functions as stand_ins
from tests.helpers.torch_calls import assert_same

NAME = "some_detector"
LEVELS = [(6, 7), (3, 4)]
N, M, D, Q = 2, 3, 8, 5


@pytest.fixture
def module(monkeypatch):
    """A module of a model."""
    made = ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, made)
    return made


def put(module, part):
    """Make `part` one of the module."""
    part.__module__ = NAME
    setattr(module, part.__name__, part)
    return part


def samples(points=(3, 3), dtype=torch.float64):
    """value [N, S, M, D], locations [N, Q, M, L*P, 2], weights [N, Q, M, L*P] and grad_output."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [drawn(N, 54, M, D), 1.4 * drawn(N, Q, M, sum(points), 2) - 0.2, drawn(N, Q, M, sum(points))]
    return *(leaf.requires_grad_() for leaf in leaves), drawn(N, Q, M * D)


def by_level(tensor):
    return tensor.unflatten(3, (2, -1))


def heads_first(value):
    return value.permute(0, 2, 3, 1)


def per_level(value):
    return list(heads_first(value).split([h * w for h, w in LEVELS], -1))


def same(tensor):
    return tensor


SHAPES = torch.tensor(LEVELS)
V2 = {"num_points_list": [4, 2]}
# Maker; value, locations and weights in its layout; level sizes; other arguments.
CONVENTIONS = {
    "mmcv": (stand_ins.pixels_first, same, by_level, by_level, SHAPES, {}),
    "PDVC": (lambda: stand_ins.pixels_first("border"), same, by_level, by_level, SHAPES, {}),
    "corners": (lambda: stand_ins.pixels_first("zeros", True), same, by_level, by_level, SHAPES, {}),
    "ultralytics": (stand_ins.one_axis, same, same, same, LEVELS, {}),
    "rfdetr": (stand_ins.heads_first, heads_first, by_level, same, SHAPES, {}),
    "rfdetr, sizes": (stand_ins.heads_first, heads_first, by_level, same, SHAPES, {"value_spatial_shapes_hw": LEVELS}),
    "rfdetr, export": (stand_ins.heads_first, heads_first, same, same, SHAPES, {"value_spatial_shapes_hw": LEVELS}),
    "RT-DETRv2": (stand_ins.points_per_level, same, same, same, LEVELS, V2),
    "RT-DETRv2, discrete": (stand_ins.points_per_level, same, same, same, LEVELS, V2 | {"method": "discrete"}),
    "D-FINE": (lambda: stand_ins.points_per_level(True), per_level, same, same, LEVELS, V2),
    "D-FINE, discrete": (
        lambda: stand_ins.points_per_level(True), per_level, same, same, LEVELS, V2 | {"method": "discrete"},
    ),
    "both values, pixels": (stand_ins.either_value, same, same, same, LEVELS, V2 | {"value_shape": "reshape"}),
    "both values, levels": (stand_ins.either_value, per_level, same, same, LEVELS, V2),
}  # fmt: skip


def run(function, convention, dtype=torch.float64):
    """Output and gradients of a call by the convention."""
    _, of_value, of_locations, of_weights, shapes, others = CONVENTIONS[convention]
    *leaves, grad_output = samples(tuple(others.get("num_points_list", (3, 3))), dtype)
    value, locations, weights = leaves
    output = function(of_value(value), shapes, of_locations(locations), of_weights(weights), **others)
    grads = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
    return [output.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


def line(patch, name=NAME):
    """The line of a report on what is in the module."""
    return next(line for line in patch.report() if line.name.startswith(name))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_convention_is_served_with_the_same_output_and_gradients(module, convention):
    function = put(module, CONVENTIONS[convention][0]())
    want = run(function, convention)
    with cupy_msda.torch.patch() as patch:
        assert_same(run(function, convention), want, 1e-9)
        assert (line(patch).status, line(patch).calls) == ("served", 1)
    assert_same(run(function, convention), want, 0)


EXTENSION = (SHAPES, torch.tensor([0, 42]))


def apply(function, requires_grad=True):
    value, locations, weights, grad_output = samples()
    output = function.apply(value, *EXTENSION, by_level(locations), by_level(weights), 64)
    if not requires_grad:
        return [output.detach()]
    return [output.detach(), *torch.autograd.grad(output, (value, locations, weights), grad_output)]


def test_an_autograd_function_is_served(module):
    function = put(module, stand_ins.autograd_function())
    want = apply(function)
    with cupy_msda.torch.patch() as patch:
        assert_same(apply(function), want, 1e-9)
        assert line(patch).calls == 1
    assert_same(apply(function), want, 0)
    assert "apply" not in vars(function)


def test_an_autograd_function_without_backward_gets_one(module):
    function = put(module, stand_ins.autograd_function(has_backward=False))
    with cupy_msda.torch.patch() as patch:
        assert_same(apply(function), apply(stand_ins.autograd_function()), 1e-9)
        assert "gradients could not be compared" in line(patch).reason


def test_what_cannot_run_on_a_cpu_is_compared_at_its_first_call(module):
    runs = []
    function = put(module, stand_ins.autograd_function(forward_fails=lambda value: runs))
    with cupy_msda.torch.patch() as patch:
        assert "to be compared at its first call" in line(patch).reason
        runs.append("as if on a GPU")
        assert_same(apply(function), apply(stand_ins.autograd_function()), 1e-9)
        assert (line(patch).calls, line(patch).reason) == (1, "compared at its first call")


def test_another_result_at_the_first_call_keeps_the_original(module, monkeypatch):
    runs = []
    function = put(module, stand_ins.autograd_function(forward_fails=lambda value: runs))
    with cupy_msda.torch.patch() as patch:
        runs.append("as if on a GPU")
        composition = stand_ins.composition
        monkeypatch.setattr(stand_ins, "composition", lambda *a: 2 * composition(*a))
        with pytest.warns(UserWarning, match="does not serve some_detector.*first call had another result"):
            first = apply(function, requires_grad=False)
        assert_same(apply(function, requires_grad=False), first, 0)
        assert line(patch).status == "kept"


def test_where_the_original_never_runs_the_operator_does(module):
    function = put(module, stand_ins.autograd_function(forward_fails=lambda value: False))
    with cupy_msda.torch.patch() as patch:
        assert_same(apply(function), apply(stand_ins.autograd_function()), 1e-9)
        assert "the original raised RuntimeError: Not implemented on the CPU" in line(patch).reason


def test_a_kept_apply_is_served(module):
    function = put(module, stand_ins.autograd_function())
    module.kept = function.apply
    with cupy_msda.torch.patch() as patch:
        value, locations, weights, _ = samples()
        module.kept(value, *EXTENSION, by_level(locations), by_level(weights), 64)
        assert line(patch).calls == 1
    assert module.kept.__self__ is function


def test_a_layer_without_parameters_is_served(module):
    layer = put(module, stand_ins.layer())()
    value, locations, weights, _ = samples()
    arguments = (value, SHAPES, LEVELS, EXTENSION[1], by_level(locations), by_level(weights), 64)
    want = layer(*arguments)
    with cupy_msda.torch.patch() as patch:
        assert_same([layer(*arguments)], [want], 1e-9)
        assert line(patch).calls == 1
    assert torch.equal(layer(*arguments), want)


class Keeper(nn.Module):
    """Layers hold the function in every way that has been seen."""

    def __init__(self, function, how):
        super().__init__()
        core = {
            "attribute": function,
            "partial": functools.partial(function),
            "partial of partial": functools.partial(functools.partial(function)),
            "closure": lambda *a: function(*a),
        }[how]
        self.core = core

    def forward(self, *arguments):
        return self.core(*arguments)


def call(layer):
    value, locations, weights, _ = samples()
    return layer(value, SHAPES, by_level(locations), by_level(weights))


@pytest.mark.parametrize("how", ["attribute", "partial", "partial of partial", "closure"])
@pytest.mark.parametrize("made", ["before", "while patched"])
def test_a_function_is_served_wherever_it_is_held(module, how, made):
    function = put(module, stand_ins.pixels_first())
    layer = Keeper(function, how)
    with cupy_msda.torch.patch() as patch:
        if made == "while patched":
            layer = Keeper(module.multi_scale_deformable_attn_pytorch, how)
        call(layer)
        assert line(patch).calls == 1
    calls = line(patch).calls
    call(layer)
    assert line(patch).calls == calls


def test_a_function_that_no_module_has_is_found_in_the_model():
    layer = Keeper(stand_ins.pixels_first(), "partial")
    with cupy_msda.torch.patch(layer) as patch:
        call(layer)
        assert sum(line.calls for line in patch.report()) == 1


def test_a_name_bound_at_import_time_is_served(module, monkeypatch):
    put(module, stand_ins.pixels_first())
    other = ModuleType("other_detector")
    other.attend = module.multi_scale_deformable_attn_pytorch
    monkeypatch.setitem(sys.modules, other.__name__, other)
    with cupy_msda.torch.patch() as patch:
        call(other.attend)
        assert line(patch).calls == 1


def test_a_module_that_is_imported_later_is_served(tmp_path, monkeypatch):
    (tmp_path / "late_detector.py").write_text(
        textwrap.dedent("""
            from tests.helpers.model_functions import composition

            def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
                samples = sampling_locations.unbind(3), attention_weights.unbind(3)
                return composition(value, value_spatial_shapes, *samples)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    with cupy_msda.torch.patch() as outer, cupy_msda.torch.patch():
        late = importlib.import_module("late_detector")
        call(late.ms_deform_attn_core_pytorch)
        served = line(outer, "late_detector").calls
    monkeypatch.delitem(sys.modules, "late_detector")
    assert sys.meta_path == finders
    assert served == 1


def test_a_model_that_is_compiled_already_follows(module):
    function = put(module, stand_ins.pixels_first())
    torch._dynamo.reset()
    layer = Keeper(function, "partial")
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    want = call(compiled)
    seen = []

    def backend(graph, _):
        seen.append(str(graph.graph))
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    call(compiled)
    with cupy_msda.torch.patch():
        assert_same([call(compiled)], [want], 1e-9)
        assert "cupy_msda" in seen[-1]
        assert "grid_sampler" not in seen[-1]
    assert_same([call(compiled)], [want], 0)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        return function(*arguments, **named)

    return wrapper


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_decorated_function_is_served(module, by_keyword):
    function = put(module, decorated(stand_ins.points_per_level()))
    value, locations, weights, _ = samples((4, 2))
    names = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights", "num_points_list")
    arguments = (value, LEVELS, locations, weights, [4, 2])

    def run():
        return [function(**dict(zip(names, arguments, strict=True))) if by_keyword else function(*arguments)]

    want = run()
    with cupy_msda.torch.patch() as patch:
        assert_same(run(), want, 1e-9)
        assert line(patch).calls == 1


def double(function):
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        return 2 * function(*arguments, **named)

    return wrapper


def wrong_gradient(function):
    @functools.wraps(function)
    def wrapper(*, value, **others):
        return function(2 * value.detach() - value, **others)

    return wrapper


REFUSED = {
    "another result": (double(stand_ins.pixels_first()), "it computes something else"),
    "another gradient": (wrong_gradient(stand_ins.pixels_first()), "its gradients are not"),
    "a parameter that is demanded": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights, depth: None, "it demands depth",
    ),
    "other parameters": (lambda query, key: None, "no parameter for value and shapes"),
    "any parameters": (lambda *arguments: None, "parameters without names"),
    "no tensor": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights: None, "its output is not",
    ),
    "an error": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights: 1 / 0, "it raised ZeroDivisionError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_operator_is_kept_and_named(module, kind):
    function, reason = REFUSED[kind]
    function.__name__ = function.__qualname__ = "ms_deform_attn_core_pytorch"
    code = put(module, function).__code__
    with cupy_msda.torch.patch() as patch:
        assert function.__code__ is code
        assert line(patch).status == "kept"
        assert reason in line(patch).reason


def test_a_function_of_another_name_is_not_called(module):
    def attention(value, value_spatial_shapes, sampling_locations, attention_weights):
        raise AssertionError("it was called")

    put(module, attention)
    with cupy_msda.torch.patch() as patch:
        assert not [line for line in patch.report() if line.name.startswith(NAME)]


def test_a_call_of_an_unknown_form_goes_to_the_original(module):
    def ms_deform_attn_core_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights, return_value=False
    ):
        output = stand_ins.composition(
            value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights.unbind(3)
        )
        return (output, value) if return_value else output

    function = put(module, ms_deform_attn_core_pytorch)
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as patch:
        output, also = function(value, SHAPES, by_level(locations), by_level(weights), return_value=True)
        assert also is value
        assert_same([function(value, SHAPES, by_level(locations), by_level(weights))], [output], 1e-9)
        assert line(patch).calls == 1
        assert "1 calls went to the original: return_value is given" in line(patch).reason


def test_a_layout_that_was_not_compared_goes_to_the_original(module):
    function = put(module, stand_ins.pixels_first())
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as patch:
        with pytest.raises(RuntimeError):
            function(value, SHAPES, locations, weights)
        assert "unknown layout" in line(patch).reason


def test_random_generators_and_modes_are_as_before(module):
    def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        assert torch.is_grad_enabled()
        value.zero_()

    put(module, ms_deform_attn_core_pytorch)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    with torch.no_grad(), cupy_msda.torch.patch():
        assert not torch.is_grad_enabled()
    assert (random.getstate(), str(np.random.get_state())) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


class DeformableAttention(nn.Module):
    """A layer that computes by itself."""

    def forward(self, x):
        return x


def test_an_attention_layer_that_does_not_reach_the_operator_is_named_once():
    model = nn.Sequential(DeformableAttention())
    with cupy_msda.torch.patch(model) as patch:
        with pytest.warns(UserWarning, match="a call of the layer '0' did not reach the operator"):
            model(torch.ones(1))
        model(torch.ones(1))
        assert line(patch, "0").reason == "a call of this layer did not reach the operator"
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_an_attention_layer_that_reaches_the_operator_is_not_named(module):
    function = put(module, stand_ins.pixels_first())

    class DeformableAttention(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    model = nn.Sequential()
    model.append(DeformableAttention())
    with cupy_msda.torch.patch(model) as patch:
        call(model[0])
        assert [line.status for line in patch.report() if line.name in ("0", f"{NAME}.x")] == []
        assert line(patch).calls == 1


def test_a_scripted_function_is_named(module):
    scripted = torch.jit.trace(lambda value: value * 2, torch.ones(1))
    module.ms_deform_attn_core_pytorch = scripted
    with cupy_msda.torch.patch() as patch:
        assert line(patch, "ms_deform").status == "compiled already"


def test_patches_nest(module):
    function = put(module, stand_ins.pixels_first())
    code = function.__code__
    with cupy_msda.torch.patch() as outer:
        with cupy_msda.torch.patch() as inner:
            call(function)
            assert line(inner).reason == "another patch serves it"
        call(function)
        assert line(outer).calls == 2
    assert function.__code__ is code


def test_undo_restores_the_module(module):
    function = put(module, stand_ins.pixels_first())
    before = dict(function.__globals__), function.__code__
    cupy_msda.torch.patch().undo()
    assert (dict(function.__globals__), function.__code__) == before


def test_a_patched_function_keeps_its_signature(module):
    function = put(module, stand_ins.points_per_level())
    before = str(inspect.signature(function))
    with cupy_msda.torch.patch():
        assert str(inspect.signature(function)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_are_served(module, dtype):
    function = put(module, stand_ins.pixels_first())
    value, locations, weights, _ = samples(dtype=dtype)
    with cupy_msda.torch.patch() as patch:
        output = function(value, SHAPES, by_level(locations.float()), by_level(weights))
        assert output.dtype is dtype
        assert line(patch).calls == 1


def test_names_of_code_bases_are_recognised():
    names = (
        "ms_deform_attn_core_pytorch MSDeformAttnFunction MultiScaleDeformableAttnFunction_fp16 "
        "multi_scale_deformable_attn_pytorch deformable_attention_core_func_v2 MultiScaleDeformableAttention"
    )
    assert all(map(conventions.NAME.search, names.split()))
    assert not conventions.NAME.search("DeformConv2d")
