"""LeCTR's online variant against oracles that look at one world, one student and one teacher at a time."""

import json

import pytest
import torch
from torch.distributions import Bernoulli, Categorical

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.marl.state import join_state, split_state
from fulmen.marl.transfer.base import Experience
from fulmen.marl.transfer.lectr import Advice, LeCTR, LeCTRSettings

CHOICES = 3  # of the discrete team, and the anchors of the continuous one


def make(agents=3, *, discrete=False, sizes=None, learner=None, **settings):
    torch.manual_seed(0)
    bounds = {"low": -torch.ones(agents, 2), "high": 2 * torch.ones(agents, 2)}
    spec = TeamSpec(
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=sizes or (4,) * agents,
        action_sizes=(CHOICES if discrete else 2,) * agents,
        discrete=discrete,
        **({} if discrete else bounds),
    )
    learner = TeamLearner(spec, LearnerSettings(hidden=(16,), **(learner or {})))
    return LeCTR(learner, LeCTRSettings(**{"hidden": 16, "anchors": CHOICES} | settings))


def last(net):
    """Weight and bias of a network's last layer, [N, ...] each, as views."""
    parts = net.unpack(frozen=True)
    last = f"layer{len(net.layers) - 1}"
    return parts[f"{last}.weight"], parts[f"{last}.bias"]


def force(transfer, *, ask=None, say=None):
    """Make every student ask or not, and every teacher choose one thing, whatever they see."""
    if ask is not None:
        last(transfer.student)[1].fill_(100.0 if ask else -100.0)
    if say is not None:
        last(transfer.teacher)[1][..., say] += 100.0


def unlike(transfer):
    """Give the networks of the advising level something to say: they begin with zeros in the last layer."""
    torch.manual_seed(1)
    for net in (transfer.student, transfer.teacher, transfer.critic):
        last(net)[0].normal_(std=0.5)


def step(transfer, worlds=5, ended=False):
    """Decide and live one step; gives the decision and the step."""
    spec = transfer.learner.spec
    observation = torch.randn(worlds, spec.num_agents, 4)
    own, _, _ = transfer.learner.act(observation, {})
    decision = transfer.decide(observation, own, explore=True)
    lived = Experience(
        observation=observation,
        action=transfer.learner.explore(decision.actions),
        reward=torch.randn(worlds, spec.num_agents),
        terminated=torch.rand(worlds, spec.num_agents) < 0.3,
        ended=torch.full((worlds,), ended),
        next_observation=torch.randn_like(observation),
        student=decision.student,
    )
    transfer.observe(lived)
    return decision, lived


def q(learner, teacher, seen, action):
    """Critic `teacher`'s value of one action at one observation, asked by putting both before everybody."""
    agents = learner.num_agents
    flags = torch.zeros(1, 1, agents, dtype=torch.bool)
    actions = action.expand(1, 1, agents, -1)
    batch = Batch(seen.expand(1, 2, agents, -1), actions, flags.float(), flags, flags, ~flags, None)
    return learner.value(batch, actions)[0, 0, teacher].item()


def test_everybody_advised_does_what_the_medoid_teacher_would_do():
    transfer = make(agents=2)
    force(transfer, ask=True, say=1)
    decision, lived = step(transfer)
    assert decision.student.all()
    assert decision.attention.tolist() == [[[0, 1], [1, 0]]] * 5
    swapped, _, _ = transfer.learner.act(lived.observation.flip(1), {})
    torch.testing.assert_close(decision.actions, swapped.flip(1))


def test_a_fixed_action_can_be_advised():
    transfer = make(agents=2)
    force(transfer, ask=True, say=3)
    decision, _ = step(transfer)
    assert torch.equal(decision.actions, transfer.fixed[:, 1].expand(5, -1, -1))
    discrete = make(agents=2, discrete=True)
    force(discrete, ask=True, say=4)
    decision, _ = step(discrete)
    assert decision.actions.argmax(-1).tolist() == [[2, 2]] * 5


@pytest.mark.parametrize(("ask", "say"), [(False, 1), (True, 0)])
def test_nobody_follows_without_a_question_and_an_answer(ask, say):
    transfer = make()
    force(transfer, ask=ask, say=say)
    decision, lived = step(transfer)
    own, _, _ = transfer.learner.act(lived.observation, {})
    assert torch.equal(decision.actions, own)
    assert not decision.student.any()
    assert decision.attention.sum() == 0


@pytest.mark.parametrize("discrete", [False, True])
def test_students_and_teachers_see_what_the_paper_says(discrete):
    transfer = make(discrete=discrete)
    force(transfer, ask=True)
    _, lived = step(transfer, worlds=2)
    advice, learner = transfer.rollout[0][0], transfer.learner
    own, _, _ = learner.act(lived.observation, {})
    for w in range(2):
        for i in range(3):
            seen = lived.observation[w, i]
            values = [q(learner, i, seen, action) for action in (own[w, i], *transfer.fixed[i])]
            expected = torch.tensor(values)
            expected = torch.cat((seen, expected.sign() * torch.log(1 + expected.abs())))
            torch.testing.assert_close(advice.student_view[w, i], expected)
            assert advice.value[w, i].item() == pytest.approx(max(values), abs=1e-5)
            for j in range(3):
                policy, _, _ = learner.act(seen.expand(1, 3, -1), {})
                points = (own[w, i], policy[0, j], *transfer.fixed[i])
                expected = torch.tensor([q(learner, agent, seen, point) for agent in (i, j) for point in points])
                expected = torch.cat((seen, expected.sign() * torch.log(1 + expected.abs())))
                torch.testing.assert_close(advice.teacher_view[w, i, j], expected)


def test_teachers_see_nothing_unless_asked():
    transfer = make()
    step(transfer, worlds=50)
    advice = transfer.rollout[0][0]
    assert 0.2 < advice.asked.float().mean() < 0.8
    assert advice.teacher_view[~advice.asked].abs().sum() == 0
    assert advice.said[~advice.asked].sum() == 0
    assert (advice.teacher_view[advice.asked].abs().sum(-1) > 0).all()


def test_whom_nobody_can_answer_hears_nothing(monkeypatch):
    transfer = make(agents=2, sizes=(4, 3))
    force(transfer, ask=True, say=1)
    monkeypatch.setattr(transfer, "_look", None)
    assert not step(transfer)[0].student.any()


def test_log_probability_and_entropy_of_all_that_was_done():
    transfer = make(sizes=(4, 4, 3))
    unlike(transfer)
    _, _ = step(transfer, worlds=6)
    advice = transfer.rollout[0][0]
    log_prob, entropy = transfer._log_prob(Advice(*(part[None] for part in advice)))
    ask = transfer.student(advice.student_view).squeeze(-1)
    say = transfer.teacher(advice.teacher_view)
    for w in range(6):
        total, entropies = 0.0, []
        for i in range(3):
            policy = Bernoulli(logits=ask[w, i])
            total += policy.log_prob(advice.asked[w, i].float()).item()
            entropies.append(policy.entropy().item())
            # Agent 2 is of another size: it can neither teach nor be taught.
            for j in {0, 1} - {i} if i < 2 and advice.asked[w, i] else ():
                policy = Categorical(logits=say[w, i, j])
                total += policy.log_prob(advice.said[w, i, j]).item()
                entropies.append(policy.entropy().item())
        assert log_prob[0, w].item() == pytest.approx(total, abs=1e-4)
        assert entropy[0, w].item() == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


def gains(reward, **settings):
    """The gains of two steps as the code measures them, and all that an oracle needs."""
    transfer = make(reward=reward, **settings)
    force(transfer, ask=True)
    steps = [step(transfer, worlds=2)[1] for _ in range(2)]
    before = [advice for advice, _ in transfer.rollout]
    errors = [td_errors(transfer.learner, lived) for lived in steps]
    with torch.no_grad():
        transfer.learner.critic.flat.mul_(1.5)
        transfer.learner.actor.flat.mul_(0.7)
    advice = Advice(*(torch.stack(parts) for parts in zip(*before, strict=True)))
    lived = Experience(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
    return transfer, transfer._gain(advice, lived), advice, steps, torch.stack(errors)


def td_errors(learner, lived):
    errors = torch.zeros_like(lived.reward)
    following, _, _ = learner.act(lived.next_observation, {})
    for w, i in torch.ones_like(errors).nonzero().tolist():
        future = 0 if lived.terminated[w, i] else q(learner, i, lived.next_observation[w, i], following[w, i])
        now = q(learner, i, lived.observation[w, i], lived.action[w, i])
        errors[w, i] = lived.reward[w, i] + learner.settings.discount * future - now
    return errors


def estimates(transfer, lived):
    """The students' best value by their present critics."""
    own, _, _ = transfer.learner.act(lived.observation, {})
    best = torch.zeros_like(lived.reward)
    for w, i in torch.ones_like(best).nonzero().tolist():
        actions = (own[w, i], *transfer.fixed[i])
        best[w, i] = max(q(transfer.learner, i, lived.observation[w, i], action) for action in actions)
    return best


def test_error_rewards_are_what_the_error_lost():
    transfer, loss_gain, _, steps, before = gains("loss_gain")
    after = torch.stack([td_errors(transfer.learner, lived) for lived in steps])
    torch.testing.assert_close(loss_gain, before**2 - after**2, atol=1e-5, rtol=1e-4)
    _, td_gain, _, _, _ = gains("td_gain")
    torch.testing.assert_close(td_gain, before.abs() - after.abs(), atol=1e-5, rtol=1e-4)


def test_value_estimation_gain_is_an_estimate_above_its_threshold():
    transfer, gain, _, steps, _ = gains("value_estimation_gain", threshold=0.1)
    after = torch.stack([estimates(transfer, lived) for lived in steps])
    assert torch.equal(gain, (after > 0.1).float())
    assert 0 < gain.mean() < 1
    transfer, gain, advice, steps, _ = gains("value_estimation_gain")
    usual = advice.value.mean((0, 1))
    assert torch.equal(gain, (after > usual).float())
    torch.testing.assert_close(transfer.usual, usual)


def test_joint_value_gain_is_the_teams():
    transfer, gain, advice, steps, _ = gains("joint_value_gain")
    after = torch.stack([estimates(transfer, lived) for lived in steps])
    torch.testing.assert_close(gain, (after - advice.value).mean(-1, keepdim=True).expand_as(gain))


def test_q_teaching_is_how_much_teachers_prefer_their_best_action():
    transfer = make(agents=2, reward="q_teaching")
    force(transfer, ask=True, say=1)
    _, lived = step(transfer, worlds=2)
    advice = transfer.rollout[0][0]
    own, _, _ = transfer.learner.act(lived.observation, {})
    for w in range(2):
        for i, j in ((0, 1), (1, 0)):
            seen = lived.observation[w, i]
            policy, _, _ = transfer.learner.act(seen.expand(1, 2, -1), {})
            values = [q(transfer.learner, j, seen, a) for a in (own[w, i], policy[0, j], *transfer.fixed[i])]
            assert advice.teaching[w, i].item() == pytest.approx(max(values) - values[0], abs=1e-5)
    assert torch.equal(transfer._gain(Advice(*(part[None] for part in advice)), None)[0], advice.teaching)


def test_the_critic_learns_what_advice_brought_within_an_episode(monkeypatch):
    transfer = make(horizon=4, cost=0.2)
    unlike(transfer)
    for ended in (False, True, False, False):
        step(transfer, worlds=3, ended=ended)
    advice = Advice(*(torch.stack(parts) for parts in zip(*(a for a, _ in transfer.rollout), strict=True)))
    value = transfer._critic(advice).detach()
    gain = torch.randn(advice.advised.shape)
    monkeypatch.setattr(transfer, "_gain", lambda advice, lived: gain)
    reward = torch.where(advice.advised, gain - 0.2, 0).mean(-1)
    assert 0.1 < advice.advised.float().mean() < 0.9
    discount = transfer.learner.settings.discount
    targets = [reward[0] + discount * value[1], reward[1], reward[2] + discount * value[3]]
    expected = torch.stack([(value[t] - target) ** 2 for t, target in enumerate(targets)]).mean().item()
    metrics = transfer.update(None)
    assert metrics["advising_critic_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["advising_reward"] == pytest.approx(reward.mean().item(), abs=1e-6)


def test_a_rollout_is_learned_from_when_it_is_full_and_its_last_step_again():
    transfer = make(horizon=3)
    for _ in range(2):
        step(transfer)
        assert transfer.update(None) == {}
    step(transfer)
    kept = transfer.rollout[-1]
    assert transfer.update(None).keys() == {"advising_reward", "advising_critic_loss", "asked", "advised"}
    assert transfer.rollout == [kept]
    learned = last(transfer.critic)[1].clone()
    assert transfer.update(None) == transfer.metrics
    assert torch.equal(last(transfer.critic)[1], learned)


@pytest.mark.parametrize(("gain", "least", "most"), [(1.0, 0.85, 1.0), (-1.0, 0.0, 0.25)])
def test_asking_and_advising_are_learned_from_what_they_bring(monkeypatch, gain, least, most):
    transfer = make(agents=2, anchors=0, learner={"actor_lr": 1e-2, "critic_lr": 1e-2})
    monkeypatch.setattr(transfer, "_gain", lambda advice, lived: torch.full(advice.advised.shape, gain))
    shares = []
    for _ in range(100):
        for _ in range(8):
            step(transfer, worlds=8, ended=True)
        shares.append(transfer.update(None)["advised"])
    assert 0.2 < shares[0] < 0.4
    assert least <= sum(shares[-5:]) / 5 <= most


def test_same_seed_same_decisions_also_after_a_resume():
    def run(transfer, seed, steps):
        torch.manual_seed(seed)
        actions = []
        for _ in range(steps):
            actions.append(step(transfer)[0].actions)
            transfer.update(None)
        return torch.stack(actions)

    settings = {"horizon": 4, "learner": {"actor_lr": 0.1, "critic_lr": 0.1}}
    first, second, third = (make(**settings) for _ in range(3))
    # The resume falls into the middle of a rollout.
    assert torch.equal(run(first, 1, 12), run(third, 1, 12))
    assert len(first.rollout) == 3
    tensors, plain = split_state(first.state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second.load_state_dict(join_state(tensors, json.loads(json.dumps(plain))))
    assert second.update(None) == first.update(None)
    expected = run(first, 2, 12)
    assert torch.equal(expected, run(second, 2, 12))
    assert not torch.equal(expected, run(make(**settings), 2, 12))


def test_a_state_comes_back_on_the_learners_device():
    first, second = make(), make()
    step(first)
    # The CPU's stand-in for a GPU: snapshots are read to the CPU all the same.
    second.learner.to("meta")
    second.load_state_dict(first.state_dict())
    advice, lived = second.rollout[0]
    assert {tensor.device.type for tensor in (second.fixed, second.usual, *advice, *lived)} == {"meta"}


def test_an_evaluation_draws_and_records_nothing():
    transfer = make(agents=2)
    force(transfer, ask=True, say=1)
    observation = torch.randn(4, 2, 4)
    own, _, _ = transfer.learner.act(observation, {})
    generator = torch.get_rng_state()
    assert transfer.decide(observation, own, explore=False).student.all()
    assert torch.equal(generator, torch.get_rng_state())
    assert transfer.pending is None


def test_steps_that_nobody_decided_are_no_lesson():
    transfer = make()
    _, lived = step(transfer)
    transfer.rollout.clear()
    transfer.observe(lived)
    assert transfer.rollout == []


def test_a_team_of_one_acts_alone():
    transfer = make(agents=1)
    decision, _ = step(transfer)
    assert decision.attention is None
    assert not decision.student.any()
    assert transfer.update(None) == {}


def test_a_newcomer_asks_and_advises_from_scratch():
    transfer = make()
    unlike(transfer)
    step(transfer)
    kept = last(transfer.student)[0][1].clone()
    transfer.renew_agent(0)
    assert last(transfer.student)[0][0].abs().sum() == 0
    assert last(transfer.teacher)[0][0].abs().sum() == 0
    assert torch.equal(last(transfer.student)[0][1], kept)
    assert transfer.rollout == []


def test_who_is_frozen_keeps_how_it_asks_and_advises():
    transfer = make(horizon=2)
    unlike(transfer)
    transfer.learner.freeze([0])
    before = {name: getattr(transfer, name).flat.detach().clone() for name in ("student", "teacher", "critic")}
    for _ in range(2):
        step(transfer)
    transfer.update(None)
    moved = {name: (getattr(transfer, name).flat != flat).any(dim=1).tolist() for name, flat in before.items()}
    assert moved == {"student": [False, True, True], "teacher": [False, True, True], "critic": [True]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "fame"}, "fame"),
        ({"reward": "td_gain", "threshold": 0.5}, "leave it out"),
        ({"threshold": float("inf")}, "threshold must be a number"),
        ({"cost": -0.5}, "cost must be at least 0"),
        ({"cost": float("nan")}, "cost must be at least 0"),
        ({"anchors": -1}, "anchors must be at least 0"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"horizon": 1}, "horizon must be at least 2"),
        ({"entropy": -0.1}, "entropy must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LeCTRSettings(**settings)


def test_memory_and_a_central_critic_are_refused():
    with pytest.raises(UserError, match="lstm"):
        make(learner={"memory": MemorySettings(kind="lstm")})
    with pytest.raises(UserError, match="central_critic=false"):
        make(learner={"central_critic": True})
