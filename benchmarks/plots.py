"""The look of all plots: as wide as a phone shows them, without background, in colours for light and dark pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Plot = TypeVar("Plot", bound=Callable[..., None])
WIDTH = 4.4  # inches: a phone shows it nearly at this size
# Readable on white and on black.
GREY, COLOURS = "#767c84", ("#3b82c4", "#d9822b", "#3a9d5d", "#d0504f", "#8e6bbf")
_STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.alpha": 0.35,
    "grid.color": GREY,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.fonttype": "none",  # text, which is small and can be searched
    "svg.hashsalt": "cupy_msda",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def styled(plot: Plot) -> Plot:
    """A function that draws, with this look for all that it draws."""

    @functools.wraps(plot)
    def drawn(*arguments: Any, **named: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return plot(*arguments, **named)

    return drawn  # type: ignore[return-value]


def panels(rows: int, columns: int = 1, *, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of `height` inches and its axes, row by row."""
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for one in axes:
        one.set_prop_cycle(cycler(color=COLOURS))
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same for the same numbers."""
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def legend(figure: Any, axes: Any, columns: int = 2) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)


def dots(
    axes: Any, labels: Sequence[str], series: dict[str, Sequence[float]], markers: Iterable[str] = "osD^v"
) -> None:
    """A row per label, from top to bottom, and in each a mark per series."""
    rows = range(len(labels))
    for (name, numbers), marker in zip(series.items(), markers, strict=False):
        axes.plot(numbers, rows, marker, markersize=5, linestyle="none", label=name)
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="both")


def logarithmic(axes: Any, ticks: Sequence[float], unit: str = "") -> None:
    """A logarithmic axis with these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.minorticks_off()


def factors(axes: Any, ticks: Sequence[float]) -> None:
    """A logarithmic axis of ratios, with these ticks."""
    logarithmic(axes, ticks, "x")
    axes.axvline(1, color=GREY, linewidth=1)
