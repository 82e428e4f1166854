"""What many runs say together: interquartile means with bootstrap intervals, paired comparisons, areas, thresholds.

The reliable evaluation of Agarwal et al. 2021 (arXiv:2108.13264). Letters: R runs (seeds), K tasks, P points of a
curve.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fulmen.config import UserError

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A statistic of runs and the ends of its confidence interval, which are nan where there is but one run."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """How runs compare with a baseline's runs of the same seeds."""

    difference: Estimate  # interquartile mean of the differences of the pairs
    relative: Estimate  # change of the interquartile mean over the baseline's size; the ratio less 1 for a positive one
    wins: int  # pairs that end above the baseline; a tie is none
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the learning curves of one method say, over its runs."""

    runs: int
    area: Estimate  # under the curve, in the units of the values
    final: Estimate  # the last value
    steps: Estimate  # frames to the threshold; inf where too few runs reach it
    reached: int  # runs that reach it
    versus: PairedComparison | None  # of the areas with the baseline's; None without one
    worse: int | None  # evaluations at which the paired difference lies below zero with all of its interval
    evaluations: int


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Mean of what is left without the lowest and the highest quarter, each of floor(n / 4) scores.

    Over all scores, or along `axis`. A nan makes it nan. Section 4.3 of the paper: a mean trimmed by 25 %.
    """
    scores = np.asarray(scores, float)
    if axis is None:
        scores, axis = scores.ravel(), 0
    count = scores.shape[axis]
    if not count:
        raise UserError("an interquartile mean needs at least one score, got none")
    ordered = np.moveaxis(np.sort(scores, axis=axis), axis, -1)
    mean = ordered[..., count // 4 : count - count // 4].mean(axis=-1)
    # Sorting puts nan last, where the trimming would hide it.
    return np.where(np.isnan(ordered[..., -1]), np.nan, mean)


def bootstrap_interval(
    scores: ArrayLike,
    *,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """`statistic` of scores [R] or [R, K], with its percentile interval from a stratified bootstrap.

    Runs are drawn with replacement, for each task apart (section 4.1 of the paper). `statistic` takes an array and an
    `axis` as NumPy's reductions do. The same seed gives the same interval.
    """
    scores = np.asarray(scores, float)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or not scores.size:
        raise UserError(f"scores must be [runs] or [runs, tasks] with at least one of each, got {scores.shape}")
    generator = _generator(resamples, confidence, seed)
    picks = generator.integers(len(scores), size=(resamples, *scores.shape))
    drawn = np.take_along_axis(scores[None], picks, axis=1).reshape(resamples, -1)
    return _estimate(statistic(scores.ravel(), axis=0), statistic(drawn, axis=1), len(scores), confidence)


def curve_intervals(
    values: ArrayLike, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile mean of the runs' values [R, P] at every point, and the ends of its interval, each [P]."""
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size:
        raise UserError(f"values must be [runs, points] with at least one of each, got {values.shape}")
    settings = {"resamples": resamples, "confidence": confidence, "seed": seed}
    # A point at a time: all at once would hold resamples x runs x points numbers.
    points = [bootstrap_interval(column, **settings) for column in values.T]
    return tuple(np.array(points).T)


def compare_paired(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedComparison:
    """Compare scores [R] with the baseline's [R], where element r of both is of the same seed.

    Pairs are drawn with replacement and stay together, so that what a seed does to both cancels. `relative` is nan or
    inf where the baseline's interquartile mean is zero.
    """
    scores, baseline = np.asarray(scores, float), np.asarray(baseline, float)
    if scores.ndim != 1 or scores.shape != baseline.shape or not scores.size:
        raise UserError(f"a paired comparison needs two equal rows of runs, got {scores.shape} and {baseline.shape}")
    picks = _generator(resamples, confidence, seed).integers(len(scores), size=(resamples, len(scores)))
    differences = scores - baseline
    drawn = interquartile_mean(differences[picks], axis=1)
    difference = _estimate(interquartile_mean(differences), drawn, len(scores), confidence)
    drawn = _relative(interquartile_mean(scores[picks], axis=1), interquartile_mean(baseline[picks], axis=1))
    value = _relative(interquartile_mean(scores), interquartile_mean(baseline))
    return PairedComparison(
        difference=difference,
        relative=_estimate(value, drawn, len(scores), confidence),
        wins=int((differences > 0).sum()),
        pairs=len(scores),
    )


def area_under_curve(frames: ArrayLike, values: ArrayLike) -> float:
    """Area under the points (frames [P], values [P]) by the trapezoid rule, over the frames from first to last.

    In the units of the values: a constant curve has the area of its constant.
    """
    frames, values = _curve(frames, values)
    if len(frames) < 2:
        raise UserError(f"the area under a curve needs at least two points, got {len(frames)}")
    heights = (values[1:] + values[:-1]) / 2
    return float((heights * np.diff(frames)).sum() / (frames[-1] - frames[0]))


def steps_to_threshold(frames: ArrayLike, values: ArrayLike, threshold: float) -> float:
    """Frames of the first point (frames [P], values [P]) whose value is at least `threshold`; inf if there is none."""
    frames, values = _curve(frames, values)
    reached = np.flatnonzero(values >= threshold)
    return float(frames[reached[0]]) if len(reached) else math.inf


def score_curves(
    frames: ArrayLike,
    values: ArrayLike,
    *,
    threshold: float,
    seeds: Sequence[int],
    baseline: Mapping[int, ArrayLike] | None = None,
) -> Score:
    """Score the curves (frames [P], values [R, P]) of runs with these R seeds.

    `baseline` has the values [P] of another method's run by seed: the seeds that both have are compared.
    """
    values = np.asarray(values, float)
    curves = dict(zip(seeds, values, strict=True))
    areas = {seed: area_under_curve(frames, run) for seed, run in curves.items()}
    steps = [steps_to_threshold(frames, run, threshold) for run in values]
    shared = [seed for seed in areas if seed in (baseline or {})]
    versus = worse = None
    if shared:
        versus = compare_paired([areas[s] for s in shared], [area_under_curve(frames, baseline[s]) for s in shared])
        differences = np.array([curves[s] - np.asarray(baseline[s], float) for s in shared])
        worse = int((curve_intervals(differences)[2] < 0).sum()) if len(shared) > 1 else None
    return Score(
        runs=len(values),
        area=bootstrap_interval(list(areas.values())),
        final=bootstrap_interval(values[:, -1]),
        steps=bootstrap_interval(steps),
        reached=int(np.isfinite(steps).sum()),
        versus=versus,
        worse=worse,
        evaluations=values.shape[1],
    )


def _curve(frames: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    frames, values = np.asarray(frames, float), np.asarray(values, float)
    if frames.ndim != 1 or frames.shape != values.shape:
        raise UserError(f"a curve needs as many values as frames, got {values.shape} and {frames.shape}")
    if not (np.diff(frames) > 0).all():
        raise UserError(f"a curve's frames must rise, got {frames.tolist()}")
    return frames, values


def _generator(resamples: int, confidence: float, seed: int) -> np.random.Generator:
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, got {confidence}")
    return np.random.default_rng(seed)


def _estimate(value: np.ndarray, drawn: np.ndarray, runs: int, confidence: float) -> Estimate:
    """The value with the percentile interval of its resamples [resamples]."""
    if runs < 2:
        return Estimate(float(value), math.nan, math.nan)
    tail = (1 - confidence) / 2
    # This method takes one of the numbers drawn: between a number and an infinite one there is no other.
    low, high = np.quantile(drawn, (tail, 1 - tail), method="inverted_cdf")
    return Estimate(float(value), float(low), float(high))


def _relative(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (scores - baseline) / np.abs(baseline)
