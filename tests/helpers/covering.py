"""Launches in the emulator that together reach every barrier of cuda_src, and every kernel but the naive ones."""

from dataclasses import dataclass, field, replace

import pytest

from cupy_msda.call import Wanted
from cupy_msda.cuda import sorted_heuristics
from tests.helpers import cases, emulator
from tests.helpers.cases import CROSS_LEVEL, Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.tolerance import assert_close

WITH_REFERENCES = Wanted(references=True)
PIXELS = Case("pixels", levels=((9, 11), (4, 5), (2, 2)), N=1, M=2, D=8, queries=None)
ENCODER = Case("encoder", levels=((9, 11), (4, 5), (2, 2)), N=2, M=4, D=32, queries=None)
SIX_LEVELS = Case("six_levels", levels=((9, 11), (4, 5), *((2, 2), (1, 1)) * 2), N=1, M=8, D=16, P=1, queries=None)
TAIL = Case("tail", levels=((5, 6), (3, 3)), N=2, M=1, D=32, queries=37)
FEW = Case("few", levels=((4, 5), (3, 3), (2, 2)), N=1, M=2, D=8, P=9, queries=5)
MANY_CHANNELS = Case("many_channels", levels=((4, 5),), N=1, M=1, D=259, P=3, queries=9)
AGGREGATED = Case("aggregated", levels=((5, 6), (5, 6), (2, 2)), N=1, M=2, D=32, P=4, queries=64)
DENSE = Case("dense", levels=((9, 11), (4, 5)), N=1, M=2, D=8, queries=None)
SPARSE = Case("sparse", levels=((20, 26), (13, 13)), N=1, M=2, D=32, queries=60)
CHUNKS = Case("bucket_chunks", levels=((9, 11), (4, 5)), N=1, M=1, D=8, queries=400)


@dataclass(frozen=True)
class Covered:
    """One function of the emulator on one case.

    `fused` is what cases.to_fused takes, `crowded` a first query and the place of its and all later samples on level 0.
    """

    function: str
    case: Case
    pair: tuple[str, str] = ("float32", "float32")
    fused: dict | None = None
    lengths: tuple[int, ...] | None = None
    crowded: tuple[int, float] | None = None
    patches: tuple = ()
    options: dict = field(default_factory=dict)

    def inputs(self):
        inputs = self.case.inputs(*self.pair, seed=41)
        if self.crowded is not None:
            first, where = self.crowded
            inputs.locations[:, first:, :, 0] = where
        points = self.case.variant.get("num_points")
        return inputs if self.fused is None else cases.to_fused(inputs, num_points=points, **self.fused)

    def expected(self):
        """Output and gradients: all of them."""
        if self.fused is not None:
            return cases.expected_fused(self.inputs(), **self.case.variant)
        if self.lengths is not None:
            return cases.expected_ragged(self.inputs(), self.lengths, **self.case.variant)
        return cases.expected(self.inputs(), **self.case.variant)

    def run(self, texts=None, **options):
        """What the function returns, as a list. `texts` replaces sources, by the kernel's name."""
        texts = texts or {}
        options |= self.options | {"variant": self.case.variant, "lengths": self.lengths}
        if self.function == "summation":
            options["texts"] = texts
        else:
            options["text"] = texts.get(self.function)
        if self.function == "backward":
            options["text_of_references"] = texts.get("reduce_references")
        with pytest.MonkeyPatch.context() as patch:
            for module, name, value in self.patches:
                patch.setattr(module, name, value)
            found = getattr(emulator, self.function)(self.inputs(), **options)
        return list(found) if isinstance(found, tuple) else [found]

    def check(self, expected=None, **options):
        output, grads = expected or self.expected()
        want = {"forward": [output], "summation": grads[:1], "backward": grads}[self.function]
        dtypes = (self.pair[0], *[self.pair[1]] * 3)
        for got, exact, dtype in zip(self.run(**options), want, dtypes[: len(want)], strict=True):
            if got is not None and exact is not None:
                assert_close(got, exact, dtype)


def covered(function, case, pair=("float32", "float32"), **rest):
    fields = {name: rest.pop(name) for name in ("fused", "lengths", "crowded", "patches") if name in rest}
    return Covered(function, case, pair, options=rest, **fields)


POINTS, BOXES = {"coordinates": 2, "packed": True}, {"coordinates": 4}

SMALL_CHUNKS = ((sorted_heuristics, "SMALLEST_CHUNK", 64), (sorted_heuristics, "LARGEST_CHUNK", 64))

FORWARD = {
    "pixels": covered("forward", PIXELS),
    "pixels, warps independent": covered("forward", PIXELS, gpu=SMALL_GPU),
    "two query tiles": covered("forward", ENCODER, ("float16", "float16"), gpu=SMALL_GPU, metadata_on_device=True),
    "six levels": covered("forward", SIX_LEVELS, gpu=SMALL_GPU, metadata_on_device=True),
    "many levels": covered("forward", Case("many", levels=((2, 3),) * 33, N=1, P=1, queries=None)),
    "chunks": covered("forward", FEW, ("float64", "float64")),
    "many channels": covered("forward", MANY_CHANNELS, ("bfloat16", "float32")),
    "ragged": covered("forward", TAIL, lengths=(20, 0)),
    "fused, packed": covered("forward", TAIL, fused=POINTS),
    "fused, boxes": covered("forward", PIXELS, ("float16", "float32"), fused=BOXES),
    "variant": covered("forward", cases.VARIANTS[-1]),
}
BACKWARD = {
    "few queries": covered("backward", FEW),
    "pixels": covered("backward", PIXELS),
    "aggregated": covered("backward", AGGREGATED),
    "aggregated, bfloat16": covered("backward", AGGREGATED, ("bfloat16", "bfloat16")),
    "cross-level tiles": covered("backward", CROSS_LEVEL[0], metadata_on_device=True),
    "tensor cores": covered("backward", FEW, ("float16", "float16"), wanted=Wanted(value=False)),
    "many channels": covered("backward", MANY_CHANNELS, ("float64", "float64")),
    "weights alone": covered("backward", FEW, wanted=Wanted(value=False, locations=False)),
    "ragged": covered("backward", TAIL, ("float16", "float32"), lengths=(20, 0)),
    "fused, packed": covered("backward", FEW, fused=POINTS, wanted=WITH_REFERENCES),
    "fused, not aggregated": covered("backward", TAIL, fused=BOXES, wanted=WITH_REFERENCES),
    "fused, aggregated": covered("backward", AGGREGATED, fused=BOXES, wanted=WITH_REFERENCES),
    "nearest": covered("backward", cases.VARIANTS[3]),
}
SUMMATION = {
    "sorted batches": covered("summation", DENSE),
    "unsorted batches": covered("summation", SPARSE, ("float16", "float16")),
    "crowded": covered("summation", replace(SPARSE, queries=64), crowded=(0, 0.37)),
    "channel tiles": covered("summation", replace(MANY_CHANNELS, queries=60)),
    "chunks": covered("summation", CHUNKS, crowded=(0, 0.63), patches=SMALL_CHUNKS),
    "slabs": covered("summation", DENSE, ("float64", "float64"), patches=((sorted_heuristics, "MAX_BUCKETS", 5),)),
    "fused": covered("summation", PIXELS, fused=POINTS),
    "fused, materialised": covered("summation", FEW, fused=BOXES),
    "ragged": covered("summation", TAIL, ("bfloat16", "float32"), lengths=(20, 0)),
}
COVERING = {f"{one.function}: {name}": one for part in (FORWARD, BACKWARD, SUMMATION) for name, one in part.items()}
