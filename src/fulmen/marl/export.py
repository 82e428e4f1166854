"""The evaluations of runs: read from their metrics, written as marl-eval's JSON and as CSV.

Letters: P evaluations of a run.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulmen.config import UserError
from fulmen.run import read_metrics, write_atomic


@dataclass(frozen=True, kw_only=True, eq=False)
class RunCurves:
    """What the evaluations of one run measured, in the order of their frames; each array is [P]."""

    frames: np.ndarray
    own: np.ndarray  # mean return of the team acting by its own policies only
    transfer: np.ndarray  # the same acting with transfer; like `own` where there is none
    student_share: np.ndarray  # of the actions since the evaluation before, how many were others' advice
    # [P, N, N] mean attention over the same time; None where there are no teachers.
    attention: np.ndarray | None = None
    others: np.ndarray | None = None  # mean own return of the agents that `own` leaves out; None where it has all


def read_curves(metrics: str | Path, agents: Sequence[int] = ()) -> RunCurves:
    """Read the evaluations of a run from its `metrics.jsonl`: the lines with an `own_return`.

    Such a line has `frames` too and, where the method has transfer, `pat_return`. `student_share` and `attention` may
    stand there or in lines of their own: an evaluation has the mean of those since the one before, nan for none. A
    list, such as a return for each agent, counts as its mean. With `agents`, returns are the mean of theirs alone, from
    `own_returns` and `pat_returns`.

    Raises `UserError` for an unreadable file or one without evaluations.
    """
    lines, shares, attentions, since = [], [], [], []
    for line in read_metrics(metrics):
        since.append(line)
        if "own_return" in line:
            lines.append(line)
            shares.append(_mean([np.mean(other["student_share"]) for other in since if "student_share" in other]))
            attentions.append(_mean([other["attention"] for other in since if "attention" in other]))
            since = []
    if not lines:
        raise UserError(f"{metrics} holds no evaluation (a line with own_return): let the run get to its first one")

    def column(key: str, otherwise: str) -> np.ndarray:
        return np.array([np.mean(line.get(key, line.get(otherwise))) for line in lines], float)

    chosen, others = list(agents), None
    if chosen:
        own, transfer = (np.array([line[f"{way}_returns"] for line in lines], float) for way in ("own", "pat"))
        left = np.delete(own, chosen, axis=1)
        own, transfer, others = own[:, chosen].mean(1), transfer[:, chosen].mean(1), left.mean(1) if left.size else None
    else:
        own, transfer = column("own_return", "own_return"), column("pat_return", "own_return")
    return RunCurves(
        frames=column("frames", "step"),
        own=own,
        transfer=transfer,
        student_share=np.array(shares, float),
        attention=_stack(attentions),
        others=others,
    )


def marl_eval_data(runs: Mapping[str, Mapping[int, RunCurves]], *, environment: str, task: str) -> dict:
    """Runs by method and seed in marl-eval's format, with the metrics `return` (acting with transfer) and `own_return`:

        {"particles": {"navigation": {"pat": {"seed_0": {
            "step_1": {"step_count": 4800, "return": [1.5], "own_return": [1.2]}, ...,
            "absolute_metrics": {"return": [3.1], "own_return": [2.8]}}}}}}

    Gorsane et al. 2022 (arXiv:2209.10485), section 4. A run has one number for a metric and evaluation: the mean over
    the episodes. The absolute metrics are those of the run's best evaluation by `return`; unlike the paper's, they are
    not measured anew over ten times the episodes. Names become lower case, as marl-eval makes them.

    Raises `UserError` if methods differ in seeds, or runs in the frames of their evaluations: marl-eval takes neither.
    """
    _check_even(runs)
    methods = {
        name.lower(): {f"seed_{seed}": _marl_eval_run(curves) for seed, curves in sorted(seeds.items())}
        for name, seeds in runs.items()
    }
    return {environment.lower(): {task.lower(): methods}}


def write_marl_eval(
    path: str | Path, runs: Mapping[str, Mapping[int, RunCurves]], *, environment: str, task: str
) -> None:
    """Write `marl_eval_data` as JSON, in one step."""
    write_atomic(path, json.dumps(marl_eval_data(runs, environment=environment, task=task), indent=1) + "\n")


def write_curves_csv(path: str | Path, runs: Mapping[str, Mapping[int, RunCurves]]) -> None:
    """Write all evaluations as CSV, a line for each, in one step; what was not measured is empty."""
    rows = [("method", "seed", "frames", "own_return", "transfer_return", "student_share")]
    for method, seeds in runs.items():
        for seed, curves in seeds.items():
            columns = (curves.frames.astype(int), curves.own, curves.transfer, curves.student_share)
            rows += [(method, seed, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    write_csv(path, rows)


def write_csv(path: str | Path, rows: list[tuple]) -> None:
    """Write rows, the first of which names the columns, in one step; nan becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["" if isinstance(value, float) and np.isnan(value) else value for value in row] for row in rows
    )
    write_atomic(path, text.getvalue())


def _mean(values: list) -> np.ndarray:
    """The mean of equal arrays; nan for none."""
    return np.mean(np.array(values, float), axis=0) if values else np.array(np.nan)


def _stack(attentions: list[np.ndarray]) -> np.ndarray | None:
    """[P, N, N], where an evaluation without attention has nan; None if all are."""
    shape = next((attention.shape for attention in attentions if attention.ndim), None)
    return None if shape is None else np.stack([np.broadcast_to(attention, shape) for attention in attentions])


def _check_even(runs: Mapping[str, Mapping[int, RunCurves]]) -> None:
    curves = [(f"{name}, seed {seed}", run) for name, seeds in runs.items() for seed, run in seeds.items()]
    if not curves:
        raise UserError("marl-eval needs at least one run, got none")
    for name, seeds in runs.items():
        if set(seeds) != set(next(iter(runs.values()))):
            raise UserError(f"marl-eval needs the same seeds of every method, {name} has {sorted(seeds)}")
        if "," in name:
            raise UserError(f"marl-eval allows no comma in a method's name, got {name!r}")
    first, reference = curves[0]
    for name, run in curves:
        if not np.array_equal(run.frames, reference.frames):
            raise UserError(f"marl-eval needs runs evaluated at the same frames, {name} differs from {first}")


def _marl_eval_run(curves: RunCurves) -> dict[str, dict]:
    def metrics(index: int) -> dict[str, list[float | None]]:
        values = {"return": curves.transfer[index], "own_return": curves.own[index]}
        return {name: [float(value) if np.isfinite(value) else None] for name, value in values.items()}

    steps = {f"step_{i + 1}": {"step_count": int(x)} | metrics(i) for i, x in enumerate(curves.frames)}
    best = int(np.argmax(np.where(np.isnan(curves.transfer), -np.inf, curves.transfer)))
    return steps | {"absolute_metrics": metrics(best)}
