"""Learning of a team against plain PyTorch, one agent and one network at a time."""

import copy

import pytest
import torch
from torch import nn

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec

KINDS = ("none", "lstm", "lightning")
SMALL = {"hidden": (16, 12), "batch": 8}


def make_spec(agents=3, observation=5, action=2, discrete=False):
    bounds = {} if discrete else {"low": -torch.ones(agents, action), "high": torch.ones(agents, action)}
    return TeamSpec(
        agents=tuple("abcdef"[:agents]),
        observation_sizes=(observation,) * agents,
        action_sizes=(action,) * agents,
        discrete=discrete,
        **bounds,
    )


def mixed_spec():
    """Agents of different sizes and bounds."""
    low = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 5.0, -1.0]])
    high = torch.tensor([[1.0, 0.0, 0.0], [0.1, 7.0, 1.0]])
    return TeamSpec(agents=("a", "b"), observation_sizes=(5, 3), action_sizes=(2, 3), low=low, high=high)


def make_learner(spec=None, kind="none", **settings):
    memory = MemorySettings(kind=kind, size=8, heads=2)
    return TeamLearner(spec or make_spec(), LearnerSettings(**(SMALL | settings), memory=memory))


def random_actions(spec, *lead):
    actions = torch.rand(*lead, spec.num_agents, spec.action_size)
    if spec.discrete:
        return nn.functional.one_hot(actions.argmax(dim=-1), spec.action_size).float()
    return spec.low + (spec.high - spec.low) * actions


def make_batch(spec, sequences=8, steps=1, state=None):
    shape = (sequences, steps, spec.num_agents)
    lengths = torch.randint(0, steps + 1, (sequences, 1, spec.num_agents))
    lengths[:2] = steps
    return Batch(
        observation=torch.randn(sequences, steps + 1, spec.num_agents, spec.observation_size),
        action=random_actions(spec, sequences, steps),
        reward=torch.randn(shape),
        terminated=torch.rand(shape) < 0.3,
        student=torch.zeros(shape, dtype=torch.bool),
        valid=torch.arange(steps)[None, :, None] < lengths,
        state=state,
    )


def random_state(learner, count):
    return {name: torch.randn_like(zeros) for name, zeros in learner.new_state(count).items()}


def differ(one, other):
    return any((one[role][name] != other[role][name]).any() for role in one for name in one[role])


def assert_same_agent(one, other, **tolerance):
    for role, parts in one.items():
        for name, tensor in parts.items():
            torch.testing.assert_close(tensor, other[role][name], **tolerance)


class PlainDDPG:
    """The same team as one Sequential per network and agent, for single steps without memory; TD3 and MADDPG too."""

    def __init__(self, learner):
        self.spec, self.s = learner.spec, learner.settings
        self.state = [learner.agent_state(i) for i in range(learner.num_agents)]
        self.heads = 2 if self.s.twin else 1
        self.nets = [{name: self._modules(parts) for name, parts in agent.items()} for agent in self.state]
        rates = {"actor": self.s.actor_lr, "critic": self.s.critic_lr}
        self.adams = [
            {role: torch.optim.Adam(nets[role].parameters(), lr=rate) for role, rate in rates.items()}
            for nets in self.nets
        ]
        self.updates = 0

    def _modules(self, parts):
        heads = []
        for head in range(sum(name.endswith("layer0.weight") for name in parts)):
            modules = []
            for layer in range(3):
                weight, bias = parts[f"head{head}.layer{layer}.weight"], parts[f"head{head}.layer{layer}.bias"]
                linear = nn.Linear(weight.shape[1], weight.shape[0])
                linear.weight.data, linear.bias.data = weight.clone(), bias[0].clone()
                modules += [linear, nn.ReLU()]
            heads.append(nn.Sequential(*modules[:-1]))
        return nn.ModuleList(heads)

    def parameters(self, agent, role):
        return torch.cat([parameter.detach().flatten() for parameter in self.nets[agent][role].parameters()])

    def act(self, agent, role, observation):
        before = self.nets[agent][role][0](observation)
        middle, reach = (self.spec.high + self.spec.low)[agent] / 2, (self.spec.high - self.spec.low)[agent] / 2
        return middle + reach * before.tanh(), before

    def q(self, agent, role, head, observations, actions):
        """Of all agents' [B, N, ...]: the own, or everybody's side by side."""
        pair = (observations, actions)
        seen = [x.flatten(1) if self.s.central_critic else x[:, agent] for x in pair]
        return self.nets[agent][role][head](torch.cat(seen, dim=-1)).squeeze(-1)

    def update(self, batch, smooth=None):
        """Gives each agent's losses and the gradients before clipping, by role."""
        seen = torch.arange(self.spec.observation_size) < torch.tensor(self.spec.observation_sizes)[:, None]
        now, then = (batch.observation[:, t].nan_to_num() * seen for t in (0, 1))
        action = batch.action[:, 0].nan_to_num() * self.spec.action_mask
        self.updates += 1
        found = [{} for _ in self.nets]
        with torch.no_grad():
            following = torch.stack([self.act(i, "target_actor", then[:, i])[0] for i in range(len(self.nets))], dim=1)
            following = following if smooth is None else smooth(following)
        for i in range(len(self.nets)):
            self._critic_step(i, batch, now, action, then, following, found[i])
        if not self.s.twin or self.updates % 2 == 0:
            for i in range(len(self.nets)):
                self._actor_step(i, batch.valid[:, 0, i], now, action, found[i])
                self._move_targets(i)
        return found

    def _critic_step(self, i, batch, now, action, then, following, found):
        valid = batch.valid[:, 0, i]
        with torch.no_grad():
            future = torch.stack([self.q(i, "target_critic", h, then, following) for h in range(self.heads)]).amin(0)
            alive = 1 - batch.terminated[:, 0, i].float()
            goal = self.s.reward_scale * batch.reward[:, 0, i] + self.s.discount * alive * future
        values = [self.q(i, "critic", head, now, action) for head in range(self.heads)]
        loss = sum(nn.functional.mse_loss(value[valid], goal[valid]) for value in values)
        self._descend(i, "critic", loss, found)

    def _actor_step(self, i, valid, now, action, found):
        own, before = self.act(i, "actor", now[:, i])
        joint = torch.stack([own if j == i else action[:, j] for j in range(len(self.nets))], dim=1)
        own_size = self.spec.action_sizes[i]
        penalty = before[valid][:, :own_size].square().mean()
        loss = -self.q(i, "critic", 0, now, joint)[valid].mean() + self.s.action_penalty * penalty
        self._descend(i, "actor", loss, found)

    def _descend(self, i, role, loss, found):
        parameters = list(self.nets[i][role].parameters())
        for parameter in self.nets[i].values():
            parameter.zero_grad()
        loss.backward()
        found[role] = loss.detach(), torch.cat([p.grad.flatten() for p in parameters])
        nn.utils.clip_grad_norm_(parameters, self.s.clip)
        self.adams[i][role].step()

    def _move_targets(self, i):
        for role in ("actor", "critic"):
            for target, own in zip(
                self.nets[i][f"target_{role}"].parameters(), self.nets[i][role].parameters(), strict=True
            ):
                target.data += self.s.target_rate * (own.data - target.data)


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_updates_are_those_of_plain_pytorch(twin, central, clip):
    spec = mixed_spec()
    options = {"twin": twin, "central_critic": central, "clip": clip}
    learner = make_learner(spec, action_penalty=0.1, target_rate=0.1, reward_scale=2.0, **options)
    plain = PlainDDPG(learner)
    shift = 0.3 * (spec.high - spec.low)

    def smooth(actions):
        return (actions + shift).clamp(spec.low, spec.high)

    # The noise itself is tested with the action space.
    learner.space.smooth = lambda actions, noise, limit: smooth(actions)
    for step in range(4):
        batch = make_batch(spec, sequences=32)
        if central:
            # A joint draw counts for all agents or for none.
            batch = batch._replace(valid=batch.valid[..., :1].repeat(1, 1, 2))
        # Columns behind an agent's size have no influence, and neither have steps that do not count.
        batch.observation[:, :, 1, 3:] = 1e9
        batch.action[:, :, 0, 2:] = 1e9
        for x in (batch.reward, batch.action, batch.observation[:, 1:]):
            x[~batch.valid] = torch.nan
        before = {role: getattr(learner, f"{role}_adam").mean.clone() for role in ("actor", "critic")}
        metrics = learner.update(batch)
        found = plain.update(batch, smooth if twin else None)
        actors = set() if twin and step % 2 == 0 else {"actor_loss", "value"}
        assert set(metrics) == {"critic_loss"} | actors
        for i in range(2):
            for role, (loss, gradient) in found[i].items():
                torch.testing.assert_close(metrics[f"{role}_loss"][i], loss, rtol=1e-4, atol=1e-5)
                clipped = gradient * min(1, clip / (gradient.norm().item() + 1e-6))
                mean = getattr(learner, f"{role}_adam").mean[i]
                torch.testing.assert_close((mean - 0.9 * before[role][i]) * 10, clipped, rtol=1e-3, atol=1e-4)
            for role in ("actor", "critic", "target_actor", "target_critic"):
                torch.testing.assert_close(
                    getattr(learner, role).flat[i].detach(), plain.parameters(i, role), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"twin": True}])
def test_an_agent_in_a_team_learns_as_one_alone(kind, options):
    team = make_learner(kind=kind, **options)
    alone = make_learner(make_spec(agents=1), kind=kind, **options)
    alone.load_agent(0, team.agent_state(1))
    for learner in (team, alone):
        learner.space.smooth = lambda actions, noise, limit: actions
    for _ in range(3):
        batch = make_batch(team.spec, steps=1 if kind == "none" else 6, state=random_state(team, 8))
        own = Batch(*(x[:, :, 1:2] for x in batch[:6]), {name: x[:, 1:2] for name, x in batch.state.items()})
        metrics, single = team.update(batch), alone.update(own)
        for name in single:
            torch.testing.assert_close(metrics[name][1:2], single[name], rtol=1e-4, atol=1e-5)
    assert_same_agent(team.agent_state(1), alone.agent_state(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_batch_nor_weights_of_another_agent_enter_an_update(kind, discrete):
    learner = make_learner(make_spec(discrete=discrete), kind=kind, twin=True)
    other = copy.deepcopy(learner)
    other.load_agent(0, make_learner(learner.spec, kind=kind, twin=True).agent_state(0))
    for seed in range(2):
        batch = make_batch(learner.spec, steps=1 if kind == "none" else 4)
        changed = batch._replace(observation=batch.observation.clone(), reward=batch.reward.clone())
        changed.observation[:, :, 0] += 1
        changed.reward[:, :, 0] -= 5
        for each, its in ((learner, batch), (other, changed)):
            torch.manual_seed(seed)
            each.update(its)
    assert differ(learner.agent_state(0), other.agent_state(0))
    for i in (1, 2):
        assert_same_agent(learner.agent_state(i), other.agent_state(i))


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_counts_after_a_time_limit_and_not_after_a_termination(kind):
    learner = make_learner(kind=kind)
    batch = make_batch(learner.spec, steps=3)
    batch = batch._replace(reward=torch.zeros_like(batch.reward), valid=torch.ones_like(batch.valid))
    value = learner.value(batch, batch.action).detach()
    over = copy.deepcopy(learner).update(batch._replace(terminated=torch.ones_like(batch.terminated)))
    torch.testing.assert_close(over["critic_loss"], value.square().mean(dim=(0, 1)))
    goes_on = batch._replace(terminated=torch.zeros_like(batch.terminated))
    later = Batch(batch.observation[:, 1:], *batch[1:])
    # Targets are still equal to the networks, and a sequence without stored state begins empty.
    if kind == "none":
        actions, _ = learner.policy(learner.contexts(goes_on)[1])
        later = later._replace(observation=torch.cat((later.observation, later.observation[:, -1:]), dim=1))
        future = 0.95 * learner.value(later, actions)
        expected = (value - future.detach()).square().mean(dim=(0, 1))
        torch.testing.assert_close(learner.update(goes_on)["critic_loss"], expected)
    else:
        assert (learner.update(goes_on)["critic_loss"] != over["critic_loss"]).all()


@pytest.mark.parametrize("kind", ["lstm", "lightning"])
@pytest.mark.parametrize("options", [{}, {"shared_weights": True}, {"central_critic": True}])
def test_acting_step_by_step_equals_the_learning_pass(kind, options):
    learner = make_learner(kind=kind, **options)
    batch = make_batch(learner.spec, sequences=4, steps=30)
    state, states, features, actions = learner.new_state(4), [], [], []
    for t in range(31):
        states.append(state)
        action, feature, state = learner.act(batch.observation[:, t], state)
        features.append(feature)
        actions.append(action)
    current, following = learner.contexts(batch)
    assert current.shape == (4, 30, 3, learner.context_size)
    learned_actions, learned_features = learner.policy(torch.cat((current, following[:, -1:]), dim=1))
    torch.testing.assert_close(torch.stack(features, dim=1), learned_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(actions, dim=1), learned_actions, rtol=1e-5, atol=1e-5)

    # The end of the episode alone, from the state that was stored there: actors' and critics'.
    end = Batch(batch.observation[:, 20:], *(x[:, 20:] for x in batch[1:6]), states[20])
    torch.testing.assert_close(learner.contexts(end)[0], current[:, 20:], rtol=1e-5, atol=1e-5)
    value = learner.value(batch, batch.action)[:, 20:]
    torch.testing.assert_close(learner.value(end, end.action), value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(learner.value(end._replace(state=None), end.action), value, atol=1e-3)
    assert not torch.allclose(learner.contexts(end._replace(state=None))[0], current[:, 20:], atol=1e-3)


@pytest.mark.parametrize("kind", ["lstm", "lightning"])
def test_what_was_seen_early_learns_from_what_happens_late(kind):
    learner = make_learner(kind=kind)
    batch = make_batch(learner.spec, steps=12)
    batch.observation.requires_grad_()
    current, _ = learner.contexts(batch)
    actions, _ = learner.policy(current)
    # The critics are frozen, but what they remember is not.
    learner.value(batch, actions)[:, -1].sum().backward()
    early = batch.observation.grad[:, 0].abs().sum(dim=-1)
    assert (early > 0).all()
    assert (learner.actor.flat.grad.abs().sum(dim=1) > 0).all()
    assert learner.critic.flat.grad is None


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_teachers_do_for_a_student_what_they_do_in_its_place(kind, discrete, shared):
    learner = make_learner(make_spec(discrete=discrete), kind=kind, shared_weights=shared)
    batch = make_batch(learner.spec, sequences=4, steps=5)
    actions, features = learner.cross_policy(batch)
    assert actions.shape == (4, 5, 3, 3, 2)
    assert features.shape == (4, 5, 3, 3, learner.feature_size)
    taught = learner.new_state(4, teachers=True)
    for i in range(3):
        # Everybody sees what student i sees.
        state = learner.new_state(4)
        for t in range(5):
            action, feature, state = learner.act(batch.observation[:, t, i : i + 1].expand(-1, 3, -1), state)
            torch.testing.assert_close(actions[:, t, i], action, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(features[:, t, i], feature, rtol=1e-5, atol=1e-5)
    for t in range(5):
        action, feature, taught = learner.teach(batch.observation[:, t], taught)
        torch.testing.assert_close(action, actions[:, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feature, features[:, t], rtol=1e-5, atol=1e-5)


def test_teaching_stays_within_the_students_bounds():
    spec = mixed_spec()
    learner = make_learner(spec)
    observation = 10 * torch.randn(50, 2, 5)
    observation[:, 1, 3:] = 0
    actions, _, _ = learner.teach(observation, {})
    own, _, _ = learner.act(observation, {})
    for i in range(2):
        assert ((actions[:, i] >= spec.low[i]) & (actions[:, i] <= spec.high[i])).all()
        torch.testing.assert_close(actions[:, i, i], own[:, i])
    sizes = {"agents": ("a", "b"), "observation_sizes": (3, 3), "action_sizes": (2, 4)}
    choices, _, _ = make_learner(TeamSpec(discrete=True, **sizes)).teach(torch.randn(50, 2, 3), {})
    assert torch.equal(choices.sum(dim=-1), torch.ones(50, 2, 2))
    assert (choices[:, 0, :, 2:] == 0).all()


def test_actions_lie_within_each_agents_bounds():
    spec = mixed_spec()
    learner = make_learner(spec, noise=2.0)
    own, features, state = learner.act(100 * torch.randn(200, 2, 5), {})
    assert features.shape == (200, 2, learner.feature_size)
    assert state == {}
    for actions in (own, learner.explore(own), learner.clamp(own + 9), learner.random_actions(200)):
        assert ((actions >= spec.low) & (actions <= spec.high)).all()
        assert (actions[:, 0, 2] == 0).all()


def bandit(spec, action, goal):
    """One step, whose reward is how far the action goes the agent's own way."""
    lead = action.shape[:2]
    return Batch(
        observation=torch.ones(lead[0], 2, spec.num_agents, spec.observation_size),
        action=action,
        reward=(action * goal).sum(dim=-1),
        terminated=torch.ones(*lead, spec.num_agents, dtype=torch.bool),
        student=torch.zeros(*lead, spec.num_agents, dtype=torch.bool),
        valid=torch.ones(*lead, spec.num_agents, dtype=torch.bool),
        state=None,
    )


@pytest.mark.parametrize(
    ("options", "discrete"),
    [
        ({}, False),
        ({}, True),
        ({"shared_weights": True}, False),
        ({"central_critic": True}, False),
        ({"central_critic": True}, True),
        ({"twin": True}, False),
    ],
)
def test_every_agent_finds_its_own_goal(options, discrete):
    spec = make_spec(discrete=discrete)
    goal = torch.tensor([[1.0, 0], [0, 1], [1, 0]]) if discrete else torch.tensor([[1.0, -1], [-1, 1], [1, 1]])
    learner = make_learner(spec, actor_lr=5e-3, critic_lr=1e-2, clip=10.0, hidden=(32, 32), **options)
    for _ in range(200):
        learner.update(bandit(spec, random_actions(spec, 32, 1), goal))
    actions, _, _ = learner.act(torch.ones(1, 3, 5), {})
    torch.testing.assert_close(actions[0], goal, rtol=0, atol=0.3)


def test_an_extra_loss_is_added_to_each_actors_own():
    learner = make_learner()
    twin = copy.deepcopy(learner)
    batch = make_batch(learner.spec)

    def extra(given, actions):
        assert torch.equal(given.observation, batch.observation)
        assert actions.shape == batch.action.shape
        return (actions - 1).square().mean(dim=(0, 1, 3)) * torch.tensor([0.0, 5.0, 0.0])

    batch = batch._replace(valid=torch.ones_like(batch.valid))
    with_extra, without = learner.update(batch, extra), twin.update(batch, lambda given, actions: None)
    assert with_extra["actor_loss"][1] > without["actor_loss"][1]
    assert_same_agent(learner.agent_state(0), twin.agent_state(0))
    assert differ(learner.agent_state(1), twin.agent_state(1))


@pytest.mark.parametrize("shared", [False, True])
def test_a_loss_that_is_no_number_names_the_agent_and_changes_nothing(shared):
    learner = make_learner(shared_weights=shared)
    batch = make_batch(learner.spec)
    before = copy.deepcopy(learner.state_dict())
    broken = batch._replace(reward=batch.reward.clone())
    broken.reward[0, 0, 1] = torch.nan
    with pytest.raises(UserError, match="agent b: critic loss is nan after 0 updates"):
        learner.update(broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    with pytest.raises(UserError, match="agent c: actor loss is inf after 1 updates"):
        learner.update(batch, lambda given, actions: torch.tensor([0.0, 0.0, torch.inf]))


@pytest.mark.parametrize("options", [{}, {"shared_weights": True}, {"twin": True}])
@pytest.mark.parametrize("kind", ["none", "lightning"])
def test_the_state_has_all_that_later_updates_need(options, kind):
    learner = make_learner(kind=kind, **options)
    batches = [make_batch(learner.spec, steps=3) for _ in range(6)]
    for batch in batches[:3]:
        learner.update(batch)
    other = make_learner(kind=kind, **options)
    other.load_state_dict(learner.state_dict())
    for batch in batches[3:]:
        for each in (learner, other):
            torch.manual_seed(1)
            each.update(batch)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.state_dict().items())


def test_starts_are_equal_only_on_demand():
    one, other = make_learner(equal_start=True), make_learner()
    assert_same_agent(one.agent_state(0), one.agent_state(2), rtol=0, atol=0)
    assert differ(other.agent_state(0), other.agent_state(2))
    for learner in (one, other):
        assert torch.equal(learner.actor.flat, learner.target_actor.flat)
        assert torch.equal(learner.critic.flat, learner.target_critic.flat)
    one.update(make_batch(one.spec))
    assert differ(one.agent_state(0), one.agent_state(2))


def test_an_agent_moves_to_a_team_of_another_size():
    source, target = make_learner(), make_learner(make_spec(agents=5))
    source.update(make_batch(source.spec))
    target.update(make_batch(target.spec))
    others = target.agent_state(3)
    target.load_agent(4, source.agent_state(2))
    assert_same_agent(target.agent_state(4), source.agent_state(2), rtol=0, atol=0)
    assert_same_agent(target.agent_state(3), others, rtol=0, atol=0)
    assert target.actor_adam.steps.tolist() == [1, 1, 1, 1, 0]
    assert target.critic_adam.steps.tolist() == [1, 1, 1, 1, 0]
    observation = torch.randn(4, 1, 5)
    there, _, _ = target.act(observation.expand(-1, 5, -1), {})
    here, _, _ = source.act(observation.expand(-1, 3, -1), {})
    torch.testing.assert_close(there[:, 4], here[:, 2])
    # The policy alone: the critic stays.
    policy = {name: parts for name, parts in source.agent_state(0).items() if "actor" in name}
    before = target.critic.flat.clone()
    target.load_agent(0, policy)
    assert torch.equal(target.critic.flat, before)
    assert torch.equal(target.actor.flat[0], source.actor.flat[0])
    with pytest.raises(UserError, match="an agent's weights must fit"):
        target.load_agent(0, make_learner(mixed_spec()).agent_state(0))


def test_frozen_agents_learn_no_more():
    learner = make_learner()
    learner.freeze([0, 2])
    before = [learner.agent_state(i) for i in range(3)]
    learner.update(make_batch(learner.spec))
    for i in (0, 2):
        assert_same_agent(before[i], learner.agent_state(i), rtol=0, atol=0)
    assert differ(before[1], learner.agent_state(1))
    learner.freeze([])
    learner.update(make_batch(learner.spec))
    assert differ(before[0], learner.agent_state(0))


def test_shared_weights_belong_to_nobody():
    learner = make_learner(shared_weights=True)
    for use in (
        lambda: learner.agent_state(0),
        lambda: learner.load_agent(0, {}),
        lambda: learner.freeze([0]),
    ):
        with pytest.raises(UserError, match="with shared_weights no agent has weights of its own"):
            use()


def test_shared_weights_learn_from_the_mean_over_the_agents():
    learner = make_learner(shared_weights=True, clip=1e6)
    assert learner.context_size == 5 + 3
    batch = make_batch(learner.spec)._replace(valid=torch.ones(8, 1, 3, dtype=torch.bool))
    # Everything is over: the goal is the reward.
    batch = batch._replace(terminated=torch.ones_like(batch.terminated))
    context, _ = learner.contexts(batch)
    weights = {name: part[0].requires_grad_() for name, part in learner.critic.unpack(frozen=True).items()}
    x = torch.cat((context, batch.action), dim=-1)
    for layer in range(3):
        x = nn.functional.linear(x, weights[f"head0.layer{layer}.weight"], weights[f"head0.layer{layer}.bias"][0])
        x = x.relu() if layer < 2 else x
    loss = (x.squeeze(-1) - batch.reward).square().mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))])
    metrics = learner.update(batch)
    torch.testing.assert_close(metrics["critic_loss"].mean(), loss.detach())
    torch.testing.assert_close(10 * learner.critic_adam.mean[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": ()}, r"hidden must be one or more widths of at least 1, got \(\)"),
        ({"hidden": (8, 0)}, r"hidden must be one or more widths"),
        ({"actor_lr": 0.0}, "actor_lr must be above 0, got 0.0"),
        ({"critic_lr": float("nan")}, "critic_lr must be above 0, got nan"),
        ({"clip": float("inf")}, "clip must be above 0, got inf"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"discount": 1.5}, "discount must be at least 0 and at most 1, got 1.5"),
        ({"target_rate": 0.0}, "target_rate must be above 0 and at most 1, got 0.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"central_critic": True, "shared_replay": True}, "choose one"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LearnerSettings(**settings)


def test_noise_of_choices_is_a_probability():
    assert make_learner(noise=1.5).settings.noise == 1.5
    with pytest.raises(UserError, match=r"at most 1, got 1\.5"):
        make_learner(make_spec(discrete=True), noise=1.5)
