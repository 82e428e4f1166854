"""The statistics of many runs: against SciPy, against numbers worked out by hand, and against their own promises."""

import math
import warnings

import numpy as np
import pytest

from fulmen.config import UserError
from fulmen.marl.statistics import (
    area_under_curve,
    bootstrap_interval,
    compare_paired,
    curve_intervals,
    interquartile_mean,
    steps_to_threshold,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 10, 33])
def test_interquartile_mean_is_the_trimmed_mean(count):
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(count).normal(size=(3, count))
    np.testing.assert_allclose(interquartile_mean(scores, axis=1), stats.trim_mean(scores, 0.25, axis=1))
    np.testing.assert_allclose(interquartile_mean(scores.T, axis=0), stats.trim_mean(scores, 0.25, axis=1))
    np.testing.assert_allclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=None))


def test_interquartile_mean_ignores_outliers_but_not_nan():
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1e9]) == 4.5
    assert interquartile_mean([math.inf, 2, 4, 1]) == 3
    assert math.isnan(interquartile_mean([1, 2, 3, math.nan]))


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(1).normal(size=24)
    ours = bootstrap_interval(scores, seed=3)
    theirs = stats.bootstrap((scores,), interquartile_mean, n_resamples=10_000, method="percentile", rng=4)
    assert ours.value == pytest.approx(stats.trim_mean(scores, 0.25))
    np.testing.assert_allclose(ours[1:], theirs.confidence_interval, atol=0.02)


def test_interval_of_the_mean_has_its_textbook_width():
    scores = np.random.default_rng(2).normal(size=400)
    estimate = bootstrap_interval(scores, statistic=np.mean, confidence=0.9)
    half = 1.645 * scores.std() / 20
    np.testing.assert_allclose(estimate, [scores.mean(), scores.mean() - half, scores.mean() + half], atol=0.008)


def test_runs_are_drawn_within_their_task():
    """Constant tasks leave nothing to chance; were runs drawn across tasks, the interval would be wide."""
    scores = np.tile([0.0, 10.0], (6, 1))
    assert bootstrap_interval(scores, statistic=np.mean) == (5, 5, 5)


def test_tasks_are_drawn_apart_from_each_other():
    """Two tasks with opposite runs: drawn together their sum never moves, drawn apart it does."""
    column = np.arange(10.0)
    estimate = bootstrap_interval(np.stack([column, -column], axis=1), statistic=np.mean)
    assert estimate.low < -0.5 < 0.5 < estimate.high


def test_the_seed_decides_the_interval():
    scores = np.random.default_rng(5).normal(size=10)
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)


def test_one_run_has_no_interval():
    estimate = bootstrap_interval([3.0])
    assert estimate.value == 3
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_infinite_scores_make_infinite_ends_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = bootstrap_interval([1.0, 2.0, 3.0, 4.0, math.inf])
    assert estimate.value == 3
    assert estimate.high == math.inf


def test_intervals_of_a_curve_are_those_of_its_points():
    values = np.random.default_rng(6).normal(size=(7, 3))
    value, low, high = curve_intervals(values, seed=2)
    for point in range(3):
        assert (value[point], low[point], high[point]) == bootstrap_interval(values[:, point], seed=2)


def test_pairs_cancel_what_a_seed_does_to_both():
    generator = np.random.default_rng(7)
    baseline = 10 + 5 * generator.normal(size=10)
    result = compare_paired(baseline + 1 + 0.01 * generator.normal(size=10), baseline)
    assert result.difference.value == pytest.approx(1, abs=0.02)
    assert 0.98 < result.difference.low < result.difference.high < 1.02
    assert (result.wins, result.pairs) == (10, 10)


def test_paired_difference_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    scores, baseline = np.random.default_rng(8).normal(size=(2, 20))

    def statistic(x, y, axis):
        return interquartile_mean(x - y, axis=axis)

    theirs = stats.bootstrap(
        (scores, baseline), statistic, n_resamples=10_000, method="percentile", paired=True, rng=1
    ).confidence_interval
    ours = compare_paired(scores, baseline).difference
    np.testing.assert_allclose(ours[1:], theirs, atol=0.03)


def test_relative_change_is_a_gain_whatever_the_sign_of_the_returns():
    positive = compare_paired([1.5, 3.0], [1.0, 2.0])
    assert positive.relative == pytest.approx((0.5, 0.5, 0.5))
    assert compare_paired([-5.0, -5.0], [-10.0, -10.0]).relative.value == 0.5
    assert compare_paired([-20.0, -20.0], [-10.0, -10.0]).relative.value == -1
    assert compare_paired([1.0, 1.0], [0.0, 0.0]).relative.value == math.inf


def test_a_tie_is_no_win():
    assert compare_paired([1.0, 2.0, 3.0], [1.0, 1.0, 4.0]).wins == 1


def test_area_under_a_curve():
    assert area_under_curve([0, 10, 30], [2, 2, 2]) == 2
    assert area_under_curve([0, 10, 30], [0, 1, 1]) == pytest.approx(25 / 30)
    assert area_under_curve([100, 200], [0, 3]) == 1.5


def test_steps_to_threshold():
    assert steps_to_threshold([0, 10, 20, 30], [0, 2, 1, 5], 2) == 10
    assert steps_to_threshold([0, 10], [5, 0], 2) == 0
    assert steps_to_threshold([0, 10], [0, 1], 2) == math.inf
    assert steps_to_threshold([0, 10], [math.nan, 3], 2) == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interquartile_mean([]), "at least one score"),
        (lambda: bootstrap_interval([]), r"got \(0, 1\)"),
        (lambda: bootstrap_interval(np.zeros((2, 2, 2))), r"got \(2, 2, 2\)"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_interval([1.0], confidence=95), "between 0 and 1, got 95"),
        (lambda: curve_intervals([1.0, 2.0]), r"\[runs, points\]"),
        (lambda: compare_paired([1.0], [1.0, 2.0]), r"got \(1,\) and \(2,\)"),
        (lambda: compare_paired([], []), "two equal rows"),
        (lambda: area_under_curve([0], [1]), "at least two points, got 1"),
        (lambda: area_under_curve([0, 1], [1]), "as many values as frames"),
        (lambda: area_under_curve([0, 5, 5], [1, 1, 1]), "frames must rise"),
        (lambda: steps_to_threshold([5, 0], [1, 1], 1), "frames must rise"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
