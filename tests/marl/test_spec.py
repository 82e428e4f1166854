"""A team's sizes and bounds are checked when they are stated, actions and rewards where they are used."""

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec, check_actions, check_rewards

TWO = {"agents": ("ann", "bob"), "observation_sizes": (3, 2), "action_sizes": (2, 1)}
LOW = torch.tensor([[-1.0, -2.0], [0.0, 0.0]])
HIGH = torch.tensor([[1.0, 2.0], [5.0, 0.0]])


def team(**changes):
    return TeamSpec(**TWO | {"low": LOW, "high": HIGH} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": ()}, "at least one agent"),
        ({"agents": ("ann", "ann")}, "a name of its own"),
        ({"observation_sizes": (3,)}, "2 agents need 2 observation sizes"),
        ({"action_sizes": (2, 0)}, "agent bob: its action size must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps"),
        ({"low": None}, r"bounds low and high of shape \(2, 2\)"),
        ({"high": HIGH[:, :1]}, r"bounds low and high of shape \(2, 2\)"),
        ({"high": HIGH * float("inf")}, "agent ann: action bounds must be finite"),
        ({"low": HIGH}, "agent ann: low must be below high"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        team(**changes)


def test_sizes():
    spec = team()
    assert (spec.num_agents, spec.observation_size, spec.action_size) == (2, 3, 2)
    assert spec.action_mask.tolist() == [[True, True], [True, False]]


def test_actions_within_the_bounds_of_each_agent():
    spec = team()
    actions = torch.tensor([[[1.0, -2.0], [5.0, 0.0]]])
    check_actions(spec, actions, 1)
    with pytest.raises(UserError, match=r"\(2, 2, 2\), got \(1, 2, 2\)"):
        check_actions(spec, actions, 2)
    for agent, dim, value, message in (
        (0, 1, -2.5, "agent ann: action 1 in world 0 is -2.5, the bounds are -2 to 2"),
        (1, 0, float("nan"), "agent bob: action 0 in world 0 is nan"),
        (1, 1, 0.5, "agent bob: action 1 in world 0 is 0.5, the bounds are 0 to 0"),
    ):
        wrong = actions.clone()
        wrong[0, agent, dim] = value
        with pytest.raises(UserError, match=message):
            check_actions(spec, wrong, 1)


def test_choices_are_one_hot_among_an_agents_own():
    spec = team(low=None, high=None, discrete=True)
    check_actions(spec, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), 1)
    for wrong in ([[0.0, 1.0], [0.0, 1.0]], [[0.5, 0.5], [1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]):
        with pytest.raises(UserError, match="must be one-hot among"):
            check_actions(spec, torch.tensor([wrong]), 1)


def test_rewards_are_numbers():
    check_rewards(team(), torch.zeros(3, 2))
    with pytest.raises(UserError, match="agent bob: reward nan in world 2"):
        check_rewards(team(), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, float("nan")]]))
