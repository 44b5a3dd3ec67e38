"""Pictures of a run, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.fileio import atomic_file

Curves = TypeVar("Curves", bound=Mapping[str, Sequence[float]])


def plot_panels(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], x: Sequence[float] | None = None,
                xlabel: str = "epoch", best_epoch: float | None = None, title: str = "") -> None:
    """Draw panels side by side, each a set of named curves.

    Args:
        path: the PNG to write.
        panels: title -> name of the curve -> its values.
        x: where the values are; default 1, 2, ...
        best_epoch: where to draw a dotted line.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for label, values in curves.items():
            at = x if x is not None else range(1, len(values) + 1)
            axis.plot(at, values, label=label, marker="o" if len(values) < 30 else None, markersize=3)
        if best_epoch is not None:
            axis.axvline(best_epoch, color="grey", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def varying(panels: Mapping[str, Curves]) -> dict[str, Curves]:
    """The panels with a curve that changes; all of them if no curve does, as after one epoch."""
    kept = {title: curves for title, curves in panels.items()
            if any(len(set(values)) > 1 for values in curves.values())}
    return kept or dict(panels)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
