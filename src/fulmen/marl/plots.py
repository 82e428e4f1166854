"""Pictures of teams: learning curves with intervals, attention between agents, student share, newcomers.

Letters: R runs, P points of a curve, N agents. A series is (frames [P], values [R, P]): all runs of one method.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fulmen.config import UserError
from fulmen.marl.statistics import Estimate, curve_intervals, steps_to_threshold
from fulmen.run.figure import COLORS, FAINT, GREY, INK, make_figure, save_figure, style_axes

Series = tuple[ArrayLike, ArrayLike]

_RESAMPLES = 2000
"""A band a few pixels wide needs fewer than a printed number."""
_MOST = 8
"""So many students, and teachers of each, are drawn one by one; more would not be legible."""


def plot_returns(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    highlight: str | None = None,
    baseline: str | None = None,
) -> None:
    """Write a PNG with a panel for each way of acting, in it a learning curve for each method.

    A curve is the interquartile mean over the runs, with a band of its 95 % bootstrap interval where there are several.
    A method has one colour in all panels; `highlight` is drawn bold, `baseline` grey and dashed.
    """
    figure = _figure(5.2 * len(panels) + 2.2, 4.6)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    styles = _styles(names, highlight, baseline)
    for axes, (way, methods) in zip(row, panels.items(), strict=True):
        for name, series in methods.items():
            _draw_band(axes, series, label=name, **styles[name])
        _dress(axes, way, "frames", "return of an episode" if axes is row[0] else "")
    _legend_beside(figure, row)
    _save(figure, path, title)


def plot_student_share(
    path: str | Path,
    methods: Mapping[str, Series],
    *,
    title: str,
    highlight: str | None = None,
) -> None:
    """Write a PNG of the share of actions that are others' advice, from 0 to 1, with bands as in `plot_returns`."""
    figure = _figure(8.4, 4.4)
    axes = figure.add_subplot()
    styles = _styles(list(methods), highlight, None)
    for name, series in methods.items():
        _draw_band(axes, series, label=name, **styles[name])
    _dress(axes, "", "frames", "share of actions taken as a student")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend_beside(figure, [axes])
    _save(figure, path, title)


def plot_areas(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    highlight: str | None = None,
    baseline: str | None = None,
) -> None:
    """Write a PNG with a panel for each way of acting: each method's area under the curve and its interval."""
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    figure = _figure(4.4 * len(panels) + 1.4, 1.6 + 0.34 * len(names))
    row = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    styles = _styles(names, highlight, baseline)
    for axes, (way, methods) in zip(row, panels.items(), strict=True):
        for name, (value, low, high) in methods.items():
            place, color = names.index(name), styles[name]["color"]
            axes.plot([low, high], [place, place], color=color, linewidth=4, alpha=0.35, solid_capstyle="round")
            axes.plot([value], [place], color=color, marker="o", markersize=7, markeredgecolor="white")
        if baseline in methods:
            axes.axvline(methods[baseline].value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        _dress(axes, way, "area under the curve", "")
        axes.xaxis.set_major_formatter("{x:.4g}")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
    _save(figure, path, title)


def plot_attention(path: str | Path, weights: ArrayLike, *, title: str, agents: Sequence[str] | None = None) -> None:
    """Write a PNG of the weights [N, N] of teacher j (column) for student i (row); the diagonal is no teacher's.

    Up to 12 agents have their numbers in the cells. Raises `UserError` for another shape.
    """
    weights, agents = _check_attention(weights, agents, 2)
    count = len(weights)
    weights = np.where(np.eye(count, dtype=bool), np.nan, weights)
    side = min(9.0, 2.2 + 0.62 * count)
    figure = _figure(side + 1.0, side)
    axes = figure.add_subplot()
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues")
    axes.set_facecolor(FAINT)
    if count <= 12:
        for i, j in np.argwhere(np.isfinite(weights)):
            color = "white" if weights[i, j] > 0.62 else INK
            axes.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", color=color, fontsize=9)
    _dress(axes, "", "teacher", "student")
    fits = max(map(len, agents)) <= (8 if count <= 6 else 3)
    axes.set_xticks(range(count), agents, rotation=0 if fits else 35, ha="center" if fits else "right")
    axes.set_yticks(range(count), agents)
    _grid_between_cells(axes, count)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, length=0)
    bar.set_label("attention weight", color=INK)
    _save(figure, path, title)


def plot_attention_course(
    path: str | Path,
    frames: ArrayLike,
    weights: ArrayLike,
    *,
    title: str,
    agents: Sequence[str] | None = None,
) -> None:
    """Write a PNG of how each student divides its attention among its teachers: frames [P], weights [P, N, N].

    A panel for each of the first eight students, with its eight strongest teachers; the others' weights are one grey
    area. Raises `UserError` for another shape.
    """
    frames = np.asarray(frames, float)
    weights, agents = _check_attention(weights, agents, 3)
    if frames.shape != weights.shape[:1]:
        raise UserError(f"attention over time needs as many frames as weights, got {frames.shape} and {weights.shape}")
    students = min(len(agents), _MOST)
    columns = min(students, 4)
    rows = -(-students // columns)
    figure = _figure(2.9 * columns + 1.6, 2.5 * rows + 1.0)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[students:]:
        axes.set_visible(False)
    for student, axes in enumerate(grid.flat[:students]):
        _stack_teachers(axes, frames, weights[:, student], student, agents)
        last_row, first_column = student + columns >= students, student % columns == 0
        _dress(axes, f"{agents[student]} as student", "frames" if last_row else "", "attention" if first_column else "")
        axes.tick_params(labelbottom=last_row, labelleft=first_column)
        axes.set_ylim(0, 1)
        if len(frames) > 1:
            axes.set_xlim(frames[0], frames[-1])
    _legend_beside(figure, grid.flat[:students], title="teacher", order=agents)
    _save(figure, path, title)


def plot_newcomer(path: str | Path, team: Series, alone: Series, *, trained: float, title: str) -> None:
    """Write a PNG of a newcomer's own return, in a trained team and alone, against the `trained` level.

    The frames at which the interquartile mean reaches the level are marked and compared.
    """
    figure = _figure(8.4, 4.6)
    axes = figure.add_subplot()
    axes.axhline(trained, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), label="trained level")
    reached = {}
    for name, series, color in (("in the team", team, COLORS[0]), ("alone", alone, COLORS[1])):
        xs, middle = _draw_band(axes, series, label=name, color=color, linewidth=2.4, zorder=4, band=0.14)
        reached[name] = steps_to_threshold(xs, middle, trained)
        at = xs == reached[name]
        axes.plot(xs[at], middle[at], "o", color=color, markersize=10, markeredgecolor="white", zorder=6)
    _dress(axes, _newcomer_verdict(**{name.replace(" ", "_"): at for name, at in reached.items()}), "frames", "")
    axes.set_ylabel("newcomer's own return", color=INK)
    axes.legend(labelcolor=INK, edgecolor="none", framealpha=0.9, loc="lower right")
    _save(figure, path, title)


def _newcomer_verdict(*, in_the_team: float, alone: float) -> str:
    if not np.isfinite(in_the_team):
        return "the newcomer does not reach the trained level in the team"
    if not np.isfinite(alone):
        return f"trained level after {in_the_team:,.0f} frames in the team, alone never"
    times = f": {alone / in_the_team:.3g} times as long" if in_the_team else ""
    return f"trained level after {in_the_team:,.0f} frames in the team, {alone:,.0f} alone{times}"


def _figure(width: float, height: float):
    figure = make_figure(width, height)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07)
    return figure


def _save(figure, path: str | Path, title: str) -> None:
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=13, fontweight="bold")
    save_figure(figure, path)


def _styles(names: Sequence[str], highlight: str | None, baseline: str | None) -> dict[str, dict]:
    """How each method's line looks; what is neither highlight nor baseline is one of many."""
    many = len(names) > 4
    # The highlight has the first colour whatever its place, so that it looks the same in every picture.
    ordered = [*(name for name in names if name == highlight), *(n for n in names if n not in (highlight, baseline))]
    styles = {}
    for name, color in zip(ordered, _palette(len(ordered)), strict=True):
        styles[name] = {"color": color, "linewidth": 1.5 if many else 2.0, "zorder": 3, "band": 0.07 if many else 0.14}
    if highlight in styles:
        styles[highlight] |= {"linewidth": 3.0, "zorder": 5, "band": 0.18}
    if baseline in names:
        styles[baseline] = {"color": GREY, "linewidth": 2.2, "linestyle": (0, (3, 1.2)), "zorder": 4, "band": 0.18}
    return styles


def _palette(count: int) -> list:
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps

    return [tuple(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def _draw_band(axes, series: Series, *, color, zorder: int, band: float, **style) -> tuple[np.ndarray, np.ndarray]:
    """Draw the middle of the runs and its interval; gives back the points drawn."""
    xs, values = (np.asarray(part, float) for part in series)
    if xs.ndim != 1 or values.ndim != 2 or values.shape[1:] != xs.shape:
        raise UserError(f"a series needs frames [P] and values [runs, P], got {xs.shape} and {values.shape}")
    middle, low, high = curve_intervals(values, resamples=_RESAMPLES)
    axes.fill_between(xs, low, high, color=color, alpha=band, linewidth=0, zorder=zorder - 1)
    # A lone point is no line.
    axes.plot(xs, middle, color=color, zorder=zorder, marker="o" if len(xs) == 1 else None, **style)
    return xs, middle


def _stack_teachers(axes, frames: np.ndarray, weights: np.ndarray, student: int, agents: Sequence[str]) -> None:
    """Draw the weights [P, N] of one student's teachers on top of each other."""
    order = sorted((j for j in range(len(agents)) if j != student), key=lambda j: -np.nansum(weights[:, j]))
    # A team of one has no teachers.
    if not order:
        return
    shown = sorted(order[:_MOST])
    layers = [weights[:, j] for j in shown]
    palette = _palette(len(agents))
    colors = [palette[j] for j in shown]
    labels = [agents[j] for j in shown]
    if order[_MOST:]:
        layers.append(weights[:, order[_MOST:]].sum(axis=1))
        colors.append(FAINT)
        labels.append("others")
    axes.stackplot(frames, layers, colors=colors, labels=labels, alpha=0.8, edgecolor="white", linewidth=0.6)


def _check_attention(
    weights: ArrayLike, agents: Sequence[str] | None, dimensions: int
) -> tuple[np.ndarray, Sequence[str]]:
    weights = np.asarray(weights, float)
    if weights.ndim != dimensions or weights.shape[-1] != weights.shape[-2] or not weights.size:
        letters = "[points, agents, agents]" if dimensions == 3 else "[agents, agents]"
        raise UserError(f"attention must be {letters}, got {weights.shape}")
    agents = [f"agent {i}" for i in range(weights.shape[-1])] if agents is None else list(agents)
    if len(agents) != weights.shape[-1]:
        raise UserError(f"attention between {weights.shape[-1]} agents needs as many names, got {agents}")
    return weights, agents


def _grid_between_cells(axes, count: int) -> None:
    axes.grid(False)
    axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend_beside(figure, panels, *, title: str | None = None, order: Sequence[str] = ()) -> None:
    """One legend for all panels, to their right; names in `order` come first."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [name for name in order if name in handles] + [name for name in handles if name not in order]
    if names:
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside right center",
            title=title,
            labelcolor=INK,
            frameon=False,
        )


def _dress(axes, title: str, x_label: str, y_label: str) -> None:
    style_axes(axes, x_label, y_label)
    axes.set_title(title, loc="left", color=GREY, fontsize=10.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.10g}k" if abs(value) >= 1000 else f"{value:g}")
