"""Replacements of compiled extensions: the calling conventions of Deformable DETR and of mmcv."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from cupy_msda.torch import extension, mmcv, ms_deform_attn
from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close
from tests.helpers.torch_calls import assert_same, results, tensors_of

NAME = "MultiScaleDeformableAttention"
CASE = Case("drop-in")


@pytest.fixture
def installed():
    extension.install()
    yield importlib.import_module(NAME)
    extension.uninstall()


def test_an_autograd_function_of_the_caller_gets_right_gradients_from_the_extension(installed):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return installed.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_output):
            grads = installed.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.step)
            return grads[0], None, None, grads[1], grads[2], None

    have = results(lambda *a: Function.apply(*a, 2), tensors_of(CASE))
    want_output, want = cases.expected(CASE.inputs())
    for tensor, exact in zip(have, (want_output, *want), strict=True):
        assert_close(tensor.numpy(), exact, "float32")


def test_the_extension_may_have_another_name(monkeypatch):
    package = ModuleType("some_detector")
    monkeypatch.setitem(sys.modules, "some_detector", package)
    extension.install("some_detector._C")
    assert importlib.import_module("some_detector._C") is extension
    assert package._C is extension
    extension.uninstall("some_detector._C")
    assert "some_detector._C" not in sys.modules
    assert not hasattr(package, "_C")


def test_an_extension_that_is_imported_already_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    with pytest.raises(RuntimeError, match=r"imported already.*before that"):
        extension.install()
    extension.uninstall()
    assert NAME in sys.modules


def test_installing_twice_is_the_same_as_once(installed):
    assert extension.install() is installed


@pytest.mark.parametrize("step", [64, torch.tensor(64)], ids=["int", "tensor"])
def test_the_function_of_mmcv_is_the_operator(step):
    arguments = tensors_of(CASE)
    have = results(lambda *a: mmcv.MultiScaleDeformableAttnFunction.apply(*a, step), arguments)
    assert_same(have, results(ms_deform_attn, arguments))


def test_the_cpu_function_of_mmcv_is_the_operator():
    arguments = tensors_of(CASE)
    have = results(lambda v, s, _, *samples: mmcv.multi_scale_deformable_attn_pytorch(v, s, *samples), arguments)
    assert_same(have, results(ms_deform_attn, arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_function_of_mmcv_keeps_float32_locations_with_a_16_bit_value(dtype):
    value, shapes, starts, locations, weights, _ = tensors_of(CASE, dtype=dtype, location_dtype=torch.float32)
    have = mmcv.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights.to(dtype), 64)
    assert torch.equal(have, ms_deform_attn(value, shapes, starts, locations, weights.to(dtype).float()))


SIZES = {"embed_dims": 32, "num_heads": 4, "num_levels": 2, "num_points": 3}


def mmcv_layer(boxes=False):
    """mmcv's layer, and its arguments."""
    torch.manual_seed(0)
    made = importlib.import_module("mmcv.ops").MultiScaleDeformableAttention(**SIZES, batch_first=True, dropout=0.0)
    query, value = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 54, 32, dtype=torch.float64)
    return made.double(), {
        "query": query, "value": value, "reference_points": torch.rand(2, 5, 2, 4 if boxes else 2, dtype=torch.float64),
        "spatial_shapes": torch.tensor([[6, 7], [3, 4]]), "level_start_index": torch.tensor([0, 42]),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("boxes", [False, True])
def test_mmcv_without_compiled_operators_is_served(boxes):
    pytest.importorskip("mmcv")
    with mmcv.install() as patch:
        layer, arguments = mmcv_layer(boxes)
        parameters = tuple(layer.parameters())

        def run():
            output = layer(**arguments)
            return [output, *torch.autograd.grad(output.square().sum(), parameters)]

        have = run()
        assert [line.calls for line in patch.report()] == [0, 0, 0, 1]
    assert_same(have, run(), 1e-9)


@pytest.mark.filterwarnings("ignore")
def test_mmcv_may_be_installed_twice():
    pytest.importorskip("mmcv")
    with mmcv.install() as outer, mmcv.install():
        pass
    layer, arguments = mmcv_layer()
    with mmcv.install():
        layer(**arguments)
    assert outer.report()[-1].calls == 0


@pytest.mark.filterwarnings("ignore")
def test_other_operators_of_such_an_mmcv_say_what_is_missing():
    pytest.importorskip("mmcv")
    with mmcv.install():
        nms = importlib.import_module("mmcv.ops").nms
        with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms.*pip install mmcv"):
            nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    assert "mmcv._ext" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_the_autograd_function_of_mmcv_is_served():
    pytest.importorskip("mmcv")
    with mmcv.install() as patch:
        function = importlib.import_module("mmcv.ops").multi_scale_deform_attn.MultiScaleDeformableAttnFunction
        arguments = tensors_of(CASE)
        assert_same(results(lambda *a: function.apply(*a, 64), arguments), results(ms_deform_attn, arguments), 1e-6)
        assert "MultiScaleDeformableAttnFunction" in str(patch.report()[2])
        assert [line.calls for line in patch.report()][2] == 1


@pytest.fixture
def compiled(monkeypatch):
    """A mmcv whose compiled operators are there, and do nothing."""
    module = ModuleType("mmcv._ext")
    module.ms_deform_attn_forward = module.ms_deform_attn_backward = lambda *a, **k: None
    attention = ModuleType("mmcv.ops.multi_scale_deform_attn")
    for name in ("mmcv", "mmcv.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mmcv._ext", module)
    monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", attention)
    return module


def test_who_calls_the_compiled_operators_of_mmcv_is_served(compiled):
    class Function(torch.autograd.Function):
        """As in BEVFormer and MapTR."""

        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return compiled.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=step)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_output):
            value, _, _, locations, weights = ctx.saved_tensors
            grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
            compiled.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, *grads, im2col_step=ctx.step)
            return grads[0], None, None, grads[1], grads[2], None

    before = dict(vars(compiled))
    with mmcv.patch() as patch:
        arguments = tensors_of(CASE)
        assert_same(results(lambda *a: Function.apply(*a, 64), arguments), results(ms_deform_attn, arguments))
        assert [line.calls for line in patch.report()] == [1, 1]
    assert vars(compiled) == before


def test_where_mmcv_has_compiled_operators_nothing_is_installed(compiled, monkeypatch):
    monkeypatch.setattr(mmcv.importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(RuntimeError, match=r"mmcv without compiled operators.*call patch\(\)"):
        mmcv.install()


def test_patch_and_install_name_the_missing_mmcv(monkeypatch):
    for part in ("mmcv", "mmcv.ops", "mmcv.ops.multi_scale_deform_attn"):
        monkeypatch.setitem(sys.modules, part, None)
    for serve in (mmcv.patch, mmcv.install):
        with pytest.raises(ModuleNotFoundError, match="mmcv"):
            serve()
