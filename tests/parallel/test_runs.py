"""Runs over ranks from recipe to checkpoint: going on over other ranks, what each rank tells, what is refused."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from tests.train.small import RECIPE, make_text

from fulmen.checkpoint import load_model
from fulmen.cli.tasks import load_task
from fulmen.config import load_recipe
from fulmen.parallel import SharedError
from fulmen.run import read_metrics
from fulmen.train import TrainRecipe, train

SETTINGS = (
    *("schedule.warmup=2", "schedule.decay=0", "schedule.batch_tokens=96", "schedule.micro_batch_tokens=48"),
    *(
        "train.capacity_factor=0",
        "train.balance=0",
        "train.evaluate_every=5",
        "train.snapshot_every=3",
        "train.routing_every=8",
    ),
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(make_text())
    return tmp_path


def run(folder: Path, name: str, steps: int, *settings: str, resume: bool = False):
    """Lines that were told, and the run's result."""
    os.chdir(folder)
    recipe = load_recipe("recipe.toml", TrainRecipe, (*SETTINGS, f"schedule.steps={steps}", *settings))
    lines: list[str] = []
    return lines, train(recipe, folder / name, resume=resume, report=lines.append)


def curve(folder, name):
    lines = read_metrics(folder / name / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line], [
        line["held_out_loss"] for line in lines if "held_out_loss" in line
    ]


def test_a_run_goes_on_over_other_ranks_and_on_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(folder, "whole", 16)
    run_ranks(2, run, folder, "parts", 5)
    meshes = (
        ("mesh.cp=2", "mesh.ep=2", "mesh.keep_weights=true"),
        (),
        ("mesh.pp=2", "mesh.cp=2"),
        ("mesh.tp=2", "mesh.etp=2"),
    )
    for ranks, steps, mesh in zip((4, 1, 4, 4), (8, 11, 14, 16), meshes, strict=True):
        arguments = (folder, "parts", steps, *mesh)
        told = run_ranks(ranks, resumed, *arguments) if ranks > 1 else [run(*arguments, resume=True)[0]]
        assert told[0]
        assert not any(told[1:])
    routed = [line for line in read_metrics(folder / "parts" / "metrics.jsonl") if "expert_load" in line]
    assert routed[0]["expert_wait"] > 0 == routed[0]["drop_rate"]
    # An evaluation came at each end as well.
    losses, held_out = curve(folder, "parts")
    expected, expected_held_out = curve(folder, "whole")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert held_out[-1] == pytest.approx(expected_held_out[-1], rel=1e-4)
    models = [load_model(folder / name / "checkpoint") for name in ("whole", "parts")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def resumed(*arguments):
    return run(*arguments, resume=True)[0]


def refused(folder, name, *settings):
    """The error of this rank, which reads the text of its own; it knows that all have it."""
    own = folder / f"of-{dist.get_rank()}"
    with pytest.raises(SharedError) as error:
        run(own if own.exists() else folder, name, 3, *settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("mesh.cp=3",), "the mesh pp 1 x dp 1 x cp 3 x tp 1 is 3 ranks, and there are 4: change mesh.pp, mesh.dp, "),
        (("mesh.ep=4", "mesh.etp=2"), "the mesh pp 1 x edp 1 x etp 2 x ep 4 is 8 ranks, and there are 4"),
        (("mesh.tp=4",), "num_heads must be a multiple of mesh.tp = 4, got 2: change either"),
        (("mesh.ep=4", "model.num_experts=6"), "6 experts over 4 ranks: mesh.ep must divide their number"),
        (("mesh.pp=4", "schedule.micro_batch_tokens=24"), "mesh.pp = 4 stages are more than the 2 layers: take fewer"),
        (
            ("mesh.pp=2", "schedule.micro_batch_tokens=96"),
            "1 rows in a step are too few for 2 replicas of mesh.pp = 2 ",
        ),
        (("data.sources=['none.txt']",), "no file matches 'none.txt'"),
    ],
)
def test_what_no_rank_can_do_is_refused_by_all(folder, settings, message):
    for told in run_ranks(4, refused, folder, "run", *settings):
        assert told.startswith(message)
    assert not (folder / "run").exists()


def test_a_rank_with_other_data_is_named(folder):
    for rank in range(3):
        (folder / f"of-{rank}").mkdir()
        (folder / f"of-{rank}" / "recipe.toml").write_text(RECIPE)
        (folder / f"of-{rank}" / "text.txt").write_text(make_text() + "more" * (rank == 2))
    for told in run_ranks(3, refused, folder, folder / "run"):
        assert told.startswith("rank 2 has another place in its data than rank 0")
    (folder / "of-1" / "text.txt").unlink()
    for told in run_ranks(3, refused, folder, folder / "run"):
        assert told.startswith("rank 1: no file matches 'text.txt'")
    assert not (folder / "run").exists()


def test_a_folder_in_use_is_refused_by_all(folder):
    run_ranks(2, run, folder, "run", 3)
    for told in run_ranks(2, refused, folder, "run"):
        assert told.endswith("already holds a run: add --resume to go on, or choose another --dir")


def start(folder, name, steps):
    """torchrun with four ranks, which it begins again if one is lost."""
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"schedule.steps={steps}", "mesh.cp=2")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--max-restarts=1"]
    command = [*launcher, "--standalone", "-m", "fulmen", "train", "recipe.toml", "--dir", name, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks_of(launcher):
    """The processes that torchrun has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def other_task(folder):
    """What a rank is told of a task whose losses are not shares of one."""
    os.chdir(folder)
    recipe, build = load_task("vision-4-preference")
    with pytest.raises(SharedError) as error:
        train(recipe, folder / "run", build=build)
    return str(error.value)


def test_tasks_of_one_rank_are_refused_on_two(folder):
    message = "the task preference trains on one rank: start it without torchrun"
    assert run_ranks(2, other_task, folder) == [message] * 2
    assert not (folder / "run").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes as Linux shows them")
def test_a_lost_rank_costs_no_more_than_what_came_after_the_last_snapshot(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(folder, "whole", 40)
    launcher = start(folder, "killed", 40)
    metrics, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks_of(launcher)[2], signal.SIGKILL)
    told, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, told
    assert "restart 1: a rank was lost; going on from the last good snapshot in killed" in told
    assert re.search(r"fulmen: error: rank [013] has lost another in step \d+: ", told)
    assert "Traceback" not in told
    assert len(re.findall("checkpoint: killed", told)) == 1
    assert curve(folder, "killed")[0] == pytest.approx(curve(folder, "whole")[0], rel=1e-4)
