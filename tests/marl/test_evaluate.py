"""An evaluation plays the same episodes with transfer and without, counts each once, and leaves no trace."""

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.evaluate import evaluate, rollout
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.spec import TeamSpec, Transition
from fulmen.marl.state import split_state
from fulmen.marl.team import Team, TeamSettings
from fulmen.marl.transfer import Decision, Transfer, make_transfer
from fulmen.marl.worlds import make_environment

SEED = 7


class Drift:
    """Agents earn what they do. World w begins from seed + w, which decides its place and its 2 to 4 steps."""

    def __init__(self, num_worlds, agents=2, max_steps=6):
        bounds = torch.ones(agents, 1)
        self.spec = TeamSpec(
            agents=tuple("abc"[:agents]),
            observation_sizes=(2,) * agents,
            action_sizes=(1,) * agents,
            low=-bounds,
            high=bounds,
            max_steps=max_steps,
        )
        self.num_worlds, self.device, self.broken = num_worlds, torch.device("cpu"), False

    def reset(self, seed=None):
        seeds = seed + torch.arange(self.num_worlds)
        self.length, self.age = 2 + seeds % 3, torch.zeros_like(seeds)
        self.place = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
        return self.observe()

    def observe(self):
        seen = torch.stack((self.place, self.age[:, None].expand_as(self.place).float()), dim=-1)
        return seen[:, : self.spec.num_agents]

    def scene(self, world):
        return {"world": world, "age": int(self.age[world])}

    def step(self, actions):
        # Worlds of users may draw from the global generator.
        torch.rand(1)
        reward = actions[..., 0].clone()
        if self.broken:
            reward[0, 1] = torch.inf
        self.age = self.age + 1
        final, ended = self.observe(), self.age == self.length
        # What follows an end must not be counted, so that it has another length.
        self.length, self.age = torch.where(ended, 1, self.length), self.age * ~ended
        return Transition(self.observe(), reward, torch.zeros_like(reward, dtype=torch.bool), ended, final)


class Shout(Transfer):
    """From its second step on agent 1 is a student of agent 0 and does 1."""

    def decide(self, observation, own, *, explore):
        assert not explore
        torch.rand(1)
        student = torch.zeros(own.shape[:2], dtype=torch.bool)
        student[:, 1] = observation[:, 1, 1] > 0
        attention = torch.zeros(len(own), 2, 2)
        attention[:, 1, 0] = observation[:, 1, 1]
        return Decision(torch.where(student[..., None], 1.0, own), student, attention)


def make_learner(agents=2, kind="none"):
    settings = LearnerSettings(hidden=(8, 8), memory=MemorySettings(kind=kind, size=8, heads=2))
    return TeamLearner(Drift(1, agents).spec, settings)


def lengths(episodes):
    return [2 + (SEED + episode) % 3 for episode in range(episodes)]


def play_by_hand(learner, episode, shout):
    """The return of one episode, in a world of its own."""
    world = Drift(1)
    observation, total = world.reset(SEED + episode), torch.zeros(2)
    for age in range(lengths(episode + 1)[-1]):
        actions, _, _ = learner.act(observation, {})
        if shout and age:
            actions[:, 1] = 1
        observation = world.step(actions).observation
        total += actions[0, :, 0]
    return total


@pytest.mark.parametrize("worlds", [1, 2, 5, 8])
def test_every_episode_counts_once_in_both_ways_of_acting(worlds):
    learner = make_learner()
    result = evaluate(Drift(worlds), learner, Shout(learner), episodes=5, seed=SEED)
    for returns, shout in ((result.team_returns, True), (result.own_returns, False)):
        assert torch.allclose(returns, torch.stack([play_by_hand(learner, e, shout) for e in range(5)]))
    steps = lengths(5)
    assert torch.allclose(result.student_share, torch.tensor([0, sum(n - 1 for n in steps) / sum(steps)]))
    # Its weight is the age of the episode.
    mean_age = sum(n * (n - 1) / 2 for n in steps) / sum(steps)
    assert torch.allclose(result.attention, torch.tensor([[0, 0], [mean_age, 0]]))


@pytest.mark.parametrize("kind", ["lstm", "lightning"])
@pytest.mark.parametrize("name", ["uniform", "pat"])
def test_memories_begin_with_each_episode(kind, name):
    """Also those that teachers have of students: a world that is used again knows nothing of its last episode."""
    learner = make_learner(kind=kind)
    transfer = make_transfer(name, learner, **({"gate": "always"} if name == "pat" else {}))
    one, many = (evaluate(Drift(worlds), learner, transfer, episodes=6, seed=SEED) for worlds in (1, 6))
    assert torch.allclose(one.own_returns, many.own_returns, atol=1e-6)
    assert torch.allclose(one.team_returns, many.team_returns, atol=1e-6)
    assert not torch.allclose(many.team_returns, many.own_returns, atol=1e-3)
    assert many.student_share.tolist() == [1, 1]


def test_the_same_seed_gives_the_same_episodes():
    learner = make_learner()
    first, again, other = (
        evaluate(Drift(2), learner, Shout(learner), episodes=4, seed=seed) for seed in (SEED, SEED, SEED + 9)
    )
    assert torch.equal(first.team_returns, again.team_returns)
    assert torch.equal(first.own_returns, again.own_returns)
    assert not torch.equal(first.own_returns, other.own_returns)


def test_the_seed_decides_what_a_transfer_draws():
    class Mumble(Transfer):
        def decide(self, observation, own, *, explore):
            return Decision(torch.rand_like(own), torch.ones(own.shape[:2], dtype=torch.bool), None)

    learner, drawn = make_learner(), []
    for before in (1, 2):
        torch.manual_seed(before)
        drawn.append(evaluate(Drift(2), learner, Mumble(learner), episodes=3, seed=SEED).team_returns)
    assert torch.equal(*drawn)


def test_the_generator_is_as_it_was():
    learner = make_learner()
    before = torch.get_rng_state()
    evaluate(Drift(2), learner, Shout(learner), episodes=4, seed=SEED)
    rollout(Drift(1), learner, Shout(learner), SEED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["none", "lightning"])
@pytest.mark.parametrize("name", ["pat", "uniform", "none"])
def test_training_goes_on_as_if_nobody_had_looked(kind, name):
    """In the middle of episodes, where memories are under way, and with another number of worlds."""
    states = []
    for looks in (False, True):
        torch.manual_seed(0)
        world, own = (make_environment("navigation", num_worlds=n, agents=3, max_steps=7) for n in (4, 2))
        memory = MemorySettings(kind=kind, size=8, heads=2)
        learner = TeamLearner(world.spec, LearnerSettings(hidden=(8, 8), batch=4, memory=memory))
        transfer = make_transfer(name, learner)
        team = Team(world, learner, transfer, TeamSettings(warmup=20, capacity=100), seed=0)
        for _ in range(12):
            team.step()
            if looks:
                evaluate(own, learner, transfer, episodes=3, seed=1)
                rollout(own, learner, transfer, 1)
        tensors, plain = split_state(team.state_dict())
        states.append((tensors, str(plain)))
    (straight, plain), (watched, plain_watched) = states
    assert plain == plain_watched
    assert not [name for name in straight if not torch.equal(straight[name], watched[name])]


def test_without_teachers_both_ways_are_one(recwarn):
    learner = make_learner()
    result = evaluate(Drift(2), learner, Transfer(learner), episodes=3, seed=SEED)
    alone = make_learner(agents=1)
    single = evaluate(Drift(2, agents=1), alone, make_transfer("pat", alone), episodes=3, seed=SEED)
    for evaluation, agents in ((result, 2), (single, 1)):
        assert torch.equal(evaluation.team_returns, evaluation.own_returns)
        assert evaluation.own_returns.shape == (3, agents)
        assert evaluation.student_share.tolist() == [0] * agents
        assert evaluation.attention is None
    frames = rollout(Drift(1, agents=1), alone, make_transfer("pat", alone), SEED)
    assert all(frame.attention is None for frame in frames)
    assert not recwarn


def test_episodes_are_cut():
    learner = make_learner()
    steps = []
    for most in (None, 3, 1):
        own_limit = None if most else 6
        result = evaluate(Drift(4, max_steps=own_limit), learner, Shout(learner), episodes=4, seed=SEED, max_steps=most)
        steps.append(round(1 / (1 - float(result.student_share[1])) * 4))
    assert steps == [sum(lengths(4)), sum(min(n, 3) for n in lengths(4)), 4]


@pytest.mark.parametrize(
    ("world", "settings", "message"),
    [
        (Drift(1), dict(episodes=0), "at least 1 episode, got 0"),
        (Drift(1, max_steps=None), {}, "an episode must end.*no limit of steps: set world.options.max_steps"),
        (Drift(1), dict(max_steps=0), "max_steps must be at least 1, got 0"),
    ],
)
def test_evaluations_that_cannot_be(world, settings, message):
    learner = make_learner()
    with pytest.raises(UserError, match=message):
        evaluate(world, learner, Transfer(learner), **({"episodes": 1, "seed": 0} | settings))


def test_a_reward_that_is_no_number_names_the_agent():
    learner, world = make_learner(), Drift(2)
    world.broken = True
    with pytest.raises(UserError, match="agent b: reward inf in world 0"):
        evaluate(world, learner, Transfer(learner), episodes=1, seed=0)


def test_a_rollout_shows_one_episode():
    learner = make_learner()
    frames = rollout(Drift(2), learner, Shout(learner), SEED)
    assert [frame.scene for frame in frames] == [{"world": 0, "age": age} for age in range(lengths(1)[0])]
    assert [frame.student.tolist() for frame in frames] == [[False, age > 0] for age in range(len(frames))]
    assert [frame.attention[1, 0].item() for frame in frames] == list(range(len(frames)))
    assert len(rollout(Drift(1), learner, Shout(learner), SEED, max_steps=2)) == 2
    assert all(frame.attention is None for frame in rollout(Drift(1), learner, Transfer(learner), SEED))


def test_a_rollout_of_a_real_world():
    world = make_environment("navigation", num_worlds=1, agents=3, max_steps=5)
    learner = TeamLearner(world.spec, LearnerSettings(hidden=(8, 8)))
    frames = rollout(world, learner, make_transfer("pat", learner, gate="always"), SEED)
    assert len(frames) == 5
    assert frames[0].scene.positions.shape == (6, 2)
    assert not torch.equal(frames[0].scene.positions, frames[4].scene.positions)
    assert frames[0].student.all()
    assert torch.allclose(frames[0].attention.sum(-1), torch.ones(3))


def test_what_cannot_be_drawn():
    class Blind:
        spec = Drift(1).spec

    learner = make_learner()
    with pytest.raises(UserError, match=r"Blind has no scene\(world\) that could be drawn"):
        rollout(Blind(), learner, Transfer(learner), 0)
