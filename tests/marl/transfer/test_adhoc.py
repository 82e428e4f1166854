"""Ad hoc advising against its formulas, written out for single agents and worlds."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer.adhoc import (
    AdHocSettings,
    AdHocTD,
    AdHocVisit,
    VisitCounts,
    ask_probability,
    follow_medoid,
    give_probability_by_values,
    give_probability_by_visits,
    sample_actions,
    teacher_values,
    within_budget,
)
from fulmen.marl.transfer.base import Experience


def make_spec(agents=3, observations=2, actions=2, discrete=False, sizes=None):
    names = tuple(f"agent_{i}" for i in range(agents))
    bounds = {} if discrete else {"low": -torch.ones(agents, actions), "high": torch.ones(agents, actions)}
    return TeamSpec(
        agents=names,
        observation_sizes=sizes or (observations,) * agents,
        action_sizes=(actions,) * agents,
        discrete=discrete,
        **bounds,
    )


class Team(nn.Module):
    """A learner whose agent j does the action `does[j]` whatever it sees, and values it by j's own weights."""

    def __init__(self, spec, does=None, memory="none", central_critic=False):
        super().__init__()
        self.spec, self.num_agents = spec, spec.num_agents
        self.settings = SimpleNamespace(memory=SimpleNamespace(kind=memory), central_critic=central_critic)
        self.does = nn.Parameter(torch.zeros(spec.num_agents, spec.action_size) if does is None else does)
        numbers = torch.arange(spec.num_agents * (spec.observation_size + spec.action_size)).float()
        self.weight = nn.Parameter((numbers * 1.7).sin().view(spec.num_agents, -1))
        self.looked_at = 0

    def act(self, observation, state):
        return self.does.detach().expand(len(observation), -1, -1), None, state

    def teach(self, observation, state):
        self.looked_at += len(observation)
        return self.does.detach().expand(len(observation), self.num_agents, -1, -1), None, state

    def value(self, batch, actions):
        return (torch.cat((batch.observation[:, :-1], actions), dim=-1) * self.weight).sum(-1)


def make(kind=AdHocVisit, learner=None, **settings):
    torch.manual_seed(0)
    return kind(learner or Team(make_spec()), AdHocSettings(**settings))


def lived(observation, action=None):
    """A step of which only the observation matters."""
    flags = torch.zeros(observation.shape[:2], dtype=torch.bool)
    action = torch.zeros(*flags.shape, 2) if action is None else action
    return Experience(observation, action, flags.float(), flags, flags[:, 0], observation, flags)


def act(transfer, observation, explore=True):
    own, _, _ = transfer.learner.act(observation, {})
    return transfer.decide(observation, own, explore=explore)


@pytest.mark.parametrize("visits", [0, 1, 2, 7, 100])
def test_probabilities_follow_the_paper(visits):
    n = torch.tensor([float(visits)])
    assert ask_probability(n, 0.5).item() == pytest.approx(1.5 ** -math.sqrt(visits), rel=1e-5)
    by_visits = 0 if visits < 2 else 1 - 1.4 ** -math.log2(visits)
    assert give_probability_by_visits(n, 0.4).item() == pytest.approx(by_visits, abs=1e-6)
    by_values = 1 - 2.5 ** -(math.sqrt(visits) * 0.3)
    assert give_probability_by_values(n, torch.tensor([0.3]), 1.5).item() == pytest.approx(by_values, abs=1e-6)


def test_visits_count_each_agents_own_observations():
    torch.manual_seed(0)
    counts = VisitCounts(make_spec(agents=2), bits=10, device=torch.device("cpu"))
    here, there = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])
    # Agent 0 sees `here` in two worlds, agent 1 sees `there`, then `here`.
    counts.add(counts.code(torch.stack((torch.stack((here, there)), torch.stack((here, here))))))
    code = counts.code(torch.stack((here, there))[None])
    assert counts.own(code).tolist() == [[2, 1]]
    # Student 0 stands here, where teacher 1 was once; student 1 stands there, where teacher 0 never was.
    assert counts.teachers(code).tolist() == [[[2, 1], [0, 1]]]
    assert counts.table.sum() == 4


def test_hash_tells_distances_in_one_direction_apart():
    torch.manual_seed(0)
    counts = VisitCounts(make_spec(), bits=16, device=torch.device("cpu"))
    near = torch.tensor([0.1, 0.1])
    assert counts.code(near) == counts.code(near + 1e-4)
    assert counts.code(near) != counts.code(10 * near)
    assert 0 <= counts.code(near) < 2**16


def test_teacher_values_ask_each_critic_at_each_student():
    spec = make_spec(agents=3, observations=4)
    learner = Team(spec)
    observation, actions = torch.randn(5, 3, 4), torch.randn(5, 3, 3, 7, 2)
    values = teacher_values(learner, observation, actions)
    for w in range(5):
        for i in range(3):
            for j in range(3):
                for k in range(7):
                    seen = torch.cat((observation[w, i], actions[w, i, j, k]))
                    assert values[w, i, j, k].item() == pytest.approx(seen.dot(learner.weight[j]).item(), abs=1e-5)


def test_confidence_by_values_matches_its_formula():
    spec = make_spec(agents=2, actions=3, discrete=True)
    transfer = make(AdHocTD, Team(spec))
    observation = torch.randn(1, 2, 2)
    for _ in range(4):
        transfer.observe(lived(observation))
    code = transfer.visits.code(observation)
    confidence = transfer.confidence(observation, code)
    # Choices move only the part of Q that is the choice's weight.
    weights = transfer.learner.weight[1, 2:]
    visits = 4 if code[0, 0] == code[0, 1] else 0
    expected = 1 - 2.5 ** -(math.sqrt(visits) * (weights.max() - weights.min()).item())
    assert confidence[0, 0, 1].item() == pytest.approx(expected, abs=1e-5)
    transfer.visits.table[:] = 9
    expected = 1 - 2.5 ** -(3 * (weights.max() - weights.min()).item())
    assert transfer.confidence(observation, code)[0, 0, 1].item() == pytest.approx(expected, abs=1e-5)


def test_sampled_actions_are_allowed_ones():
    spec = TeamSpec(
        agents=("a", "b"),
        observation_sizes=(1, 1),
        action_sizes=(2, 1),
        low=torch.tensor([[-1.0, 2.0], [0.0, 0.0]]),
        high=torch.tensor([[1.0, 3.0], [5.0, 0.0]]),
    )
    actions = sample_actions(spec, 4, 100, torch.device("cpu"))
    assert actions.shape == (4, 2, 100, 2)
    assert (actions >= spec.low[:, None]).all()
    assert (actions <= spec.high[:, None]).all()
    assert actions[:, 1, :, 0].max() > 4
    discrete = TeamSpec(agents=("a", "b"), observation_sizes=(1, 1), action_sizes=(3, 2), discrete=True)
    choices = sample_actions(discrete, 2, 5, torch.device("cpu"))[1].argmax(-1)
    assert choices.tolist() == [[0, 1, 2], [0, 1, 0]]


def test_medoid_is_the_middle_of_the_given():
    advice = torch.tensor([[9.0], [0.0], [1.0], [5.0]]).expand(1, 4, 4, 1).clone()
    gives = torch.ones(1, 4, 4, dtype=torch.bool) & ~torch.eye(4, dtype=torch.bool)
    # Of 0, 1, 5 the sums of distances are 6, 5, 9; of 9, 1, 5: 12, 12, 8; of 9, 0, 5: 13, 14, 9; of 9, 0, 1: 17, 10, 9.
    actions, weights = follow_medoid(advice, gives, explore=False)
    assert actions.squeeze().tolist() == [1, 5, 5, 1]
    assert weights[0].argmax(-1).tolist() == [2, 3, 3, 2]
    assert weights.sum(-1).tolist() == [[1, 1, 1, 1]]


def test_medoid_of_choices_is_the_majority():
    choices = torch.tensor([0, 2, 1, 2, 0])
    advice = torch.nn.functional.one_hot(choices, 3).float().expand(1, 5, 5, 3)
    gives = torch.zeros(1, 5, 5, dtype=torch.bool)
    gives[0, 0, 1:4] = True
    actions, weights = follow_medoid(advice, gives, explore=True)
    assert actions[0, 0].tolist() == [0, 0, 1]
    assert weights[0, 1:].sum() == 0


def test_chance_decides_a_draw():
    torch.manual_seed(0)
    advice = torch.tensor([[0.0], [1.0], [2.0]]).expand(200, 3, 3, 1)
    gives = ~torch.eye(3, dtype=torch.bool).expand(200, 3, 3)
    _, weights = follow_medoid(advice, gives, explore=True)
    assert 60 < weights[:, 0, 1].sum() < 140
    _, weights = follow_medoid(advice, gives, explore=False)
    assert weights[:, 0, 1].sum() == 200


def test_budget_pays_for_the_first():
    wanted = torch.tensor([[True, True], [False, True], [True, True], [True, True]])
    left = within_budget(wanted, torch.tensor([1, 0]), 3)
    assert left.tolist() == [[True, True], [False, True], [True, True], [False, False]]
    assert within_budget(wanted, torch.tensor([9, 9]), None) is wanted


def trained_teacher(**settings):
    """Agent 0 was often where agents 1 and 2 are for the first time; it does 0.5, the others -0.5."""
    does = torch.tensor([[0.5, 0.5], [-0.5, -0.5], [-0.5, -0.5]])
    transfer = make(learner=Team(make_spec(), does), **settings)
    # Chances are 1 - 1.4^-23 for agent 0 to give, 1 for the others to ask.
    transfer.visits.table[0] = 10_000_000
    return transfer


def test_novices_follow_who_knows_the_place():
    transfer = trained_teacher()
    decision = act(transfer, torch.randn(8, 3, 2))
    assert decision.student.tolist() == [[False, True, True]] * 8
    assert (decision.actions[:, 1:] == 0.5).all()
    assert decision.attention.tolist() == [[[0, 0, 0], [1, 0, 0], [1, 0, 0]]] * 8
    assert transfer.taken.tolist() == [0, 8, 8]
    assert transfer.given.tolist() == [16, 0, 0]
    assert transfer.update(None) == {"advice_taken": 16, "advice_given": 16}


@pytest.mark.parametrize(
    ("settings", "taken", "given"),
    [({"ask_budget": 10}, [0, 10, 10], 20), ({"give_budget": 13}, None, 13), ({"ask_budget": 0}, [0, 0, 0], 0)],
)
def test_budgets_run_out(settings, taken, given):
    transfer = trained_teacher(**settings)
    advised = sum(act(transfer, torch.randn(4, 3, 2)).student.sum(0) for _ in range(5))
    assert advised.tolist() == transfer.taken.tolist()
    assert transfer.taken.tolist() == taken or taken is None
    assert transfer.taken.sum() == given
    assert transfer.given.tolist() == [given, 0, 0]


def test_asking_ends_where_one_has_been():
    transfer, observation = trained_teacher(), torch.randn(1, 3, 2).expand(2000, 3, 2)
    transfer.visits.table[1:] = 4
    share = act(transfer, observation).student[:, 1].float().mean()
    assert share.item() == pytest.approx(1.5**-2, abs=0.05)


def test_no_teacher_looks_where_nobody_asks():
    transfer = trained_teacher()
    observation = torch.cat((torch.ones(3, 3, 2), -torch.ones(1, 3, 2)))
    transfer.visits.table[:, transfer.visits.code(torch.ones(2))] = 10_000_000
    act(transfer, observation)
    assert transfer.learner.looked_at == 1
    transfer.visits.table[:] = 10_000_000
    decision = act(transfer, observation)
    assert transfer.learner.looked_at == 1
    assert not decision.student.any()
    assert decision.attention.sum() == 0


def test_an_evaluation_draws_and_spends_nothing():
    transfer, observation = trained_teacher(), torch.randn(4, 3, 2)
    generator = torch.get_rng_state()
    decision = act(transfer, observation, explore=False)
    assert decision.student.tolist() == [[False, True, True]] * 4
    assert torch.equal(generator, torch.get_rng_state())
    assert transfer.taken.sum() == transfer.given.sum() == 0


@pytest.mark.parametrize("kind", [AdHocVisit, AdHocTD])
def test_same_seed_same_decisions_also_after_a_resume(kind):
    def run(transfer, seed):
        torch.manual_seed(seed)
        decisions = []
        for _ in range(20):
            observation = torch.randn(6, 3, 2)
            decisions.append(act(transfer, observation))
            transfer.observe(lived(observation))
        return decisions

    settings = {"bits": 3, "ask_budget": 60}
    first, second = make(kind, **settings), make(kind, **settings)
    run(first, 1)
    assert first.taken.sum() > 0
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for a, b in zip(run(first, 2), run(second, 2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(first.visits.table, second.visits.table)
    assert first.visits.table.sum() == 2 * 20 * 6 * 3


def test_a_team_of_one_acts_alone():
    transfer = make(learner=Team(make_spec(agents=1)))
    decision = act(transfer, torch.randn(4, 1, 2))
    assert decision.attention is None
    assert not decision.student.any()
    transfer.observe(lived(torch.randn(4, 1, 2)))


def test_agents_of_other_sizes_do_not_advise():
    does = torch.tensor([[0.5, 0.5], [-0.5, -0.5], [-0.5, -0.5]])
    transfer = make(learner=Team(make_spec(sizes=(2, 1, 2)), does))
    transfer.visits.table[0] = 10_000_000
    assert act(transfer, torch.randn(4, 3, 2)).student.tolist() == [[False, False, True]] * 4


def test_whom_nobody_can_answer_does_not_ask():
    transfer = make(learner=Team(make_spec(agents=2, sizes=(2, 1))))
    assert not act(transfer, torch.randn(4, 2, 2)).student.any()
    assert transfer.learner.looked_at == 0


def test_a_newcomer_has_seen_nothing():
    transfer = trained_teacher()
    act(transfer, torch.randn(4, 3, 2))
    transfer.renew_agent(0)
    assert transfer.visits.table.sum() == 0
    assert transfer.given.tolist() == [0, 0, 0]
    assert transfer.taken.tolist() == [0, 4, 4]


@pytest.mark.parametrize(
    "settings",
    [
        {"ask_budget": -1},
        {"give_budget": -1},
        {"ask_rate": 0},
        {"give_rate": -1.0},
        {"bits": 0},
        {"bits": 25},
        {"samples": 1},
    ],
)
def test_impossible_settings_are_refused(settings):
    (value,) = settings.values()
    with pytest.raises(UserError, match=str(value)):
        AdHocSettings(**settings)


def test_memory_and_a_central_critic_are_refused():
    with pytest.raises(UserError, match=r"memory\.kind='none'"):
        make(learner=Team(make_spec(), memory="lstm"))
    make(AdHocVisit, Team(make_spec(), central_critic=True))
    with pytest.raises(UserError, match="central_critic=false"):
        make(AdHocTD, Team(make_spec(), central_critic=True))


def test_counts_of_another_hash_are_refused():
    with pytest.raises(UserError, match="same team and bits"):
        make(bits=4).load_state_dict(make(bits=5).state_dict())
