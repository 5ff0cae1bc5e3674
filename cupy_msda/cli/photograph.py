"""Any image that Pillow reads, as an RGB photograph of bounded size."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..requirements import install
from .output import CommandError, one_line, reason_of

LONGEST_SIDE = 256
MAX_PIXELS = 128_000_000
INSTALL_DEMO = install("pillow", "matplotlib")
# Of the EXIF orientation: from the stored image [H, W, 3] to the upright one.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
_ORIENTATION = 0x0112  # EXIF tag
# Largest values of the usual encodings of grey images with more than 8 bits, and how much of one an image must use.
_FULL_SCALES, _LEAST_USE = (1.0, 255.0, 65535.0), 1 / 8
_BLOCK = 1 << 22  # pixels that are widened to float64 at a time


def load(path: Path) -> np.ndarray:
    """[H, W, 3] from 0 to 1 of the first frame, upright, on white; its longer side has at most LONGEST_SIDE pixels."""
    image_module = _pillow()
    try:
        # A file, not its name: Pillow 13 maps an uncompressed TIFF of this name with the sides of the upright image.
        with path.open("rb") as file, _limited(image_module), image_module.open(file) as image:
            return _read(image, image_module)
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
        raise CommandError(f"{path} has more than {MAX_PIXELS:,} pixels: make it smaller first") from error
    except image_module.UnidentifiedImageError as error:
        raise CommandError(f"{path} is not an image that Pillow can read") from error
    except MemoryError as error:
        raise CommandError(f"{path} does not fit into memory") from error
    except OSError as error:
        raise CommandError(f"cannot read {path}: {reason_of(error)}") from error
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        raise CommandError(f"{path} is not an image that Pillow can read: {one_line(error)}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise CommandError(f"the demo needs Pillow and matplotlib: {INSTALL_DEMO}") from error
    except Exception as error:
        raise CommandError(f"Pillow cannot be imported ({one_line(error)}): {INSTALL_DEMO}") from error
    return Image


@contextlib.contextmanager
def _limited(image_module: Any) -> Iterator[None]:
    """Pillow refuses more than MAX_PIXELS, also for images inside a file, and warns of nothing else."""
    before = image_module.MAX_IMAGE_PIXELS
    image_module.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            yield
    finally:
        image_module.MAX_IMAGE_PIXELS = before


def _read(image: Any, image_module: Any) -> np.ndarray:
    image.draft(None, (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))  # JPEG: decodes a smaller image
    image.load()
    if 0 in image.size:
        raise ValueError("it has no pixels")
    orientation = _orientation(image)
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    rgb = _deep_grey(image) if deep else _colours(image, image_module)
    return np.ascontiguousarray(_UPRIGHT.get(orientation, lambda upright: upright)(rgb))


def _orientation(image: Any) -> int:
    if image.format == "TIFF":  # Pillow turns it, and its older releases keep the orientation in the metadata
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a good image
        return 1


def _colours(image: Any, image_module: Any) -> np.ndarray:
    """An image of at most 8 bits per channel. Its colours are mixed with white where it is transparent."""
    if image.mode == "LAB":
        image = _from_lab(image)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    mode = "RGBA" if transparent else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), image_module.Resampling.LANCZOS)
    if transparent:
        white = image_module.new("RGBA", image.size, "white")
        image = image_module.alpha_composite(white, image).convert("RGB")
    return np.asarray(image, np.float32) / 255


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")


def _deep_grey(image: Any) -> np.ndarray:
    """Grey of 16 or 32 bits or floating point. White is the largest value of the encoding that it seems to have."""
    scale = min(1.0, LONGEST_SIDE / max(image.size))
    size = [max(1, round(scale * side)) for side in image.size]
    grey, visible = _means(image, size, image.info.get("transparency"))
    low = min(0.0, grey.min())
    high = grey.max()
    full = next((full for full in _FULL_SCALES if high <= full), high)
    if low < 0 or high < _LEAST_USE * full:
        full = high
    grey = (grey - low) / (full - low) if full > low else grey * 0
    return np.repeat((grey * visible + 1 - visible)[..., None], 3, -1).astype(np.float32)


def _means(image: Any, size: list[int], transparent: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means [h, w] of the pixels with a number that are not `transparent`, and what part of all pixels these are."""
    w, h = size
    xs, ys = (np.arange(count + 1) * full // count for count, full in zip(size, image.size, strict=True))
    sums, counts, areas = (np.zeros((h, w)) for _ in range(3))
    step = max(1, _BLOCK * w * h // (image.size[0] * image.size[1]))  # output columns at a time
    for row in range(h):
        for first in range(0, w, step):
            last = min(first + step, w)
            box = (int(xs[first]), int(ys[row]), int(xs[last]), int(ys[row + 1]))
            pixels = np.asarray(image.crop(box)).astype(np.float64)
            visible = np.isfinite(pixels)
            if isinstance(transparent, (int, float)):
                visible &= pixels != transparent
            starts, columns = xs[first:last] - xs[first], slice(first, last)
            sums[row, columns] = np.add.reduceat(np.where(visible, pixels, 0).sum(0), starts)
            counts[row, columns] = np.add.reduceat(visible.sum(0), starts)
            areas[row, columns] = (box[3] - box[1]) * np.diff(xs[first : last + 1])
    return sums / np.maximum(counts, 1), counts / areas
