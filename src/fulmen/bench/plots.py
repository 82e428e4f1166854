"""Pictures of benchmarks' results, drawn from the JSON that `fulmen bench NAME --json FILE` wrote; no GPU is needed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from fulmen.config import UserError
from fulmen.run.figure import COLORS, GREY, INK, make_figure, save_figure, style_axes

LABELS = {
    "ours": "lightning attention, ours",
    "fla": "lightning attention, flash-linear-attention",
    "softmax": "softmax attention, cuDNN",
    "floor": "floor: every tensor moved once",
}
SIDES = {"forward": "forward", "training": "forward + backward"}
MODELS = {"lightning": "all lightning", "softmax": "all softmax", "hybrid": "hybrid, 7 lightning : 1 softmax"}
MACHINE = ("gpu", "torch", "triton", "fla-core")


def draw(name: str, source: Path, folder: Path, only: str | None = None) -> list[Path]:
    """Write the pictures of benchmark `name`, or that of its table `only`, from the results in `source`.

    They are FOLDER/NAME-TABLE.png. Raises UserError for a benchmark without pictures and a file without its tables.
    """
    if name not in PICTURES:
        raise UserError(f"fulmen bench {name} has no pictures; there are some of {', '.join(PICTURES)}")
    pictures = PICTURES[name]
    if only is not None and only not in pictures:
        raise UserError(f"fulmen bench {name} has no picture of {only!r}; there are {', '.join(pictures)}")
    results, paths = read_results(source), []
    wanted = pictures if only is None else {only: pictures[only]}
    for table in wanted:
        if not results.get(table):
            raise UserError(f"{source} has no table {table!r}: write it with fulmen bench {name} --json {source}")
    for table, picture in wanted.items():
        try:
            figure = picture(results[table], describe(results["machine"]))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{source}: table {table!r} has another form than fulmen bench writes ({error})") from None
        paths.append(folder / f"{name}-{table}.png")
        save_figure(figure, paths[-1])
    return paths


def read_results(source: Path) -> dict:
    """The tables and the machine of a results file."""
    try:
        results = json.loads(source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{source} is not JSON ({error})") from None
    if not isinstance(results, dict) or not isinstance(results.get("machine"), dict):
        raise UserError(f"{source} is no result of fulmen bench: it names no machine")
    return results


def describe(machine: Mapping[str, str]) -> str:
    """The GPU, or else the CPU, and the versions that times depend on."""
    device = [machine["gpu"]] if "gpu" in machine else [str(machine.get("cpu", "unknown machine"))]
    return ", ".join(device + [f"{name} {machine[name]}" for name in MACHINE[1:] if name in machine])


def draw_attention(rows: list[dict], machine: str):
    """Milliseconds of one sequence against its length, forward and with backward."""
    figure = make_figure(11, 5)
    _title(figure, "Attention of one sequence, 64 heads of 128, bf16", machine)
    for place, (side, name) in enumerate(SIDES.items()):
        axes = figure.add_subplot(1, 2, 1 + place)
        # Lightning is blue and softmax orange in all pictures.
        for color, peer in zip((COLORS[0], COLORS[3], COLORS[1]), ("ours", "fla", "softmax"), strict=True):
            _line(axes, rows, f"{peer} {side}", color, label=LABELS[peer])
        xs, ys = _points(rows, f"floor {side}")
        axes.plot(xs, ys, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label=LABELS["floor"], zorder=2)
        style_axes(axes, "tokens", "milliseconds")
        _log_tokens(axes, [row["length"] for row in rows])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(which="both", length=0)
        axes.set_title(name, loc="left", color=INK, fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, labelcolor=INK, edgecolor="none", fontsize=9)
    return figure


def draw_training(rows: list[dict], machine: str):
    """Tokens a second of training steps against the samples' length, by the model's layers."""
    figure = make_figure(8, 4.8)
    _title(figure, "Training a 950 M mixture-of-experts model, bf16", machine)
    axes = figure.add_subplot()
    for color, (layers, label) in zip(COLORS, MODELS.items(), strict=False):
        _line(axes, [row for row in rows if row["layers"] == layers], "tokens a second", color, label, scale=1e-3)
    style_axes(axes, "tokens of a sample", "thousand tokens a second")
    _log_tokens(axes, sorted({row["length"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.legend(labelcolor=INK, edgecolor="none", framealpha=0.9, loc="best")
    return figure


def draw_parts(rows: list[dict], machine: str):
    """A bar for each length, cut into the shares of a training step's parts."""
    rows = [row for row in rows if "failed" not in row]
    parts = [name for name in rows[0] if name != "length" and not name.startswith("milliseconds")]
    figure = make_figure(9, 1.9 + 0.75 * len(rows))
    _title(figure, "Where the time of a hybrid's training step goes", machine)
    axes = figure.add_subplot()
    names, left = [f"{_tokens(row['length'])} tokens" for row in rows], [0.0] * len(rows)
    for color, part in zip(COLORS, parts, strict=False):
        widths = [100 * row[part] for row in rows]
        bars = axes.barh(names, widths, 0.6, left, color=color, label=part, edgecolor="white", linewidth=1)
        # A narrow piece has no room for its number.
        numbers = [f"{width:.0f}" if width >= 3 else "" for width in widths]
        axes.bar_label(bars, numbers, label_type="center", color="white", fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    style_axes(axes, "% of the step's time", "")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, labelcolor=INK, edgecolor="none", fontsize=9)
    return figure


PICTURES: dict[str, dict[str, Callable]] = {
    "lightning": {"lengths": draw_attention},
    "train": {"lengths": draw_training, "parts": draw_parts},
}
"""By benchmark and table."""


def _title(figure, title: str, machine: str) -> None:
    figure.suptitle(f"{title}\n", x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    # A third of an inch below the upper edge, however high the figure is.
    figure.text(0.01, 1 - 0.36 / figure.get_figheight(), machine, color=GREY, fontsize=9, va="top")


def _line(axes, rows: list[dict], column: str, color: str, label: str, scale: float = 1.0) -> None:
    xs, ys = _points(rows, column)
    if xs:
        ys = [scale * y for y in ys]
        style = dict(linewidth=1.6, marker="o", markersize=5, markeredgecolor="white", zorder=3)
        axes.plot(xs, ys, color=color, label=label, **style)


def _points(rows: list[dict], column: str) -> tuple[list[int], list[float]]:
    """Of the rows that have a number there: what failed left a text."""
    found = [(row["length"], row[column]) for row in rows if isinstance(row.get(column), int | float)]
    return [length for length, _ in found], [value for _, value in found]


def _log_tokens(axes, lengths: list[int]) -> None:
    """A logarithmic axis whose ticks are the lengths themselves."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.minorticks_off()


def _tokens(length: int) -> str:
    """131072 is 128K."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{letter}"
    return str(length)
