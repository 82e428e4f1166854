"""How all pictures of runs look: a figure, its axes and its file."""

import io
from pathlib import Path

from fulmen.run.files import write_atomic

COLORS = (
    *("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#06b6d4"),
    *("#ca8a04", "#ec4899", "#84cc16", "#78350f", "#94a3b8", "#1e3a8a"),
)
INK, GREY, FAINT = "#1f2937", "#64748b", "#d1d5db"


def make_figure(width: float, height: float):
    """A figure of so many inches."""
    # Figures are made by hand rather than by pyplot: no global state, no window, any thread. The import takes a while.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes, x_label: str, y_label: str) -> None:
    """Names of the axes, a faint grid behind everything, no box."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def save_figure(figure, path: str | Path) -> None:
    """Write a PNG, replacing `path` in one step. UserError if the disk refuses."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomic(path, png.getvalue())
