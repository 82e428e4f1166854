"""A team's run from recipe to checkpoint, in this process: what it leaves, how it is stopped, what it refuses."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fulmen.config import UserError, load_recipe
from fulmen.marl import MarlRecipe, PettingZooEnvironment, Team, build, load_team, train
from fulmen.marl.run import FIXED_KEYS, FIXED_SECTIONS, TRIAL_STEPS
from fulmen.run import MetricsLog, RunDirectory, SnapshotStore, read_metrics

RECIPE = """
[world]
name = "navigation"
num_worlds = 2
options = { agents = 3, max_steps = 5 }

[learner]
hidden = [8]
batch = 8

[team]
warmup = 8
capacity = 200

[run]
frames = 60
report_every = 10
evaluate_every = 20
episodes = 2
snapshot_every = 20
"""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """They take ten times as long as the run; tests of them ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("fulmen.marl.run.draw_curves", lambda *rest: ())
        monkeypatch.setattr("fulmen.marl.run.render_episode", lambda path: path)


@pytest.fixture
def pictures():
    return ["returns.png", "student-share.png", "attention.png", "attention-course.png", "episode.gif"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def small(folder):
    """small("run.frames=40", ...) gives the recipe above with some keys changed."""
    return lambda *overrides: load_recipe(folder / "recipe.toml", MarlRecipe, overrides)


@pytest.fixture
def at_frame(monkeypatch):
    """at_frame(30, function) calls the function just before the step that leads there."""

    def arrange(frame, function):
        real = Team.step

        def step(self):
            if self.frames + self.environment.num_worlds == frame:
                function(self)
            return real(self)

        monkeypatch.setattr(Team, "step", step)

    return arrange


def kill(number):
    return lambda team: os.kill(os.getpid(), number)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def without_rates(path):
    """The metrics of a run, less what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key != "frames_per_second"}
        for line in read_metrics(path / "metrics.jsonl")
    ]


def assert_same_run(one, other, frames):
    first, second = (SnapshotStore(path / "snapshots").load(frames) for path in (one, other))
    tensors = second.tensors()
    assert first.state == second.state
    assert {name for name, tensor in first.tensors().items() if not torch.equal(tensor, tensors[name])} == set()
    assert str(without_rates(one)) == str(without_rates(other))


def test_leaves_what_it_says(small, folder, pictures):
    lines = []
    result = train(small(), folder / "run", report=lines.append)
    assert (result.frames, result.checkpoint, result.stopped_by) == (60, folder / "run" / "checkpoint", None)
    assert lines[-1].startswith("team: 3 agents in 2 worlds on cpu")
    assert [path.relative_to(folder / "run" / "plots").as_posix() for path in result.pictures] == pictures
    assert [file for file in files(folder / "run") if "tfevents" not in file] == [
        *(f"checkpoint/{name}" for name in ("recipe.toml", "team.json", "team.safetensors")),
        "lock",
        "metrics.jsonl",
        *(f"plots/{name}" for name in sorted(pictures)),
        "recipe.toml",
        "snapshots/.lock",
        *(
            f"snapshots/step-{step:08d}/{name}"
            for step in (40, 60)
            for name in ("manifest.json", "state.json", "tensors.safetensors")
        ),
    ]
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert load_recipe(folder / "run" / "recipe.toml", MarlRecipe) == small()


def test_the_metrics_are_those_of_the_page(small, folder):
    result = train(small(), folder / "run")
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    reports = [line for line in metrics if "returns" in line]
    assert [line["frames"] for line in result.evaluations] == [0, 20, 40, 60]
    assert [line["frames"] for line in reports] == [10, 20, 30, 40, 50, 60]
    assert all(line["step"] == line["frames"] for line in metrics)
    for line in result.evaluations:
        assert line["own_return"] == pytest.approx(np.mean(line["own_returns"]))
        assert line["pat_return"] == pytest.approx(np.mean(line["pat_returns"]))
        assert len(line["own_returns"]) == len(line["pat_student_share"]) == 3
        assert np.shape(line["pat_attention"]) == (3, 3)
    last = reports[-1]
    assert np.shape(last["attention"]) == (3, 3)
    assert len(last["returns"]) == len(last["student_share"]) == len(last["critic_loss"]) == 3
    assert {"actor_loss", "attention_entropy", "gate_entropy", "frames_per_second", "episodes"} <= last.keys()


def test_without_transfer_both_ways_of_acting_are_one(small, folder, pictures):
    result = train(small("transfer.name=none"), folder / "run")
    assert all(line["own_return"] == line["pat_return"] for line in result.evaluations)
    assert [path.name for path in result.pictures] == [pictures[0], pictures[-1]]


def test_a_team_of_one_says_so_and_learns_alone(small, folder):
    lines = []
    result = train(small("world.options.agents=1"), folder / "run", report=lines.append)
    assert "is alone and has no teacher" in lines[0]
    assert result.frames == 60


def test_evaluating_and_reporting_change_nothing(small, folder):
    train(small(), folder / "often")
    train(small("run.evaluate_every=60", "run.report_every=60", "run.episodes=1"), folder / "seldom")
    one, other = (SnapshotStore(folder / name / "snapshots").load(60).tensors() for name in ("often", "seldom"))
    names = [name for name in one if name.startswith(("state.learner", "state.replay", "state.generator"))]
    assert len(names) > 5
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_step_and_resume_goes_on(small, folder, at_frame, number):
    train(small(), folder / "straight")
    # No multiple of snapshot_every: the signal itself makes it save.
    at_frame(46, kill(number))
    result = train(small(), folder / "run")
    assert (result.frames, result.checkpoint, result.stopped_by) == (46, None, number)
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [40, 46]
    assert train(small(), folder / "run", resume=True).checkpoint
    assert_same_run(folder / "straight", folder / "run", 60)


def test_kill_9_and_resume_is_the_run_that_was_never_killed(small, folder):
    """With a memory, whose states are part of what must come back."""
    settings = ("learner.memory.kind=lightning", "learner.memory.size=8")
    train(small(*settings), folder / "straight")
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from fulmen.config import load_recipe\n"
        "from fulmen.marl import MarlRecipe, Team, train\n"
        "torch.set_num_threads(1)\n"
        "real = Team.step\n"
        "def step(team):\n"
        "    if team.frames == 52:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(team)\n"
        "Team.step = step\n"
        "train(load_recipe('recipe.toml', MarlRecipe, sys.argv[1:]), Path('run'))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, *settings], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [20, 40]
    assert train(small(*settings), folder / "run", resume=True).frames == 60
    assert_same_run(folder / "straight", folder / "run", 60)


def test_metrics_are_on_the_disk_before_the_snapshot_that_keeps_them(small, folder, monkeypatch):
    done = []
    for owner, name in ((MetricsLog, "flush"), (SnapshotStore, "save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *rest, name=name, real=real: done.append(name) or real(*rest))
    train(small(), folder / "run")
    assert done == ["flush", "save"] * 3 + ["flush"]


def test_a_signal_in_the_last_step_stops_nothing(small, folder, at_frame):
    at_frame(60, kill(signal.SIGTERM))
    result = train(small(), folder / "run")
    assert result.checkpoint.exists()
    assert result.stopped_by is None


def test_resume_begins_goes_further_and_exports_again(small, folder):
    assert train(small(), folder / "run", resume=True).frames == 60
    shutil.rmtree(folder / "run" / "checkpoint")
    assert train(small(), folder / "run", resume=True).checkpoint.exists()
    assert train(small("run.frames=80", "run.episodes=3"), folder / "run", resume=True).frames == 80
    train(small("run.frames=80"), folder / "straight")
    assert_same_weights(folder / "run", folder / "straight")


def assert_same_weights(one, other):
    first, second = (load_team(path).learner.state_dict() for path in (one, other))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if torch.is_tensor(tensor))


def test_resume_passes_over_a_damaged_snapshot_and_says_so(small, folder, capsys):
    train(small(), folder / "run")
    (folder / "run" / "snapshots" / "step-00000060" / "tensors.safetensors").write_bytes(b"torn")
    train(small(), folder / "run", resume=True)
    assert "warning: the snapshot" in capsys.readouterr().out


@pytest.fixture
def finished(small, folder):
    train(small(), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.num_worlds=3", "world.num_worlds = 2, the recipe now says 3"),
        ("world.options.agents=4", "world.options = {'agents': 3, 'max_steps': 5}, the recipe now says"),
        ("learner.discount=0.9", "learner.discount = 0.95, the recipe now says 0.9"),
        ("transfer.name=none", "transfer.name = 'pat', the recipe now says 'none'"),
        ("team.warmup=10", "team.warmup = 8, the recipe now says 10"),
        ("run.seed=1", "run.seed = 0, the recipe now says 1"),
        ("run.frames=58", "is at frame 60, beyond run.frames = 58: ask for more frames"),
    ],
)
def test_resume_refuses_another_recipe(small, finished, override, message):
    with pytest.raises(UserError) as caught:
        train(small(override), finished, resume=True)
    assert message in str(caught.value)
    assert str(caught.value).endswith("or choose another --dir")
    assert load_recipe(finished / "recipe.toml", MarlRecipe) == small()


def test_every_key_that_a_run_keeps_is_one_of_the_recipe(small):
    assert set(FIXED_SECTIONS) <= {field.name for field in dataclasses.fields(small())}
    assert all(hasattr(small().run, key) for key in FIXED_KEYS)


def test_refuses_a_folder_that_is_used(small, finished):
    with pytest.raises(UserError, match="already holds a run: add --resume to go on, or choose another --dir"):
        train(small(), finished)
    with RunDirectory(finished), pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        train(small(), finished, resume=True)
    (finished / "recipe.toml").unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="holds snapshots of a run without its recipe"):
            train(small(), finished, resume=resume)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.name=navigatoin", "there is no world 'navigatoin', did you mean navigation?"),
        ("world.options.radus=1", "navigation: unknown option radus, did you mean radius?"),
        ("transfer.name=pta", "unknown transfer 'pta', did you mean pat?"),
        ("transfer.options.heds=1", "transfer pat has no setting heds, did you mean heads?"),
        ("run.device=gpu", "device 'gpu' cannot be used here"),
        ("world.name=nowhere:make", "world nowhere:make: nowhere cannot be imported"),
        ("run.from_run=nowhere", "there is no trained team in nowhere"),
        ("run.selector_from=nowhere", "there is no trained team in nowhere"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(small, folder, override, message):
    before = files(folder)
    with pytest.raises(UserError) as caught:
        train(small(override), folder / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before
    assert not (folder / "run").exists()


def test_other_peoples_files_stay(small, folder):
    (folder / "run").mkdir()
    (folder / "run" / "diary.txt").write_text("mine")
    with pytest.raises(UserError):
        train(small("world.name=nowhere"), folder / "run")
    assert files(folder / "run") == ["diary.txt"]
    assert train(small(), folder / "run").frames == 60


def test_a_reward_that_is_not_a_number_ends_the_run_and_names_the_agent(small, folder, at_frame):
    def poison(team):
        real = team.environment.step

        def step(actions):
            transition = real(actions)
            reward = transition.reward.clone()
            reward[1, 2] = torch.nan
            return transition._replace(reward=reward)

        team.environment.step = step

    at_frame(46, poison)
    with pytest.raises(UserError, match="agent agent_2: reward nan in world 1"):
        train(small(), folder / "run")
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [20, 40]


def test_threads_are_the_runs_own_and_given_back(small, folder, at_frame):
    seen = []
    at_frame(10, lambda team: seen.append(torch.get_num_threads()))
    train(small("run.threads=2"), folder / "run")
    assert seen == [2]
    assert torch.get_num_threads() == 1


def test_without_snapshots(small, folder):
    result = train(small("run.snapshot_every=0"), folder / "run")
    assert not (folder / "run" / "snapshots").exists()
    assert load_team(folder / "run").frames == result.frames == 60
    train(small(), folder / "saved")
    assert str(without_rates(folder / "run")) == str(without_rates(folder / "saved"))


PETTINGZOO = """
from mpe2 import simple_spread_v3

def make(cycles):
    return simple_spread_v3.parallel_env(N=2, max_cycles=cycles, continuous_actions=True)

nothing = 3
"""


def test_somebody_elses_environment(small, folder, pictures):
    """By a module's name or a file's; what cannot be drawn has no film."""
    (folder / "mine.py").write_text(PETTINGZOO)
    overrides = ("world.name=mine.py:make", "world.options={cycles = 5, max_steps = 4}")
    result = train(small(*overrides), folder / "run")
    assert [path.name for path in result.pictures] == pictures[:-1]
    team = load_team(folder / "run")
    assert type(team.world) is PettingZooEnvironment
    assert team.world.spec.max_steps == 4
    for name, message in (("mine.py:other", "has no function other"), ("mine.py:nothing", "no function nothing")):
        with pytest.raises(UserError, match=message):
            train(small(f"world.name={name}"), folder / "other")


# Two agents are carried along a line by chance: from the seed, or without one.
WALK = """
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

CLOSED = []
NOISE = np.random.default_rng(0)

class Walk(ParallelEnv):
    metadata = {"name": "walk"}
    possible_agents = ["a", "b"]

    def __init__(self, repeatable, length):
        self.repeatable, self.length = repeatable, length

    def observation_space(self, agent):
        return Box(-100, 100, (1,), np.float32)

    def action_space(self, agent):
        return Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.agents, self.place, self.steps = list(self.possible_agents), 0.0, 0
        self.random = np.random.default_rng(seed) if self.repeatable else NOISE
        return self.see()

    def step(self, actions):
        self.place, self.steps = self.place + self.random.uniform(), self.steps + 1
        over = dict.fromkeys(self.agents, self.steps == self.length)
        seen, infos = self.see()
        self.agents = [] if self.steps == self.length else self.agents
        return seen, dict.fromkeys(over, self.place), dict.fromkeys(over, False), over, infos

    def see(self):
        place = np.array([self.place], np.float32)
        return dict.fromkeys(self.agents, place), {agent: {} for agent in self.agents}

    def close(self):
        CLOSED.append(self)
        raise OSError("gone already")

def make(repeatable=True, length=5):
    return Walk(repeatable, length)
"""


@pytest.fixture
def walk(small, folder):
    """walk("{max_steps = 4}", ...) gives a recipe of a world of the user's own."""
    (folder / "walk.py").write_text(WALK)
    return lambda options, *overrides: small("world.name=walk.py:make", f"world.options={options}", *overrides)


def closed():
    """How many environments of the user's file are closed."""
    return len(sys.modules["walk.py"].CLOSED)


def test_an_episode_that_need_not_end_is_found_before_the_run_begins(walk, folder):
    with pytest.raises(UserError, match=r"an episode must end.*set world\.options\.max_steps"):
        train(walk("{}"), folder / "run")
    assert not (folder / "run").exists()
    assert train(walk("{max_steps = 4}"), folder / "run").checkpoint


@pytest.mark.parametrize("length", [TRIAL_STEPS, 5])
def test_a_world_that_cannot_be_saved_is_found_before_the_run_begins(walk, folder, length):
    options = f"{{repeatable = false, length = {length}, max_steps = 9}}"
    with pytest.raises(UserError, match=r"cannot be saved.*set run\.snapshot_every=0"):
        train(walk(options), folder / "run")
    assert not (folder / "run").exists()
    assert train(walk(options, "run.snapshot_every=0"), folder / "run").checkpoint


def test_its_environments_are_closed_however_the_run_ends(walk, folder, monkeypatch):
    """Two to train in, two to evaluate in; one beside each that tries whether they can be saved."""
    monkeypatch.setattr("fulmen.marl.build._run_file", functools.cache(build._run_file))
    lines = []
    train(walk("{max_steps = 4}"), folder / "run", report=lines.append)
    assert closed() == 6
    assert lines[-1] == "warning: world 0, step 2: close() raised OSError: gone already"
    with pytest.raises(UserError):
        train(walk("{}"), folder / "other")
    assert closed() == 6 + 4

    def fail(team):
        raise KeyboardInterrupt

    monkeypatch.setattr(Team, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(walk("{max_steps = 4}"), folder / "other")
    assert closed() == 6 + 4 + 5


def test_what_a_team_is_loaded_for_is_closed_after_it(walk, folder, monkeypatch):
    monkeypatch.setattr("fulmen.marl.build._run_file", functools.cache(build._run_file))
    train(walk("{max_steps = 4}"), folder / "run")
    before = closed()
    with pytest.warns(UserWarning, match="gone already"), load_team(folder / "run"):
        assert closed() == before
    assert closed() == before + 1
    description = folder / "run" / "checkpoint" / "team.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"state": {}}))
    with pytest.warns(UserWarning, match="gone already"), pytest.raises(UserError, match="cannot read the team"):
        load_team(folder / "run")
    description.unlink()
    with pytest.warns(UserWarning, match="gone already"):
        train(walk("{max_steps = 4}", "run.from_run=run"), folder / "other")
    # The snapshot's team, whose weights the new one begins with, and the six of the new run.
    assert closed() == before + 2 + 6 + 1
