"""A team lives step by step: what it acts on, what it remembers, when it learns, and that it goes on as it stopped."""

import copy
import json

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.spec import TeamSpec, Transition
from fulmen.marl.state import join_state, split_state
from fulmen.marl.team import Team, TeamSettings
from fulmen.marl.transfer import Decision, Transfer, make_transfer
from fulmen.marl.worlds import make_environment

WORLDS = 3


class Walk:
    """Agents on a line, who see where they are and the step, and earn what they move. World w's episodes last 2 + w."""

    def __init__(self, agents=2, sizes=None, discrete=False):
        sizes = sizes or (2,) * agents
        bounds = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).float()
        self.spec = TeamSpec(
            agents=tuple(f"agent{i}" for i in range(agents)),
            observation_sizes=(2,) * agents,
            action_sizes=sizes,
            low=None if discrete else -0.5 * bounds,
            high=None if discrete else 2 * bounds,
            discrete=discrete,
            max_steps=2 + WORLDS,
        )
        self.num_worlds, self.device = WORLDS, torch.device("cpu")
        self.generator = torch.Generator()
        self.lengths = 2 + torch.arange(WORLDS)
        self.actions, self.transitions = [], []
        self.broken = None

    def reset(self, seed=None):
        self.generator.manual_seed(seed or 0)
        self.age = torch.zeros(WORLDS, dtype=torch.int64)
        self.position = torch.rand(WORLDS, self.spec.num_agents, generator=self.generator)
        return self.observe()

    def observe(self):
        return torch.stack((self.position, self.age[:, None].expand_as(self.position).float()), dim=-1)

    def step(self, actions):
        self.actions.append(actions)
        moved = actions.mean(-1)
        self.position, self.age = self.position + moved, self.age + 1
        final, ended = self.observe(), self.age == self.lengths
        begin = torch.rand(moved.shape, generator=self.generator)
        self.position, self.age = torch.where(ended[:, None], begin, self.position), self.age * ~ended
        reward = moved.clone()
        if self.broken:
            reward[self.broken] = torch.nan
        terminated = ended[:, None] & (torch.arange(self.spec.num_agents) == 0)
        self.transitions.append(Transition(self.observe(), reward, terminated, ended, final))
        return self.transitions[-1]

    def state_dict(self):
        return {"age": self.age, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.age, self.position = state["age"], state["position"]
        self.generator.set_state(state["generator"])


class Script(Transfer):
    """Agent 1 is a student in worlds 1 and 2 and looks at agent 0; everything that happens is written down."""

    def __init__(self, learner):
        super().__init__(learner)
        self.calls, self.experiences = [], []

    def decide(self, observation, own, *, explore):
        assert explore
        assert not own.requires_grad
        self.calls.append("decide")
        student = torch.zeros(own.shape[:2], dtype=torch.bool)
        student[1:, 1] = True
        attention = torch.zeros(WORLDS, 2, 2)
        attention[:, 1, 0] = 1
        return Decision(torch.where(student[..., None], own + 0.25, own), student, attention)

    def observe(self, experience):
        self.calls.append("observe")
        self.experiences.append(experience)

    def actor_loss(self, batch, actions):
        self.calls.append("actor_loss")
        return actions.square().mean((0, 1, 3))

    def update(self, batch):
        self.calls.append("update")
        return {"lessons": 1.0}


def make_team(environment=None, *, transfer=Script, settings=None, report=pytest.fail, seed=0, **learner):
    environment = environment or Walk()
    torch.manual_seed(seed)
    learner = TeamLearner(environment.spec, LearnerSettings(**({"hidden": (8, 8), "batch": 4} | learner)))
    settings = TeamSettings(**({"warmup": 0, "capacity": 60} | (settings or {})))
    return Team(environment, learner, transfer(learner), settings, seed=seed, report=report)


def spy(monkeypatch, thing, name):
    """Write down the arguments of a method, which does what it did."""
    calls, method = [], getattr(thing, name)

    def wrapped(*arguments, **named):
        calls.append((arguments, named))
        return method(*arguments, **named)

    monkeypatch.setattr(thing, name, wrapped)
    return calls


def test_a_step_decides_acts_observes_and_learns(monkeypatch):
    team = make_team()
    learned = spy(monkeypatch, team.learner, "update")
    metrics = team.step()
    assert team.transfer.calls == ["decide", "observe", "actor_loss", "update"]
    assert len(learned) == 1
    assert metrics["lessons"] == 1
    assert metrics["critic_loss"].shape == (2,)
    assert (team.steps, team.frames, len(team.replay)) == (1, WORLDS, WORLDS)


def test_episodes_begin_from_the_seed():
    assert torch.equal(make_team(seed=5).observation, Walk().reset(5))
    assert not torch.equal(make_team(seed=5).observation, make_team(seed=6).observation)


def test_what_is_observed_and_remembered_is_what_happened():
    team = make_team()
    for _ in range(9):
        before = team.observation
        team.step()
        happened, lived = team.environment.transitions[-1], team.transfer.experiences[-1]
        assert torch.equal(lived.observation, before)
        assert torch.equal(lived.action, team.environment.actions[-1])
        assert torch.equal(lived.reward, happened.reward)
        assert torch.equal(lived.terminated, happened.terminated)
        assert torch.equal(lived.ended, happened.ended)
        assert torch.equal(lived.next_observation, happened.final_observation)
        assert lived.student.tolist() == [[False, False], [False, True], [False, True]]
        assert torch.equal(team.observation, happened.observation)
    rows = team.replay.state_dict()["rows"]
    for row, lived in zip(rows, team.transfer.experiences, strict=True):
        parts = (lived.observation, lived.next_observation, lived.action, lived.reward[..., None])
        assert torch.equal(row[..., :-2], torch.cat(parts, dim=-1))
        assert torch.equal(row[..., -2:], torch.stack((lived.terminated, lived.student), dim=-1).float())


def test_actions_are_explored_around_what_was_decided(monkeypatch):
    team = make_team(noise=0.0)
    team.step()
    own, _, _ = team.learner.act(team.transfer.experiences[0].observation, {})
    # An update came between.
    moved = team.environment.actions[0] - own
    team = make_team(noise=0.3)
    explored = spy(monkeypatch, team.learner, "explore")
    team.step()
    ((decided,), _), acted = explored[0], team.environment.actions[0]
    assert not torch.equal(decided, acted)
    assert torch.allclose(moved[1:, 1], torch.tensor(0.25), atol=0.05)
    assert torch.allclose(moved[0], torch.tensor(0.0), atol=0.05)


@pytest.mark.parametrize("discrete", [False, True])
def test_it_begins_with_random_actions_and_does_not_learn(monkeypatch, discrete):
    team = make_team(Walk(sizes=(2, 3), discrete=discrete), settings=dict(warmup=300))
    learned = spy(monkeypatch, team.learner, "update")
    for _ in range(99):
        assert team.step() == {}
    assert team.transfer.calls == ["observe"] * 99
    assert not learned
    actions = torch.stack(team.environment.actions)
    assert torch.equal(actions[..., 0, 2], torch.zeros(99, WORLDS))
    if discrete:
        assert set(actions.argmax(-1)[..., 1].unique().tolist()) == {0, 1, 2}
        assert (actions.sum(-1) == 1).all()
    else:
        own = actions[..., 1, :]
        assert own.min() > -0.5
        assert own.min() < -0.4
        assert own.max() < 2
        assert own.max() > 1.9
    assert team.statistics().student_share.tolist() == [0, 0]
    assert team.step()
    assert len(learned) == 1
    team.step()
    assert team.transfer.calls.count("decide") == 1


def test_how_often_it_learns(monkeypatch):
    team = make_team(settings=dict(update_every=3, updates=2, warmup=8))
    learned = spy(monkeypatch, team.learner, "update")
    counts = []
    for _ in range(9):
        team.step()
        counts.append(len(learned))
    assert counts == [0, 0, 2, 2, 2, 4, 4, 4, 6]


@pytest.mark.parametrize("name", ["shared_replay", "central_critic"])
def test_how_it_draws(monkeypatch, name):
    team = make_team(**{name: True})
    drawn = spy(monkeypatch, team.replay, "sample")
    team.step()
    assert drawn == [((4,), {"shared": name == "shared_replay", "joint": name == "central_critic"})]


@pytest.mark.parametrize("kind", ["lstm", "lightning"])
def test_memory_lasts_for_an_episode(monkeypatch, kind):
    memory = MemorySettings(kind=kind, size=8, heads=2)
    team = make_team(memory=memory, settings=dict(sequence=2, warmup=9))
    acted, stored = (spy(monkeypatch, *where) for where in ((team.learner, "act"), (team.replay, "add")))
    ages = torch.zeros(WORLDS, dtype=torch.int64)
    for _ in range(8):
        team.step()
        (_, before), (_, kept) = acted[-1][0], stored[-1][0]
        assert before is kept
        for state in before.values():
            assert torch.equal(state.flatten(1).any(dim=1), ages > 0)
        ages = (ages + 1) * ~team.environment.transitions[-1].ended
    assert team.replay.sample(4).state.keys() == before.keys()


@pytest.mark.parametrize(
    ("kind", "sequence", "length"), [("none", None, 1), ("lstm", None, 5), ("lstm", 3, 3), ("none", 2, 2)]
)
def test_sequences_that_are_drawn(kind, sequence, length):
    team = make_team(memory=MemorySettings(kind=kind, size=8), settings=dict(sequence=sequence))
    assert team.replay.length == length
    assert team.replay.whole_episodes == (length == 5)


def test_capacity_counts_frames():
    assert make_team(settings=dict(capacity=61)).replay.capacity == 21


def test_statistics_of_what_happened_since_the_last_time():
    team = make_team(settings=dict(update_every=100))
    assert team.statistics().episodes == 0
    for first, last in ((0, 5), (5, 13)):
        for _ in range(first, last):
            team.step()
        said = team.statistics()
        returns, running = [], torch.zeros(WORLDS, 2)
        for index, happened in enumerate(team.environment.transitions):
            running = running + happened.reward
            returns += [running[happened.ended]] if index >= first else []
            running = running * ~happened.ended[:, None]
        returns = torch.cat(returns)
        assert said.episodes == len(returns) > 0
        assert torch.allclose(said.returns, returns.mean(0))
        assert torch.allclose(said.student_share, torch.tensor([0, 2 / 3]))
        assert said.attention.tolist() == [[0, 0], [1, 0]]


def test_statistics_of_nothing():
    team = make_team(transfer=Transfer)
    said = team.statistics()
    assert said.returns.isnan().all()
    assert said.student_share.isnan().all()
    team.step()
    assert team.statistics().attention is None


def test_a_reward_that_is_no_number_names_the_agent():
    team = make_team()
    team.step()
    team.environment.broken = (2, 1)
    with pytest.raises(UserError, match="agent agent1: reward nan in world 2"):
        team.step()
    assert len(team.replay) == WORLDS


def test_an_agent_alone_says_so_once_and_learns():
    said = []
    team = make_team(Walk(agents=1), report=said.append, transfer=lambda learner: make_transfer("pat", learner))
    before = team.learner.agent_state(0)["actor"]
    for _ in range(3):
        assert "critic_loss" in team.step()
    assert said == ["agent agent0 is alone and has no teacher: it learns without transfer"]
    after = team.learner.agent_state(0)["actor"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert team.statistics().attention is None
    make_team(Walk(agents=1), transfer=Transfer)


@pytest.mark.filterwarnings("error::UserWarning")
def test_who_reports_nowhere_warns():
    environment = Walk(agents=1)
    learner = TeamLearner(environment.spec, LearnerSettings())
    with pytest.raises(UserWarning, match="is alone and has no teacher"):
        Team(environment, learner, make_transfer("uniform", learner), TeamSettings())


def test_it_describes_itself():
    assert "2 agents in 3 worlds on cpu" in make_team().describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(warmup=-1), "warmup must be at least 0, got -1"),
        (dict(update_every=0), "update_every must be at least 1, got 0"),
        (dict(updates=0), "updates must be at least 1, got 0"),
        (dict(capacity=0), "capacity must be at least 1, got 0"),
        (dict(sequence=-1), "sequence must be at least 1, or 0 for whole episodes, got -1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        TeamSettings(**settings)


def test_memory_needs_sequences():
    with pytest.raises(UserError, match="a memory learns nothing from single steps"):
        make_team(memory=MemorySettings(kind="lstm"), settings=dict(sequence=1))


def test_different_agents_share_no_replay():
    with pytest.raises(UserError, match="agents of different sizes cannot share their replay: agent1"):
        make_team(Walk(sizes=(2, 3)), shared_replay=True)


def through_a_snapshot(state):
    """As a run stores it: tensors, copied, and JSON."""
    tensors, plain = split_state(copy.deepcopy(state))
    return join_state(tensors, json.loads(json.dumps(plain)))


def flat(state):
    tensors, plain = split_state(state)
    return tensors, json.dumps(plain)


def check_equal(a, b):
    (tensors_a, plain_a), (tensors_b, plain_b) = flat(a), flat(b)
    assert plain_a == plain_b
    assert tensors_a.keys() == tensors_b.keys()
    different = [name for name in tensors_a if not tensors_a[name].equal(tensors_b[name])]
    assert not different


def navigation():
    return make_environment("navigation", num_worlds=4, agents=3, max_steps=7)


WAYS = {
    "walk": (Walk, "none", {}),
    "alone": (lambda: Walk(agents=1), "pat", {}),
    "discrete": (lambda: Walk(sizes=(2, 3), discrete=True), "none", {}),
    "navigation": (navigation, "pat", {}),
    "TD3": (navigation, "pat", dict(twin=True)),
    "lightning": (navigation, "pat", dict(memory=MemorySettings(kind="lightning", size=8, heads=2))),
    "shared": (navigation, "uniform", dict(shared_replay=True)),
    "advising": (navigation, "adhoc_td", {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, 2, 18])
def test_a_team_that_stopped_goes_on_bit_for_bit(way, at):
    """In the warm-up, in the middle of episodes, and when the replay has begun to forget."""
    make, name, learner = WAYS[way]

    def build(seed):
        settings = dict(warmup=20, update_every=2, capacity=60, sequence=3 if "memory" in learner else None)
        return make_team(
            make(),
            transfer=lambda learner: make_transfer(name, learner),
            settings=settings,
            report=lambda line: None,
            seed=seed,
            **learner,
        )

    straight = build(0)
    for _ in range(at):
        straight.step()
    stored = through_a_snapshot(straight.state_dict())
    expected = [straight.step() for _ in range(9)]
    other = build(1)
    for _ in range(8):
        other.step()
    other.load_state_dict(stored)
    check_equal(expected, [other.step() for _ in range(9)])
    check_equal(straight.state_dict(), other.state_dict())
    check_equal(straight.statistics()._asdict(), other.statistics()._asdict())
