"""Methods as overrides, runs in parallel processes, and the table: with a trainer that takes no time."""

import csv
import dataclasses
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from fulmen.config import UserError
from fulmen.marl.compare import (
    METHODS,
    Method,
    _draw_attention,
    compare,
    find_method,
    parse_variant,
    run_methods,
    summarise,
    trained_level,
)
from fulmen.marl.export import RunCurves
from fulmen.marl.parallel import FINISHED, Failure, Job, _count_workers
from fulmen.run import RunDirectory

# New processes import the trainer by its name, so it is a module of its own.
TRAINER = """
import json, os, signal, time
from dataclasses import dataclass, field
from types import SimpleNamespace
import torch
from fulmen.config import UserError
from fulmen.run import RunDirectory, StopRequest

@dataclass(frozen=True, kw_only=True)
class Transfer:
    name: str = "pat"
    options: dict = field(default_factory=dict)

@dataclass(frozen=True, kw_only=True)
class Learner:
    equal_start: bool = False
    size: int = 1
    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0
    frames: int = 200
    threads: int = 1
    newcomers: tuple[int, ...] = ()

@dataclass(frozen=True, kw_only=True)
class Recipe:
    transfer: Transfer = field(default_factory=Transfer)
    learner: Learner = field(default_factory=Learner)
    run: Run = field(default_factory=Run)

def train(recipe, path, *, resume=False):
    assert resume
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "starts", "a") as file:
        file.write(f"{torch.get_num_threads()}\\n")
    name, seed = recipe.transfer.name, recipe.run.seed
    print("hello from", name)
    if name == "user" and seed == 1:
        raise UserError("the world\\nis not enough")
    if name == "bug":
        raise RuntimeError("boom")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    stopped_by = None
    if name == "slow":
        with RunDirectory(path), StopRequest() as stop:
            (path / "waiting").touch()
            while not stop.requested and not (path / "go").exists():
                time.sleep(0.01)
        stopped_by = stop.requested
    if name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with RunDirectory(path):
            (path / "waiting").touch()
            time.sleep(60)
    gain = {"none": 1.0, "pat": 2.0}.get(name, 0.5)
    with open(path / "metrics.jsonl", "w") as file:
        for frames in (0, 100, 200):
            line = {"step": frames, "frames": frames, "own_return": frames / 100 + seed}
            line |= {"own_returns": [frames / 100 + seed, 9.0], "pat_returns": [frames / 50 + seed, 9.0]}
            if name != "none":
                line |= {"pat_return": gain * frames / 100 + seed, "student_share": [0.5, 0.25]}
                line["attention"] = [[0, 0.4, 0.6], [1, 0, 0], [0.5, 0.5, 0]]
            file.write(json.dumps(line) + "\\n")
    return SimpleNamespace(stopped_by=stopped_by)

def compare_slow(folder):
    from fulmen.marl.compare import Method, run_methods
    slow = Method(name="slow", overrides={"transfer.name": "slow"})
    run_methods(Recipe(), [slow], [0], folder, workers=1, train=train)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    (tmp_path / "fake_trainer.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_trainer", raising=False)
    import fake_trainer

    return fake_trainer


def method(name):
    return Method(name=name, overrides={"transfer.name": name})


def starts(path):
    return len((path / "starts").read_text().splitlines())


def test_the_standard_methods_are_settings_of_the_real_recipe():
    recipes = pytest.importorskip("fulmen.marl.recipe")
    base = recipes.MarlRecipe(transfer=recipes.TransferSection(name="pat", options={"epsilon": 0.5}))
    named = {method.name: method.recipe(base, 7) for method in METHODS}
    assert all(recipe.run.seed == 7 for recipe in named.values())
    assert named["pat"].transfer == base.transfer
    assert named["uniform"].transfer == recipes.TransferSection(name="uniform")
    flags = {"equal_start": "equal_start", "shared_weights": "shared_weights", "shared_replay": "shared_replay"}
    for name, flag in (flags | {"maddpg": "central_critic"}).items():
        assert named[name].transfer.name == "none"
        assert getattr(named[name].learner, flag) is True
        assert getattr(named["none"].learner, flag) is False
    assert len({str(recipe) for recipe in named.values()}) == 11


def test_an_override_changes_one_key_deep_in_a_copy(trainer):
    base = trainer.Recipe(transfer=trainer.Transfer(options={"a": {"b": 1, "c": 2}}))
    changed = Method(name="x", overrides={"transfer.options.a.b": 3, "learner.size": 4}).recipe(base, 5)
    assert changed.transfer.options == {"a": {"b": 3, "c": 2}}
    assert (changed.learner.size, changed.run.seed) == (4, 5)
    assert (base.transfer.options["a"]["b"], base.learner.size) == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learner.sise": 2}, "method x: unknown key learner.sise; did you mean learner.size?"),
        ({"learner.size.deep": 2}, "method x: override of 'learner.size.deep': learner.size is a value, not a section"),
        ({"learner.size": 0}, "method x: learner: size must be at least 1, got 0"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(trainer, overrides, message):
    with pytest.raises(UserError, match=message):
        Method(name="x", overrides=overrides).recipe(trainer.Recipe(), 0)


def test_a_variant_is_a_name_and_keys(trainer):
    variant = parse_variant("big learner.size=3 transfer.name='other'")
    assert variant.name == "big"
    recipe = variant.recipe(trainer.Recipe(transfer=trainer.Transfer(options={"a": 1})), 5)
    assert (recipe.learner.size, recipe.transfer.name, recipe.transfer.options) == (3, "other", {})
    for text, message in (("", "a method's name"), ("big size", "override 'size' must read section.key=value")):
        with pytest.raises(UserError, match=message):
            parse_variant(text)


def test_names_are_checked():
    assert find_method("lectr").name == "lectr"
    with pytest.raises(UserError, match="unknown method 'unifrom'; did you mean uniform"):
        find_method("unifrom")
    with pytest.raises(UserError, match=r"got '\.\./x'"):
        Method(name="../x", overrides={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0]), "at least one of its methods"),
        ((["pat", "pat"], [0]), "each once"),
        ((["pat"], []), "at least one of its seeds"),
        ((["pat"], [1, 1]), "each once"),
    ],
)
def test_nothing_or_twice_the_same_is_no_comparison(trainer, tmp_path, arguments, message):
    names, seeds = arguments
    with pytest.raises(UserError, match=message):
        run_methods(trainer.Recipe(), [method(name) for name in names], seeds, tmp_path, train=trainer.train)
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        run_methods(trainer.Recipe(), [method("pat")], [0], tmp_path, train=trainer.train, workers=0)


def test_runs_that_fail_are_reported_and_lose_nobody_else(trainer, tmp_path):
    folder, out = tmp_path / "runs", io.StringIO()
    methods = [method(name) for name in ("none", "user", "bug", "killed")]
    outcome = run_methods(trainer.Recipe(), methods, [0, 1], folder, train=trainer.train, workers=4, file=out)
    errors = {(failure.method, failure.seed): failure.error for failure in outcome.failures}
    assert errors == {
        ("user", 1): "the world is not enough",
        **{("bug", seed): "RuntimeError: boom" for seed in (0, 1)},
        **{("killed", seed): "killed by SIGKILL" for seed in (0, 1)},
    }
    assert outcome.stopped_by is None
    done = [folder / "none" / "seed-0", folder / "none" / "seed-1", folder / "user" / "seed-0"]
    assert sorted(path.parent for path in folder.rglob(FINISHED)) == done
    # One thread each, and what it writes in a file of its own.
    assert (done[0] / "starts").read_text() == "1\n"
    assert "hello from none" in (folder / "none" / "seed-0.log").read_text()
    assert 'raise RuntimeError("boom")' in (folder / "bug" / "seed-0.log").read_text()
    assert "user, seed 1 failed: the world is not enough" in out.getvalue()
    assert "600/1600" in out.getvalue().splitlines()[-1]
    assert "runs 3/8" in out.getvalue().splitlines()[-1]


def test_finished_runs_stay_and_others_go_on(trainer, tmp_path):
    folder = tmp_path / "runs"

    def run(name, recipe=None):
        recipe = recipe or trainer.Recipe()
        return run_methods(recipe, [method(name)], [0], folder, train=trainer.train, workers=1, file=io.StringIO())

    run("none"), run("none"), run("bug"), run("bug")
    assert starts(folder / "none" / "seed-0") == 1
    assert starts(folder / "bug" / "seed-0") == 2
    with pytest.raises(UserError, match="finished run of another recipe"):
        run("none", trainer.Recipe(run=trainer.Run(frames=300)))
    # A key that recipes had not yet then is no other recipe.
    mark = folder / "none" / "seed-0" / FINISHED
    mark.write_text(mark.read_text().replace("size = 1\n", ""))
    run("none")
    assert starts(folder / "none" / "seed-0") == 1
    for text in ("size = 1\n", "torn"):
        mark.write_text(text)
        with pytest.raises(UserError, match="finished run of another recipe"):
            run("none")


def test_as_many_workers_as_the_cores_can_feed(trainer, tmp_path, monkeypatch):
    def job(run):
        return Job(method="none", seed=0, recipe=SimpleNamespace(run=run), path=tmp_path)

    monkeypatch.setattr("fulmen.marl.parallel._count_cores", lambda: 8)
    one, three, twenty = (job(trainer.Run(threads=threads)) for threads in (1, 3, 20))
    assert [_count_workers(jobs) for jobs in ([one], [one, three], [twenty], [])] == [8, 2, 1, 8]
    assert job(SimpleNamespace(frames=1)).threads == 1

    asked = []
    monkeypatch.setattr("fulmen.marl.parallel._count_workers", lambda jobs: asked.extend(jobs) or 1)
    recipe = trainer.Recipe(run=trainer.Run(threads=2))
    run_methods(recipe, [method("none")], [0], tmp_path, train=trainer.train, file=io.StringIO())
    assert [job.threads for job in asked] == [2]
    assert (tmp_path / "none" / "seed-0" / "starts").read_text() == "2\n"


def test_a_second_comparison_in_the_same_folder_touches_nothing(trainer, tmp_path):
    folder = tmp_path / "runs"
    run = folder / "slow" / "seed-0"
    process = multiprocessing.get_context("forkserver").Process(target=trainer.compare_slow, args=(folder,))
    process.start()
    try:
        wait_for(lambda: (run / "waiting").exists() or not process.is_alive())
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert b"hello from slow" in before[folder / "slow" / "seed-0.log"]
        for name in ("slow", "none"):
            with pytest.raises(UserError, match=rf"another comparison is at work in {folder}: wait, stop it, or"):
                compare(
                    trainer.Recipe(), folder, methods=[method(name)], seeds=1, train=trainer.train, file=io.StringIO()
                )
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    finally:
        run.mkdir(parents=True, exist_ok=True)
        (run / "go").touch()
        process.join()
    assert (run / FINISHED).exists()
    assert not RunDirectory(folder).recipe.exists()


def test_a_comparison_holds_its_folder_until_all_is_written(trainer, tmp_path, monkeypatch):
    def again(*_):
        run_methods(trainer.Recipe(), [method("none")], [0], tmp_path, train=trainer.train, file=io.StringIO())

    monkeypatch.setattr("fulmen.marl.compare._save", again)
    with pytest.raises(UserError, match="another comparison is at work in"):
        compare(trainer.Recipe(), tmp_path, methods=[method("none")], seeds=1, train=trainer.train, file=io.StringIO())
    again()


def test_folders_that_cannot_be_made_are_one_line(trainer, tmp_path):
    (tmp_path / "none").touch()
    for folder, message in (
        (tmp_path / "none", r"cannot use .*none as the folder of a comparison: File exists"),
        (tmp_path, r"cannot make the folder .*none: File exists"),
    ):
        with pytest.raises(UserError, match=message):
            run_methods(trainer.Recipe(), [method("none")], [0], folder, train=trainer.train, file=io.StringIO())


def test_a_full_disk_leaves_no_half_table(trainer, tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(28, "No space left on device")

    def again():
        return compare(
            trainer.Recipe(), tmp_path, methods=["none", "pat"], seeds=1, train=trainer.train, file=io.StringIO()
        )

    with monkeypatch.context() as patch:
        # The runs are other processes, and have room.
        patch.setattr("fulmen.run.files.sync", refuse)
        with pytest.raises(UserError, match=r"cannot write .*comparison\.json: No space left on device"):
            again()
    assert not list(tmp_path.glob("*comparison*"))
    assert [row.method for row in again().rows] == ["none", "pat"]
    assert starts(tmp_path / "none" / "seed-0") == 1
    assert (tmp_path / "comparison.json").exists()


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_free(path):
    """Whether the process that held a run's folder has ended."""
    try:
        with RunDirectory(path):
            return True
    except UserError:
        return False


def test_ctrl_c_lets_the_running_ones_end_and_starts_no_more(trainer, tmp_path):
    runs = tmp_path / "slow"

    def interrupt():
        wait_for((runs / "seed-0" / "waiting").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        compare(
            trainer.Recipe(),
            tmp_path,
            methods=[method("slow")],
            seeds=2,
            workers=1,
            train=trainer.train,
            file=io.StringIO(),
        )
    # It came to its end, by the trainer's own way to stop, but is not marked as finished.
    assert is_free(runs / "seed-0")
    assert (runs / "seed-0" / "metrics.jsonl").exists()
    assert not list(runs.rglob(FINISHED))
    assert not (runs / "seed-1").exists()


def test_a_second_ctrl_c_does_not_wait_for_a_run_that_goes_on(trainer, tmp_path):
    run = tmp_path / "stubborn" / "seed-0"

    def interrupt():
        wait_for((run / "waiting").exists)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_methods(
            trainer.Recipe(), [method("stubborn")], [0], tmp_path, workers=1, train=trainer.train, file=io.StringIO()
        )
    assert time.monotonic() - started < 40
    assert is_free(run)


def test_no_worker_outlives_a_comparison_that_is_killed(trainer, tmp_path):
    run = tmp_path / "slow" / "seed-0"
    process = multiprocessing.get_context("forkserver").Process(target=trainer.compare_slow, args=(tmp_path,))
    process.start()
    try:
        wait_for(lambda: (run / "waiting").exists() or not process.is_alive())
        assert not is_free(run)
        process.kill()
        wait_for(lambda: is_free(run))
    finally:
        process.kill()
        process.join()
        # Whatever goes wrong, the worker does not wait for ever.
        run.mkdir(parents=True, exist_ok=True)
        (run / "go").touch()
    assert not (run / FINISHED).exists()


def curves(gain, seed, own_gain=None, frames=(0, 100, 200)):
    frames = np.array(frames, float)
    own = gain if own_gain is None else own_gain
    share = np.full(len(frames), np.nan)
    return RunCurves(frames=frames, own=own * frames + seed, transfer=gain * frames + seed, student_share=share)


def made_up_runs():
    gains = {"none": (0.01, 0.01), "pat": (0.02, 0.015), "worse": (0.0, 0.01)}
    return {name: {s: curves(gain, s / 10, own) for s in range(10)} for name, (gain, own) in gains.items()}


def test_the_table_says_what_the_runs_say():
    table = summarise(made_up_runs(), title="test")
    none, pat, worse = table.rows
    assert (table.baseline, table.frames) == ("none", 200)
    assert table.threshold == pytest.approx(2.45)
    assert none.transfer.versus is None
    # Areas are 1 + 0.45 and 2 + 0.45; what a seed adds to both cancels in the difference.
    assert none.transfer.area.value == pytest.approx(1.45)
    assert pat.transfer.area.value == pytest.approx(2.45)
    assert pat.transfer.versus.difference == pytest.approx((1, 1, 1))
    assert pat.own.versus.difference.value == pytest.approx(0.5)
    assert pat.transfer.versus.relative.value == pytest.approx(1 / 1.45)
    assert (pat.transfer.versus.wins, worse.transfer.versus.wins) == (10, 0)
    assert pat.transfer.final.value == pytest.approx(4.45)
    assert none.transfer.reached == 5
    assert pat.transfer.steps.value < none.transfer.steps.value
    assert worse.transfer.steps.value == math.inf


def test_the_table_counts_evaluations_that_are_surely_worse():
    runs = made_up_runs()
    # Behind at 100 frames in every run, ahead at 200, and as good as the baseline at 0.
    for seed, run in runs["pat"].items():
        runs["pat"][seed] = dataclasses.replace(run, own=runs["none"][seed].own + np.array([0, -0.1, 9]))
    rows = summarise(runs, title="test").rows
    assert [(row.own.worse, row.own.evaluations) for row in rows] == [(None, 3), (1, 3), (0, 3)]
    assert rows[2].transfer.worse == 2
    assert summarise({name: {0: seeds[0]} for name, seeds in runs.items()}, title="").rows[1].own.worse is None


def test_a_newcomer_is_trained_at_nineteen_twentieths_of_the_way():
    def run(first, others):
        return dataclasses.replace(curves(1, first), others=np.full(3, others))

    runs = {"none": {0: run(1, 10), 1: run(3, 12)}, "pat": {0: run(1, 10), 1: run(3, 12)}}
    assert trained_level(runs) == pytest.approx(2 + 0.95 * (11 - 2))
    assert trained_level(made_up_runs()) is None
    assert trained_level({"none": {}}) is None


def test_the_table_is_printed():
    failure = Failure(method="pat", seed=3, error="boom", log=Path("log"))
    table = summarise(made_up_runs(), title="sparse", failures=[failure])
    text = str(table)
    assert "sparse, 200 frames: acting with transfer" in text
    assert "sparse, 200 frames: own policies only" in text
    line = next(line.split() for line in text.splitlines() if line.strip().startswith("pat "))
    assert " ".join(line[:3]) == "pat 10 2.45"
    assert " ".join(line[5:]) == "+1.00 [+1.00, +1.00] +69% 10/10 0/3 4.45 150"
    # Half of these runs get there, and none of those.
    assert "some (5/10)" in text
    assert " never " in text
    assert "pat, seed 3 failed: boom" in text
    assert "torch" in text
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120)
    console.print(table)
    assert "\x1b[1;32m+1.00" in console.file.getvalue()
    assert "\x1b[1;31m-1.00" in console.file.getvalue()


def test_attention_that_not_all_runs_report_is_not_drawn(tmp_path):
    one, other = curves(1, 0), curves(1, 1)
    weights = np.full((3, 2, 2), 0.5)
    first, last = weights.copy(), weights.copy()
    first[1:], last[:2] = np.nan, np.nan
    for attention, files in ((None, 0), (first, 0), (weights, 2)):
        folder = tmp_path / f"{files}"
        runs = [dataclasses.replace(one, attention=attention), dataclasses.replace(other, attention=last)]
        _draw_attention(folder, "", "pat", runs if attention is not None else [one])
        assert len(list(folder.glob("*"))) == files


def test_only_seeds_of_both_are_paired():
    runs = made_up_runs()
    del runs["none"][4], runs["pat"][7]
    assert summarise(runs, title="").rows[1].own.versus.pairs == 8


def test_without_the_baseline_the_first_method_is_one():
    runs = made_up_runs()
    runs["none"] = {}
    table = summarise(runs, title="", threshold=3.0)
    assert (table.baseline, table.threshold) == ("pat", 3.0)
    assert [row.method for row in table.rows] == ["pat", "worse"]


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="no finished run"):
        summarise({"none": {}}, title="")
    runs = made_up_runs()
    runs["pat"][3] = curves(1, 3, frames=(0, 100))
    with pytest.raises(UserError, match="pat, seed 3 was evaluated at other frames than none"):
        summarise(runs, title="")


def test_a_comparison_from_recipe_to_files(trainer, tmp_path):
    folder = tmp_path / "sparse"
    methods = ["none", "pat", method("bug")]
    table = compare(
        trainer.Recipe(), folder, methods=methods, seeds=2, workers=4, train=trainer.train, file=io.StringIO()
    )
    assert [row.method for row in table.rows] == ["none", "pat"]
    assert [(failure.method, failure.seed) for failure in table.failures] == [("bug", 0), ("bug", 1)]
    assert table.rows[1].transfer.versus.difference.value == pytest.approx(1)
    saved = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert saved["rows"][1]["transfer"]["versus"]["difference"]["value"] == pytest.approx(1)
    assert saved["rows"][0]["own"]["versus"] is None
    assert saved["machine"]["torch"]
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [(row["method"], row["acting"]) for row in rows] == [
        (name, way) for name in ("none", "pat") for way in ("transfer", "own")
    ]
    assert (rows[0]["difference"], float(rows[2]["difference"]), rows[2]["wins"]) == ("", 1, "2")
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    runs = json.loads((folder / "marl_eval.json").read_text())["fulmen"]["sparse"]
    assert {name: list(seeds) for name, seeds in runs.items()} == {key: ["seed_0", "seed_1"] for key in ("none", "pat")}
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "areas.png",
        "attention_pat.png",
        "attention_pat_course.png",
        "returns.png",
        "student_share.png",
    ]


def test_the_returns_of_a_comparison_with_newcomers_are_theirs(trainer, tmp_path):
    recipe, folder = trainer.Recipe(run=trainer.Run(newcomers=(0,))), tmp_path / "joined"
    table = compare(recipe, folder, methods=["none", "pat"], seeds=2, train=trainer.train, file=io.StringIO())
    assert table.title == "joined, the newcomers"
    assert table.threshold == pytest.approx(0.5 + 0.95 * (9 - 0.5))
    assert table.rows[1].transfer.final.value == 4.5
    assert (folder / "plots" / "newcomer_pat.png").exists()
    assert not (folder / "plots" / "newcomer_none.png").exists()


def test_a_comparison_of_failures_says_why(trainer, tmp_path):
    with pytest.raises(UserError, match="every run failed, bug with seed 0: RuntimeError: boom"):
        compare(trainer.Recipe(), tmp_path, methods=[method("bug")], seeds=1, train=trainer.train, file=io.StringIO())
