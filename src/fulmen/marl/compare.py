"""Many methods, many seeds: their runs in parallel processes, and the table of what they say together."""

import dataclasses
import difflib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fulmen.config import UserError, change_recipe, parse_override
from fulmen.marl import plots
from fulmen.marl.export import RunCurves, read_curves, write_csv, write_curves_csv, write_marl_eval
from fulmen.marl.parallel import Failure, Job, Outcome, Train, run_jobs
from fulmen.marl.statistics import (
    Estimate,
    Score,
    interquartile_mean,
    score_curves,
)
from fulmen.run import RunDirectory, write_atomic
from fulmen.run.files import lock_file
from fulmen.run.machine import describe_machine

WAYS = {"transfer": "acting with transfer", "own": "own policies only"}
"""The two ways of acting that are always reported apart, and their names."""

WIDTH = 130
"""Columns of a table in plain text."""

TRAINED = 0.95
"""Share of the way to the trained agents' return at which a newcomer counts as trained."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name for the table and the folder, and what it changes in a recipe, such as {"transfer.name": "pat"}."""

    name: str
    overrides: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise UserError(f"a method's name is a folder's too: letters, digits and _ . + -, got {self.name!r}")

    def recipe(self, base: Any, seed: int) -> Any:
        """The recipe `base` as this method runs it with `seed`. UserError for an override that does not fit it."""
        changes = {"run.seed": seed, **self.overrides}
        # The options of a recipe's transfer are those of the method that it names, and mean nothing to another.
        if changes.get("transfer.name", base.transfer.name) != base.transfer.name:
            changes = {"transfer.options": {}} | changes
        try:
            return change_recipe(base, changes)
        except UserError as error:
            raise UserError(f"method {self.name}: {error}") from None


def _method(name: str, transfer: str = "none", **learner: bool) -> Method:
    changes = {f"learner.{key}": value for key, value in learner.items()}
    return Method(name=name, overrides={"transfer.name": transfer} | changes)


METHODS = (
    _method("none"),
    _method("equal_start", equal_start=True),
    _method("shared_weights", shared_weights=True),
    _method("maddpg", central_critic=True),
    _method("uniform", "uniform"),
    _method("best_teacher", "best_teacher"),
    _method("shared_replay", shared_replay=True),
    _method("adhoc_visit", "adhoc_visit"),
    _method("adhoc_td", "adhoc_td"),
    _method("lectr", "lectr"),
    _method("pat", "pat"),
)
"""PAT and its rivals, all of them settings of one harness. A recipe's other settings hold for every one."""


def find_method(name: str) -> Method:
    """The standard method of that name. UserError, with a similar name, if there is none."""
    methods = {method.name: method for method in METHODS}
    if name not in methods:
        close = difflib.get_close_matches(name, methods, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown method {name!r}{hint} (known: {', '.join(methods)})")
    return methods[name]


def parse_variant(text: str) -> Method:
    """A method of one's own from `NAME KEY=VALUE ...`, each a key of the recipe, as `--set` takes it.

    Raises `UserError` for a name that cannot be one, or a word that is no override.
    """
    name, *overrides = shlex.split(text) or [""]
    return Method(name=name, overrides=dict(map(parse_override, overrides)))


def run_methods(
    recipe: Any,
    methods: Sequence[Method],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    workers: int | None = None,
    train: Train | None = None,
    file: TextIO | None = None,
) -> Outcome:
    """Train every method with every seed, each run in folder/METHOD/seed-K, by `run_jobs` in parallel processes.

    `train` is `fulmen.marl.run.train` or another that can be called and resumed like it.

    Raises `UserError` for methods or seeds that are none or double, a folder in which another comparison is at work,
    and as `run_jobs`.
    """
    jobs = _list_jobs(recipe, methods, seeds, folder)
    with _alone_in(folder):
        return run_jobs(jobs, train or _our_train(), workers=workers, file=file)


def _list_jobs(recipe: Any, methods: Sequence[Method], seeds: Sequence[int], folder: str | Path) -> list[Job]:
    """Seed by seed, so that what is done when the time is up can be compared."""
    for what, chosen in (("methods", [method.name for method in methods]), ("seeds", list(seeds))):
        if not chosen or len(set(chosen)) != len(chosen):
            raise UserError(f"a comparison needs at least one of its {what}, and each once, got {chosen}")
    return [
        Job(method=m.name, seed=seed, recipe=m.recipe(recipe, seed), path=Path(folder) / m.name / f"seed-{seed}")
        for seed in seeds
        for m in methods
    ]


def _our_train() -> Train:
    # Whoever brings a trainer needs nothing of ours.
    from fulmen.marl.run import train

    return train


@contextmanager
def _alone_in(folder: str | Path) -> Iterator[None]:
    """Hold a comparison's folder for this process. UserError if another one compares there, or it cannot be used."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Hidden: a method may be called `lock`, and the folder is no run's.
        lock = lock_file(folder / ".lock", wait=False)
    except BlockingIOError:
        raise UserError(f"another comparison is at work in {folder}: wait, stop it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot use {folder} as the folder of a comparison: {error.strerror}") from None
    with lock:
        yield


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table, in both ways of acting."""

    method: str
    transfer: Score
    own: Score


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table: rich prints it as it is, `str` gives plain text."""

    title: str
    baseline: str  # the method that others are compared with
    threshold: float  # of the frames to reach it
    frames: int  # of a run, up to its last evaluation
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...] = ()
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __rich__(self) -> Group:
        lines = [f"{failure.method}, seed {failure.seed} failed: {failure.error}" for failure in self.failures]
        notes = (
            "Interquartile means over seeds with 95 % bootstrap intervals. Area: mean return over the frames.",
            f"Against {self.baseline}: paired by seed, of the areas; bold where the interval leaves out zero. "
            "Worse at: evaluations at which the paired difference's interval lies below zero.",
            ", ".join(f"{key} {value}" for key, value in self.machine.items()),
        )
        return Group(
            *(self._table(way) for way in WAYS), *(Text(line, style="red") for line in lines), *map(Text, notes)
        )

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()

    def _table(self, way: str) -> Table:
        # Three digits of the largest area, and as many behind the point everywhere.
        largest = max((abs(getattr(row, way).area.value) for row in self.rows), default=0.0)
        digits = min(max(2 - math.floor(math.log10(largest)), 0), 6) if 0 < largest < math.inf else 2
        table = Table(
            title=f"{self.title}, {self.frames:,} frames: {WAYS[way]}",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
        )
        table.add_column("method")
        ahead = ("runs", "area under curve", f"against {self.baseline}", "", "wins", "worse at", "final return")
        for heading in (*ahead, f"frames to {self.threshold:,.{digits}f}"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(row.method, *_cells(getattr(row, way), digits))
        return table


def _cells(score: Score, digits: int) -> list[Text | str]:
    against, relative, wins, worse = "", "", "", ""
    if score.versus is not None:
        difference = score.versus.difference
        style = "bold green" if difference.low > 0 else "bold red" if difference.high < 0 else ""
        against = Text(_interval(difference, f"+,.{digits}f"), style=style)
        relative = f"{score.versus.relative.value:+.0%}" if math.isfinite(score.versus.relative.value) else ""
        wins = f"{score.versus.wins}/{score.versus.pairs}"
    if score.worse is not None:
        worse = f"{score.worse}/{score.evaluations}"
    steps = f"{score.steps.value:,.0f}" if math.isfinite(score.steps.value) else "never"
    if 0 < score.reached < score.runs:
        # Where too few runs get there, the interquartile mean is infinite.
        steps = f"{steps.replace('never', 'some')} ({score.reached}/{score.runs})"
    area, final = _interval(score.area, f",.{digits}f"), f"{score.final.value:,.{digits}f}"
    return [f"{score.runs}", area, against, relative, wins, worse, final, steps]


def _interval(estimate: Estimate, layout: str) -> str:
    value, low, high = (format(part, layout) for part in estimate)
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def summarise(
    runs: Mapping[str, Mapping[int, RunCurves]],
    *,
    title: str,
    baseline: str = "none",
    threshold: float | None = None,
    failures: Sequence[Failure] = (),
) -> Comparison:
    """Compare finished runs, by method and seed, with the `baseline`; without its runs, with the first method.

    `threshold` is a return, such as `trained_level` for newcomers; None takes the interquartile mean of the baseline's
    last own return, so that the frames to it say how much sooner others are where the baseline ends.

    Raises `UserError` for no runs, or runs evaluated at different frames.
    """
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    if not runs:
        raise UserError("there is no finished run to compare")
    baseline = baseline if baseline in runs else next(iter(runs))
    frames = next(iter(runs[baseline].values())).frames
    for name, seeds in runs.items():
        for seed, curves in seeds.items():
            if not np.array_equal(curves.frames, frames):
                raise UserError(f"{name}, seed {seed} was evaluated at other frames than {baseline}: train it anew")
    if threshold is None:
        threshold = _middle(curves.own[-1] for curves in runs[baseline].values())

    def score(name: str, way: str) -> Score:
        values = [getattr(curves, way) for curves in runs[name].values()]
        other = None if name == baseline else {seed: getattr(run, way) for seed, run in runs[baseline].items()}
        return score_curves(frames, values, threshold=threshold, seeds=list(runs[name]), baseline=other)

    rows = tuple(Row(method=name, **{way: score(name, way) for way in WAYS}) for name in runs)
    return Comparison(
        title=title,
        baseline=baseline,
        threshold=threshold,
        frames=int(frames[-1]),
        rows=rows,
        failures=tuple(failures),
        machine=describe_machine(),
    )


def trained_level(runs: Mapping[str, Mapping[int, RunCurves]]) -> float | None:
    """What newcomers are to reach: `TRAINED` of the way from their first own return to that of the agents they join.

    Interquartile means over all runs; None for runs without others.
    """
    curves = [run for seeds in runs.values() for run in seeds.values()]
    if not curves or any(run.others is None for run in curves):
        return None
    first, others = _middle(run.own[0] for run in curves), _middle(run.others[0] for run in curves)
    return first + TRAINED * (others - first)


def _middle(values: Iterable[float]) -> float:
    return float(interquartile_mean(list(values)))


def compare(
    recipe: Any,
    folder: str | Path,
    *,
    methods: Sequence[Method | str] = METHODS,
    seeds: int | Sequence[int] = 10,
    workers: int | None = None,
    train: Train | None = None,
    baseline: str = "none",
    threshold: float | None = None,
    file: TextIO | None = None,
) -> Comparison:
    """Train every method with every seed as `run_methods` does, then compare the runs that came to their end.

    `methods` are names of `METHODS` or methods of your own, `seeds` a list, or how many from 0 on. Leaves in `folder`
    the table (comparison.json and .csv), all evaluations (curves.csv, marl_eval.json) and plots. Of a recipe with
    newcomers the returns are theirs, and the threshold is the `trained_level`, if no other is given.

    Raises:
        UserError: as `run_methods` and `summarise`.
        KeyboardInterrupt: it was asked to stop; called again, it goes on.
    """
    folder, seeds = Path(folder), range(seeds) if isinstance(seeds, int) else seeds
    methods = [find_method(method) if isinstance(method, str) else method for method in methods]
    jobs = _list_jobs(recipe, methods, seeds, folder)
    newcomers = getattr(recipe.run, "newcomers", ())
    with _alone_in(folder):
        outcome = run_jobs(jobs, train or _our_train(), workers=workers, file=file)
        if outcome.stopped_by is not None:
            raise KeyboardInterrupt
        failures = outcome.failures
        if len(failures) == len(jobs):
            raise UserError(f"every run failed, {failures[0].method} with seed {failures[0].seed}: {failures[0].error}")
        runs = _read_runs(jobs, failures, newcomers)
        level = trained_level(runs)
        comparison = summarise(
            runs,
            title=f"{folder.name}, the newcomers" if newcomers else folder.name,
            baseline=baseline,
            threshold=level if threshold is None else threshold,
            failures=failures,
        )
        _save(comparison, runs, folder)
        if level is not None:
            _draw_newcomers(comparison, runs, folder / "plots")
    return comparison


def _read_runs(
    jobs: Sequence[Job], failures: Iterable[Failure], newcomers: Sequence[int]
) -> dict[str, dict[int, RunCurves]]:
    """The curves of all runs that did not fail, by method and seed; a method of failures alone has none."""
    failed = {(failure.method, failure.seed) for failure in failures}
    runs = {job.method: {} for job in jobs}
    for job in jobs:
        if (job.method, job.seed) not in failed:
            runs[job.method][job.seed] = read_curves(RunDirectory(job.path).metrics, newcomers)
    return runs


def _save(comparison: Comparison, runs: Mapping[str, Mapping[int, RunCurves]], folder: Path) -> None:
    write_atomic(folder / "comparison.json", json.dumps(_plain(comparison), indent=2, allow_nan=False) + "\n")
    write_csv(folder / "comparison.csv", _csv_rows(comparison))
    write_curves_csv(folder / "curves.csv", runs)
    # marl-eval takes the same seeds of all methods, and no method without any.
    begun = {name: seeds for name, seeds in runs.items() if seeds}
    shared = set.intersection(*map(set, begun.values()))
    if shared:
        even = {name: {seed: seeds[seed] for seed in sorted(shared)} for name, seeds in begun.items()}
        write_marl_eval(folder / "marl_eval.json", even, environment="fulmen", task=comparison.title)
    _draw(comparison, begun, folder / "plots")


def _draw(comparison: Comparison, runs: Mapping[str, Mapping[int, RunCurves]], folder: Path) -> None:
    def series(way: str) -> dict[str, plots.Series]:
        curves = {name: list(seeds.values()) for name, seeds in runs.items()}
        return {name: (own[0].frames, [getattr(run, way) for run in own]) for name, own in curves.items()}

    title = comparison.title
    look = {"highlight": "pat", "baseline": comparison.baseline}
    returns = {name: series(way) for way, name in WAYS.items()}
    plots.plot_returns(folder / "returns.png", returns, title=f"{title}: return", **look)
    areas = {name: {row.method: getattr(row, way).area for row in comparison.rows} for way, name in WAYS.items()}
    plots.plot_areas(folder / "areas.png", areas, title=f"{title}: area under the learning curve", **look)
    shares = {name: share for name, share in series("student_share").items() if np.nansum(share[1]) > 0}
    if shares:
        path = folder / "student_share.png"
        plots.plot_student_share(path, shares, title=f"{title}: student share", highlight="pat")
    for name, seeds in runs.items():
        _draw_attention(folder, f"{title}, {name}: attention", name, list(seeds.values()))


def _draw_newcomers(comparison: Comparison, runs: Mapping[str, Mapping[int, RunCurves]], folder: Path) -> None:
    """A picture for each method: how soon the newcomer is trained, beside the baseline, which is alone."""
    series = {
        name: (next(iter(seeds.values())).frames, [run.own for run in seeds.values()])
        for name, seeds in runs.items()
        if seeds
    }
    alone = series.pop(comparison.baseline, None)
    for name, team in series.items() if alone else ():
        plots.plot_newcomer(
            folder / f"newcomer_{name}.png",
            team,
            alone,
            trained=comparison.threshold,
            title=f"{comparison.title}: {name} beside {comparison.baseline}",
        )


def _draw_attention(folder: Path, title: str, name: str, runs: Sequence[RunCurves]) -> None:
    """The mean over the runs, at the evaluations before which all had attention to report."""
    attentions = [curves.attention for curves in runs if curves.attention is not None]
    if not attentions:
        return
    weights = np.mean(attentions, axis=0)
    known = np.isfinite(weights).all(axis=(1, 2))
    if not known.any():
        return
    frames, weights = runs[0].frames[known], weights[known]
    plots.plot_attention(folder / f"attention_{name}.png", weights[-1], title=f"{title} at the end")
    plots.plot_attention_course(folder / f"attention_{name}_course.png", frames, weights, title=f"{title} over time")


def _plain(value: Any) -> Any:
    """What JSON can hold; it has neither nan nor inf."""
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


def _csv_rows(comparison: Comparison) -> list[tuple]:
    estimates = ("area", "final", "steps", "difference", "relative")
    ends = [f"{name}{end}" for name in estimates for end in ("", "_low", "_high")]
    rows = [("method", "acting", "runs", "reached", "wins", "pairs", *ends)]
    nothing = Estimate(math.nan, math.nan, math.nan)
    for row in comparison.rows:
        for way in WAYS:
            score = getattr(row, way)
            pairs = score.versus
            compared = (nothing, nothing) if pairs is None else (pairs.difference, pairs.relative)
            counts = (score.runs, score.reached, *(("", "") if pairs is None else (pairs.wins, pairs.pairs)))
            parts = (part for estimate in (score.area, score.final, score.steps, *compared) for part in estimate)
            rows.append((row.method, way, *counts, *parts))
    return rows
