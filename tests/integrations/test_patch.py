"""cupy_msda.torch.patch finds the operator in any model, serves what computes the same, and says what it does not."""

import functools
import importlib
import sys
import textwrap
from types import ModuleType

import pytest
import torch
from torch import nn

import cupy_msda.torch
from tests.helpers import model_functions as stand_ins
from tests.helpers import patched_modules
from tests.helpers.model_functions import CONVENTIONS, LEVELS, SHAPES, arguments_of, by_level, points_of, samples
from tests.helpers.patched_modules import NAME, call, line, put
from tests.helpers.torch_calls import assert_same

module = pytest.fixture(patched_modules.module)


def run(function, convention, dtype=torch.float64):
    """Output and gradients of a call by the convention."""
    *leaves, grad_output = samples(points_of(convention), dtype)
    arguments, others = arguments_of(convention, leaves)
    output = function(*arguments, **others)
    grads = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
    return [output.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


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
    function = put(module, stand_ins.autograd_function(can_run=lambda value: runs))
    with cupy_msda.torch.patch() as patch:
        assert "to be compared at its first call" in line(patch).reason
        runs.append("as if on a GPU")
        assert_same(apply(function), apply(stand_ins.autograd_function()), 1e-9)
        assert (line(patch).calls, line(patch).reason) == (1, "compared at its first call")


@pytest.mark.gpu
def test_what_runs_on_a_gpu_alone_is_compared_there(module):
    function = put(module, stand_ins.autograd_function(can_run=lambda value: value.is_cuda))
    value, locations, weights, grad_output = (tensor.detach().cuda() for tensor in samples())
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    arguments = (value, SHAPES.cuda(), EXTENSION[1].cuda(), by_level(locations), by_level(weights), 64)

    def run():
        output = function.apply(*arguments)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    want = run()
    with cupy_msda.torch.patch() as patch:
        assert_same(run(), want, 1e-9)
        assert (line(patch).calls, line(patch).reason) == (1, "compared at its first call")


def test_another_result_at_the_first_call_keeps_the_original(module, monkeypatch):
    runs = []
    function = put(module, stand_ins.autograd_function(can_run=lambda value: runs))
    with cupy_msda.torch.patch() as patch:
        runs.append("as if on a GPU")
        composition = stand_ins.composition
        monkeypatch.setattr(stand_ins, "composition", lambda *a: 2 * composition(*a))
        with pytest.warns(UserWarning, match="does not serve some_detector.*first call had another result"):
            first = apply(function, requires_grad=False)
        assert_same(apply(function, requires_grad=False), first, 0)
        assert line(patch).status == "kept"


def test_where_the_original_never_runs_the_operator_does(module):
    function = put(module, stand_ins.autograd_function(can_run=lambda value: False))
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


class Methods(nn.Module):
    """Layers that compute by a method, or by an object of theirs."""

    def __init__(self, how):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.how, self.bound = how, self.ms_deform_attn
        self.core = DeformableAttentionCore()

    def ms_deform_attn(self, value, value_spatial_shapes, sampling_locations, attention_weights):
        """`self` has parameters, so that no object can be made without one."""
        return self.scale * stand_ins.pixels_first()(value, value_spatial_shapes, sampling_locations, attention_weights)

    def forward(self, *arguments):
        return {"method": self.ms_deform_attn, "bound": self.bound, "object": self.core}[self.how](*arguments)


class DeformableAttentionCore:
    def __call__(this, value, value_spatial_shapes, sampling_locations, attention_weights):
        return stand_ins.pixels_first()(value, value_spatial_shapes, sampling_locations, attention_weights)


@pytest.mark.parametrize("how", ["method", "bound", "object"])
def test_a_method_is_served(how):
    layer = Methods(how)
    want = call(layer)
    with cupy_msda.torch.patch(layer) as patch:
        assert_same([call(layer)], [want], 1e-9)
        assert sum(line.calls for line in patch.report()) == 1
    assert_same([call(layer)], [want], 0)


def test_an_inherited_forward_is_served(module):
    base = put(module, stand_ins.layer())
    inherited = type("InheritedDeformableAttention", (base,), {"__module__": NAME})
    layer = inherited()
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch(layer) as patch:
        layer(value, SHAPES, LEVELS, EXTENSION[1], by_level(locations), by_level(weights), 64)
        assert sum(line.calls for line in patch.report()) == 1


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
    del sys.modules["late_detector"]
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
