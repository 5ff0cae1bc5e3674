"""The picture that the demo writes, and the file that it goes to."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from .demo import CHANNELS, HEADS, LEVELS, Outcome, Scene
from .output import CommandError, one_line, reason_of
from .photograph import INSTALL_DEMO

# Inches and dots per inch. The height follows that of the photograph, up to HEIGHT.
WIDTH, HEIGHT, DOTS = 14, 14, 110
# A photograph that is longer than this is stretched, because a line of pixels shows nothing.
_LONGEST_ASPECT = 8


def target(out: str, image: Path) -> tuple[Path, str]:
    """The file to write and its format, or a ``CommandError`` before any work is done."""
    path = Path(out)
    if not out:
        raise CommandError("--out: expected the name of a file, got nothing")
    try:
        if os.path.isdir(out) or out.endswith(("/", os.sep)):
            raise CommandError(f"--out: expected the name of a file, got the folder {out}")
        folder = os.path.dirname(os.path.realpath(out))
        if not os.path.isdir(folder):
            raise CommandError(f"--out: there is no folder {folder}: make it first")
        exists = _exists(out)
        if exists and _same_file(path, image):
            raise CommandError(f"--out: {out} is the image itself: choose another name")
        if not os.access(out if exists else folder, os.W_OK):
            raise CommandError(f"--out: cannot write to {out}: Permission denied")
    except (OSError, ValueError) as error:
        raise CommandError(f"--out: cannot write to {out}: {reason_of(error)}") from error
    formats = _figure_class()().canvas.get_supported_filetypes()
    suffix = path.suffix[1:]
    if suffix and suffix.lower() not in formats:
        known = ", ".join(f".{name}" for name in sorted(formats))
        raise CommandError(f"--out: expected a name without a suffix (PNG) or with one of {known}, got {out}")
    return path, suffix.lower() or "png"


def write(scene: Scene, outcome: Outcome, path: Path, file_format: str) -> None:
    """Draw and write. The file is opened when its contents are ready, so that an error leaves an old one as it was."""
    try:
        contents = io.BytesIO()
        _draw(scene, outcome).savefig(contents, dpi=DOTS, format=file_format)
    except Exception as error:  # settings of the user's matplotlib, a format that needs LaTeX
        raise CommandError(f"matplotlib cannot draw a picture of format {file_format}: {one_line(error)}") from error
    try:
        path.write_bytes(contents.getvalue())
    except (OSError, ValueError) as error:
        raise CommandError(f"--out: cannot write to {path}: {reason_of(error)}") from error


def _exists(name: str) -> bool:
    """Whether there is a file; a link to nothing is none. Raises for a name that no file can have."""
    try:
        os.stat(name)
    except FileNotFoundError:
        return False
    return True


def _same_file(path: Path, image: Path) -> bool:
    try:
        return path.samefile(image)
    except (OSError, ValueError):  # one of them is not there
        return False


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CommandError(f"the demo needs Pillow and matplotlib: {INSTALL_DEMO}") from error
    except Exception as error:  # no folder for its settings, or wrong settings
        raise CommandError(f"matplotlib cannot be imported ({one_line(error)}): {INSTALL_DEMO}") from error
    return Figure


def _draw(scene: Scene, outcome: Outcome) -> Any:
    """Queries and samples, the output, the loss and the gradient of value."""
    H, W = scene.shapes[0]
    figure = _figure_class()(figsize=(WIDTH, min(4.2 + 8.0 * H / W, HEIGHT)), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_samples(axes[0, 0], scene)
    attended = outcome.output.reshape(H, W, HEADS, CHANNELS).mean(2)[..., :3]
    axes[0, 1].imshow(np.clip(attended, 0, 1))
    axes[0, 1].set_title("Output: each pixel's weighted mean along and across its edge")
    loss = np.abs(attended - scene.photograph).mean(-1)
    axes[1, 0].imshow(loss, cmap="gray_r", vmin=0, vmax=max(loss.max(), 1 / 255))  # rounding errors stay white
    axes[1, 0].set_title("Loss: |output - photograph|")
    shown = axes[1, 1].imshow(_gradient_image(scene, outcome.grad_value), cmap="magma", vmin=0)
    axes[1, 1].set_title("Gradient of value, all levels")
    figure.colorbar(shown, ax=axes[1, 1], shrink=0.8, label="|gradient| per pixel of the finest level")
    for ax in axes.flat:
        ax.set_axis_off()
        if max(H, W) > _LONGEST_ASPECT * min(H, W):
            ax.set_aspect("auto")
    return figure


def _draw_samples(ax: Any, scene: Scene) -> None:
    H, W = scene.shapes[0]
    ax.imshow(scene.photograph)
    ax.set_title("Five queries (white) and their samples: colour is the level, size the attention")
    colours = ("#ffd92f", "#4daf4a", "#377eb8", "#e41a1c")
    for fy, fx in ((0.3, 0.3), (0.3, 0.72), (0.52, 0.5), (0.8, 0.25), (0.75, 0.8)):
        query = int(fy * H) * W + int(fx * W)
        ax.plot(int(fx * W), int(fy * H), "o", color="white", markeredgecolor="black", markersize=7, zorder=4)
        for level in range(LEVELS):
            points = scene.locations[0, query, :, level].reshape(-1, 2) * (W, H) - 0.5
            attention = scene.weights[0, query, :, level].ravel()
            ax.scatter(*points.T, s=6 + 260 * attention, color=colours[level], edgecolors="black", linewidths=0.4)
    for level, (h, w) in enumerate(scene.shapes):
        ax.scatter([], [], color=colours[level], label=f"level {level}: {h} x {w}")
    ax.set_xlim(-0.5, W - 0.5)
    ax.set_ylim(H - 0.5, -0.5)
    ax.legend(loc="upper right", fontsize=8)


def _gradient_image(scene: Scene, grad_value: np.ndarray) -> np.ndarray:
    H, W = scene.shapes[0]
    total = np.zeros((H, W))
    start = 0
    for h, w in scene.shapes:
        pixels = np.abs(grad_value[0, start : start + h * w].sum(1)[:, :3]).sum(-1).reshape(h, w)
        rows, columns = np.arange(H) * h // H, np.arange(W) * w // W
        total += pixels[rows][:, columns] * (h * w) / (H * W)
        start += h * w
    return total
