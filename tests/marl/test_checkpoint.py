"""A trained team comes back as it was, takes in newcomers, and hands its selector to another team."""

import pytest
import torch
from safetensors.torch import load_file

from fulmen.config import UserError, load_recipe
from fulmen.marl.build import build_team
from fulmen.marl.checkpoint import NETWORKS, begin_from, load_team, save_checkpoint
from fulmen.marl.recipe import MarlRecipe
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


def begun(recipe):
    team = build_team(recipe)
    begin_from(team, recipe)
    return team


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
    directory = RunDirectory(tmp_path / "other")
    SnapshotStore(directory.snapshots).save(40, *split_state(trained.state_dict()))
    directory.recipe.write_text(RECIPE)
    team = load_team(directory.path)
    assert team.frames == 40
    assert_same(team.learner.state_dict(), trained.learner.state_dict())


def test_refuses_what_is_no_team(trained, tmp_path):
    with pytest.raises(UserError, match="there is no trained team in nowhere"):
        load_team("nowhere")
    checkpoint = tmp_path / "run" / "checkpoint"
    (checkpoint / "team.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the team in"):
        load_team(checkpoint)
    (checkpoint / "team.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the team in"):
        load_team(checkpoint)


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
