"""Evaluations out of metrics and into other tools' formats."""

import csv
import json
import math

import numpy as np
import pytest

from fulmen.config import UserError
from fulmen.marl import export
from fulmen.marl.export import RunCurves, marl_eval_data, read_curves, write_curves_csv
from fulmen.run import MetricsLog, RunDirectory


def curves(transfer, *, own=None, frames=None):
    transfer = np.array(transfer, float)
    own = transfer - 1 if own is None else np.array(own, float)
    frames = np.arange(len(transfer)) * 100.0 if frames is None else np.array(frames, float)
    return RunCurves(frames=frames, own=own, transfer=transfer, student_share=np.full(len(transfer), np.nan))


def even_runs():
    return {name: {seed: curves([0, seed + 2, 1]) for seed in (3, 0)} for name in ("none", "PAT")}


def test_evaluations_are_read_from_metrics(tmp_path):
    with RunDirectory(tmp_path) as directory, MetricsLog(directory, resume_step=None) as log:
        log.log(0, frames=0, own_return=1.0, pat_return=2.0, student_share=0.25)
        log.log(5, frames=80, critic_loss=0.1)
        log.log(10, frames=160, own_return=[1.0, 3.0], pat_return=math.nan)
    read = read_curves(directory.metrics)
    np.testing.assert_array_equal(read.frames, [0, 160])
    np.testing.assert_array_equal(read.own, [1, 2])
    np.testing.assert_array_equal(read.transfer, [2, np.nan])
    np.testing.assert_array_equal(read.student_share, [0.25, np.nan])


def test_what_was_reported_between_evaluations_is_averaged(tmp_path):
    with RunDirectory(tmp_path) as directory, MetricsLog(directory, resume_step=None) as log:
        log.log(0, frames=0, own_return=0.0)
        log.log(10, frames=10, student_share=[0.0, 0.4], attention=[[0.0, 1.0], [0.5, 0.0]])
        log.log(20, frames=20, student_share=[0.6, 0.6], attention=[[0.0, 0.0], [0.5, 0.0]])
        log.log(20, frames=20, own_return=0.0)
        log.log(30, frames=30, student_share=[1.0, 1.0])
        log.log(30, frames=30, own_return=0.0)
    read = read_curves(directory.metrics)
    np.testing.assert_allclose(read.student_share, [np.nan, 0.4, 1.0])
    nothing = np.full((2, 2), np.nan)
    np.testing.assert_allclose(read.attention, [nothing, [[0, 0.5], [0.5, 0]], nothing])


def test_without_transfer_the_team_acts_by_its_own_policies(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 7, "own_return": 4}\n')
    read = read_curves(metrics)
    assert (read.frames, read.own, read.transfer) == (7, 4, 4)
    assert np.isnan(read.student_share)
    assert read.attention is None


def test_chosen_agents_have_curves_of_their_own(tmp_path):
    with RunDirectory(tmp_path) as directory, MetricsLog(directory, resume_step=None) as log:
        returns = {"own_returns": [1.0, 3.0, 8.0], "pat_returns": [2.0, 5.0, 9.0]}
        log.log(0, frames=0, own_return=4.0, pat_return=16 / 3, **returns)
    read = read_curves(directory.metrics, agents=(1, 2))
    assert (read.own, read.transfer, read.others) == (5.5, 7, 1)
    assert read_curves(directory.metrics).others is None
    assert read_curves(directory.metrics, agents=(0, 1, 2)).others is None


def test_a_run_without_evaluations_is_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 1}\n')
    with pytest.raises(UserError, match="no evaluation"):
        read_curves(metrics)


def check_marl_eval(data):
    """The structure that marl-eval's documentation asks for."""
    metrics = {"return", "own_return"}
    step_counts = []
    for tasks in data.values():
        for methods in tasks.values():
            assert len({tuple(runs) for runs in methods.values()}) == 1
            for runs in methods.values():
                for run in runs.values():
                    *steps, last = run
                    assert last == "absolute_metrics"
                    assert run[last].keys() == metrics
                    assert steps == [f"step_{k}" for k in range(1, len(steps) + 1)]
                    assert all(run[step].keys() == metrics | {"step_count"} for step in steps)
                    step_counts.append([run[step]["step_count"] for step in steps])
                    assert all(type(count) is int for count in step_counts[-1])
                    values = [run[step][name] for step in run for name in metrics]
                    assert all(isinstance(value, list) and len(value) == 1 for value in values)
    assert all(counts == step_counts[0] for counts in step_counts)


def test_marl_eval_structure(tmp_path):
    path = tmp_path / "marl_eval.json"
    export.write_marl_eval(path, even_runs(), environment="Particles", task="Navigation")
    data = json.loads(path.read_text())
    check_marl_eval(data)
    assert list(data) == ["particles"]
    assert list(data["particles"]["navigation"]) == ["none", "pat"]
    run = data["particles"]["navigation"]["pat"]["seed_3"]
    assert run["step_2"] == {"step_count": 100, "return": [5.0], "own_return": [4.0]}


def test_absolute_metrics_are_those_of_the_best_evaluation():
    data = marl_eval_data({"pat": {0: curves([0, 9, np.nan, 1], own=[8, 2, 7, 6])}}, environment="e", task="t")
    run = data["e"]["t"]["pat"]["seed_0"]
    assert run["absolute_metrics"] == {"return": [9.0], "own_return": [2.0]}
    # JSON has no nan.
    assert run["step_3"]["return"] == [None]
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.clear(), "at least one run"),
        (lambda runs: runs["none"].pop(3), "same seeds of every method"),
        (lambda runs: runs.update({"a,b": runs["none"]}), "no comma"),
        (lambda runs: runs["PAT"].update({3: curves([0, 1])}), "same frames, PAT, seed 3 differs from none, seed 3"),
    ],
)
def test_what_marl_eval_would_not_take_is_refused(change, message):
    runs = even_runs()
    change(runs)
    with pytest.raises(UserError, match=message):
        marl_eval_data(runs, environment="e", task="t")


def test_curves_as_csv(tmp_path):
    write_curves_csv(tmp_path / "curves.csv", {"pat": {4: curves([2, 3])}})
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert rows == [
        {
            "method": "pat",
            "seed": "4",
            "frames": frames,
            "own_return": own,
            "transfer_return": transfer,
            "student_share": "",
        }
        for frames, own, transfer in (("0", "1.0", "2.0"), ("100", "2.0", "3.0"))
    ]
