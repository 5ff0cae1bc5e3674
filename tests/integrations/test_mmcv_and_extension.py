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


@pytest.fixture
def real_mmcv(monkeypatch):
    """mmcv's own Python code; an empty module stands for what it compiles, which the CPU path does not call."""

    class Compiled(ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "mmcv._ext", Compiled("mmcv._ext"))
    return pytest.importorskip("mmcv.ops.multi_scale_deform_attn")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("boxes", [False, True])
def test_a_patched_layer_of_mmcv_gives_the_same_numbers(real_mmcv, boxes, monkeypatch):
    torch.manual_seed(0)
    layer = real_mmcv.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True, dropout=0.0).double()
    shapes = torch.tensor([[6, 7], [3, 4]])
    query, value = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 54, 32, dtype=torch.float64)
    arguments = {
        "query": query, "value": value, "reference_points": torch.rand(2, 5, 2, 4 if boxes else 2, dtype=torch.float64),
        "spatial_shapes": shapes, "level_start_index": torch.tensor([0, 42]),
    }  # fmt: skip
    parameters = tuple(layer.parameters())

    def run():
        output = layer(**arguments)
        return [output, *torch.autograd.grad(output.square().sum(), parameters)]

    want, calls = run(), []
    monkeypatch.setattr(mmcv, "ms_deform_attn", lambda *a: calls.append(1) or ms_deform_attn(*a))
    with mmcv.patch() as patch:
        assert_same(run(), want, 1e-9)
        assert len(patch.served) == 2
    assert len(calls) == 1
    assert_same(run(), want, 1e-12)
    assert len(calls) == 1


def test_undo_restores_mmcv(real_mmcv):
    before = real_mmcv.MultiScaleDeformableAttnFunction, real_mmcv.multi_scale_deformable_attn_pytorch
    with mmcv.patch():
        assert issubclass(real_mmcv.MultiScaleDeformableAttnFunction, mmcv.MultiScaleDeformableAttnFunction)
    assert before == (real_mmcv.MultiScaleDeformableAttnFunction, real_mmcv.multi_scale_deformable_attn_pytorch)


def test_patch_names_the_missing_mmcv(monkeypatch):
    for part in ("mmcv", "mmcv.ops", "mmcv.ops.multi_scale_deform_attn"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(ModuleNotFoundError, match="mmcv"):
        mmcv.patch()
