"""A trained team comes back as it was, takes in newcomers, and hands its selector to another team."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fulmen.config import UserError, load_recipe
from fulmen.marl.build import build_team
from fulmen.marl.checkpoint import NETWORKS, begin_from, load_team, save_checkpoint
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.run import train
from fulmen.marl.state import split_state
from fulmen.run import RunDirectory, SnapshotStore

RECIPE = """
[world]
options = { agents = 3, max_steps = 5 }
num_worlds = 2
[learner]
hidden = [8]
batch = 8
[team]
warmup = 8
capacity = 200
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return lambda *overrides: load_recipe("recipe.toml", MarlRecipe, overrides)


@pytest.fixture
def trained(small, tmp_path):
    """A team after some learning, whose checkpoint lies in run/checkpoint."""
    team = build_team(small())
    live(team)
    save_checkpoint(team, small(), tmp_path / "run" / "checkpoint")
    return team


def live(team, steps=20):
    for _ in range(steps):
        team.step()


def begun(recipe, report=lambda line: None):
    team = build_team(recipe)
    begin_from(team, recipe, report)
    return team


def snap(team, path, frames):
    """A snapshot of the run in `path`, as of that many frames."""
    directory = RunDirectory(path)
    SnapshotStore(directory.snapshots).save(frames, *split_state(team.state_dict()))
    directory.recipe.write_text(RECIPE)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[name])
        else:
            assert torch.equal(value, other[name]), name


def differ(one, other):
    return any(not torch.equal(one["actor"][name], other["actor"][name]) for name in one["actor"])


def test_comes_back_with_all_its_weights(small, trained, tmp_path):
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        team = load_team(path)
        assert (team.frames, team.recipe, team.world.num_worlds) == (40, small(), 1)
        for agent in range(3):
            assert_same(team.learner.agent_state(agent), trained.learner.agent_state(agent))
        assert_same(team.transfer.selector_state(), trained.transfer.selector_state())
        assert torch.equal(team.transfer.returns.mean, trained.transfer.returns.mean)


def test_the_file_names_agents_networks_and_parts(trained, tmp_path):
    tensors = load_file(tmp_path / "run" / "checkpoint" / "team.safetensors")
    for network, parts in trained.learner.agent_state(1).items():
        for part, tensor in parts.items():
            assert torch.equal(tensors[f"state.agents.agent_1.{network}.{part}"], tensor)
    assert "state.transfer.selector.query" in tensors


def test_shared_weights_come_back_too(small, tmp_path):
    recipe = small("learner.shared_weights=true")
    team = build_team(recipe)
    live(team)
    loaded = load_team(save_checkpoint(team, recipe, tmp_path / "shared"))
    for name in NETWORKS:
        assert torch.equal(getattr(loaded.learner, name).flat, getattr(team.learner, name).flat)


def test_comes_back_from_a_snapshot(small, trained, tmp_path):
    snap(trained, tmp_path / "other", 40)
    team = load_team(tmp_path / "other")
    assert team.frames == 40
    assert_same(team.learner.state_dict(), trained.learner.state_dict())


def test_the_newer_of_checkpoint_and_snapshot_is_taken(small, trained, tmp_path):
    old = trained.learner.agent_state(0)
    live(trained)
    snap(trained, tmp_path / "run", 20)
    assert_same(load_team(tmp_path / "run").learner.agent_state(0), old)
    snap(trained, tmp_path / "run", 80)
    team = load_team(tmp_path / "run")
    assert team.frames == 80
    assert_same(team.learner.agent_state(0), trained.learner.agent_state(0))
    assert load_team(tmp_path / "run" / "checkpoint").frames == 40
    # A damaged one is none.
    (tmp_path / "run" / "snapshots" / "step-00000080" / "state.json").write_text("torn")
    assert load_team(tmp_path / "run").frames == 40


def test_a_team_of_a_device_that_is_not_here_comes_to_the_cpu(small, trained, tmp_path):
    recipe = small("run.device=cuda:99")
    save_checkpoint(trained, recipe, tmp_path / "far")
    team = load_team(tmp_path / "far")
    assert (team.recipe, team.world.device.type) == (recipe, "cpu")
    assert_same(begun(small("run.from_run=far")).learner.agent_state(0), trained.learner.agent_state(0))
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used here"):
        load_team(tmp_path / "far", device="cuda:99")


def test_refuses_what_is_no_team(trained, tmp_path):
    with pytest.raises(UserError, match="there is no trained team in nowhere"):
        load_team("nowhere")
    checkpoint = tmp_path / "run" / "checkpoint"
    (checkpoint / "team.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the team in"):
        load_team(checkpoint)
    for text in ("{}", "[]"):
        (checkpoint / "team.json").write_text(text)
        with pytest.raises(UserError, match="cannot read the team in"):
            load_team(checkpoint)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: state["agents"].pop("agent_1"), "'agent_1' is missing"),
        (lambda state: state["agents"]["agent_1"].pop("critic"), "'critic' is missing"),
        (lambda state: state["agents"].update(agent_0=None), "not subscriptable"),
        (lambda state: state["transfer"].pop("frames"), "'frames' is missing"),
        (lambda state: state["transfer"]["gate"].popitem(), "Missing key"),
        (lambda state: state.pop("transfer"), "'transfer' is missing"),
        (lambda state: state["transfer"].update(frames={"__tensor__": "gone"}), "'gone' is missing"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_one_line(trained, tmp_path, damage, reason):
    checkpoint = tmp_path / "run" / "checkpoint"
    description = json.loads((checkpoint / "team.json").read_text())
    damage(description["state"])
    (checkpoint / "team.json").write_text(json.dumps(description))
    with pytest.raises(UserError) as caught:
        load_team(tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"cannot read the team in {checkpoint}, it is damaged or of another version: ")
    assert reason in message
    assert "\n" not in message


def test_a_snapshot_of_another_version_is_one_line(trained, tmp_path):
    state = trained.state_dict()
    del state["transfer"]["returns"]
    trained.state_dict = lambda: state
    snap(trained, tmp_path / "other", 40)
    with pytest.raises(UserError, match=r"cannot read the team in .*step-00000040, .*: 'returns' is missing"):
        load_team(tmp_path / "other")


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(name): there is no room for the file of that name."""

    def fill(name):
        def refuse(file):
            if Path(file.name).name == f".{name}.draft":
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("fulmen.run.files.sync", refuse)

    return fill


@pytest.mark.parametrize("name", ["team.safetensors", "recipe.toml", "team.json"])
def test_a_full_disk_leaves_no_checkpoint_of_two_halves(small, trained, tmp_path, full_disk, name):
    checkpoint = tmp_path / "run" / "checkpoint"
    live(trained)
    full_disk(name)
    with pytest.raises(UserError, match=rf"cannot write .*{name}: No space left on device"):
        save_checkpoint(trained, small(), checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {"team.safetensors", "recipe.toml"}
    with pytest.raises(UserError, match="there is no trained team in"):
        load_team(tmp_path / "run")


def test_newcomers_begin_from_scratch_and_the_others_do_not(small, trained):
    team = begun(small("run.from_run=run", "run.newcomers=[2]", "run.seed=1"))
    for agent in (0, 1):
        assert_same(team.learner.agent_state(agent), trained.learner.agent_state(agent))
    assert differ(team.learner.agent_state(2), trained.learner.agent_state(2))
    assert_same(team.transfer.selector_state(), trained.transfer.selector_state())
    # What was measured of the agent whose place is taken says nothing of who takes it.
    weight = team.transfer.returns.weight
    assert weight[0, 0] > 0
    assert weight[2].sum() == weight[:, 2].sum() == 0


def test_says_what_keeps_the_state_of_a_pat_behind(small, trained, tmp_path):
    lines = []
    same = begun(small("run.from_run=run", "transfer.options={heads = 1}"), lines.append)
    assert_same(same.transfer.selector_state(), trained.transfer.selector_state())
    assert begun(small("run.from_run=run", "transfer.name=none"), lines.append).transfer.state_dict() == {}
    assert lines == []
    recipe = small("run.from_run=run", "transfer.options={heads = 2, novelty = 0.0}", "run.frames=8", "run.episodes=1")
    train(recipe, tmp_path / "new", report=lines.append)
    assert lines[1:] == [
        "what the PAT of run has learned stays behind, for its settings differ: novelty was 1.0, is 0.0, "
        "heads was 1, is 2"
    ]


def test_a_run_may_begin_from_the_one_of_its_own_seed(small, trained, tmp_path):
    (tmp_path / "run-7").symlink_to(tmp_path / "run")
    team = begun(small("run.from_run=run-{seed}", "run.selector_from=run-{seed}", "run.seed=7"))
    assert_same(team.learner.agent_state(0), trained.learner.agent_state(0))
    with pytest.raises(UserError, match="there is no trained team in run-8"):
        begun(small("run.from_run=run-{seed}", "run.seed=8"))


def test_another_number_of_worlds_and_another_transfer_may_follow(small, trained):
    for override in ("world.num_worlds=5", "transfer.name=none", "transfer.options={heads = 2}"):
        team = begun(small("run.from_run=run", override))
        assert_same(team.learner.agent_state(1), trained.learner.agent_state(1))
        live(team)


@pytest.mark.parametrize("freeze", [True, False])
def test_who_is_frozen_learns_no_more(small, trained, freeze):
    recipe = small("run.from_run=run", "run.newcomers=[2]", f"run.freeze={str(freeze).lower()}")
    team = begun(recipe)
    before = [team.learner.agent_state(agent) for agent in range(3)]
    live(team)
    changed = [differ(old, team.learner.agent_state(agent)) for agent, old in enumerate(before)]
    assert changed == [not freeze, not freeze, True]


def test_the_selector_moves_to_a_team_of_another_size(small, trained):
    fresh, moved = (begun(small("world.options.agents=5", *more)) for more in ((), ("run.selector_from=run",)))
    assert_same(moved.transfer.selector_state(), trained.transfer.selector_state())
    assert not torch.equal(fresh.transfer.selector.query, moved.transfer.selector.query)
    live(moved)


def test_refuses_a_team_whose_actions_mean_something_else(small, trained, tmp_path):
    recipe = small("world.options.actions=mpe2")
    save_checkpoint(build_team(recipe), recipe, tmp_path / "mpe2")
    with pytest.raises(UserError, match="the team of mpe2 has discrete False, this one True: from_run needs"):
        begun(small("world.options.actions=discrete", "run.from_run=mpe2"))
    recipe = small("run.from_run=run")
    team = build_team(recipe)
    for bound, theirs, ours in (("low", "-1.0", "-2.0"), ("high", "1.0", "2.0")):
        spec = team.environment.spec
        team.environment.spec = dataclasses.replace(spec, **{bound: 2 * getattr(spec, bound)})
        with pytest.raises(UserError, match=rf"has {bound} \[\[{theirs}, .*, this one \[\[{ours}, "):
            begin_from(team, recipe)
        team.environment.spec = spec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run.from_run=run", "run.newcomers=[3]"), "newcomer 3 does not exist: the team's agents are 0 to 2"),
        (("run.from_run=run", "world.options.agents=4"), "from_run needs a team of the same agents"),
        (("run.from_run=run", "world.options.observe_others=true"), "has observation_sizes (6, 6, 6), this one"),
        (("run.selector_from=run", "transfer.name=uniform"), "selector_from moves a selector from PAT to PAT"),
        (("run.selector_from=run", "transfer.options.heads=2"), "the selector was trained with heads 1, here is 2"),
    ],
)
def test_refuses_a_team_that_does_not_fit(small, trained, overrides, message):
    with pytest.raises(UserError) as caught:
        begun(small(*overrides))
    assert message in str(caught.value)
