"""python -m benchmarks.models: detectors of transformers from end to end, as they are and served by this operator.

Random weights, images of the size that each model is used at, float32 (TF32 where the GPU has it) and bfloat16
autocast, eager and compiled. Writes images a second, the GPU's time of a call, peak memory and the share of the time
spent in the operator; and how far outputs and the gradients of all parameters are from those of the model as it is.
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

from cupy_msda.torch import transformers as serve
from cupy_msda.torch.integrations.patch import Patch

from .provenance import provenance
from .timing import summary

MODES = ("eager", "gradients", "compiled")
WARM_CALLS = 3
RANGE = "multi-scale deformable attention"


class Detector(NamedTuple):
    """A model, the folder of transformers that it is from, and how it is used."""

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
def marked(family: str, model: nn.Module) -> Iterator[None]:
    """While this lasts, the operator of `model`, whoever computes it, is a range of the profiler."""
    modeling = sys.modules[f"transformers.models.{family}.modeling_{family}"]

    def mark(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def in_range(*arguments: Any, **options: Any) -> Tensor:
            with torch.profiler.record_function(RANGE):
                return function(*arguments, **options)

        return in_range

    with Patch() as patch:
        if hasattr(modeling, "MultiScaleDeformableAttention"):
            layer = modeling.MultiScaleDeformableAttention
            patch.replace(layer, "forward", mark(layer.forward))
        for name in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"):
            if hasattr(modeling, name):
                patch.replace(modeling, name, mark(getattr(modeling, name)))
        for layer in model.modules():
            if hasattr(layer, "ms_deformable_attn_core"):
                patch.replace(layer, "ms_deformable_attn_core", mark(layer.ms_deformable_attn_core))
        yield


def times_of(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Microseconds of `call` by name: of the GPU, "all" those of every kernel, or of the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("all"):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profile.key_averages()
    if device == "cpu":
        return {event.key: event.cpu_time_total for event in events}
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    times = {event.key: event.device_time_total for event in events}
    return times | {"all": sum(kernel.self_device_time_total for kernel in kernels)}


def share(times: Mapping[str, float]) -> float:
    """Part of the time that passes in the operator."""
    # The profiler gives no range what CuPy launches: our kernels go by their names.
    ours = sum(time for key, time in times.items() if key.startswith("msda_"))
    return (times.get(RANGE, 0.0) + ours) / times["all"]


class Subject:
    """A model on its device, as it is or served; `setting` is what its calls run in."""

    def __init__(self, detector: Detector, dtype: str, served: bool, device: str) -> None:
        torch.manual_seed(0)
        self.detector, self.dtype, self.served, self.device = detector, dtype, served, device
        self.model = self.called = detector.make().to(device).eval()
        self.images = torch.randn(detector.N, 3, *detector.size, device=device)

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.served:
                stack.enter_context(serve.patch(self.detector.family))
            if self.dtype == "bfloat16":
                stack.enter_context(torch.autocast(self.device, torch.bfloat16))
            yield

    def outputs(self) -> list[Tensor]:
        found = self.called(pixel_values=self.images).to_tuple()
        return [t for t in found if torch.is_tensor(t) and t.is_floating_point()]

    def seconds(self) -> float:
        begin = time.perf_counter()
        self.outputs()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of pairs of tensors, but for those whose norm is infinite or zero.

    D-FINE marks anchors outside the image by the largest number that there is.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if 0 < b.norm() < float("inf"))


@torch.no_grad()
def measure(detector: Detector, dtype: str, compiled: bool, device: str, rounds: int) -> list[dict[str, Any]]:
    """Two records: of the model as it is, and served.

    Eager models are timed in turn, because their time is the host's and drifts; compiled ones one after the other,
    because torch's compiler keeps code by class: a served model would run what was compiled for the other. Where the
    host is the limit such times do not compare (Mask2Former in bfloat16, the same code in one process: 27 to 43 ms a
    call); the GPU's time does.
    """
    subjects, records, exact = [], [], []
    for served in (False, True):
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        subject = Subject(detector, dtype, served, device)
        record: dict[str, Any] = {"served": served}
        with subject.setting():
            if compiled:
                subject.called = torch.compile(subject.model)
            for _ in range(WARM_CALLS if device == "cuda" else 1):
                outputs = subject.outputs()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                subject.outputs()
                torch.cuda.synchronize()
                record["peak_bytes"] = torch.cuda.max_memory_allocated() - held
            if compiled:
                record["time"] = summary([subject.seconds() for _ in range(rounds)])
            with contextlib.nullcontext() if compiled else marked(detector.family, subject.model):
                times = times_of(subject.outputs, device)
            if device == "cuda":
                record["gpu_us"] = times["all"]
            # What is compiled has no range around the operator, but our kernels have names.
            if not compiled or (served and device == "cuda"):
                record["share_of_operator"] = share(times)
        if served:
            record["largest_difference"] = difference(outputs, exact)
        exact = outputs
        subjects.append(subject)
        records.append(record)
        if compiled:
            torch.compiler.reset()
    if not compiled:
        samples: list[list[float]] = [[], []]
        pairs = list(zip(subjects, samples, strict=True))
        for turn in range(rounds):
            for subject, found in pairs if turn % 2 else reversed(pairs):
                with subject.setting():
                    found.append(subject.seconds())
        for record, found in zip(records, samples, strict=True):
            record["time"] = summary(found)
    for record in records:
        record["images_per_second"] = detector.N / (record["time"]["median_us"] * 1e-6)
    return records


def compare_gradients(detector: Detector, device: str) -> dict[str, Any]:
    """How far the gradients of all parameters in float32 are from those of the model as it is in float64.

    Served and as it is. Products of matrices in float32, not TF32: its rounding would be all that one sees.
    """
    exact, exact_outputs = _gradients(detector, torch.float64, False, device)
    record: dict[str, Any] = {"parameters": len(exact)}
    every = torch.cat([grad.flatten() for grad in exact.values()])
    for served in (False, True):
        grads, outputs = _gradients(detector, torch.float32, served, device)
        name = "served" if served else "as_it_is"
        record[f"output_error_{name}"] = difference(outputs, exact_outputs)
        record[f"gradient_error_{name}"] = difference([torch.cat([grads[n].flatten() for n in exact])], [every])
    return record


def _gradients(
    detector: Detector, dtype: torch.dtype, served: bool, device: str
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Those of every parameter, and the outputs, of one call."""
    subject = Subject(detector, "float32", served, device)
    _condition(subject.model)
    subject.model.to(dtype)
    subject.images = subject.images.to(dtype)
    with subject.setting(), _float32_products():
        outputs = subject.outputs()
        losses = [t.square().mean() for t in outputs if t.requires_grad]
        sum(loss for loss in losses if loss.isfinite()).backward()
    grads = {name: p.grad.double() for name, p in subject.model.named_parameters() if p.grad is not None}
    return grads, [t.detach() for t in outputs]


@torch.no_grad()
def _condition(model: nn.Module) -> None:
    """Parameters at which rounding does not decide the gradients.

    Untrained offsets are whole pixels, so that every sample of an encoder lies on a centre, where rounding picks the
    slope: they are moved. Small convolutions make the activations of a deep backbone vanish: they get He's weights.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter += 0.3 * torch.randn_like(parameter)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)


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
        "--size", nargs=2, type=int, metavar=("H", "W"), help="other images than the model's usual ones"
    )
    parser.add_argument("--batch", type=int, help="another number of images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for a JSON file a model, models_NAME.json")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    failed = False
    for name in options.models:
        detector = DETECTORS[name]
        detector = detector._replace(size=tuple(options.size or detector.size), N=options.batch or detector.N)
        result: dict[str, Any] = {"provenance": provenance(options.device), "records": []}
        for about, found in _records(detector, options):
            record = {"model": name, **about, "size": detector.size, "N": detector.N, **found}
            failed = failed or "failed" in record
            result["records"].append(record)
            print(json.dumps(record), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"models_{detector.family}.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


def _records(detector: Detector, options: argparse.Namespace) -> Iterator[tuple[dict, dict]]:
    """What each record is about, and what was found or went wrong."""
    for mode in options.modes:
        for dtype in options.dtypes if mode != "gradients" else ["float32"]:
            about = {"dtype": dtype, "mode": mode}
            try:
                if mode == "gradients":
                    yield about, compare_gradients(detector, options.device)
                    continue
                for record in measure(detector, dtype, mode == "compiled", options.device, options.rounds):
                    yield about, record
            except (RuntimeError, TypeError, ValueError) as error:
                yield about, {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            torch.compiler.reset()


if __name__ == "__main__":
    raise SystemExit(main())
