"""python -m benchmarks.models: whole detectors of transformers, original and patched to use this operator.

Random weights, images of each model's usual size, float32 (with TF32 if the GPU has it) and bfloat16 autocast, eager
and compiled. Writes images per second, GPU time per call, peak memory and the operator's share of the time; and the
differences of outputs and of the gradients of all parameters from those of the original model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

from cupy_msda.torch import transformers as integration
from cupy_msda.torch.integrations.patch import Patch

from .provenance import provenance
from .robust_gradients import make_gradients_robust
from .timing import summary

MODES = ("eager", "gradients", "compiled")
WARM_UP_CALLS = 3
OPERATOR_RANGE = "multi-scale deformable attention"


class Detector(NamedTuple):
    """A model, its folder in transformers, and the images of one call."""

    family: str
    make: Callable[[], nn.Module]
    size: tuple[int, int]
    N: int


def _deformable_detr() -> nn.Module:
    backbone = hf.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = hf.DeformableDetrConfig(backbone_config=backbone, two_stage=True, with_box_refine=True)
    return hf.DeformableDetrForObjectDetection(config)


DETECTORS = {
    "Deformable DETR": Detector("deformable_detr", _deformable_detr, (800, 1333), 2),
    "RT-DETR": Detector("rt_detr", lambda: hf.RTDetrForObjectDetection(hf.RTDetrConfig()), (640, 640), 16),
    "D-FINE": Detector("d_fine", lambda: hf.DFineForObjectDetection(hf.DFineConfig()), (640, 640), 16),
    "Mask2Former": Detector(
        "mask2former", lambda: hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig()), (1024, 1024), 1
    ),
}


@contextlib.contextmanager
def operator_as_profiler_range(family: str, model: nn.Module) -> Iterator[None]:
    """Make the operator of `model`, original or patched, a range of the profiler within the context."""
    modeling = sys.modules[f"transformers.models.{family}.modeling_{family}"]

    def in_range(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Tensor:
            with torch.profiler.record_function(OPERATOR_RANGE):
                return function(*arguments, **options)

        return call

    with Patch() as patch:
        if hasattr(modeling, "MultiScaleDeformableAttention"):
            layer = modeling.MultiScaleDeformableAttention
            patch.replace(layer, "forward", in_range(layer.forward))
        for name in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"):
            if hasattr(modeling, name):
                patch.replace(modeling, name, in_range(getattr(modeling, name)))
        for layer in model.modules():
            if hasattr(layer, "ms_deformable_attn_core"):
                patch.replace(layer, "ms_deformable_attn_core", in_range(layer.ms_deformable_attn_core))
        yield


def profile(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Microseconds on the device by the profiler's names; "all" is the whole call, on a GPU the sum of its kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function("all"):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    if device == "cpu":
        return {event.key: event.cpu_time_total for event in events}
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    times = {event.key: event.device_time_total for event in events}
    return times | {"all": sum(kernel.self_device_time_total for kernel in kernels)}


def operator_share(times: Mapping[str, float]) -> float:
    """The operator's part of the time."""
    # The profiler assigns kernels that CuPy launches to no range, so this project's kernels are found by name.
    by_name = sum(time for key, time in times.items() if key.startswith("msda_"))
    return (times.get(OPERATOR_RANGE, 0.0) + by_name) / times["all"]


class Subject:
    """A model on its device, original or patched. Its calls run inside the context `setting`."""

    def __init__(self, detector: Detector, dtype: str, patched: bool, device: str) -> None:
        torch.manual_seed(0)
        self.detector, self.dtype, self.patched, self.device = detector, dtype, patched, device
        self.model = self.called = detector.make().to(device).eval()
        self.images = torch.randn(detector.N, 3, *detector.size, device=device)

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.patched:
                stack.enter_context(integration.patch(self.detector.family))
            if self.dtype == "bfloat16":
                stack.enter_context(torch.autocast(self.device, torch.bfloat16))
            yield

    def outputs(self) -> list[Tensor]:
        found = self.called(pixel_values=self.images).to_tuple()
        return [t for t in found if torch.is_tensor(t) and t.is_floating_point()]

    def seconds(self) -> float:
        """Wall-clock seconds of one call."""
        begin = time.perf_counter()
        self.outputs()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def largest_difference(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of pairs of tensors. Pairs with an infinite or zero norm do not count.

    D-FINE marks anchors outside the image by the largest finite number, whose norm is infinite.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(tensors, others, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if 0 < b.norm() < float("inf"))


@torch.no_grad()
def measure_model(detector: Detector, dtype: str, compiled: bool, device: str, repeats: int) -> list[dict[str, Any]]:
    """Two records: of the original model and of the patched one.

    Samples of eager models alternate, because the host limits them and its speed drifts. Compiled models are timed one
    after the other, because torch's compiler caches code by class: the patched model would run the original's code.
    Where the host is the limit, only the GPU time compares: the wall-clock time of the same code varies by half.
    """
    subjects, records, exact = [], [], []
    for patched in (False, True):
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        subject = Subject(detector, dtype, patched, device)
        record: dict[str, Any] = {"patched": patched}
        with subject.setting():
            if compiled:
                subject.called = torch.compile(subject.model)
            for _ in range(WARM_UP_CALLS if device == "cuda" else 1):
                outputs = subject.outputs()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                subject.outputs()
                torch.cuda.synchronize()
                record["peak_bytes"] = torch.cuda.max_memory_allocated() - held
            if compiled:
                record["time"] = summary([subject.seconds() for _ in range(repeats)])
            with contextlib.nullcontext() if compiled else operator_as_profiler_range(detector.family, subject.model):
                times = profile(subject.outputs, device)
            if device == "cuda":
                record["gpu_us"] = times["all"]
            # Compiled code has no range around the operator; this project's kernels are found by name.
            if not compiled or (patched and device == "cuda"):
                record["share_of_operator"] = operator_share(times)
        if patched:
            record["largest_difference"] = largest_difference(outputs, exact)
        exact = outputs
        subjects.append(subject)
        records.append(record)
        if compiled:
            torch.compiler.reset()
    if not compiled:
        samples: list[list[float]] = [[], []]
        pairs = list(zip(subjects, samples, strict=True))
        for repeat in range(repeats):
            for subject, found in pairs if repeat % 2 else reversed(pairs):
                with subject.setting():
                    found.append(subject.seconds())
        for record, found in zip(records, samples, strict=True):
            record["time"] = summary(found)
    for record in records:
        record["images_per_second"] = detector.N / (record["time"]["median_us"] * 1e-6)
    return records


def compare_gradients(detector: Detector, device: str) -> dict[str, Any]:
    """Errors of the float32 gradients of all parameters, of the original and the patched model.

    The reference is the original model in float64. Matrix products are float32: the error of TF32 would hide all else.
    """
    exact, exact_outputs = _gradients(detector, torch.float64, False, device)
    record: dict[str, Any] = {"parameters": len(exact)}
    every = torch.cat([grad.flatten() for grad in exact.values()])
    for patched in (False, True):
        grads, outputs = _gradients(detector, torch.float32, patched, device)
        name = "patched" if patched else "original"
        record[f"output_error_{name}"] = largest_difference(outputs, exact_outputs)
        record[f"gradient_error_{name}"] = largest_difference([torch.cat([grads[n].flatten() for n in exact])], [every])
    return record


def _gradients(
    detector: Detector, dtype: torch.dtype, patched: bool, device: str
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradients of all parameters by name, and the outputs, of one call."""
    subject = Subject(detector, "float32", patched, device)
    make_gradients_robust(subject.model)
    subject.model.to(dtype)
    subject.images = subject.images.to(dtype)
    with subject.setting(), _float32_products():
        outputs = subject.outputs()
        losses = [t.square().mean() for t in outputs if t.requires_grad]
        sum(loss for loss in losses if loss.isfinite()).backward()
    grads = {name: p.grad.double() for name, p in subject.model.named_parameters() if p.grad is not None}
    return grads, [t.detach() for t in outputs]


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="another image size than the model's usual one"
    )
    parser.add_argument("--batch", type=int, help="another number of images per call")
    parser.add_argument("--repeats", type=int, default=20, help="samples per time")
    parser.add_argument("--out", type=Path, help="folder for models_NAME.json, one file per model")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    failed = False
    for name in options.models:
        detector = DETECTORS[name]
        detector = detector._replace(size=tuple(options.size or detector.size), N=options.batch or detector.N)
        result: dict[str, Any] = {"provenance": provenance(options.device), "records": []}
        for settings, measured in _records(detector, options):
            record = {"model": name, **settings, "size": detector.size, "N": detector.N, **measured}
            failed = failed or "failed" in record
            result["records"].append(record)
            print(json.dumps(record), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"models_{detector.family}.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


def _records(detector: Detector, options: argparse.Namespace) -> Iterator[tuple[dict, dict]]:
    """The settings of each record, and its measurements or its error."""
    for mode in options.modes:
        for dtype in options.dtypes if mode != "gradients" else ["float32"]:
            settings = {"dtype": dtype, "mode": mode}
            try:
                if mode == "gradients":
                    yield settings, compare_gradients(detector, options.device)
                    continue
                for record in measure_model(detector, dtype, mode == "compiled", options.device, options.repeats):
                    yield settings, record
            except (RuntimeError, TypeError, ValueError) as error:
                yield settings, {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            torch.compiler.reset()


if __name__ == "__main__":
    raise SystemExit(main())
