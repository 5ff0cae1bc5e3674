"""`inspect` of models: the names of layers, results with the same bits, and nothing that remains."""

import copy
import threading

import pytest
import torch
from torch import nn

from cupy_msda import plot
from cupy_msda.torch import inspect, ms_deform_attn
from cupy_msda.torch.watchers import watchers
from tests.helpers.torch_calls import (
    DEVICES,
    LEVELS,
    Calls,
    assert_same,
    attention_module,
    module_inputs,
    tensors,
    to_float32,
)


class Stack(nn.Module):
    """Two layers, the second of which is called twice."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = attention_module(0), nn.ModuleDict({"cross": attention_module(1)})

    def forward(self, query, *others):
        query = self.encoder(query, *others)
        for _ in range(2):
            query = self.decoder["cross"](query, *others)
        return query


nothing_recorded = pytest.mark.filterwarnings("ignore:cupy_msda. no call was recorded")


def test_records_name_the_innermost_module_in_the_order_of_calls():
    model, inputs = Stack(), module_inputs()
    with inspect(model) as records:
        model(*inputs)
    assert [record.layer for record in records] == ["encoder", "decoder.cross", "decoder.cross"]
    assert not torch.equal(records[1].sampling_locations, records[2].sampling_locations)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["encoder"], ["encoder"]),
        (["decoder.cross"], ["decoder.cross"] * 2),
        (["", "encoder"], ["encoder", "", ""]),
        (["encoder.value_proj"], []),
        ([], []),
    ],
)
def test_only_the_chosen_layers_are_recorded(layers, names):
    model, inputs = Stack(), module_inputs()
    with inspect(model, layers=layers) as records:
        model(*inputs)
    assert [record.layer for record in records] == names


def test_a_shared_layer_has_the_name_by_which_it_is_chosen():
    layer = attention_module()
    model = nn.ModuleDict({"first": layer, "second": layer})
    with inspect(model, layers=["second"]) as records:
        layer(*module_inputs())
    assert [record.layer for record in records] == ["second"]


def results(model, inputs):
    """Output and gradients."""
    inputs = [part.detach().requires_grad_() if part.is_floating_point() else part for part in inputs]
    model.zero_grad()
    output = model(*inputs)
    output.square().sum().backward()
    return [output, *(part.grad for part in inputs if part.grad is not None), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients_have_the_same_bits(autocast):
    model, inputs = Stack().float(), to_float32(module_inputs(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = results(copy.deepcopy(model), inputs)
        with inspect(model) as records:
            have = results(model, inputs)
    assert len(records) == 3
    for ours, theirs in zip(have, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_repeated_call_has_the_same_bits(device):
    """On a GPU it takes a launch plan without this context, and with it the general path."""
    layer, inputs = attention_module().float().to(device), [part.to(device) for part in to_float32(module_inputs())]
    want = [layer(*inputs) for _ in range(3)][-1]
    with inspect(layer) as records:
        assert torch.equal(layer(*inputs), want)
    assert {part.device.type for part in (records[0].sampling_locations, records[0].attention_weights)} == {"cpu"}
    assert torch.equal(layer(*inputs), want)


@nothing_recorded
def test_other_layers_keep_their_fused_kernels():
    """A mode of __torch_function__ would change their results."""
    torch.manual_seed(0)
    model, inputs = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval(), torch.randn(2, 50, 32)
    with torch.inference_mode():
        want = model(inputs)
        with inspect(model):
            assert torch.equal(model(inputs), want)


def test_a_step_of_training_is_recorded_before_and_after():
    layer, inputs = attention_module(), module_inputs()
    optimizer, records = torch.optim.SGD(layer.parameters(), lr=0.1), []
    for _ in range(2):
        with inspect(layer, queries=[0]) as found:
            layer(*inputs).square().sum().backward()
        optimizer.step()
        records += found
    assert not torch.equal(records[0].sampling_locations, records[1].sampling_locations)


def test_records_can_be_drawn():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    layer, image = attention_module(), torch.zeros(12, 14).numpy()
    with inspect(layer, queries=[3]) as records:
        layer(*module_inputs(4))
    for draw, axes in zip((plot.sampling_points, plot.heat_map), figure.subplots(2), strict=True):
        assert draw(records[0], image, 3, batch=1, head=1, axes=axes) is axes
    figure.canvas.draw()


def hooks_of(model):
    return [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_remains_after_the_context(fails):
    model, inputs = Stack(), module_inputs()
    try:
        with inspect(model) as records:
            model(*inputs)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not any(hooks_of(model))
    assert not watchers
    model(*inputs)
    assert len(records) == 3


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_names_are_right_after_a_layer_has_failed(error):
    layers, inputs = Stack(), module_inputs()
    value, _, _, locations, weights, _ = tensors("cpu")

    def fail(*_):
        raise error

    def attempt(*inputs):
        failing = layers.encoder.value_proj.register_forward_hook(fail)
        with pytest.raises(error):
            layers(*inputs)
        failing.remove()
        return layers.decoder["cross"](*inputs)

    model = nn.ModuleDict({"layers": layers, "attempt": Calls(attempt)})
    with inspect(model) as records:
        model["attempt"](*inputs)
        ms_deform_attn(value, LEVELS, None, locations, weights)  # outside of the model
    assert [record.layer for record in records] == ["layers.decoder.cross"]


def test_a_hook_that_fails_first_hides_no_name():
    model, inputs = Stack(), module_inputs()

    def fail(*_):
        raise RuntimeError("of a user")

    with inspect(model) as records:
        hook = model.encoder.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(RuntimeError, match="of a user"):
            model(*inputs)
        hook.remove()
        model(*inputs)
    assert [record.layer for record in records] == ["encoder", "decoder.cross", "decoder.cross"]


@nothing_recorded
def test_a_call_that_fails_is_not_recorded():
    layer, (query, references, *others) = attention_module(), module_inputs()
    with inspect(layer) as records, pytest.raises(ValueError, match="reference_points: expected shape"):
        layer(query, references[..., :1], *others)
    assert not records


def test_contexts_nest():
    model, inputs = Stack(), module_inputs()
    with inspect(model) as outer, inspect(model, layers=["encoder"]) as inner:
        model(*inputs)
    assert (len(outer), len(inner)) == (3, 1)


def test_threads_have_names_of_their_own():
    model, inputs = Stack(), module_inputs()
    calls = [model.encoder, model.decoder["cross"]] * 2
    with inspect(model) as records:
        threads = [threading.Thread(target=layer, args=inputs) for layer in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(record.layer for record in records) == ["decoder.cross"] * 2 + ["encoder"] * 2


@nothing_recorded
def test_compiled_code_goes_on_unseen():
    torch._dynamo.reset()
    layer, inputs = attention_module(), module_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with inspect(layer) as records:
        inside = compiled(*inputs)
    assert_same([inside, compiled(*inputs)], [layer(*inputs)] * 2)
    assert not records
    torch._dynamo.reset()


@nothing_recorded
def test_a_scripted_submodule_has_no_hooks():
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with inspect(model) as records:
        model(torch.ones(1, 2))
    assert not records


@nothing_recorded
def test_a_query_that_a_layer_does_not_have_is_an_error():
    layer, inputs = attention_module(), module_inputs()
    with inspect(layer, queries=[5]), pytest.raises(IndexError, match=r"indices below Q = 5 in the layer '', got 5"):
        layer(*inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ["encode"]}, ValueError, r"layers: expected names as in model.named_modules\(\), got \['encode'\]"),
        ({"layers": "encoder"}, TypeError, "layers: expected a list of names, got 'encoder'"),
        ({"queries": 3}, TypeError, "queries: expected a list of ints, got 3"),
        ({"queries": [0.5]}, TypeError, r"queries: expected a list of ints, got \[0.5\]"),
        ({"queries": [-1]}, ValueError, r"queries: expected indices of at least 0, got \[-1\]"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message), inspect(**({"model": Stack()} | options)):
        pass


def test_a_model_of_which_nothing_is_recorded_is_named():
    with pytest.warns(UserWarning, match=r"no call was recorded.*patched first"), inspect(torch.nn.Linear(2, 2)):
        pass
