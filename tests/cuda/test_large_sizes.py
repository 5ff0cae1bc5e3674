"""Arrays of more than 2**31 elements on a GPU: parts of a large call are what they are in a small one.

Each test says how many GiB of GPU memory it needs, and is skipped where these are not free.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest

import cupy_msda
from tests.helpers.tolerance import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.exclusive]

LEVELS = [(32, 48), (16, 24), (8, 12), (4, 6)]
PIXELS = sum(h * w for h, w in LEVELS)
# Queries of a part.
PART = 200


def needs(gib):
    """Skips the test where so much memory is not free."""
    import torch

    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free} are")


@dataclass(frozen=True)
class LargeCall:
    """A call; `samples` are locations and weights, or reference points, offsets and maybe logits."""

    value: Any
    levels: list[tuple[int, int]]
    samples: list[Any]
    options: dict[str, Any]
    fused: bool = False

    def part(self, image, queries):
        """The same with some queries of one image."""
        options = dict(self.options)
        if "query_lengths" in options:
            length = options["query_lengths"][image] - queries.start
            options["query_lengths"] = [min(max(length, 0), queries.stop - queries.start)]
        samples = [array[image : image + 1, queries].contiguous() for array in self.samples]
        return replace(self, value=self.value[image : image + 1], samples=samples, options=options)

    def forward(self):
        function = cupy_msda.ms_deform_attn_fused if self.fused else cupy_msda.ms_deform_attn
        return function(self.value, self.levels, None, *self.samples, **self.options)

    def backward(self, grad_output):
        """Gradients of value and of the samples."""
        samples = [*self.samples, None] if self.fused and len(self.samples) == 2 else self.samples
        function = cupy_msda.ms_deform_attn_fused_backward if self.fused else cupy_msda.ms_deform_attn_backward
        grads = function(self.value, self.levels, None, *samples, grad_output, 64, **self.options)
        return grads[: 1 + len(self.samples)]


def same(got, want, name):
    dtype = str(got.dtype).removeprefix("torch.")
    assert_close(got.double().cpu().numpy(), want.double().cpu().numpy(), dtype, name)


def check_parts(call):
    """The first and the last queries of the first and the last image, forward and backward."""
    import torch

    N, Q = call.samples[0].shape[:2]
    places = [(n, q) for n in sorted({0, N - 1}) for q in (slice(0, PART), slice(Q - PART, Q))]
    parts = [call.part(n, q) for n, q in places]
    output = call.forward()
    for (n, q), part in zip(places, parts, strict=True):
        same(output[n : n + 1, q], part.forward(), "output")
    grad_output = output.zero_()
    for n, q in places:
        grad_output[n, q] = torch.randn_like(grad_output[n, q])
    grad_value, *grads = call.backward(grad_output)
    sums = torch.zeros(call.value.shape, device=call.value.device)
    for (n, q), part in zip(places, parts, strict=True):
        of_part, *wants = part.backward(grad_output[n : n + 1, q].contiguous())
        sums[n] += of_part[0]
        for number, (grad, want) in enumerate(zip(grads, wants, strict=True)):
            same(grad[n : n + 1, q], want, f"gradient {number}")
    same(grad_value, sums, "grad_value")


def drawn(*shape):
    import torch

    return torch.randn(shape, dtype=torch.float16, device="cuda")


def uniform(*shape):
    import torch

    return torch.rand(shape, dtype=torch.float16, device="cuda")


def plain_call(Q, N=1, M=8, D=32, P=8, **options):
    samples = [uniform(N, Q, M, 4, P, 2), uniform(N, Q, M, 4, P)]
    return LargeCall(drawn(N, PIXELS, M, D), LEVELS, samples, options)


def fused_call(Q, coordinates, packed, M=8, D=32, P=8, **options):
    N, K = 1, 4 * P
    samples = [uniform(N, Q, 4, coordinates)]
    samples += [drawn(N, Q, M, 3 * K)] if packed else [drawn(N, Q, M, 4, P, 2), drawn(N, Q, M, 4, P)]
    return LargeCall(drawn(N, PIXELS, M, D), LEVELS, samples, options, fused=True)


def test_output_and_locations_of_ragged_queries():
    needs(50)
    call = plain_call(Q := 8_400_000, query_lengths=[Q - 50])
    assert Q * 8 * 32 > 2**31
    check_parts(call)


def test_output_of_all_images():
    needs(16)
    call = plain_call(Q := 4_300_000, N=2, P=1)
    assert 2 * Q * 8 * 32 > 2**31 > Q * 8 * 32
    check_parts(call)


def test_packed_offsets_in_the_order_of_samples():
    needs(32)
    call = fused_call(Q := 3_000_000, coordinates=2, packed=True, deterministic=True)
    assert 3 * Q * 8 * 32 > 2**31 > 2 * Q * 8 * 32
    check_parts(call)


def test_packed_offsets_that_are_materialised():
    needs(48)
    call = fused_call(Q := 4_000_000, coordinates=2, packed=True, P=6, deterministic=True)
    assert 3 * Q * 8 * 24 > 2**31 > 2 * Q * 8 * 24
    check_parts(call)


def test_boxes():
    needs(64)
    call = fused_call(Q := 140_000_000, coordinates=4, packed=False, M=1, D=8, P=1, deterministic=True)
    assert 4 * 4 * Q > 2**31 > 2 * 4 * Q
    check_parts(call)


@pytest.mark.parametrize(("S", "stride"), [(300, 2**23), (3, 2**31 - 8), (3, 2**31 + 64)])
def test_value_of_a_few_pixels_far_from_each_other(S, stride):
    import torch

    needs(24)
    M, D, Q = 1, 512, PART
    memory = torch.zeros((S - 1) * stride + M * D, dtype=torch.float16, device="cuda")
    value = memory.as_strided((1, S, M, D), (memory.numel(), stride, D, 1))
    value.copy_(drawn(1, S, M, D))
    call = LargeCall(value, [(1, S)], [uniform(1, Q, M, 1, 4, 2), uniform(1, Q, M, 1, 4)], {})
    compact = replace(call, value=value.contiguous())
    same(call.forward(), compact.forward(), "output")
    grad_output = drawn(1, Q, M * D)
    for number, (grad, want) in enumerate(zip(call.backward(grad_output), compact.backward(grad_output), strict=True)):
        same(grad, want, f"gradient {number}")


def test_heads_of_all_images():
    """One pixel, one query and one sample, in the middle of the pixel: the output is weight * value."""
    import torch

    needs(40)
    N, M = 2**28 + 3, 8
    value, weights = uniform(N, 1, M, 1), uniform(N, 1, M, 1, 1)
    locations = torch.full((N, 1, M, 1, 1, 2), 0.5, dtype=torch.float16, device="cuda")
    output = cupy_msda.ms_deform_attn(value, [(1, 1)], None, locations, weights)
    torch.testing.assert_close(output, value[..., 0] * weights[..., 0, 0], rtol=0, atol=0)
