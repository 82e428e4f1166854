"""Curves of a run as a picture: the raw values light, their smoothed course in full colour, sparse series as points."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fulmen.run.figure import COLORS, INK, make_figure, save_figure, style_axes

_SPARSE = 40
"""Up to so many points are drawn one by one and never smoothed."""


def plot_curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    smooth: float = 0.01,
) -> None:
    """Write a PNG of `series`, each (xs, ys) under its name, replacing `path` in one step.

    `smooth` is the standard deviation of the Gaussian that smooths a curve, as a share of its number of points; 0 turns
    smoothing off. Values that are not finite leave gaps. Raises `UserError` if the disk refuses.
    """
    figure = make_figure(8, 4.5)
    axes = figure.add_subplot()
    for index, (name, (xs, ys)) in enumerate(series.items()):
        _draw(axes, name, np.asarray(xs, float), np.asarray(ys, float), COLORS[index % len(COLORS)], smooth)
    style_axes(axes, x_label, y_label)
    axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=INK, edgecolor="none", framealpha=0.9)
    save_figure(figure, path)


def _draw(axes, name: str, xs: np.ndarray, ys: np.ndarray, color: str, smooth: float) -> None:
    if len(xs) <= _SPARSE:
        axes.plot(
            xs, ys, color=color, linewidth=1.4, marker="o", markersize=5, markeredgecolor="white", label=name, zorder=4
        )
    elif smooth <= 0:
        axes.plot(xs, ys, color=color, linewidth=1.2, label=name)
    else:
        axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(xs, _smooth(ys, smooth * len(ys)), color=color, linewidth=1.8, label=name, zorder=3)


def _smooth(ys: np.ndarray, deviation: float) -> np.ndarray:
    """Return Gaussian means of `ys` with the given standard deviation in points; gaps and ends weigh nothing."""
    radius = max(1, round(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(deviation, 1e-6)) ** 2)
    known = np.isfinite(ys)
    total = np.convolve(np.where(known, ys, 0.0), weights, mode="full")[radius:-radius]
    count = np.convolve(known.astype(float), weights, mode="full")[radius:-radius]
    return np.where(known, total / np.where(known, count, 1.0), np.nan)
