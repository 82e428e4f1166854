"""Pictures of teams: each thing that must be seen is there, whatever the numbers, and pyplot is left alone."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from fulmen.config import UserError
from fulmen.marl import plots
from fulmen.marl.statistics import Estimate

FRAMES = np.arange(0, 5000, 1000)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(plots, "_RESAMPLES", 50)


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, so that a test can ask what is on them."""
    kept, make = [], plots._figure

    def keep(width, height):
        kept.append(make(width, height))
        return kept[-1]

    monkeypatch.setattr(plots, "_figure", keep)
    return kept


def series(runs=3, slope=1.0):
    return FRAMES, slope * FRAMES / 1000 + np.arange(runs)[:, None]


def colors(path):
    return {color for _, color in Image.open(path).convert("RGB").getcolors(2**24)}


def rgb(hexadecimal):
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))


def test_each_way_of_acting_has_its_panel_and_each_method_its_curve(tmp_path, figures):
    path = tmp_path / "plots" / "returns.png"
    panels = {"with transfer": {"none": series(), "pat": series(slope=2)}, "own": {"none": series(), "pat": series()}}
    plots.plot_returns(path, panels, title="Navigation", highlight="pat", baseline="none")
    assert {rgb(plots.COLORS[0]), rgb(plots.GREY)} <= colors(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["returns.png"]
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["with transfer", "own"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["pat"].get_ydata(), 2 * FRAMES / 1000 + 1)
    assert lines["pat"].get_linewidth() > lines["none"].get_linewidth()
    assert [text.get_text() for text in figure.legends[0].texts] == ["none", "pat"]


def test_the_band_spans_the_runs(tmp_path, figures):
    plots.plot_returns(tmp_path / "a.png", {"own": {"pat": series(runs=2)}}, title="")
    (band,) = figures[0].axes[0].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == (0, 5)


def test_every_method_has_a_colour_of_its_own():
    for count in (2, 11, 30):
        styles = plots._styles([f"method {i}" for i in range(count)], "method 1", "method 0")
        assert len({style["color"] for style in styles.values()}) == count
        assert styles["method 1"]["color"] == plots.COLORS[0] or count > 12


def test_student_share_is_a_percentage_from_none_to_all(tmp_path, figures):
    plots.plot_student_share(tmp_path / "a.png", {"pat": (FRAMES, np.full((2, 5), 0.25))}, title="")
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    assert low <= 0
    assert high >= 1
    assert axes.yaxis.get_major_formatter()(0.25, 0) == "25%"


def test_areas_lie_in_a_row_for_each_method(tmp_path, figures):
    areas = {"none": Estimate(1, 0.5, 1.5), "pat": Estimate(2, 1.5, 2.5), "alone": Estimate(3, np.nan, np.nan)}
    plots.plot_areas(tmp_path / "a.png", {"own": areas}, title="", baseline="none")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(areas)
    spans = [tuple(line.get_xdata()) for line in axes.lines]
    assert (1.5, 2.5) in spans


def test_attention_is_written_into_its_cells(tmp_path, figures):
    weights = np.array([[0, 0.25, 0.75], [1, 0, 0], [0.5, 0.5, 0]])
    plots.plot_attention(tmp_path / "a.png", weights, title="", agents=["anna", "bob", "cleo"])
    axes = figures[0].axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    # Position (column, row) is (teacher, student).
    assert texts[(2, 0)] == "0.75"
    assert texts[(0, 1)] == "1.00"
    assert not texts.keys() & {(0, 0), (1, 1), (2, 2)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["anna", "bob", "cleo"]


@pytest.mark.parametrize("count", [1, 2, 13, 32])
def test_attention_of_any_team_can_be_drawn(tmp_path, count):
    weights = np.full((4, count, count), 1 / max(count - 1, 1))
    plots.plot_attention(tmp_path / "a.png", weights[0], title="")
    plots.plot_attention_course(tmp_path / "b.png", FRAMES[:4], weights, title="")
    for name in "ab":
        Image.open(tmp_path / f"{name}.png").verify()


def test_attention_over_time_stacks_each_students_teachers(tmp_path, figures):
    weights = np.tile(np.array([[0, 0.3, 0.7], [0.6, 0, 0.4], [0.5, 0.5, 0]]), (5, 1, 1))
    plots.plot_attention_course(tmp_path / "a.png", FRAMES, weights, title="")
    first, second, _ = figures[0].axes
    assert first.get_title(loc="left") == "agent 0 as student"
    assert [layer.get_label() for layer in first.collections] == ["agent 1", "agent 2"]
    tops = [layer.get_paths()[0].vertices[:, 1].max() for layer in second.collections]
    np.testing.assert_allclose(tops, [0.6, 1.0])


def test_weak_teachers_of_a_large_team_become_others(tmp_path, figures):
    weights = np.full((5, 12, 12), 0.01)
    weights[:, :, 11] = 0.9
    plots.plot_attention_course(tmp_path / "a.png", FRAMES, weights, title="")
    labels = [layer.get_label() for layer in figures[0].axes[0].collections]
    assert len(labels) == 9
    assert labels[-2:] == ["agent 11", "others"]


@pytest.mark.parametrize(
    ("trained", "verdict"),
    [
        (4.0, "trained level after 1,000 frames in the team, 3,000 alone: 3 times as long"),
        (7.0, "trained level after 2,000 frames in the team, alone never"),
        (99.0, "the newcomer does not reach the trained level in the team"),
        (1.0, "trained level after 0 frames in the team, 0 alone"),
    ],
)
def test_a_newcomer_is_measured_against_the_trained_level(tmp_path, figures, trained, verdict):
    team, alone = series(slope=3), series()
    plots.plot_newcomer(tmp_path / "a.png", team, alone, trained=trained, title="")
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == verdict
    assert [text.get_text() for text in axes.get_legend().texts] == ["trained level", "in the team", "alone"]


@pytest.mark.parametrize("ys", [[[1.0]], [[np.nan] * 4] * 2, [[np.inf, 1, 2, np.nan]], [[1e300, -1e300]] * 3])
def test_any_numbers_can_be_drawn(tmp_path, ys):
    one = (np.arange(len(ys[0])), ys)
    plots.plot_returns(tmp_path / "a.png", {"own": {"pat": one}}, title="")
    plots.plot_newcomer(tmp_path / "b.png", one, one, trained=0.0, title="")
    plots.plot_attention_course(tmp_path / "c.png", [0, 1], np.full((2, 3, 3), np.nan), title="")
    Image.open(tmp_path / "a.png").verify()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plots.plot_attention(path, np.zeros((2, 3)), title=""), r"\[agents, agents\], got \(2, 3\)"),
        (lambda path: plots.plot_attention(path, np.zeros((2, 2)), title="", agents=["a"]), "as many names"),
        (
            lambda path: plots.plot_attention_course(path, [0], np.zeros((2, 2)), title=""),
            r"\[points, agents, agents\]",
        ),
        (lambda path: plots.plot_attention_course(path, [0], np.zeros((2, 2, 2)), title=""), "as many frames"),
        (lambda path: plots.plot_student_share(path, {"pat": ([0, 1], [0.5, 0.5])}, title=""), r"\[runs, P\]"),
    ],
)
def test_other_shapes_are_refused(tmp_path, draw, message):
    with pytest.raises(UserError, match=message):
        draw(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_pyplot_is_left_alone(tmp_path):
    script = (
        "import sys; from fulmen.marl.plots import plot_attention; assert 'matplotlib' not in sys.modules;"
        f"plot_attention({str(tmp_path / 'a.png')!r}, [[0, 1], [1, 0]], title='');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
