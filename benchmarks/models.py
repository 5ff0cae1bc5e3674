"""python -m benchmarks.models: detectors of transformers from end to end, as they are and served by this operator.

Random weights, images of the size that each model is used at, float32 (TF32 where the GPU has it) and bfloat16
autocast, eager and compiled. Writes images a second, peak memory and the share of the time spent in the operator.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

from cupy_msda.torch import transformers as serve
from cupy_msda.torch.patches import Patch

from .provenance import provenance
from .timing import summary

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


def share(call: Callable[[], Any], family: str, model: nn.Module, device: str) -> float:
    """Part of the time of `call` that passes in the operator: of the GPU's kernels, or of the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with marked(family, model), torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("all"):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    times = {
        event.key: event.device_time_total if device == "cuda" else event.cpu_time_total
        for event in profile.key_averages()
        if event.key in ("all", RANGE) or event.key.startswith("msda_")
    }
    # The profiler gives no range what CuPy launches: our kernels go by their names.
    ours = sum(time for key, time in times.items() if key.startswith("msda_"))
    return (times.get(RANGE, 0.0) + ours) / (times["all"] + ours)


def measure(
    detector: Detector, dtype: str, served: bool, compiled: bool, device: str, rounds: int, exact: list[Tensor] | None
) -> tuple[dict[str, Any], list[Tensor]]:
    """One record, and the outputs; `exact` are those of the model as it is."""
    torch.manual_seed(0)
    model = detector.make().to(device).eval()
    images = torch.randn(detector.N, 3, *detector.size, device=device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if served:
            stack.enter_context(serve.patch(detector.family))
        if dtype == "bfloat16":
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        called = torch.compile(model) if compiled else model

        def call() -> list[Tensor]:
            return [t for t in called(pixel_values=images).to_tuple() if torch.is_tensor(t) and t.is_floating_point()]

        for _ in range(WARM_CALLS if device == "cuda" else 1):
            outputs = call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        samples = []
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - begin)
        record = {"time": summary(samples)}
        record["images_per_second"] = detector.N / (record["time"]["median_us"] * 1e-6)
        if device == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
        if not compiled:
            record["share_of_operator"] = share(call, detector.family, model, device)
        if exact is not None:
            pairs = [(a.float(), b.float()) for a, b in zip(outputs, exact, strict=True)]
            record["largest_difference"] = max(float((a - b).norm() / b.norm()) for a, b in pairs if b.isfinite().all())
    return record, outputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="other images than the model's usual ones"
    )
    parser.add_argument("--batch", type=int, help="another number of images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    result: dict[str, Any] = {"provenance": provenance(options.device), "records": []}
    for name in options.models:
        detector = DETECTORS[name]
        detector = detector._replace(size=tuple(options.size or detector.size), N=options.batch or detector.N)
        for dtype in options.dtypes:
            for mode in options.modes:
                exact = None
                for served in (False, True):
                    about = {"model": name, "dtype": dtype, "mode": mode, "served": served}
                    about |= {"size": detector.size, "N": detector.N}
                    try:
                        settings = (dtype, served, mode == "compiled", options.device, options.rounds)
                        record, outputs = measure(detector, *settings, exact)
                        exact = outputs if exact is None else exact
                    except (RuntimeError, TypeError, ValueError) as error:
                        record = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                    torch.compiler.reset()
                    result["records"].append(about | record)
                    print(json.dumps(about | record), flush=True)
                    if options.out:
                        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in record for record in result["records"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
