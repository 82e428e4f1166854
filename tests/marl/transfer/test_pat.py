"""PAT step by step against loops over agents, and in a toy world where it is known who the right teacher is."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.nets import ActionSpace
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.marl.state import join_state, split_state
from fulmen.marl.transfer.base import Experience
from fulmen.marl.transfer.pat import PAT, PATSettings, distance_weights

AGENTS, SIZE, ACTIONS, WORLDS = 4, 5, 2, 6


def make_spec(agents=AGENTS, discrete=False, high=1.0, sizes=None):
    bound = torch.full((agents, ACTIONS), high)
    bounds = {} if discrete else {"low": -bound, "high": bound}
    return TeamSpec(
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=sizes or (SIZE,) * agents,
        action_sizes=(ACTIONS,) * agents,
        discrete=discrete,
        **bounds,
    )


def make_learner(spec=None, memory="none", hidden=(8, 8), **settings):
    memory = MemorySettings(kind=memory, size=8, heads=2)
    return TeamLearner(spec or make_spec(), LearnerSettings(hidden=hidden, memory=memory, **settings))


def make_pat(learner=None, **settings):
    return PAT(learner or make_learner(), PATSettings(**settings))


def make_batch(agents=AGENTS, size=16, steps=1, discrete=False):
    shape = (size, steps, agents)
    action = torch.rand(*shape, ACTIONS) * 2 - 1
    if discrete:
        action = torch.nn.functional.one_hot(action.argmax(-1), ACTIONS).float()
    return Batch(
        observation=torch.randn(size, steps + 1, agents, SIZE),
        action=action,
        reward=torch.randn(shape),
        terminated=torch.rand(shape) < 0.2,
        student=torch.rand(shape) < 0.5,
        valid=torch.ones(shape, dtype=torch.bool),
        state=None,
    )


def live(pat, steps=1, worlds=WORLDS, episode=5):
    """So many training steps from the state that the pat is in; gives all decisions."""
    agents, decisions = pat.learner.num_agents, []
    state = pat.learner.new_state(worlds)
    for step in range(steps):
        observation = torch.randn(worlds, agents, SIZE)
        own, _, state = pat.learner.act(observation, state)
        decision = pat.decide(observation, own, explore=True)
        reward = torch.randn(worlds, agents) + torch.arange(agents)
        ended = torch.full((worlds,), step % episode == episode - 1)
        nobody = torch.zeros(worlds, agents, dtype=torch.bool)
        pat.observe(
            Experience(observation, decision.actions, reward, nobody, ended, observation, student=decision.student)
        )
        decisions.append(decision)
    return decisions


def set_returns(pat, means, deviation=1.0, weight=45.0):
    """Measured returns [N, N] of so many episodes; 45 shrink a gap by 9 tenths."""
    pat.returns.mean = torch.tensor(means, dtype=torch.float32)
    pat.returns.variance = torch.full_like(pat.returns.mean, deviation**2)
    pat.returns.weight = torch.full_like(pat.returns.mean, weight)


def students(pat, steps=1, **options):
    return torch.stack([decision.student for decision in live(pat, steps, **options)]).float()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "sometimes"}, "gate must be one of actor_critic, bandit, .*'sometimes'"),
        ({"epsilon_self": 1.5}, "epsilon_self must be a share from 0 to 1, got 1.5"),
        ({"mode_steps": 0}, "mode_steps must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"gate_lr": -1.0}, "gate_lr must be at least 0"),
        ({"novelty": float("nan")}, "novelty must be a number, got nan"),
        ({"internalise_weight": float("inf")}, "internalise_weight must be at least 0, got inf"),
        ({"gate": "bandit", "follow": "drawn"}, "the bandit chooses one teacher for an episode"),
        ({"gate": "bandit", "mode_steps": 5}, "the bandit chooses one teacher for an episode"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PATSettings(**settings)


def test_students_do_what_the_attention_says_and_others_what_their_policies_say():
    pat = make_pat()
    observation = torch.randn(WORLDS, AGENTS, SIZE)
    own, _, _ = pat.learner.act(observation, {})
    actions, student, attention = pat.decide(observation, own, explore=True)
    said, _, _ = pat.learner.teach(observation, {})
    assert student.any()
    assert not student.all()
    for w in range(WORLDS):
        for i in range(AGENTS):
            expected = own[w, i]
            if student[w, i]:
                expected = sum(attention[w, i, j] * said[w, i, j] for j in range(AGENTS) if j != i)
            torch.testing.assert_close(actions[w, i], expected)


def test_a_drawn_teacher_is_followed_alone_for_mode_steps_and_an_evaluation_mixes():
    torch.manual_seed(0)
    pat = make_pat(follow="drawn", gate="always", epsilon_self=0.0, mode_steps=2)
    observation = torch.randn(400, AGENTS, SIZE)
    own, _, _ = pat.learner.act(observation, {})
    said, _, _ = pat.learner.teach(observation, {})
    mixed = pat.decide(observation, own, explore=False).attention
    assert (mixed > 0).sum() == 400 * AGENTS * (AGENTS - 1)
    actions, student, attention = pat.decide(observation, own, explore=True)
    assert student.all()
    teacher = attention.argmax(-1)
    expected = said.gather(2, teacher[..., None, None].expand(-1, -1, 1, ACTIONS))[:, :, 0]
    torch.testing.assert_close(actions, expected)
    assert torch.equal(attention, one_hot(teacher, AGENTS).float())
    torch.testing.assert_close(attention.mean(0), mixed.mean(0), atol=0.1, rtol=0)
    first, second, third = (d.attention for d in live(make_pat(follow="drawn", mode_steps=2), 3, 200, episode=9))
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize(("gate", "share"), [("always", 0.75), ("random", 0.375), ("never", 0.0)])
@pytest.mark.parametrize("self_for", ["episode", "step"])
def test_a_quarter_of_the_time_is_self_learning_whatever_the_gate_says(gate, share, self_for):
    torch.manual_seed(0)
    pat = make_pat(gate=gate, self_for=self_for)
    seen = students(pat, 60, worlds=64, episode=5)
    assert seen.mean().item() == pytest.approx(share, abs=0.03)
    observation, own = torch.randn(200, AGENTS, SIZE), torch.zeros(200, AGENTS, ACTIONS)
    evaluated = pat.decide(observation, own, explore=False).student.float().mean().item()
    assert evaluated == pytest.approx(
        {"always": 1, "random": 0.5, "never": 0}[gate], abs=0.1 if gate == "random" else 0
    )
    if gate == "always":
        first, second, next_episode = seen[0], seen[1], seen[5]
        assert torch.equal(first, second) is (self_for == "episode")
        assert not torch.equal(first, next_episode)


def test_a_mode_holds_for_mode_steps_and_never_beyond_the_episode():
    torch.manual_seed(0)
    seen = students(make_pat(gate="random", mode_steps=3, epsilon_self=0.0), 8, worlds=32, episode=4)
    same = [torch.equal(seen[t], seen[t + 1]) for t in range(7)]
    assert same == [True, True, False, False, True, True, False]


def test_novelty_makes_students_early_and_fades_and_returns_may_speak_for_the_gate():
    pat = make_pat(novelty=2.0, novelty_frames=100, gate_return_bias=3.0)
    context, attention = torch.randn(AGENTS, SIZE), torch.full((AGENTS, AGENTS), 1 / 3).fill_diagonal_(0)
    torch.testing.assert_close(pat.student_logit(context, attention), torch.full((AGENTS,), 2.0))
    live(pat, 10, worlds=10, episode=100)
    expected = 2 * torch.tensor(-1.0).exp()
    torch.testing.assert_close(pat.student_logit(context, attention), expected.expand(AGENTS))
    set_returns(pat, [[1.0, 2.0, 3.0, 6.0]] * 4)
    pat.returns.mean = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    gap = 0.9 * torch.tensor([2.0, 2 / 3, -2 / 3, -2.0])
    torch.testing.assert_close(pat.student_logit(context, attention), expected + 3 * gap)


def test_measured_returns_draw_the_attention_and_can_be_switched_off():
    observation, own = torch.randn(WORLDS, AGENTS, SIZE), torch.zeros(WORLDS, AGENTS, ACTIONS)
    means = torch.diag(torch.tensor([0.0, 0.0, 0.0, 2.0])) + (1 - torch.eye(4)) * torch.tensor([0.0, 9.0, 0.0, 0.0])
    drawn = {}
    for settings in ({}, {"returns": "pair"}, {"return_bias": "none"}):
        pat = make_pat(bias_scale=2.0, **settings)
        torch.nn.init.zeros_(pat.selector.query)
        set_returns(pat, means.tolist())
        drawn[str(settings)] = pat.decide(observation, own, explore=False).attention[0, 0]
    by_own, by_pair, by_none = drawn.values()
    # The gap of 2 deviations is shrunk by 9 tenths, the one of 9 is cut at 3.
    for weights, best, bias in ((by_own, 3, 1.8), (by_pair, 1, 3.0)):
        raised = torch.tensor(2 * bias).exp()
        assert weights[best].item() == pytest.approx((raised / (raised + 2)).item(), abs=1e-4)
    torch.testing.assert_close(by_none, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]))


def test_beta_is_the_clipped_gap_of_the_attended_teachers():
    pat = make_pat()
    set_returns(pat, torch.diag(torch.tensor([0.0, 0.5, 1.0, 5.0])).tolist(), deviation=2.0)
    batch = make_batch()
    advice, _ = pat.teaching.on_batch(batch)
    attention = pat.attend(advice).detach()
    beta = pat.beta(batch, advice, attention, pat.taught(advice, attention))
    returns = [0.0, 0.5, 1.0, 5.0]
    for b in range(16):
        for i in range(AGENTS):
            gap = sum(float(attention[b, 0, i, j]) * 0.9 * (returns[j] - returns[i]) / 2 for j in range(AGENTS))
            assert beta[b, 0, i].item() == pytest.approx(min(max(gap, 0), 1), abs=1e-5)
    assert (beta[..., 3] == 0).all()
    assert (beta[..., 0] > 0).all()


@pytest.mark.parametrize("kind", ["gap", "q_filter", "constant"])
def test_imitation_is_the_weighted_squared_distance(kind):
    learner = make_learner(make_spec(high=2.0))
    pat = make_pat(learner, internalise=kind, internalise_weight=0.5)
    set_returns(pat, torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0])).tolist())
    batch = make_batch()
    batch.valid[3:, :, 1] = False
    actions = (torch.rand(16, 1, AGENTS, ACTIONS) * 4 - 2).requires_grad_()
    advice, _ = pat.teaching.on_batch(batch)
    attention = pat.attend(advice).detach()
    taught = pat.taught(advice, attention)
    beta = pat.beta(batch, advice, attention, taught)
    loss = pat.actor_loss(batch, actions)
    for i in range(AGENTS):
        terms = [
            beta[b, 0, i] * (((actions[b, 0, i] - taught[b, 0, i]) / 2) ** 2).mean()
            for b in range(16)
            if batch.valid[b, 0, i]
        ]
        torch.testing.assert_close(loss[i], 0.5 * sum(terms) / len(terms))
    loss.sum().backward()
    assert actions.grad.any()
    assert all(parameter.grad is None for parameter in (*learner.parameters(), *pat.selector.parameters()))
    if kind == "q_filter":
        own = torch.stack([advice.actions[:, :, i, i] for i in range(AGENTS)], dim=2)
        better = learner.value(batch, taught) > learner.value(batch, own)
        assert torch.equal(beta, better.float())
    if kind == "constant":
        assert (beta == 1).all()


def test_no_imitation_if_none_is_asked_for():
    assert make_pat(internalise="none").actor_loss(make_batch(), torch.zeros(16, 1, AGENTS, ACTIONS)) is None


def test_distance_weights_leave_out_columns_behind_an_agents_size():
    low, high = torch.tensor([[-1.0, -2.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    spec = TeamSpec(agents=("a", "b"), observation_sizes=(1, 1), action_sizes=(2, 1), low=low, high=high)
    torch.testing.assert_close(distance_weights(spec), torch.tensor([[0.5, 0.125], [4.0, 0.0]]))


def test_the_selectors_gradient_reaches_the_selector_alone():
    # A gate that does not learn.
    pat = make_pat(return_bias="learned", gate="always")
    set_returns(pat, torch.diag(torch.arange(4.0)).tolist())
    weights = {name: tensor.clone() for name, tensor in pat.learner.state_dict().items()}
    gate = {name: tensor.clone() for name, tensor in pat.gate.state_dict().items()}
    batch = make_batch()
    advice, _ = pat.teaching.on_batch(batch)
    attention = pat.attend(advice)
    value = pat.learner.value(batch, pat.taught(advice, attention))
    others = ~torch.eye(AGENTS, dtype=torch.bool)
    entropy = -(attention[..., others] * attention[..., others].log()).sum(-1) / AGENTS
    expected = torch.autograd.grad(-(value.mean() + 0.1 * entropy.mean()), list(pat.selector.parameters()))
    before = [parameter.detach().clone() for parameter in pat.selector.parameters()]
    pat.update(batch)
    for parameter, gradient, old in zip(pat.selector.parameters(), expected, before, strict=True):
        assert gradient.any()
        # Adam's first step is the learning rate long in every direction.
        moved = old - pat.settings.selector_lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), moved)
    assert all(parameter.grad is None for parameter in (*pat.learner.parameters(), *pat.gate.parameters()))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pat.learner.state_dict().items())
    assert all(torch.equal(tensor, gate[name]) for name, tensor in pat.gate.state_dict().items())


def test_attention_stays_even_until_the_critics_tell_teachers_apart():
    torch.manual_seed(0)
    batch, told = make_batch(size=64), {}
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        pat = make_pat(selector_entropy=weight, selector_lr=1e-2)
        for _ in range(100):
            told[weight] = pat.update(batch)["attention_entropy"]
    assert told[1.0] > 0.99 * torch.tensor(AGENTS - 1.0).log()
    assert told[0.0] < told[1.0] - 0.02


@pytest.mark.parametrize("kind", ["return", "critic_gain", "value_gain"])
def test_what_the_gate_learns_from(kind):
    pat, batch, told = make_pat(student_reward=kind), make_batch(), {}
    torch.nn.init.normal_(pat.gate.net.flat)
    learner, losses = pat.learner, pat.gate.losses
    advice, following = pat.teaching.on_batch(batch)
    taught = pat.taught(advice, pat.attend(advice)).detach()
    if kind == "return":
        expected = batch.reward + 0.95 * torch.where(batch.terminated, 0, pat.gate.value(following))
    elif kind == "critic_gain":
        own = torch.stack([advice.actions[:, :, i, i] for i in range(AGENTS)], dim=2)
        gain = learner.value(batch, taught) - learner.value(batch, own)
        expected = torch.where(batch.student, gain, 0)
    else:
        value = learner.value(batch, batch.action)
        expected = (value > value.mean((0, 1))).float()
    pat.gate.losses = lambda *args: told.update(args=args) or losses(*args)
    pat.update(batch)
    context, student, target, valid, entropy = told["args"]
    torch.testing.assert_close(target, expected.detach())
    assert torch.equal(context, batch.observation[:, :-1])
    assert student is batch.student
    assert valid is batch.valid
    assert entropy == 0.01


def test_who_is_frozen_keeps_its_gate():
    pat = make_pat()
    pat.learner.freeze([0, 3])
    before = pat.gate.net.flat.detach().clone()
    pat.update(make_batch())
    moved = (pat.gate.net.flat != before).any(dim=1).view(2, AGENTS)
    assert moved.tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("internalise", ["constant", "gap"])
def test_with_the_bandit_an_agent_imitates_whom_it_follows(internalise):
    pat, batch = make_pat(gate="bandit", returns="pair", internalise=internalise), make_batch()
    # Agent 0 earned most by following 2; the others follow themselves.
    set_returns(pat, [[0.0, 1.0, 90.0, 1.0], *([9.0 if i == j else 0.0 for j in range(4)] for i in (1, 2, 3))])
    actions = torch.rand(16, 1, AGENTS, ACTIONS)
    said, _ = pat.learner.cross_policy(batch)
    expected = (actions[:, :, 0] - said[:, :, 0, 2]).square().mean()
    torch.testing.assert_close(pat.actor_loss(batch, actions), torch.stack([expected, *torch.zeros(3)]))


def test_permuting_the_agents_permutes_what_they_do():
    pat, moved = make_pat(gate="always"), make_pat(gate="always")
    order = torch.tensor([2, 0, 3, 1])
    for place, agent in enumerate(order.tolist()):
        moved.learner.load_agent(place, pat.learner.agent_state(agent))
    moved.load_selector(pat.selector_state())
    means = torch.randn(AGENTS, AGENTS)
    set_returns(pat, means.tolist())
    set_returns(moved, means[order][:, order].tolist())
    observation = torch.randn(WORLDS, AGENTS, SIZE)
    own = torch.zeros(WORLDS, AGENTS, ACTIONS)
    here, there = pat.decide(observation, own, explore=False), moved.decide(observation[:, order], own, explore=False)
    torch.testing.assert_close(there.actions, here.actions[:, order])
    torch.testing.assert_close(there.attention, here.attention[:, order][:, :, order])


def test_the_bandit_follows_the_measured_better_teacher_for_an_episode():
    torch.manual_seed(0)
    pat = make_pat(gate="bandit", epsilon_self=0.25)
    means = torch.zeros(AGENTS, AGENTS)
    means[0, 2] = means[1, 3] = means[2, 2] = means[3, 0] = 9.0
    set_returns(pat, means.tolist())
    observation = torch.randn(1, AGENTS, SIZE)
    own, _, _ = pat.learner.act(observation, {})
    actions, student, attention = pat.decide(observation, own, explore=False)
    assert student.tolist() == [[True, True, False, True]]
    said, _, _ = pat.learner.teach(observation, {})
    torch.testing.assert_close(actions[0], torch.stack((said[0, 0, 2], said[0, 1, 3], own[0, 2], said[0, 3, 0])))
    assert attention[0, 0].tolist() == [0, 0, 1, 0]
    decisions = live(pat, 4, worlds=200, episode=4)
    share = torch.stack([decision.student for decision in decisions]).float().mean((0, 1))
    torch.testing.assert_close(share, torch.tensor([0.75, 0.75, 0.0, 0.75]), atol=0.09, rtol=0)
    assert all(torch.equal(decision.student, decisions[0].student) for decision in decisions)


def test_the_bandit_finds_out_who_is_worth_following():
    torch.manual_seed(0)
    pat = make_pat(gate="bandit")
    right = torch.tensor([3, 3, 3, 3])
    for step in range(120):
        observation = torch.randn(WORLDS, AGENTS, SIZE)
        own, _, _ = pat.learner.act(observation, {})
        decision = pat.decide(observation, own, explore=True)
        followed = torch.where(decision.student, decision.attention.argmax(-1), torch.arange(AGENTS))
        reward = (followed == right).float() + torch.randn(WORLDS, AGENTS) * 0.5
        nobody, ended = torch.zeros(WORLDS, AGENTS, dtype=torch.bool), torch.full((WORLDS,), step % 4 == 3)
        pat.observe(Experience(observation, own, reward, nobody, ended, observation, decision.student))
    assert pat.bandit.best().tolist() == [3, 3, 3, 3]


def test_own_returns_come_from_the_steps_that_were_decided():
    pat = make_pat(gate="never")
    observation, zeros = torch.zeros(1, AGENTS, SIZE), torch.zeros(1, AGENTS, ACTIONS)
    nobody, ended = torch.zeros(1, AGENTS, dtype=torch.bool), torch.tensor([True])
    step = Experience(observation, zeros, torch.ones(1, AGENTS), nobody, ended, observation, nobody)
    pat.observe(step)
    assert (pat.returns.weight == 0).all()
    pat.decide(observation, zeros, explore=False)
    pat.observe(step)
    assert (pat.returns.weight == 0).all()
    pat.decide(observation, zeros, explore=True)
    pat.observe(step)
    pat.observe(step)
    assert torch.equal(pat.returns.weight, torch.eye(AGENTS))
    assert pat.returns.mean.diagonal().tolist() == [1.0] * AGENTS


@pytest.mark.parametrize(
    ("settings", "memory", "discrete"),
    [
        ({}, "none", False),
        ({"gate": "bandit", "returns": "pair"}, "lstm", False),
        ({"student_reward": "value_gain", "mode_steps": 3, "heads": 2}, "lightning", False),
        ({"student_reward": "critic_gain", "internalise": "q_filter", "shared_gate": True}, "none", True),
    ],
)
def test_a_pat_that_took_back_its_state_goes_on_identically(settings, memory, discrete):
    learner = make_learner(make_spec(discrete=discrete), memory=memory)
    steps = 1 if memory == "none" else 3

    def lesson(pat):
        batch = make_batch(discrete=discrete, steps=steps)
        pat.actor_loss(batch, batch.action)
        return pat.update(batch)

    pat, other = make_pat(learner, **settings), make_pat(learner, **settings)
    live(pat, 7)
    lesson(pat)
    tensors, plain = split_state(pat.state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other.load_state_dict(join_state(tensors, json.loads(json.dumps(plain))))
    told = []
    for each in (pat, other):
        torch.manual_seed(7)
        decisions = live(each, 9)
        told.append([lesson(each), lesson(each), live(each, 2), decisions])
    first, second = told
    assert first[:2] == second[:2]
    for one, two in zip(first[2] + first[3], second[2] + second[3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    theirs = split_state(other.state_dict())[0]
    assert all(torch.equal(theirs[name], tensor) for name, tensor in split_state(pat.state_dict())[0].items())


def test_an_evaluation_changes_nothing_in_training():
    pat, observation = make_pat(make_learner(memory="lstm")), torch.randn(3, AGENTS, SIZE)
    live(pat, 3)
    before = {name: tensor.clone() for name, tensor in split_state(pat.state_dict())[0].items()}
    pat.begin(explore=False)
    own = torch.zeros(3, AGENTS, ACTIONS)
    first = pat.decide(observation, own, explore=False)
    pat.decide(observation, own, explore=False)
    pat.begin(explore=False)
    again = pat.decide(observation, own, explore=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    after = split_state(pat.state_dict())[0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_memory_of_training_ends_with_the_episode():
    pat, observation = make_pat(make_learner(memory="lstm"), return_bias="none"), torch.randn(1, AGENTS, SIZE)
    own, nobody = torch.zeros(1, AGENTS, ACTIONS), torch.zeros(1, AGENTS, dtype=torch.bool)
    seen = []
    for ended in (False, True, False):
        seen.append(pat.decide(observation, own, explore=True).attention)
        over = torch.tensor([ended])
        pat.observe(Experience(observation, own, own[..., 0], nobody, over, observation, nobody))
    assert not torch.allclose(seen[0], seen[1])
    torch.testing.assert_close(seen[2], seen[0])


def test_new_worlds_forget_unfinished_episodes_but_not_what_was_learned():
    pat = make_pat(gate="random", mode_steps=100)
    live(pat, 7)
    modes = live(pat, 1, episode=9)[0].student
    weight = pat.returns.weight.clone()
    pat.begin(explore=True)
    assert torch.equal(pat.returns.weight, weight)
    # An episode of one step, in which each agent is in one mode only.
    (decision,) = live(pat, 1, episode=1)
    assert not torch.equal(decision.student, modes)
    added = pat.returns.weight - weight * 0.99 ** (pat.returns.weight - weight)
    torch.testing.assert_close(added.diagonal(), (~decision.student).sum(0).float(), rtol=0, atol=0.3)
    (decision,) = live(pat, 1, worlds=2)
    assert decision.student.shape == (2, AGENTS)


def test_a_selector_moves_from_a_team_of_four_to_one_of_eight():
    pat, larger = make_pat(), make_pat(make_learner(make_spec(agents=8)))
    pat.update(make_batch())
    larger.load_selector(pat.selector_state())
    assert torch.equal(larger.selector.query, pat.selector.query)
    decision = live(larger, 1)[0]
    assert decision.attention.shape == (WORLDS, 8, 8)
    torch.testing.assert_close(decision.attention.sum(-1), torch.ones(WORLDS, 8))
    larger.update(make_batch(agents=8))
    assert not torch.equal(larger.selector.query, pat.selector.query)
    wider = make_pat(make_learner(make_spec(sizes=(SIZE + 1,) * AGENTS)))
    with pytest.raises(UserError, match="context 5, here is 6"):
        wider.load_selector(pat.selector_state())


def test_a_selector_of_advice_moves_to_other_networks_and_learns_no_more_at_a_rate_of_zero():
    pat = make_pat(keys="advice")
    pat.update(make_batch())
    larger = make_pat(make_learner(make_spec(agents=8), hidden=(24,)), keys="advice", selector_lr=0.0)
    larger.load_selector(pat.selector_state())
    larger.update(make_batch(agents=8))
    assert torch.equal(larger.selector.query, pat.selector.query)
    with pytest.raises(UserError, match="the same keys"):
        make_pat().load_selector(pat.selector_state())


def test_a_newcomer_begins_anew():
    pat = make_pat(novelty=1.0, novelty_frames=10)
    live(pat, 20)
    pat.update(make_batch())
    pat.renew_agent(2)
    assert (pat.returns.weight[2] == 0).all()
    assert (pat.returns.weight[:, 2] == 0).all()
    assert pat.returns.weight[0, 0] > 0
    assert pat.frames.tolist() == [120, 120, 0, 120]
    attention = torch.zeros(AGENTS, AGENTS)
    assert pat.student_logit(torch.ones(AGENTS, SIZE), attention)[2] == 1.0


def test_an_agent_alone_says_so_once_and_acts_by_itself():
    pat = make_pat(make_learner(make_spec(agents=1)))
    own = torch.rand(WORLDS, 1, ACTIONS)
    with pytest.warns(UserWarning, match="nobody in this team can teach"):
        first = pat.decide(torch.randn(WORLDS, 1, SIZE), own, explore=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pat.decide(torch.randn(WORLDS, 1, SIZE), own, explore=False)
    assert torch.equal(first.actions, own)
    assert not first.student.any()
    assert first.attention is None
    assert live(pat, 3)[-1].attention is None
    batch = make_batch(agents=1)
    assert pat.actor_loss(batch, batch.action) is None
    assert pat.update(batch) == {}


def test_who_has_no_teacher_is_never_a_student():
    pat = make_pat(make_learner(make_spec(sizes=(SIZE, SIZE, SIZE - 1, SIZE))), gate="always", epsilon_self=0.0)
    assert students(pat, 3).mean((0, 1)).tolist() == [1.0, 1.0, 0.0, 1.0]
    batch = make_batch()
    assert pat.actor_loss(batch, batch.action) is not None
    pat.update(batch)


def test_mixing_weights_is_warned_of_or_refused():
    with pytest.warns(UserWarning, match="weights that began apart"):
        make_pat(value_space="parameters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pat = make_pat(make_learner(equal_start=True), value_space="parameters")
    with pytest.raises(UserError, match="nothing to mix"):
        make_pat(make_learner(shared_weights=True), value_space="parameters")
    with pytest.raises(UserError, match=r"weights of a memory \(lstm\)"):
        make_pat(make_learner(memory="lstm", equal_start=True), value_space="parameters")
    # Equal weights mix to themselves, so that students do what they would do anyway.
    observation = torch.randn(WORLDS, AGENTS, SIZE)
    own, _, _ = pat.learner.act(observation, {})
    torch.testing.assert_close(pat.decide(observation, own, explore=True).actions, own)
    assert pat.update(make_batch())["taught_value"] != 0


@pytest.mark.parametrize("memory", ["none", "lightning"])
@pytest.mark.parametrize("discrete", [False, True])
def test_learner_and_pat_learn_together(memory, discrete):
    learner = make_learner(make_spec(discrete=discrete), memory=memory, batch=8)
    pat = make_pat(learner)
    live(pat, 12)
    looks, on_batch = [], pat.teaching.on_batch
    pat.teaching.on_batch = lambda batch: looks.append(batch) or on_batch(batch)
    batch = make_batch(steps=1 if memory == "none" else 4, discrete=discrete)
    before = pat.selector.query.detach().clone()
    learner.update(batch, pat.actor_loss)
    metrics = pat.update(batch)
    assert len(looks) == 1
    assert all(abs(value) < 1e6 for value in metrics.values())
    assert not torch.equal(pat.selector.query, before)
    assert (pat.selector.query - before).isfinite().all()


class ToyLearner(nn.Module):
    """Teacher j always does action j; whom student i should follow depends on the sign that it sees.

    Or on nothing that it sees, if it is `blind`. A stand-in for `TeamLearner` in which the critics are right from the
    beginning.
    """

    def __init__(self, spec, blind=False):
        super().__init__()
        self.learning = range(AGENTS)
        self.blind, self.space = blind, ActionSpace(spec, 0.1, 1.0, "cpu")
        self.spec, self.num_agents, self.context_size, self.feature_size = spec, AGENTS, 2 * AGENTS, AGENTS
        self.settings = SimpleNamespace(discount=0.9, shared_weights=False, memory=SimpleNamespace(kind="none"))
        self.scale = nn.Parameter(torch.ones(()))
        angle = torch.arange(AGENTS) * torch.pi / 2
        self.does = torch.stack((angle.cos(), angle.sin()), dim=-1) * 0.9

    def right(self, observation):
        """[..., N] the right teacher."""
        return (torch.arange(AGENTS) + torch.where((observation[..., 0] > 0) | self.blind, 1, 2)) % AGENTS

    def contexts(self, batch):
        positive = (batch.observation[..., :1] > 0).float()
        context = torch.cat((positive * torch.eye(AGENTS), (1 - positive) * torch.eye(AGENTS)), dim=-1)
        context = torch.zeros_like(context) if self.blind else context
        return context[:, :-1], context[:, 1:]

    def new_state(self, num_worlds, teachers=False):
        return {}

    def teach(self, observation, state):
        lead = (*observation.shape[:-1], -1, -1)
        return self.does.expand(lead), torch.eye(AGENTS).expand(lead), state

    def cross_policy(self, batch):
        return self.teach(batch.observation[:, :-1], {})[:2]

    def value(self, batch, actions):
        wanted = self.does[self.right(batch.observation[:, :-1])]
        return -self.scale * (actions - wanted).square().sum(-1)

    def clamp(self, actions):
        return actions.clamp(-1, 1)


@pytest.mark.parametrize("blind", [False, True], ids=["by what it sees", "by who it is"])
def test_attention_finds_the_right_teacher_in_a_few_hundred_updates(blind):
    torch.manual_seed(0)
    learner = ToyLearner(make_spec(), blind)
    pat = PAT(learner, PATSettings(selector_lr=1e-2))
    for _ in range(250):
        pat.update(make_batch(size=32))
    observation = torch.randn(64, AGENTS, SIZE)
    attention = pat.decide(observation, torch.zeros(64, AGENTS, ACTIONS), explore=False).attention
    right = attention.gather(-1, learner.right(observation)[..., None])
    assert right.mean() > 0.85
