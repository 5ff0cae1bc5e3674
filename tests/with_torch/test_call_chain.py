"""A cold call goes one way: from the public function to the computation, through each file once.

Counted are the Python calls of this package that receive the operands: a tensor, the Arguments or the Call, as an
argument or in a tuple. A hop is such a call that enters another file, or one inside a file that is still on the stack
when the computation starts. Not counted are helpers that return to their own file, `call.py` (data), `arrays/` (a view
per array, a result per output) and `torch/compat.py` (what torch answers about tensors).

The chain is measured to the function that receives the validated Call: `cpu/run.py` here, `cuda/run.py` on a GPU.
"""

import sys
from pathlib import Path

import pytest
import torch

import cupy_msda
from cupy_msda.call import Arguments, Call
from cupy_msda.torch import cpu_path, ms_deform_attn, ms_deform_attn_fused
from tests.helpers.torch_calls import tensors

PACKAGE = Path(cupy_msda.__file__).parent
# Of 12 in all. cuda/run.py makes the other four: it plans, prepares the launch, compiles the kernel and launches it.
MOST_HOPS = 12 - 4
TENSORS_AND_CALLS = (torch.Tensor, Arguments, Call)


@pytest.fixture(autouse=True)
def _cold(monkeypatch):
    monkeypatch.setattr(cpu_path, "problems", {})


def file_of(frame):
    """Of this package, or None."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def has_operands(frame):
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount + 2]
    given = [frame.f_locals[name] for name in names if name in frame.f_locals]
    given += [part for value in given if isinstance(value, tuple) for part in value]
    return any(isinstance(value, TENSORS_AND_CALLS) for value in given)


def frames_of_package(frame):
    while frame is not None:
        if file_of(frame):
            yield frame
        frame = frame.f_back


class Chain:
    """Records the files that a call enters, and the functions on the stack when the computation starts."""

    def __init__(self):
        self.entered, self.stack = [], []

    def __call__(self, frame, event, argument):
        if event != "call" or self.stack or not file_of(frame) or not has_operands(frame):
            return
        here, *callers = frames_of_package(frame)
        name = f"{file_of(here)}:{here.f_code.co_qualname}"
        if file_of(here).startswith("arrays/") or file_of(here) in ("call.py", "torch/compat.py"):
            return
        if not callers or file_of(callers[0]) != file_of(here):
            self.entered.append(name)
        if name == "cpu/run.py:forward":
            self.stack = [f"{file_of(one)}:{one.f_code.co_qualname}" for one in (here, *callers)]

    def hops(self):
        return [*self.entered, *(name for name in self.stack if name not in self.entered)]


def chain_of(call):
    chain = Chain()
    sys.setprofile(chain)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert chain.stack, "the computation did not start"
    return chain


def call_of(form, requires_grad, options):
    value, shapes, starts, locations, weights, _ = tensors("cpu", requires_grad=requires_grad, starts=True)
    references = torch.rand(2, 5, 2, 2)
    packed = torch.cat((locations.detach().flatten(3), weights.detach().flatten(3)), -1).requires_grad_(requires_grad)
    return {
        "plain": lambda: ms_deform_attn(value, shapes, starts, locations, weights, **options),
        "fused": lambda: ms_deform_attn_fused(value, shapes, starts, references, locations, weights, **options),
        "packed": lambda: ms_deform_attn_fused(value, shapes, starts, references, packed, **options),
    }[form]


@pytest.mark.parametrize("options", [{}, {"align_corners": True}, {"validate": True}], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("form", ["plain", "fused", "packed"])
def test_a_cold_call_enters_no_file_twice_and_has_few_hops(form, requires_grad, options):
    chain = chain_of(call_of(form, requires_grad, options))
    files = [name.partition(":")[0] for name in chain.entered]
    assert len(files) == len(set(files)), chain.entered
    assert len(chain.hops()) <= MOST_HOPS, chain.hops()


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_plain_and_fused_calls_share_the_chain(form):
    function = "ms_deform_attn" if form == "plain" else "ms_deform_attn_fused"
    chain = chain_of(call_of(form, True, {}))
    assert chain.entered == [
        f"torch/functional.py:{function}",
        "torch/dtypes.py:dtypes_agree",
        "torch/autograd.py:_Attention.forward",
        "torch/fast_path.py:forward",
        "validate.py:read",
        "api.py:forward",
        "cpu/run.py:forward",
    ]
    assert chain.hops() == [*chain.entered, "torch/functional.py:_attention"]
