"""Curves of a run as a picture: the raw values light, their smoothed course in full colour, sparse series as points."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fulmen.run.files import write_atomic

_COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#475569")
_INK, _FAINT = "#1f2937", "#d1d5db"
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
    # Figures are made by hand rather than by pyplot: no global state, no window, any thread. The import takes a while.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, (xs, ys)) in enumerate(series.items()):
        _draw(axes, name, np.asarray(xs, float), np.asarray(ys, float), _COLORS[index % len(_COLORS)], smooth)
    _dress(axes, title, x_label, y_label)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomic(path, png.getvalue())


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


def _dress(axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.grid(color=_FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=_INK, edgecolor="none", framealpha=0.9)
