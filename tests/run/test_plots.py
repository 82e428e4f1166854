"""Pictures of curves: drawn without pyplot, whole or not at all, whatever the numbers."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from fulmen.run import plots
from fulmen.run.plots import plot_curves

LABELS = {"title": "Loss", "x_label": "step", "y_label": "bits per byte"}


def colors(path):
    return {color for _, color in Image.open(path).convert("RGB").getcolors(2**24)}


def rgb(hexadecimal):
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("smooth", [0.0, 0.01, 0.5])
def test_each_series_is_drawn_in_its_colour(tmp_path, smooth):
    xs = np.arange(500)
    path = tmp_path / "plots" / "loss.png"
    plot_curves(path, {"train": (xs, 9 / (xs + 1)), "held-out": ([0, 250, 499], [9, 1, 0.5])}, smooth=smooth, **LABELS)
    assert {rgb(plots.COLORS[0]), rgb(plots.COLORS[1])} <= colors(path)
    assert Image.open(path).size == (1200, 675)
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    "ys", [[], [1.0], [np.nan] * 3, [np.nan] * 100, [np.inf, 1.0] * 50, [1e300, -1e300] * 50, [7] * 100]
)
def test_any_numbers_can_be_drawn_without_a_warning(tmp_path, ys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(tmp_path / "loss.png", {"train": (range(len(ys)), ys)}, **LABELS)
    Image.open(tmp_path / "loss.png").verify()


def test_no_series_is_an_empty_plot(tmp_path):
    plot_curves(tmp_path / "loss.png", {}, **LABELS)
    Image.open(tmp_path / "loss.png").verify()


def test_smoothing_keeps_constants_skips_gaps_and_damps_noise():
    ys = np.full(200, 3.0)
    ys[50:60] = np.nan
    smoothed = plots._smooth(ys, 4.0)
    np.testing.assert_allclose(smoothed[~np.isnan(ys)], 3.0)
    assert np.isnan(smoothed[50:60]).all()
    noise = np.random.default_rng(0).normal(size=2000)
    # A Gaussian of deviation s leaves 1 / (2 sqrt(pi) s) of the variance of white noise.
    assert plots._smooth(noise, 10.0).var() == pytest.approx(1 / (2 * np.pi**0.5 * 10), rel=0.3)


def test_pyplot_is_left_alone(tmp_path):
    script = (
        "import sys; from fulmen.run.plots import plot_curves; assert 'matplotlib' not in sys.modules;"
        f"plot_curves({str(tmp_path / 'a.png')!r}, {{}}, title='', x_label='', y_label='');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
