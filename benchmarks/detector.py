"""python -m benchmarks.detector: trains a small detector with this operator and with the grid_sample composition.

The images show three coloured boxes. The model is a convolutional pyramid with one encoder layer and two decoder layers
of MSDeformAttn. Both runs start from the same weights and see the same images, so their losses agree up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupy_msda.torch import MSDeformAttn, decomposed

from . import plots
from .cases import pixel_centres
from .provenance import provenance

IMAGE, OBJECTS, COLOURS = 64, 3, 3
CURVES = {"cupy_msda": contextlib.nullcontext, "grid_sample": decomposed}


def synthetic_batch(generator: torch.Generator, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 3, 64, 64], boxes [N, 3, 4] as (centre, size) in 0 to 1, and the colour [N, 3] of each box."""
    size = torch.rand(N, OBJECTS, 2, generator=generator) * 0.25 + 0.15
    centre = size / 2 + torch.rand(N, OBJECTS, 2, generator=generator) * (1 - size)
    colour = torch.randint(COLOURS, (N, OBJECTS), generator=generator)
    image = torch.randn(N, 3, IMAGE, IMAGE, generator=generator) * 0.1
    pixel = (torch.arange(IMAGE) + 0.5) / IMAGE
    for index in range(OBJECTS):
        (x, y), (w, h) = centre[:, index].T[..., None], size[:, index].T[..., None]
        inside = ((pixel - y).abs() < h / 2)[:, :, None] & ((pixel - x).abs() < w / 2)[:, None, :]
        paint = F.one_hot(colour[:, index], 3).float()[:, :, None, None]
        image = torch.where(inside[:, None], paint, image)
    return image, torch.cat((centre, size), -1), colour


class Detector(nn.Module):
    """Predicts `queries` boxes [N, queries, 4] and logits of their colours; the last logit means "no object"."""

    def __init__(self, C: int = 64, M: int = 4, P: int = 4, queries: int = 12) -> None:
        super().__init__()

        def block(inputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, C, 3, 2, 1), nn.GroupNorm(8, C), nn.ReLU())

        self.stem, self.levels = nn.Sequential(block(3), block(C)), nn.ModuleList([nn.Identity(), block(C), block(C)])
        L = len(self.levels)
        self.encoder = MSDeformAttn(C, L, M, P)
        self.decoder = nn.ModuleList([MSDeformAttn(C, L, M, P) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])
        self.mixers = nn.ModuleList([nn.MultiheadAttention(C, M, batch_first=True) for _ in range(2)])
        self.queries, self.references = nn.Parameter(torch.randn(queries, C)), nn.Parameter(torch.randn(queries, 2))
        self.box, self.colour = nn.Linear(C, 4), nn.Linear(C, COLOURS + 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x, maps = self.stem(image), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        shapes = torch.tensor([m.shape[2:] for m in maps], device=image.device)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        memory = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        N, L = len(image), len(maps)
        centres = pixel_centres([m.shape[2:] for m in maps], image.device).expand(N, -1, 2)
        here = centres[:, :, None].expand(-1, -1, L, -1)
        memory = self.norms[0](memory + self.encoder(memory, here, memory, shapes, starts))
        state = self.queries.expand(N, -1, -1)
        reference = self.references.sigmoid().expand(N, -1, 2)
        for mixer, attention, norm in zip(self.mixers, self.decoder, self.norms[1:], strict=True):
            state = state + mixer(state, state, state, need_weights=False)[0]
            at = reference[:, :, None].expand(-1, -1, L, -1)
            state = norm(state + attention(state, at, memory, shapes, starts))
        offset = torch.cat((self.references, torch.zeros_like(self.references)), -1)
        return (self.box(state).float() + offset).sigmoid(), self.colour(state).float()


def detection_loss(boxes: Tensor, logits: Tensor, true_boxes: Tensor, colours: Tensor) -> Tensor:
    """L1 loss of boxes plus cross entropy of colours, for the cheapest assignment of objects to queries."""
    distance = torch.cdist(boxes, true_boxes, p=1)  # [N, queries, objects]
    likelihood = logits.softmax(-1).gather(2, colours[:, None].expand(-1, boxes.shape[1], -1))
    cost = (5 * distance - likelihood).detach()
    assignments = _assignments(boxes.shape[1], boxes.device)  # [A, objects]
    total = cost[:, assignments, torch.arange(OBJECTS, device=boxes.device)].sum(-1)  # [N, A]
    chosen = assignments[total.argmin(1)]
    target = torch.full(logits.shape[:2], COLOURS, device=boxes.device).scatter(1, chosen, colours)
    weight = torch.ones(COLOURS + 1, device=boxes.device)
    weight[COLOURS] = 0.2
    matched = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    return F.cross_entropy(logits.transpose(1, 2), target, weight) + 5 * F.l1_loss(matched, true_boxes)


def _assignments(queries: int, device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(queries), OBJECTS)), device=device)


def train(
    name: str, steps: int, device: str, amp: torch.dtype | None = None, N: int = 8, seed: int = 0
) -> dict[str, Any]:
    """The loss of each step with the operator that :data:`CURVES` calls `name`, under autocast to `amp` if given."""
    torch.manual_seed(seed)
    model = Detector().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16)
    generator = torch.Generator().manual_seed(seed)
    losses, begin = [], time.perf_counter()
    with CURVES[name]():
        for _ in range(steps):
            image, boxes, colours = (t.to(device) for t in synthetic_batch(generator, N))
            with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
                predicted = model(image)
            loss = detection_loss(*predicted, boxes, colours)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    return {"implementation": name, "amp": str(amp).removeprefix("torch."), "losses": losses,
            "seconds": time.perf_counter() - begin}  # fmt: skip


def smoothed(losses: list[float], window: int = 25) -> list[float]:
    """Means of consecutive windows."""
    return [sum(losses[i : i + window]) / window for i in range(0, len(losses) - window + 1, window)]


@plots.styled
def plot_losses(result: dict[str, Any], path: Path) -> None:
    """Loss curves, one panel per precision."""
    precisions = list(dict.fromkeys(record["amp"] for record in result["records"]))
    figure, axes = plots.panels(len(precisions), height=1.8 * len(precisions) + 0.6, sharex=True)
    for ax, precision in zip(axes, precisions, strict=True):
        for record in result["records"]:
            if record["amp"] == precision:
                style = "-" if record["implementation"] == "cupy_msda" else "--"
                ax.plot(record["losses"], style, label=record["implementation"], linewidth=1)
        ax.set_title("loss, " + ("float32" if precision == "None" else f"autocast to {precision}"))
        ax.grid()
    axes[-1].set_xlabel("step")
    plots.legend(figure, axes[0])
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    precisions = (None, torch.float16, torch.bfloat16) if options.device == "cuda" else (None,)
    records = [train(name, options.steps, options.device, amp) for amp in precisions for name in CURVES]
    for record in records:
        means = smoothed(record["losses"])
        print(f"{record['amp']:9} {record['implementation']:12} first {means[0]:.4f} last {means[-1]:.4f}, "
              f"{record['seconds']:.1f} s")  # fmt: skip
    result = {"provenance": provenance(options.device), "records": records}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
