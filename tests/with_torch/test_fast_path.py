"""What counts as the same call again, for the short way that CUDA calls take; a stand-in plays the recipe."""

from types import SimpleNamespace

import pytest
import torch

from cupy_msda.call import PLAIN
from cupy_msda.torch import decomposed, fast_path, functional, ms_deform_attn
from tests.with_torch.test_registered_operator import layer, tensors


@pytest.fixture
def recent(monkeypatch):
    """Makes calls like `arguments` recent: their recipe answers "again"."""

    def remember(arguments, im2col_step=64, deterministic=None):
        value, shapes, starts, locations, weights, _ = arguments
        recipe = SimpleNamespace(levels=(), forward=lambda *a: "again")
        monkeypatch.setattr(fast_path, "recent", ())
        monkeypatch.setitem(fast_path.recipes, "key", recipe)
        call = (value, locations, weights, shapes, starts, im2col_step, deterministic, PLAIN)
        assert fast_path.recall("key", *call) is recipe
        assert len(fast_path.recent) == 1

    return remember


def call(arguments, **settings):
    return ms_deform_attn(*arguments[:5], **settings)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_same_layout_is_the_same_call(recent, monkeypatch, requires_grad):
    recent(tensors("cpu", requires_grad=requires_grad, starts=True))
    monkeypatch.setattr(functional, "apply", lambda *inputs: inputs[-1][0].forward())
    assert call(tensors("cpu", requires_grad=requires_grad, starts=True, seed=1)) == "again"
    with torch.no_grad():
        assert call(tensors("cpu", requires_grad=requires_grad, starts=True, seed=2)) == "again"


OTHERS = {
    "more queries": lambda a: (*a[:3], *(t.repeat(1, 2, *(1,) * (t.ndim - 2)) for t in a[3:5])),
    "float64": lambda a: (a[0].double(), *a[1:3], a[3].double(), a[4].double()),
    "strides": lambda a: (a[0].transpose(1, 2).contiguous().transpose(1, 2), *a[1:5]),
    "int32 metadata": lambda a: (a[0], a[1].int(), *a[2:5]),
    "packed": lambda a: (*a[:2], None, *a[3:5]),
    "metadata as numbers": lambda a: (a[0], a[1].tolist(), a[2].tolist(), *a[3:5]),
    "gradient wanted": lambda a: (a[0].clone().requires_grad_(), *a[1:5]),
    "parameter": lambda a: (torch.nn.Parameter(a[0], requires_grad=False), *a[1:5]),
}


@pytest.mark.parametrize("variant", [{"padding_mode": "border"}, {"align_corners": True}], ids=str)
def test_a_variant_is_another_call(recent, variant):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments)
    assert torch.is_tensor(call(arguments, **variant))


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_is_another_call(recent, name):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments)
    other = OTHERS[name](arguments)
    assert torch.is_tensor(call(other))


@pytest.mark.parametrize("settings", [{"im2col_step": 32}, {"deterministic": True}, {"validate": True}], ids=str)
def test_other_settings_are_another_call(recent, settings):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments)
    assert torch.is_tensor(call(arguments, **settings))


@pytest.mark.parametrize("step", [64.0, True, "64"], ids=repr)
def test_what_only_equals_the_setting_is_validated(recent, step):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments, im2col_step=64 if step != 1 else 1)
    with pytest.raises(TypeError, match="im2col_step"):
        call(arguments, im2col_step=step)


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operator(recent):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments)
    with Mode():
        assert torch.is_tensor(call(arguments))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.is_tensor(call(arguments))
    with decomposed():
        assert torch.is_tensor(call(arguments))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], arguments[0])
        with pytest.raises(NotImplementedError):
            call((dual, *arguments[1:]))
    value, *others = arguments[:5]
    mapped = torch.vmap(lambda v: ms_deform_attn(v, *others))(torch.stack((value, value)))
    assert mapped.shape[0] == 2
    grad = torch.func.grad(lambda v: ms_deform_attn(v, *others).sum())(value)
    assert grad.shape == value.shape
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.is_tensor(compiled(*arguments[:5]))


def test_only_a_few_are_recent(recent):
    arguments = tensors("cpu", requires_grad=False, starts=True)
    recent(arguments)
    for _ in range(10):
        fast_path.recall("key", arguments[0], *arguments[3:5], *arguments[1:3], 64, None, PLAIN)
    assert len(fast_path.recent) == fast_path._MOST_RECENT


def test_a_known_layout_that_is_not_recent_is_looked_up_once(monkeypatch):
    """Levels as numbers are never among the recent calls: each such call finds its recipe by its key."""
    value, shapes, starts, locations, weights, _ = tensors("cpu", requires_grad=False, starts=True)
    arguments = (value, shapes.tolist(), starts.tolist(), locations, weights)
    key = fast_path.key_of(value, locations, weights, arguments[1], arguments[2], 64, None, PLAIN)
    monkeypatch.setitem(fast_path.recipes, key, SimpleNamespace(levels=(1,), forward=lambda *a: "again"))
    seen, real = [], fast_path.key_of
    monkeypatch.setattr(fast_path, "key_of", lambda *a: seen.append(a) or real(*a))
    assert ms_deform_attn(*arguments) == "again"
    assert len(seen) == 1
