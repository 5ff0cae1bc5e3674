"""Drawings of what :func:`cupy_msda.torch.inspect` records, on the image. They need matplotlib and no torch."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np

from .requirements import install

_COLOURS = ("#ffd92f", "#4daf4a", "#377eb8", "#e41a1c", "#ff7f00", "#984ea3", "#a65628", "#f781bf")


def sampling_points(
    record: Any, image: Any, query: int, *, batch: int = 0, head: int | None = None, axes: Any = None
) -> Any:
    """Draw the sampling points of a query on the image.

    A colour is a level, and the opacity of a point is its weight, relative to the largest that is drawn. White crosses
    or boxes are the reference points of the query in a fused call; a plain call, as of a patched model, has none.
    Points outside of the image are not shown.

    Parameters
    ----------
    record : Record
        Of :func:`cupy_msda.torch.inspect`; or any object with its attributes, with arrays for its tensors.
    image : array [H, W, 3] or [H, W]
        What the levels were made from, with the padding that it had there: floats from 0 to 1, or uint8. Its size need
        not be that of a level.
    query : int
        One of ``record.queries``.
    batch : int
        Index of the image among the N of the call.
    head : int, optional
        Which head; by default all.
    axes : matplotlib.axes.Axes, optional
        Where to draw; by default in a new figure of pyplot.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError
        For what is no record, such as a list of them.
    ValueError
        For a query that is not in the record, or for an image of another shape.
    IndexError
        For an image or a head that the call does not have.
    """
    image, samples = _image(image), _samples(record, query, batch, head)
    axes = _drawn(image, axes)
    H, W = image.shape[:2]
    opacity = samples.weights / max(samples.weights.max(initial=0), np.finfo(np.float64).tiny)
    order = np.lexsort((-samples.level_of, opacity))  # large weights on top, and fine levels of the same weight
    colours = _rgba(samples.level_of % len(_COLOURS), opacity)
    edges = np.concatenate((np.zeros((len(opacity), 3)), opacity[:, None]), -1)
    pixels = samples.locations * (W, H) - 0.5
    axes.scatter(*pixels[order].T, s=40, color=colours[order], edgecolors=edges[order], linewidths=0.8, zorder=3)
    for level, (height, width) in enumerate(record.spatial_shapes):
        label = f"level {level}: {height} x {width}"
        axes.scatter([], [], s=40, color=_COLOURS[level % len(_COLOURS)], edgecolors="black", label=label)
    _draw_references(axes, samples.references, (H, W))
    if record.spatial_shapes:
        axes.legend(loc="best", fontsize="x-small", framealpha=0.7, handletextpad=0, borderpad=0.3, labelspacing=0.3)
    return _finished(axes, (H, W))


def heat_map(record: Any, image: Any, query: int, *, batch: int = 0, head: int | None = None, axes: Any = None) -> Any:
    """Draw what part of a query's attention lies on each pixel of the image, over the image in dark grey.

    Each sample spreads its weight over the image as bilinear interpolation does: over two pixels of its level in each
    direction, and over at least two pixels of the image. The sum over the image is that of the weights; what lies
    outside of the image is missing. With all heads it is their mean. Colours follow the square root, because the
    weight of a sample of a coarse level is spread over many pixels.

    Parameters
    ----------
    record, image, query, batch, head, axes
        As for :func:`sampling_points`.

    Returns
    -------
    matplotlib.axes.Axes
        Its last image holds the map [H, W].

    Raises
    ------
    ModuleNotFoundError, ValueError, IndexError
        As :func:`sampling_points`.
    """
    image, samples = _image(image), _samples(record, query, batch, head)
    H, W = image.shape[:2]
    attention = _splat(samples, (H, W))
    grey = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
    axes = _drawn(0.7 * grey, axes)
    largest = attention.max(initial=0) or 1
    opacity = np.minimum(1.5 * np.sqrt(attention / largest), 1)
    axes.imshow(attention, cmap="inferno", norm=_square_root(largest), alpha=opacity)
    _draw_references(axes, samples.references, (H, W))
    return _finished(axes, (H, W))


class _Samples(NamedTuple):
    """The finite samples of one query.

    `locations` [K, 2] and `sizes` [K, 2], both as (x, y) where 0 and 1 are the edges of the image: where a sample is,
    and how large a pixel of its level. `weights` [K] are those of the mean of the heads, without sign. `level_of` [K].
    `references` [R, 2 or 4] or None.
    """

    locations: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    level_of: np.ndarray
    references: np.ndarray | None


def _samples(record: Any, query: int, batch: int, head: int | None) -> _Samples:
    if not hasattr(record, "queries"):
        raise TypeError(f"record: expected one record, such as records[0], got {type(record).__name__}")
    queries = list(record.queries)
    if query not in queries:
        raise ValueError(f"query: expected one of the recorded ones, {_listed(queries)}, got {query!r}")
    at = queries.index(query)
    locations, weights = (np.asarray(a) for a in (record.sampling_locations, record.attention_weights))
    batch = _index("batch", batch, weights.shape[0])
    chosen = slice(None) if head is None else [_index("head", head, weights.shape[2])]
    locations, weights = locations[batch, at, chosen], np.abs(weights[batch, at, chosen])
    heads, K = weights.shape[0], sum(record.num_points)
    locations = locations.reshape(heads * K, 2).astype(np.float64)
    weights = weights.reshape(heads * K).astype(np.float64) / max(heads, 1)
    level_of = np.tile(np.repeat(np.arange(len(record.num_points)), record.num_points), heads)
    pixels = np.array(record.spatial_shapes, np.float64).reshape(-1, 2)[:, ::-1]
    pixels = np.maximum(pixels, 1)[level_of]
    if record.align_corners:
        locations = (locations * (pixels - 1) + 0.5) / pixels
    finite = np.isfinite(locations).all(-1) & np.isfinite(weights)
    references = None
    if record.reference_points is not None:
        # The levels of a batch of padded images have slightly different ones, which are drawn as one.
        references = np.asarray(record.reference_points)[batch, at].astype(np.float64)
        references = references[np.unique(references.round(2), axis=0, return_index=True)[1]]
    return _Samples(locations[finite], 1 / pixels[finite], weights[finite], level_of[finite], references)


def _splat(samples: _Samples, shape: tuple[int, int]) -> np.ndarray:
    """The weights [H, W] on an image, each as a product of two triangles."""
    along_x, along_y = (
        _triangles(samples.locations[:, axis] * size - 0.5, np.maximum(samples.sizes[:, axis] * size, 1), size)
        for axis, size in ((0, shape[1]), (1, shape[0]))
    )
    return (along_y * samples.weights[:, None]).T @ along_x


def _triangles(centres: np.ndarray, radii: np.ndarray, size: int) -> np.ndarray:
    """[K, size]: triangles of area 1 around pixel coordinates, which vanish at a distance of `radii`."""
    distances = np.abs(np.arange(size) - centres[:, None])
    return np.maximum(1 - distances / radii[:, None], 0) / radii[:, None]


def _image(image: Any) -> np.ndarray:
    """The image as floats, where it has integers of 8 bits."""
    image = np.asarray(image)
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise ValueError(f"image: expected shape [H, W, 3] or [H, W], got {list(image.shape)}")
    return image / 255 if image.dtype == np.uint8 else image.astype(np.float64)


def _index(name: str, given: Any, size: int) -> int:
    index = operator.index(given)
    if not 0 <= index < size:
        raise IndexError(f"{name}: expected an index from 0 to {size - 1}, got {index}")
    return index


def _listed(queries: list[int]) -> str:
    return str(queries) if len(queries) <= 10 else f"[{queries[0]}, {queries[1]}, ... {queries[-1]}]"


def _drawn(image: np.ndarray, axes: Any) -> Any:
    """`axes`, or new ones, with the image."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"cupy_msda.plot needs matplotlib: {install('matplotlib')}", name="matplotlib"
        ) from error
    if axes is None:
        axes = pyplot.figure(layout="constrained").add_subplot()
    axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
    return axes


def _rgba(levels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.concatenate((np.array([to_rgb(colour) for colour in _COLOURS])[levels], opacity[:, None]), -1)


def _square_root(largest: float) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=largest)


def _draw_references(axes: Any, references: np.ndarray | None, shape: tuple[int, int]) -> None:
    """A cross for each point, a rectangle for each box."""
    for reference in () if references is None else references:
        _draw_reference(axes, reference, shape)


def _draw_reference(axes: Any, reference: np.ndarray, shape: tuple[int, int]) -> None:
    H, W = shape
    x, y = reference[:2] * (W, H) - 0.5
    if len(reference) == 4:
        half = reference[2:] * (W, H) / 2
        columns, rows = x + half[0] * np.array([-1, 1, 1, -1, -1]), y + half[1] * np.array([-1, -1, 1, 1, -1])
        for colour, width in (("black", 3.5), ("white", 1.5)):
            axes.plot(columns, rows, color=colour, linewidth=width, zorder=4)
    else:
        for colour, width in (("black", 3.5), ("white", 1.5)):
            axes.plot(x, y, "+", color=colour, markersize=11, markeredgewidth=width, zorder=4)


def _finished(axes: Any, shape: tuple[int, int]) -> Any:
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(shape[0] - 0.5, -0.5)
    axes.set_axis_off()
    return axes
