"""What counts as a repeated call, and what it does: the fast path of CUDA calls, tested on the CPU with stub launches.

A stub launch records its words instead of launching a kernel, so outputs hold no results here.
"""

import contextlib
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cupy_msda import validate
from cupy_msda.call import FUSED_NAMES, PLAIN, Arguments
from cupy_msda.cuda import plan as planner
from cupy_msda.torch import cpu_path, decomposed, fast_path, functional, ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.fast_path import PACKED, WITH_LOGITS, WITH_WEIGHTS
from tests.helpers.torch_calls import between_other_operations, tensors

FORMS = (WITH_WEIGHTS, WITH_LOGITS, PACKED)


def arguments_of(form, seed=0, requires_grad=False, **settings):
    """Arguments of a call of each form with two levels, metadata as tensors."""
    value, shapes, starts, locations, weights, _ = tensors("cpu", requires_grad=requires_grad, starts=True, seed=seed)
    references, names = None, {}
    if form != WITH_WEIGHTS:
        references = torch.rand(2, 5, 2, 2, generator=torch.Generator().manual_seed(seed))
        references.requires_grad_(requires_grad)
        names = {"names": FUSED_NAMES}
    if form == PACKED:
        flat = torch.cat((locations.detach().flatten(3), weights.detach().flatten(3)), -1)
        locations, weights = flat.requires_grad_(requires_grad), None
    return Arguments(value, shapes, starts, references, locations, weights, **names, **settings)


def bound(arguments, **settings):
    """The public function with its arguments."""
    metadata = (arguments.spatial_shapes, arguments.level_start_index)
    samples = (arguments.locations, arguments.weights)
    if arguments.fused:
        return partial(
            ms_deform_attn_fused, arguments.value, *metadata, arguments.reference_points, *samples, **settings
        )
    return partial(ms_deform_attn, arguments.value, *metadata, *samples, **settings)


def call(arguments, **settings):
    return bound(arguments, **settings)()


@pytest.fixture
def no_plans(monkeypatch):
    monkeypatch.setattr(fast_path, "plans", {})
    monkeypatch.setattr(cpu_path, "problems", {})
    for form in FORMS:
        monkeypatch.setitem(fast_path.recent, form, ())


@pytest.fixture
def remember(monkeypatch, no_plans):
    """Makes calls like these arguments recent: the forward of their plan answers "repeated"."""

    def remember(arguments):
        plan = SimpleNamespace(levels=(), forward=lambda *inputs: "repeated")
        monkeypatch.setitem(fast_path.plans, fast_path.layout_key(arguments), plan)
        assert fast_path.forward(arguments) == ("repeated", plan)
        monkeypatch.setattr(fast_path, "plans", {})
        assert sum(map(len, fast_path.recent.values())) == 1

    return remember


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_the_same_layout_is_repeated(remember, monkeypatch, form, requires_grad):
    remember(arguments_of(form, requires_grad=requires_grad))
    monkeypatch.setattr(functional, "apply_attention", lambda *inputs: inputs[6].forward())
    assert call(arguments_of(form, seed=1, requires_grad=requires_grad)) == "repeated"
    with torch.no_grad():
        assert call(arguments_of(form, seed=2, requires_grad=requires_grad)) == "repeated"


@pytest.mark.parametrize("form", [WITH_LOGITS, PACKED])
def test_a_fused_call_of_another_layout_is_not_repeated(remember, form):
    arguments = arguments_of(form)
    remember(arguments)
    samples = (arguments.reference_points, arguments.locations, arguments.weights)
    assert torch.is_tensor(ms_deform_attn_fused(arguments.value, arguments.spatial_shapes, None, *samples))


@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_another_form_is_not_repeated(remember, form):
    remember(arguments_of(form))
    for other in FORMS:
        assert (
            (call(arguments_of(other)) == "repeated") if other == form else torch.is_tensor(call(arguments_of(other)))
        )


OTHER_LAYOUTS = {
    "more queries": lambda a: (*a[:3], *(t.repeat(1, 2, *(1,) * (t.ndim - 2)) for t in a[3:5])),
    "float64": lambda a: (a[0].double(), *a[1:3], a[3].double(), a[4].double()),
    "strides": lambda a: (a[0].transpose(1, 2).contiguous().transpose(1, 2), *a[1:5]),
    "int32 metadata": lambda a: (a[0], a[1].int(), *a[2:5]),
    "no starts": lambda a: (*a[:2], None, *a[3:5]),
    "metadata as numbers": lambda a: (a[0], a[1].tolist(), a[2].tolist(), *a[3:5]),
    "gradient wanted": lambda a: (a[0].clone().requires_grad_(), *a[1:5]),
    "parameter": lambda a: (torch.nn.Parameter(a[0], requires_grad=False), *a[1:5]),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_a_call_of_another_layout_is_not_repeated(remember, name):
    remember(arguments_of(WITH_WEIGHTS))
    other = OTHER_LAYOUTS[name](tensors("cpu", requires_grad=False, starts=True))
    assert torch.is_tensor(ms_deform_attn(*other))


@pytest.mark.parametrize(
    "settings",
    [{"padding_mode": "border"}, {"align_corners": True}, {"im2col_step": 32}, {"deterministic": True},
     {"validate": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_a_call_with_other_settings_is_not_repeated(remember, form, settings):
    arguments = arguments_of(form)
    remember(arguments)
    assert torch.is_tensor(call(arguments, **settings))


@pytest.mark.parametrize("step", [64.0, True, "64"], ids=repr)
def test_a_setting_that_only_equals_the_recent_one_is_validated(remember, step):
    arguments = arguments_of(WITH_WEIGHTS, im2col_step=64 if step != 1 else 1)
    remember(arguments)
    with pytest.raises(TypeError, match="im2col_step"):
        call(arguments, im2col_step=step)


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_profilers_transforms_and_compilers_see_the_operator(remember):
    arguments = arguments_of(WITH_WEIGHTS)
    remember(arguments)
    with Mode():
        assert torch.is_tensor(call(arguments))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.is_tensor(call(arguments))
    with decomposed():
        assert torch.is_tensor(call(arguments))
    value, *others = tensors("cpu", requires_grad=False, starts=True)[:5]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, value)
        assert torch.autograd.forward_ad.unpack_dual(ms_deform_attn(dual, *others)).tangent is not None
    mapped = torch.vmap(lambda v: ms_deform_attn(v, *others))(torch.stack((value, value)))
    assert mapped.shape[0] == 2
    grad = torch.func.grad(lambda v: ms_deform_attn(v, *others).sum())(value)
    assert grad.shape == value.shape
    compiled = torch.compile(between_other_operations, fullgraph=True, backend="aot_eager")
    assert torch.is_tensor(compiled(value, *others))


@pytest.mark.parametrize("form", FORMS)
def test_only_a_few_calls_are_recent(remember, monkeypatch, form):
    arguments = arguments_of(form)
    remember(arguments)
    plan = SimpleNamespace(levels=(), forward=lambda *inputs: "repeated")
    monkeypatch.setitem(fast_path.plans, fast_path.layout_key(arguments), plan)
    for _ in range(10):
        fast_path.forward(arguments)
    assert len(fast_path.recent[form]) == fast_path._MOST_RECENT
    fast_path.forward(arguments, remember=False)
    assert sum(map(len, fast_path.recent.values())) == fast_path._MOST_RECENT


def test_level_sizes_as_numbers_are_found_by_one_key_per_call(no_plans, monkeypatch):
    value, shapes, starts, locations, weights, _ = tensors("cpu", requires_grad=False, starts=True)
    arguments = (value, shapes.tolist(), starts.tolist(), locations, weights)
    key = fast_path.layout_key(Arguments(*arguments[:3], None, *arguments[3:]))
    monkeypatch.setitem(fast_path.plans, key, SimpleNamespace(levels=(1,), forward=lambda *a: "repeated"))
    seen, real = [], fast_path.layout_key
    monkeypatch.setattr(fast_path, "layout_key", lambda *a: seen.append(a) or real(*a))
    assert ms_deform_attn(*arguments) == "repeated"
    assert len(seen) == 1
    assert not any(fast_path.recent.values())


def test_host_tensors_of_other_numbers_have_another_key():
    """A launch plan holds the numbers of host metadata: 2 x 3 pixels are not 3 x 2."""
    arguments = arguments_of(WITH_WEIGHTS)
    key = fast_path.layout_key(arguments)
    assert key == fast_path.layout_key(replace(arguments, spatial_shapes=arguments.spatial_shapes.clone()))
    assert key != fast_path.layout_key(replace(arguments, spatial_shapes=arguments.spatial_shapes.flip(-1)))
    assert key != fast_path.layout_key(replace(arguments, level_start_index=arguments.level_start_index + 1))


@pytest.mark.parametrize(
    "variant", [{"align_corners": 1}, {"interpolation": b"bilinear"}, {"num_points": [True, 2]}], ids=str
)
def test_a_variant_of_another_type_has_no_key(variant):
    arguments = arguments_of(WITH_WEIGHTS, variant=PLAIN._replace(**variant))
    assert fast_path.layout_key(arguments) is None
    assert fast_path.layout_key(arguments_of(WITH_WEIGHTS)) is not None


class StubLaunches:
    """The CUDA path as launch plans see it."""

    def __init__(self):
        self.forwards, self.backwards, self.planned, self.device = [], [], [], 3

    def prepare_forward(self, problem, alignment, stream):
        self.planned.append(problem)
        return SimpleNamespace(run=lambda *words: self.forwards.append((self.device, *words)))

    def switched_forward(self, problem, alignment, stream, is_deterministic):
        return self.prepare_forward(problem, alignment, stream).run

    def prepare_backward(self, problem, alignment, stream, wanted):
        self.planned.append((problem, wanted))

        def run(stream, metadata, addresses):
            self.backwards.append((self.device, stream, metadata, *addresses))

        return SimpleNamespace(run=run, workspace=256)

    def set_device(self, device):
        self.device = device


@pytest.fixture
def launches(monkeypatch, no_plans):
    """Calls on the CPU leave launch plans, whose launches are stubs."""
    stub = StubLaunches()
    monkeypatch.setattr(fast_path, "cuda", stub)
    monkeypatch.setattr(fast_path, "on_device", lambda device: contextlib.nullcontext())
    # As for metadata on the device, whose addresses a launch takes.
    monkeypatch.setattr(fast_path, "level_table", lambda levels, device, stream: ())
    monkeypatch.setattr(fast_path, "_repeatable", lambda call: True)
    monkeypatch.setattr(fast_path, "device_functions", lambda: (lambda: stub.device, stub.set_device))
    monkeypatch.setattr(fast_path.compat, "current_stream", lambda device: 77)
    return stub


def addresses(arguments):
    """Of locations, weights and references, as a launch takes them."""
    offset = arguments.locations.element_size() * 2 * arguments.locations.shape[-1] // 3
    weights = arguments.locations.data_ptr() + offset if arguments.packed else arguments.weights.data_ptr()
    references = arguments.reference_points.data_ptr() if arguments.fused else 0
    return arguments.locations.data_ptr(), weights, references


@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_call_launches_with_its_own_addresses(launches, monkeypatch, form):
    call(arguments_of(form))
    call(arguments_of(form))
    (problem,) = launches.planned
    monkeypatch.setattr(validate, "read", None)
    monkeypatch.setattr(fast_path, "layout_key", None)
    launches.forwards.clear()
    arguments = arguments_of(form, seed=1)
    output = call(arguments)
    metadata = (arguments.spatial_shapes.data_ptr(), arguments.level_start_index.data_ptr())
    want = (0, 77, arguments.value.data_ptr(), *metadata, *addresses(arguments), 0, output.data_ptr())
    assert launches.forwards == [(*want, *planner.size_words(problem))]
    assert launches.device == 3
    assert output.shape == (2, 5, 16)


@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_backward_launches_with_its_own_addresses(launches, monkeypatch, form):
    for seed in range(2):
        call(arguments_of(form, seed, requires_grad=True)).sum().backward()
    monkeypatch.setattr(validate, "read", None)
    monkeypatch.setattr(fast_path, "layout_key", None)
    launches.backwards.clear()
    arguments = arguments_of(form, seed=2, requires_grad=True)
    output = call(arguments)
    grad_output = torch.rand_like(output)
    leaves = [arguments.value, arguments.locations, arguments.weights, arguments.reference_points]
    grads = torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad_output)
    of_value, of_locations, *others = (grad.data_ptr() for grad in grads)
    if form == PACKED:
        others.insert(0, of_locations + addresses(arguments)[1] - addresses(arguments)[0])
    metadata = (arguments.spatial_shapes.data_ptr(), arguments.level_start_index.data_ptr())
    ((device, stream, *words),) = launches.backwards
    assert (device, stream, launches.device) == (0, 77, 3)
    inputs = (arguments.value.data_ptr(), *addresses(arguments), 0, grad_output.data_ptr())
    assert words[:-1] == [metadata, *inputs, of_value, of_locations, *(*others, 0)[:2]]
    assert words[-1] % 16 == 0
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves if leaf is not None]


def test_only_the_gradients_that_are_wanted_have_addresses(launches):
    for _ in range(2):
        arguments = arguments_of(WITH_WEIGHTS)
        arguments.weights.requires_grad_()
        call(arguments).sum().backward()
    words = launches.backwards[-1]
    assert [word != 0 for word in words[-5:]] == [False, False, True, False, True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_unaligned_address_takes_the_general_path(launches, form, requires_grad):
    for seed in range(2):
        call(arguments_of(form, seed, requires_grad))
    launches.forwards.clear()
    arguments = arguments_of(form, requires_grad=requires_grad)
    value = arguments.value.detach()
    buffer = torch.empty(value.numel() + 1)
    buffer[1:] = value.flatten()
    object.__setattr__(arguments, "value", buffer[1:].view(value.shape).requires_grad_(requires_grad))
    output = call(arguments)
    assert not launches.forwards
    with decomposed():
        torch.testing.assert_close(output, call(arguments))


def test_the_plan_cache_forgets_when_it_is_full(launches, monkeypatch):
    monkeypatch.setattr(fast_path, "_MOST_PLANS", 3)
    for queries in range(1, 9):
        ms_deform_attn(*tensors("cpu", requires_grad=False, starts=True, queries=queries)[:5])
        assert 1 <= len(fast_path.plans) <= 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_repeated_call_runs_three_python_functions_of_this_package(launches, form, requires_grad):
    """Four with a gradient: the autograd function."""
    for seed in range(2):
        call(arguments_of(form, seed, requires_grad))
    repeated, ran = bound(arguments_of(form, 2, requires_grad)), []

    def profile(frame, event, argument):
        if event == "call" and "/cupy_msda/" in frame.f_code.co_filename:
            ran.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        repeated()
    finally:
        sys.setprofile(None)
    function = repeated.func.__name__
    autograd = ["_Attention.forward"] if requires_grad else []
    assert ran == [function, "_observed", *autograd, "LaunchPlan._forward.<locals>.forward"]
