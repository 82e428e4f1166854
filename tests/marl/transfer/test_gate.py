"""The student actor-critic, measured returns and the bandit against sums written out."""

import pytest
import torch
from torch.nn.functional import linear

from fulmen.marl.transfer.base import Experience
from fulmen.marl.transfer.gate import Bandit, Held, Returns, StackedPerceptron, StudentActorCritic, agent_means


def make_gate(agents=3, context=2, shared=False, lr=1e-2):
    return StudentActorCritic(agents, context, hidden=16, shared=shared, lr=lr, device=torch.device("cpu"))


def experience(reward, student=None, ended=False):
    worlds, agents = reward.shape
    student = torch.zeros(worlds, agents, dtype=torch.bool) if student is None else student
    nothing = torch.zeros(worlds, agents, 1)
    ended = torch.full((worlds,), ended) if isinstance(ended, bool) else ended
    return Experience(nothing, nothing, reward, student & False, ended, nothing, student)


def measured(means, deviations, weight=50.0):
    """Returns with these means and deviations [N, N], each of `weight` episodes."""
    means = torch.tensor(means)
    returns = Returns(len(means))
    returns.mean, returns.variance = means, torch.tensor(deviations).expand_as(means).square()
    returns.weight = torch.full_like(means, weight)
    return returns


def test_means_count_valid_steps_only():
    x = torch.tensor([[[1.0, 5.0]], [[3.0, torch.nan]]])
    valid = torch.tensor([[[True, True]], [[True, False]]])
    assert agent_means(x, valid).tolist() == [2.0, 5.0]
    assert agent_means(x, valid & False).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [3, 1])
def test_stacked_perceptron_equals_its_networks(count):
    net = StackedPerceptron(count, (2, 5, 4))
    torch.nn.init.normal_(net.flat)
    x = torch.randn(7, 6, 3, 2)
    y = net(x)
    for agent in range(3):
        row = net.row(agent if count > 1 else 0)
        hidden = linear(x[:, :, agent], row["layer0.weight"], row["layer0.bias"][0]).relu()
        torch.testing.assert_close(y[:, :, agent], linear(hidden, row["layer1.weight"], row["layer1.bias"][0]))


def test_a_new_perceptron_says_zero_and_renewing_touches_one():
    net = StackedPerceptron(3, (2, 5, 1))
    assert (net(torch.randn(4, 3, 2)) == 0).all()
    torch.nn.init.normal_(net.flat)
    before = net.flat.detach().clone()
    net.renew(1)
    assert (net.flat[1] != before[1]).any()
    assert torch.equal(net.flat[[0, 2]], before[[0, 2]])
    assert (net(torch.randn(4, 3, 2))[:, 1] == 0).all()


def test_losses_equal_the_formulas():
    gate = make_gate(agents=2)
    torch.nn.init.normal_(gate.net.flat, std=0.5)
    context, target = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2)
    student, valid = torch.rand(6, 1, 2) < 0.5, torch.ones(6, 1, 2, dtype=torch.bool)
    valid[0, 0, 1] = False
    policy_loss, value_loss, entropy = gate.losses(context, student, target, valid, entropy_weight=0.3)
    for agent in range(2):
        rows = [b for b in range(6) if valid[b, 0, agent]]
        value, logit = gate.value(context)[rows, 0, agent], gate.logit(context)[rows, 0, agent]
        goal, mode = target[rows, 0, agent], student[rows, 0, agent]
        advantage = goal - value
        advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
        p = logit.sigmoid()
        h = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
        expected = -(advantage * torch.where(mode, p, 1 - p).log()).mean() - 0.3 * h
        torch.testing.assert_close(policy_loss[agent], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value_loss[agent], (goal - value).square().mean())
        torch.testing.assert_close(entropy[agent], h)


@pytest.mark.parametrize("shared", [False, True])
def test_the_gate_learns_in_which_contexts_to_be_a_student(shared):
    torch.manual_seed(0)
    gate = make_gate(shared=shared, lr=5e-2)
    for _ in range(60):
        context = torch.randn(64, 1, 3, 2)
        # Nearly all are students, as in a replay that an earlier gate filled.
        student = torch.rand(64, 1, 3) < 0.8
        target = torch.where(student == (context[..., 0] > 0), 1.0, 0.0)
        policy_loss, value_loss, _ = gate.losses(context, student, target, torch.ones_like(student))
        gate.update(policy_loss, value_loss, range(3))
    chance = gate.logit(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[:, None].expand(-1, 3, -1)).sigmoid()
    assert (chance[0] > 0.8).all()
    assert (chance[1] < 0.2).all()


@pytest.mark.parametrize("certain", [True, False])
def test_replayed_steps_push_no_mode_beyond_the_limit_and_the_gate_turns_back(certain):
    gate = make_gate()
    gate.net.unpack(frozen=True)["layer1.bias"][:3].fill_(5.0 if certain else -5.0)
    context, student = torch.ones(32, 1, 3, 2), torch.arange(32).view(-1, 1, 1).expand(32, 1, 3) % 2 == 0
    for pays, moves in ((certain, False), (not certain, True)):
        target = (student == pays).float()
        policy_loss, value_loss, _ = gate.losses(context, student, target, torch.ones_like(student), 0.0)
        (grad,) = torch.autograd.grad(policy_loss.sum(), gate.net.flat, retain_graph=True)
        assert grad.any().item() is moves
    gate.update(policy_loss, value_loss, range(3))
    assert (gate.logit(context).abs() < 5).all()


def test_renewing_an_agent_begins_its_gate_anew_but_not_a_shared_one():
    for shared in (False, True):
        gate = make_gate(shared=shared)
        torch.nn.init.normal_(gate.net.flat)
        before = gate.logit(torch.ones(3, 2))
        gate.renew_agent(1)
        after = gate.logit(torch.ones(3, 2))
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert (after[1] == (before[1] if shared else 0)).all()


def test_returns_are_means_weighed_by_squared_shares():
    torch.manual_seed(1)
    # A window this wide forgets nothing.
    returns, episodes = Returns(3, window=10**9), []
    for _ in range(6):
        total, share = torch.zeros(2, 3), torch.zeros(2, 3, 3)
        for step in range(4):
            reward, student = torch.randn(2, 3), torch.rand(2, 3) < 0.5
            attention = torch.rand(2, 3, 3).masked_fill(torch.eye(3, dtype=torch.bool), 0)
            attention = attention / attention.sum(-1, keepdim=True)
            total += reward
            share += torch.where(student[..., None], attention, torch.eye(3)) / 4
            returns.observe(experience(reward, student, ended=step == 3), attention)
        episodes += [(total[w], share[w]) for w in range(2)]
    for i in range(3):
        for j in range(3):
            weight = torch.tensor([share[i, j] ** 2 for _, share in episodes])
            value = torch.tensor([total[i] for total, _ in episodes])
            mean = (weight * value).sum() / weight.sum()
            variance = (weight * (value - mean) ** 2).sum() / weight.sum()
            torch.testing.assert_close(returns.weight[i, j], weight.sum(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(returns.mean[i, j], mean, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(returns.variance[i, j], variance, rtol=1e-3, atol=1e-5)


def test_episodes_that_nobody_decided_count_for_nobody_and_worlds_end_apart():
    returns = Returns(2, window=10**9)
    returns.observe(experience(torch.full((1, 2), 9.0), ended=True), None)
    assert (returns.weight == 0).all()
    own = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).expand(2, 2, 2)
    returns.observe(experience(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ended=torch.tensor([True, False])), own)
    assert returns.mean.diagonal().tolist() == [1.0, 2.0]
    returns.observe(experience(torch.ones(2, 2), ended=torch.tensor([False, True])), own)
    torch.testing.assert_close(returns.mean.diagonal(), torch.tensor([2.5, 3.5]))
    returns.begin()
    returns.observe(experience(torch.full((2, 2), 2.5), ended=True), own)
    assert returns.mean[0, 0] == pytest.approx(2.5)


def test_a_mean_forgets_what_lies_outside_its_window():
    returns, none = Returns(1, window=10), torch.zeros(1, 1, 1)
    for value in [0.0] * 50 + [1.0] * 10:
        returns.observe(experience(torch.full((1, 1), value), ended=True), none)
    # The share of the last 10 of equally many steps, each of which keeps 9 tenths.
    assert returns.mean.item() == pytest.approx(1 - 0.9**10, abs=0.01)


def test_gap_in_deviations_of_single_episodes():
    returns = measured([[1.0, 4.0], [7.0, 3.0]], [[1.0, 2.0], [3.0, 1.0]])
    shrink = 50 / 55
    own = returns.gap("own")
    assert own[0, 1].item() == pytest.approx(shrink * (3 - 1) / 1)
    assert own[1, 0].item() == pytest.approx(shrink * (1 - 3) / 1)
    pair = returns.gap("pair")
    assert pair[0, 1].item() == pytest.approx(shrink * (4 - 1) / ((4 + 1) / 2) ** 0.5)
    assert pair[1, 0].item() == pytest.approx(shrink * (7 - 3) / ((9 + 1) / 2) ** 0.5)
    assert (own.diagonal() == 0).all()
    assert (pair.diagonal() == 0).all()


def test_no_gap_without_a_difference_or_a_measurement():
    assert (measured([[2.0, 2.0], [2.0, 2.0]], [[0.0]]).gap() == 0).all()
    unmeasured = measured([[1.0, 9.0], [9.0, 1.0]], [[1.0]])
    unmeasured.weight = torch.tensor([[50.0, 0.0], [50.0, 50.0]])
    assert unmeasured.gap("pair")[0, 1] == 0
    assert unmeasured.gap("pair")[1, 0] > 0
    unmeasured.weight = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert (unmeasured.gap("pair") == 0).all()
    assert Returns(3).gap().isfinite().all()


def test_the_gap_follows_what_is_measured():
    returns = measured([[1.0, 1.0], [1.0, 9.0]], [[1.0]])
    before = returns.gap()
    assert returns.gap() is before
    returns.observe(experience(torch.tensor([[90.0, 1.0]]), ended=True), torch.zeros(1, 2, 2))
    assert returns.gap()[0, 1] < before[0, 1]
    returns.load_state_dict(measured([[1.0, 1.0], [1.0, 1.0]], [[1.0]]).state_dict())
    assert (returns.gap() == 0).all()
    returns.mean = torch.tensor([[1.0, 1.0], [1.0, 9.0]])
    assert returns.gap()[0, 1] > 0
    returns.renew_agent(1)
    assert (returns.gap() == 0).all()


def test_spread_is_the_deviation_over_all_episodes():
    returns = measured([[0.0, 2.0], [1.0, 1.0]], [[3.0, 3.0], [2.0, 2.0]])
    torch.testing.assert_close(returns.spread(), torch.tensor([10.0**0.5, 2.0]))


def test_renewing_an_agent_forgets_its_row_and_its_column():
    returns = measured([[1.0, 2.0], [3.0, 4.0]], [[1.0]])
    returns.renew_agent(1)
    assert returns.weight.tolist() == [[50.0, 0.0], [0.0, 0.0]]
    assert returns.mean.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_bandit_follows_the_teacher_that_is_measured_better():
    teachers = ~torch.eye(3, dtype=torch.bool)
    returns = measured([[0.0, 1.0, 5.0], [2.0, 6.0, 1.0], [3.0, 1.0, 0.0]], [[1.0]])
    bandit = Bandit(returns, teachers)
    assert bandit.best().tolist() == [2, 1, 0]
    drawn = bandit.draw(200)
    assert (drawn.float() == torch.tensor([2.0, 1.0, 0.0])).float().mean() > 0.95
    # Nearly equal means are still told apart by trying.
    close = Bandit(measured([[0.0, 0.1], [0.1, 0.0]], [[5.0]]), teachers[:2, :2]).draw(300)
    assert ((close.float().mean(0) - 0.5).abs() < 0.2).all()


def test_the_bandit_tries_what_is_untried_first_and_trusts_nothing_unmeasured():
    teachers = ~torch.eye(3, dtype=torch.bool)
    teachers[2] = False
    returns = measured([[9.0, 5.0, 0.0]] * 3, [[1.0]])
    returns.weight[:, 2] = 0
    bandit = Bandit(returns, teachers)
    assert (bandit.draw(50)[:, :2] == 2).all()
    assert bandit.best().tolist() == [0, 0, 2]
    nobody = Bandit(Returns(3), teachers)
    assert nobody.best().tolist() == [0, 1, 2]
    assert (nobody.draw(50)[:, 2] == 2).all()
    assert nobody.draw(50)[:, 0].unique().tolist() == [0, 1, 2]


def test_choices_hold_for_their_steps_and_end_with_the_episode():
    held, no, yes = Held(), torch.tensor([False, False]), torch.tensor([False, True])
    seen = []
    for step in range(5):
        fresh = torch.full((2, 1), step)
        seen.append((held.hold("a", fresh, 2).flatten().tolist(), held.hold("b", fresh).flatten().tolist()))
        held.observe(yes if step == 2 else no)
    assert seen == [([0, 0], [0, 0]), ([0, 0], [0, 0]), ([2, 2], [0, 0]), ([2, 3], [0, 3]), ([4, 3], [0, 3])]
    other = Held()
    other.load_state_dict(held.state_dict(), torch.device("cpu"))
    assert other.hold("a", torch.full((2, 1), 9), 2).flatten().tolist() == [4, 9]
    held.begin()
    assert held.hold("b", torch.full((3, 1), 7)).flatten().tolist() == [7, 7, 7]


def test_returns_come_back_from_their_state_in_the_middle_of_an_episode():
    returns, own = Returns(2), torch.zeros(1, 2, 2)
    returns.observe(experience(torch.ones(1, 2)), own)
    other = Returns(2)
    other.load_state_dict(returns.state_dict())
    for measure in (returns, other):
        measure.observe(experience(torch.ones(1, 2), ended=True), own)
    assert other.mean.diagonal().tolist() == [2.0, 2.0]
    assert torch.equal(other.mean, returns.mean)
