"""Models whose functions look like the operator and are not quite, and programs that do more than patch and undo."""

import copy
import functools
import importlib.util
import pickle
import sys
import threading
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import cupy_msda.torch
from tests.helpers import model_functions as stand_ins
from tests.helpers import patched_modules
from tests.helpers.model_functions import LEVELS, SHAPES, by_level, samples
from tests.helpers.patched_modules import NAME, call, line, put
from tests.helpers.torch_calls import assert_same

module = pytest.fixture(patched_modules.module)
STARTS = torch.tensor([0, 42])


def apply(function, starts=STARTS):
    value, locations, weights, _ = samples()
    return function.apply(value, SHAPES, starts, by_level(locations), by_level(weights), 64)


# ---- not quite the operator ------------------------------------------------------------------------------------------


def test_a_subclass_of_an_autograd_function_keeps_its_own(module):
    function = put(module, stand_ins.autograd_function())

    class Doubled(function):
        @staticmethod
        def forward(ctx, *arguments):
            return 2 * function.forward(ctx, *arguments)

    want = apply(Doubled).detach()
    with cupy_msda.torch.patch():
        assert_same([apply(Doubled).detach()], [want], 0)


class PaddedDeformableAttention(nn.Module):
    """What it computes depends on how it was made."""

    def __init__(self, padding_mode="zeros"):
        super().__init__()
        self.padding_mode = padding_mode

    def forward(self, value, value_spatial_shapes, sampling_locations, attention_weights):
        return stand_ins.composition(
            value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights.unbind(3), self.padding_mode
        )


@pytest.mark.parametrize("made", ["before", "while patched"])
def test_each_object_of_a_class_is_compared(made):
    layers = nn.ModuleList([PaddedDeformableAttention(), PaddedDeformableAttention("border")])
    want = [call(layer) for layer in layers]
    with cupy_msda.torch.patch(layers) as patch:
        if made == "while patched":
            layers = [PaddedDeformableAttention(), PaddedDeformableAttention("border")]
        assert_same([call(layer) for layer in layers], want, 1e-9)
        assert sum(line.calls for line in patch.report()) == 2


def test_a_subclass_that_calls_its_base_is_right(module):
    base = put(module, stand_ins.layer())
    inherited = type("Scaled", (base,), {"forward": lambda self, *arguments: 3 * base.forward(self, *arguments)})
    value, locations, weights, _ = samples()
    arguments = (value, SHAPES, LEVELS, STARTS, by_level(locations), by_level(weights), 64)
    want = inherited()(*arguments)
    with cupy_msda.torch.patch():
        assert_same([inherited()(*arguments)], [want], 1e-9)


def scaled_by_keyword(function):
    @functools.wraps(function)
    def wrapper(*arguments, scale=1.0, **named):
        return scale * function(*arguments, **named)

    return wrapper


def test_a_parameter_of_a_decorator_is_seen(module):
    function = put(module, scaled_by_keyword(stand_ins.pixels_first()))
    value, locations, weights, _ = samples()
    arguments = (value, SHAPES, by_level(locations), by_level(weights))
    want = function(*arguments), function(*arguments, scale=2.0)
    with cupy_msda.torch.patch() as patch:
        assert_same([function(*arguments), function(*arguments, scale=2.0)], want, 1e-9)
        assert line(patch).calls == 1


def test_a_decorator_that_takes_no_keywords_is_compared(module):
    def tripled(function):
        @functools.wraps(function)
        def wrapper(*arguments):
            return 3 * function(*arguments)

        return wrapper

    function = put(module, tripled(stand_ins.pixels_first()))
    want = call(function)
    with cupy_msda.torch.patch() as patch:
        assert_same([call(function)], [want], 0)
        assert line(patch).status == "kept"


def test_a_function_without_gradient_has_none(module):
    function = put(module, torch.no_grad()(stand_ins.pixels_first()))
    with cupy_msda.torch.patch() as patch:
        assert not call(function).requires_grad
        assert line(patch).calls == 1


@pytest.mark.parametrize("starts", [[0, 42], [12, 0]])
def test_level_starts_are_used_as_the_original_uses_them(module, starts):
    function = put(module, stand_ins.autograd_function())  # a composition, which ignores them
    want = apply(function, torch.tensor(starts))
    with cupy_msda.torch.patch() as patch:
        assert_same([apply(function, torch.tensor(starts))], [want], 1e-9)
        assert line(patch).calls == 1


def test_a_first_call_in_which_nothing_can_be_seen_is_not_the_comparison(module):
    runs = []
    function = put(module, stand_ins.autograd_function(can_run=lambda value: runs))
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as patch:
        runs.append("as if on a GPU")
        zeros = function.apply(0 * value, SHAPES, STARTS, by_level(locations), by_level(weights), 64)
        assert not zeros.any()
        assert "to be compared" in line(patch).reason
        apply(function)
        assert line(patch).reason == "compared at its first call"


def test_an_autograd_function_with_setup_context_is_served(module):
    class MSDeformAttnFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
        ):
            samples = sampling_locations.unbind(3), attention_weights.unbind(3)
            return stand_ins.composition(value, value_spatial_shapes, *samples)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    function = put(module, MSDeformAttnFunction)
    want = apply(function).detach()
    with cupy_msda.torch.patch() as patch:
        assert_same([apply(function).detach()], [want], 1e-9)
        assert line(patch).calls == 1


def test_wrong_arguments_raise_what_the_original_raises(module):
    function, plain = put(module, stand_ins.autograd_function()), put(module, optional_weights())
    value, locations, _, _ = samples()
    with cupy_msda.torch.patch():
        with pytest.raises(TypeError, match="positional argument"):
            function.apply(value, SHAPES)
        with pytest.raises(TypeError, match="positional argument"):
            function.apply(*[value] * 9)
        with pytest.raises(ValueError, match="weights are missing"):
            plain(value, SHAPES, by_level(locations))


def optional_weights():
    def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights=None):
        if attention_weights is None:
            raise ValueError("weights are missing")
        samples = sampling_locations.unbind(3), attention_weights.unbind(3)
        return stand_ins.composition(value, value_spatial_shapes, *samples)

    return ms_deform_attn_core_pytorch


# ---- who holds it, and modules that answer with errors ---------------------------------------------------------------


def test_every_kind_of_kept_apply_is_served(module):
    function = put(module, stand_ins.autograd_function())

    class Layer(nn.Module):
        of_class = staticmethod(function.apply)

        def __init__(self):
            super().__init__()
            self.partial = functools.partial(function.apply)

    layer = put(module, Layer)()
    value, locations, weights, _ = samples()
    arguments = (value, SHAPES, STARTS, by_level(locations), by_level(weights), 64)
    before = dict(vars(Layer)), layer.partial
    with cupy_msda.torch.patch(layer) as patch:
        layer.of_class(*arguments)
        layer.partial(*arguments)
        assert line(patch).calls == 2
    assert (dict(vars(Layer)), layer.partial) == before


class Angry:
    """As a proxy outside of its request."""

    def __getattr__(self, name):
        raise RuntimeError("outside of a request")


def test_objects_that_answer_with_errors_do_no_harm(module):
    module.angry = Angry()
    function = put(module, stand_ins.pixels_first())
    with cupy_msda.torch.patch() as patch:
        call(function)
        assert line(patch).calls == 1


def test_a_lazy_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "lazy_detector.py").write_text("raise ImportError('it was imported')")
    spec = importlib.util.spec_from_file_location("lazy_detector", tmp_path / "lazy_detector.py")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_detector", lazy)
    spec.loader.exec_module(lazy)
    cupy_msda.torch.patch().undo()


def test_a_patch_among_fake_tensors_keeps_what_it_cannot_compare(module):
    function = put(module, stand_ins.pixels_first())
    with FakeTensorMode(), cupy_msda.torch.patch() as patch:
        assert line(patch).status == "kept"
    call(function)


def test_a_kept_apply_is_served_until_the_last_patch_is_undone(module):
    function = put(module, stand_ins.autograd_function())
    module.kept = function.apply
    value, locations, weights, _ = samples()
    arguments = (value, SHAPES, STARTS, by_level(locations), by_level(weights), 64)
    before, first, second = dict(vars(module)), cupy_msda.torch.patch(), cupy_msda.torch.patch()
    first.undo()
    module.kept(*arguments)
    assert line(second).calls == 1
    second.undo()
    assert dict(vars(module)) == before


def test_an_apply_of_its_own_is_restored(module):
    base = stand_ins.autograd_function()

    class MSDeformAttnFunction(base):
        @classmethod
        def apply(cls, *arguments):
            return super().apply(*arguments)

    function = put(module, MSDeformAttnFunction)
    own = vars(function)["apply"]
    with cupy_msda.torch.patch() as patch:
        apply(function)
        assert line(patch).calls == 1
    assert vars(function)["apply"] is own


class Reflected(PaddedDeformableAttention):
    def __init__(self, padding_mode):
        super().__init__()
        self.padding_mode = padding_mode


def test_an_object_after_one_that_is_kept_is_served():
    layers = nn.ModuleList([Reflected("reflection"), Reflected("border")])
    want = [call(layer) for layer in layers]
    with cupy_msda.torch.patch(layers) as patch:
        assert_same([call(layer) for layer in layers], want, 1e-9)
        assert sum(line.calls for line in patch.report()) == 1


def test_calls_that_were_left_before_a_patch_are_not_its(module):
    function = put(module, scaled_by_keyword(stand_ins.pixels_first()))
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as outer:
        function(value, SHAPES, by_level(locations), by_level(weights), scale=2.0)
        with cupy_msda.torch.patch() as inner:
            assert "1 calls went to the original" in line(outer).reason
            assert line(inner).reason == ""


# ---- programs --------------------------------------------------------------------------------------------------------


class DeformableAttention(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.core = function

    def forward(self, *arguments):
        return self.core(*arguments)


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    samples = sampling_locations.unbind(3), attention_weights.unbind(3)
    return stand_ins.composition(value, value_spatial_shapes, *samples)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_patched_model_is_copied_and_pickled(copied):
    model = nn.Sequential(DeformableAttention(multi_scale_deformable_attn_pytorch))
    want = call(model[0])
    with cupy_msda.torch.patch(model):
        other = copied(model)
        assert_same([call(other[0])], [want], 1e-9)
    assert_same([call(other[0])], [want], 0)


@pytest.mark.parametrize("first", [0, 1])
def test_patches_are_undone_in_any_order(module, first):
    function = put(module, stand_ins.pixels_first())
    code, patches = function.__code__, [cupy_msda.torch.patch(), cupy_msda.torch.patch()]
    patches[first].undo()
    call(function)
    assert [line(patch).calls for patch in patches] == [1 - (first == 0), 1 - (first == 1)]
    patches[1 - first].undo()
    assert function.__code__ is code


def test_threads_that_patch_and_undo_at_once(module):
    function = put(module, stand_ins.pixels_first())
    code, errors = function.__code__, []

    def work():
        try:
            for _ in range(5):
                with cupy_msda.torch.patch():
                    call(function)
                call(function)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert function.__code__ is code


def test_undo_after_the_module_is_gone():
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    exec(
        "def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights): pass",
        vars(module),
    )
    patch = cupy_msda.torch.patch()
    vars(module).clear()
    del sys.modules[NAME]
    patch.undo()
    assert "cupy_msda" not in str(sys.meta_path[0])
