"""Teams on a GPU: the same worlds, the same updates, whole runs. The CPU twins are the other tests of this folder."""

import math

import pytest
import torch

from fulmen.config import load_recipe
from fulmen.marl import TRANSFERS, MarlRecipe, load_team, render_episode, train
from fulmen.marl.learner import LearnerSettings, MemorySettings, TeamLearner
from fulmen.marl.replay import Batch
from fulmen.marl.worlds import make_environment

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
MEMORIES = ("none", "lstm", "lightning")


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("task", ["spread", "tag", "push", "reference", "speaker_listener", "adversary", "navigation"])
def test_worlds_move_as_on_a_cpu(task, device):
    here, there = (make_environment(task, num_worlds=64, device=name, max_steps=100) for name in ("cpu", device))
    for world in (here, there):
        world.reset(0)
    there.load_state_dict(here.state_dict() | {"generator": there.state_dict()["generator"]})
    size = here.spec.action_sizes
    for _ in range(50):
        actions = torch.rand(64, len(size), max(size)) * here.spec.action_mask
        if here.spec.discrete:
            actions = torch.nn.functional.one_hot(actions.argmax(-1), max(size)).float()
        ours, theirs = here.step(actions), there.step(actions.to(device))
        torch.testing.assert_close(theirs.observation.cpu(), ours.observation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.reward.cpu(), ours.reward, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("memory", MEMORIES)
def test_an_update_is_the_same_as_on_a_cpu(memory, device):
    spec = make_environment("navigation", num_worlds=1, agents=3).spec
    learners = []
    for name in ("cpu", device):
        torch.manual_seed(0)
        settings = LearnerSettings(hidden=(16, 16), memory=MemorySettings(kind=memory, size=16))
        learners.append(TeamLearner(spec, settings, device=name))
    torch.manual_seed(1)
    steps, shape = 12, (8, 12, 3)
    never = torch.zeros(shape, dtype=torch.bool)
    for _ in range(5):
        observation, action = torch.randn(8, steps + 1, 3, spec.observation_size), torch.rand(*shape, 2) * 2 - 1
        batch = Batch(observation, action, torch.randn(shape), never, never, ~never, None)
        for learner in learners:
            place = learner.actor.flat.device
            learner.update(Batch(*(part if part is None else part.to(place) for part in batch)))
    for (name, ours), theirs in zip(learners[0].named_parameters(), learners[1].parameters(), strict=True):
        torch.testing.assert_close(
            theirs.cpu(), ours, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def small(device, *more):
    """A recipe of ten steps."""
    overrides = (
        f"run.device={device}",
        "learner.hidden=[16]",
        "learner.batch=4",
        "world.options.max_steps=6",
        "team.warmup=16",
        "run.frames=160",
        "run.evaluate_every=80",
        "run.snapshot_every=80",
        "run.episodes=2",
    )
    return load_recipe("marl/sparse", MarlRecipe, (*overrides, *more))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_whole_run_with_pat(memory, device, tmp_path):
    recipe = small(device, f"learner.memory.kind={memory}", "learner.memory.size=16")
    result = train(recipe, tmp_path / "run")
    assert result.frames == 160
    assert result.checkpoint is not None
    assert all(math.isfinite(line[key]) for line in result.evaluations for key in ("own_return", "pat_return"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_every_transfer_is_resumed_loaded_and_drawn(transfer, device, tmp_path):
    run, options = tmp_path / "run", (f"transfer.name={transfer}", "transfer.options={}")
    train(small(device, *options), run)
    result = train(small(device, *options, "run.frames=320"), run, resume=True)
    assert result.frames == 320
    for path in (run, run / "checkpoint"):
        team = load_team(path)
        assert (team.frames, team.world.device.type) == (320, device)
    assert load_team(run, device="cpu").world.device.type == "cpu"
    # Without the checkpoint it is the last snapshot's.
    (run / "checkpoint" / "team.json").unlink()
    assert load_team(run).frames == 320
    assert render_episode(run, seed=1).exists()
