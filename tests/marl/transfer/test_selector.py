"""The attention teacher selector against loops over students, teachers and heads."""

import math

import pytest
import torch
from torch.nn.functional import linear

from fulmen.config import UserError
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer.selector import (
    TeacherSelector,
    Teaching,
    load_selector,
    mix_actions,
    mix_parameters,
    relative_advice,
    save_selector,
    teacher_mask,
)

CONTEXT, POLICIES = 5, 7


def make_spec(agents=3, observations=None, actions=None, discrete=False):
    observations, actions = observations or (4,) * agents, actions or (2,) * agents
    bound = (torch.arange(max(actions)) < torch.tensor(actions)[:, None]).float()
    bounds = {} if discrete else {"low": -bound, "high": bound}
    names = tuple(f"agent_{i}" for i in range(agents))
    return TeamSpec(agents=names, observation_sizes=observations, action_sizes=actions, discrete=discrete, **bounds)


def everybody(agents):
    return ~torch.eye(agents, dtype=torch.bool)


def inputs(*lead, agents=3):
    return torch.randn(*lead, agents, CONTEXT), torch.randn(*lead, agents, agents, POLICIES)


def attention_by_loops(selector, context, policies, teachers, bias):
    """One world: alpha [N][N]."""
    heads, _, size = selector.query.shape
    agents = len(context)
    alpha = torch.zeros(agents, agents)
    for head in range(heads):
        for i in range(agents):
            q = torch.cat((context[i], policies[i, i])) @ selector.query[head].detach()
            score = {}
            for j in range(agents):
                if teachers[i, j]:
                    k = policies[i, j] @ selector.key[head]
                    score[j] = math.exp((q @ k).item() / math.sqrt(size) + (selector.bias_scale * bias[i, j]).item())
            for j in score:
                alpha[i, j] += score[j] / sum(score.values()) / heads
    return alpha


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_equals_loops(heads):
    selector = TeacherSelector(CONTEXT, POLICIES, size=4, heads=heads, bias_scale=0.7)
    context, policies = inputs(2)
    bias = torch.randn(3, 3)
    alpha = selector(context, policies, everybody(3), bias)
    for world in range(2):
        expected = attention_by_loops(selector, context[world], policies[world], everybody(3), bias)
        torch.testing.assert_close(alpha[world].detach(), expected)


def test_rows_sum_to_one_and_nobody_attends_to_itself():
    selector = TeacherSelector(CONTEXT, POLICIES, heads=2)
    context, policies = inputs(6, 2, agents=5)
    alpha = selector(context * 100, policies * 100, everybody(5))
    torch.testing.assert_close(alpha.sum(-1), torch.ones(6, 2, 5))
    assert (alpha.diagonal(dim1=-2, dim2=-1) == 0).all()


def test_a_student_without_teachers_has_a_row_of_zeros_and_finite_gradients():
    selector = TeacherSelector(CONTEXT, POLICIES)
    context, policies = inputs(2)
    teachers = everybody(3)
    teachers[1] = False
    alpha = selector(context, policies, teachers)
    assert (alpha[:, 1] == 0).all()
    assert (alpha[:, 0].sum(-1) > 0.99).all()
    alpha.square().sum().backward()
    assert selector.query.grad.isfinite().all()
    assert selector.query.grad.any()


def test_permuting_agents_permutes_attention():
    selector = TeacherSelector(CONTEXT, POLICIES, heads=2)
    context, policies = inputs(2, agents=4)
    bias, order = torch.randn(4, 4), torch.tensor([2, 0, 3, 1])
    alpha = selector(context, policies, everybody(4), bias)
    moved = selector(context[:, order], policies[:, order][:, :, order], everybody(4), bias[order][:, order])
    torch.testing.assert_close(moved, alpha[:, order][:, :, order])


def test_learned_bias_scale_gets_a_gradient_and_a_fixed_one_does_not():
    context, policies = inputs(2)
    for learned in (True, False):
        selector = TeacherSelector(CONTEXT, POLICIES, learn_bias_scale=learned)
        selector(context, policies, everybody(3), torch.randn(3, 3)).square().sum().backward()
        assert (selector.bias_scale.grad is not None) is learned


def test_only_agents_of_equal_sizes_teach_each_other():
    mask = teacher_mask(make_spec(4, observations=(4, 4, 3, 4), actions=(2, 2, 2, 1)))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert (mask == expected).all()


def test_mixed_actions_equal_loops():
    attention, actions = torch.rand(2, 3, 3), torch.randn(2, 3, 3, 2)
    mixed = mix_actions(attention, actions)
    for i in range(3):
        expected = sum(attention[:, i, j, None] * actions[:, i, j] for j in range(3))
        torch.testing.assert_close(mixed[:, i], expected)


@pytest.mark.parametrize("discrete", [False, True])
def test_parameters_of_one_teacher_act_as_that_teacher(discrete):
    learner = TeamLearner(make_spec(discrete=discrete), LearnerSettings(hidden=(8, 6)))
    observation = torch.randn(5, 3, 4)
    actions, _, _ = learner.teach(observation, {})
    attention = torch.eye(3)[[1, 2, 0]].expand(5, 3, 3)
    mixed = learner.clamp(mix_parameters(learner, observation, attention))
    torch.testing.assert_close(mixed, mix_actions(attention, actions))


def test_mixed_parameters_are_the_weighted_mean_and_gradients_reach_attention_alone():
    learner = TeamLearner(make_spec(), LearnerSettings(hidden=(8,)))
    observation, attention = torch.randn(1, 3, 4), torch.rand(1, 3, 3).requires_grad_()
    mixed = mix_parameters(learner, observation, attention)
    weights = [learner.agent_state(j)["actor"] for j in range(3)]
    for i in range(3):
        mean = {n: sum(attention[0, i, j] * weights[j][n] for j in range(3)) for n in weights[0]}
        hidden = linear(observation[0, i], mean["head0.layer0.weight"], mean["head0.layer0.bias"][0]).relu()
        expected = linear(hidden, mean["head0.layer1.weight"], mean["head0.layer1.bias"][0]).tanh()
        torch.testing.assert_close(mixed[0, i], expected)
    mixed.sum().backward()
    assert attention.grad.any()
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_selector_moves_to_a_larger_team_through_a_file(tmp_path):
    ours, theirs = (TeacherSelector(CONTEXT, POLICIES, heads=2) for _ in range(2))
    save_selector(tmp_path / "selector.safetensors", theirs.state_dict())
    ours.load_state(load_selector(tmp_path / "selector.safetensors"))
    context, policies = inputs(2, agents=8)
    assert torch.equal(ours(context, policies, everybody(8)), theirs(context, policies, everybody(8)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"context_size": 6}, "context 6, here is 5"),
        ({"policy_size": 9}, "policies 9, here is 7"),
        ({"heads": 2}, "heads 2, here is 1: set heads"),
        ({"size": 8}, "head size 8, here is 32: set selector_size"),
    ],
)
def test_a_selector_that_does_not_fit_is_refused_with_both_sizes(other, message):
    theirs = TeacherSelector(**{"context_size": CONTEXT, "policy_size": POLICIES} | other)
    with pytest.raises(UserError, match=message):
        TeacherSelector(CONTEXT, POLICIES).load_state(theirs.state_dict())


def test_what_is_no_selector_is_refused(tmp_path):
    with pytest.raises(UserError, match="bias_scale, key is missing"):
        TeacherSelector(CONTEXT, POLICIES).load_state({"query": torch.zeros(1, 2, 3)})
    with pytest.raises(UserError, match="cannot read the selector"):
        load_selector(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read the selector"):
        load_selector(tmp_path / "broken.safetensors")


def test_relative_advice_is_the_distance_from_the_mean_of_those_who_are_asked():
    actions, asked = torch.randn(2, 4, 4, 3), everybody(4) | torch.eye(4, dtype=torch.bool)
    asked[0, 2] = False
    away = relative_advice(actions, asked)
    for i in range(4):
        those = actions[:, i, asked[i]]
        centre = those.mean(1, keepdim=True)
        spread = (those - centre).norm(dim=(1, 2)) / asked[i].sum() ** 0.5
        torch.testing.assert_close(away[:, i], (actions[:, i] - centre) / spread[:, None, None])
    torch.testing.assert_close(relative_advice(actions * 0.02 + 0.5, asked), away)
    assert torch.equal(relative_advice(torch.full((4, 4, 3), 0.5), asked), torch.zeros(4, 4, 3))


def test_keys_of_advice_tell_of_actions_alone_and_leave_out_who_is_not_asked():
    learner = TeamLearner(make_spec(observations=(4, 4, 3)), LearnerSettings(hidden=(8,)))
    advice = Teaching(learner, "advice").while_acting(torch.randn(5, 3, 4), explore=True)
    asked = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    # The bounds are 1 and -1.
    assert torch.equal(advice.policies, relative_advice(advice.actions, asked))
    assert not torch.equal(advice.policies, relative_advice(advice.actions, torch.ones_like(asked)))


@pytest.mark.parametrize("kind", ["none", "lstm", "lightning"])
def test_advice_while_acting_equals_advice_on_the_whole_episode(kind):
    memory = MemorySettings(kind=kind, size=8, heads=2)
    learner = TeamLearner(make_spec(), LearnerSettings(hidden=(8,), memory=memory))
    teaching, worlds, steps = Teaching(learner), 2, 4
    observation = torch.randn(worlds, steps + 1, 3, 4)
    no = torch.zeros(worlds, steps, 3, dtype=torch.bool)
    batch = Batch(observation, torch.zeros(worlds, steps, 3, 2), no.float(), no, no, ~no, None)
    whole, following = teaching.on_batch(batch)
    for step in range(steps):
        advice = teaching.while_acting(observation[:, step], explore=True)
        for name in ("context", "actions", "policies"):
            expected = getattr(whole, name)[:, step]
            torch.testing.assert_close(getattr(advice, name), expected, rtol=1e-4, atol=1e-5)
        # The bounds are 1 and -1.
        assert torch.equal(advice.policies[..., -2:], advice.actions)
        own = advice.actions.diagonal(dim1=1, dim2=2).movedim(-1, 1)
        expected = learner.policy(advice.context)[0].detach()
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(following[:, :-1], whole.context[:, 1:], rtol=1e-4, atol=1e-5)


def test_memory_begins_anew_in_the_worlds_that_are_named_and_apart_for_evaluations():
    learner = TeamLearner(make_spec(), LearnerSettings(hidden=(8,), memory=MemorySettings(kind="lstm", size=8)))
    teaching, observation = Teaching(learner), torch.randn(2, 3, 4)
    first = teaching.while_acting(observation, explore=True).context
    second = teaching.while_acting(observation, explore=True).context
    assert not torch.allclose(first, second)
    assert torch.equal(teaching.while_acting(observation, explore=False).context, first)
    saved = teaching.state_dict()
    teaching.begin(torch.tensor([False, True]), explore=True)
    third = teaching.while_acting(observation, explore=True).context
    torch.testing.assert_close(third[1], first[1])
    assert not torch.allclose(third[0], first[0])
    other = Teaching(learner)
    other.load_state_dict(saved)
    torch.testing.assert_close(other.while_acting(observation, explore=True).context[0], third[0])
    teaching.begin(explore=True)
    assert torch.equal(teaching.while_acting(observation, explore=True).context, first)
