"""What agents see and are paid in each task, worked by hand, and the options' guards."""

import math

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.worlds import TASKS, make_environment
from fulmen.marl.worlds.tasks.base import ACTIONS

SIZES = {
    # name: agents, observation sizes, action sizes of mpe2, force and discrete
    "spread": (("agent_0", "agent_1", "agent_2"), (18, 18, 18), (5, 5, 5), (2, 2, 2), (5, 5, 5)),
    "tag": (
        ("adversary_0", "adversary_1", "adversary_2", "agent_0"),
        (16, 16, 16, 14),
        (5, 5, 5, 5),
        (2, 2, 2, 2),
        (5, 5, 5, 5),
    ),
    "push": (("adversary_0", "agent_0"), (8, 19), (5, 5), (2, 2), (5, 5)),
    "reference": (("agent_0", "agent_1"), (21, 21), (15, 15), (12, 12), (50, 50)),
    "speaker_listener": (("speaker_0", "listener_0"), (3, 11), (3, 5), (3, 2), (3, 5)),
    "adversary": (("adversary_0", "agent_0", "agent_1"), (8, 10, 10), (5, 5, 5), (2, 2, 2), (5, 5, 5)),
    "navigation": (tuple(f"agent_{i}" for i in range(4)), (6,) * 4, (5,) * 4, (2,) * 4, (5,) * 4),
    "memory": (tuple(f"agent_{i}" for i in range(4)), (7,) * 4, (5,) * 4, (2,) * 4, (5,) * 4),
}


def place(environment, positions):
    environment.state.positions.copy_(torch.tensor(positions).T[..., None])
    environment.state.velocities.zero_()
    environment.task.settle(environment.state)


def still(environment):
    """Actions that move nobody."""
    actions = torch.zeros(environment.num_worlds, environment.spec.num_agents, environment.spec.action_size)
    if environment.spec.discrete:
        actions[..., 0] = 1
    return actions


def test_every_task_is_listed_here():
    assert SIZES.keys() == TASKS.keys()


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_bounds(name, actions):
    environment = make_environment(name, num_worlds=2, actions=actions)
    spec, (agents, observations, *sizes) = environment.spec, SIZES[name]
    assert spec.agents == agents
    assert spec.observation_sizes == observations
    assert spec.action_sizes == sizes[ACTIONS.index(actions)]
    assert spec.discrete == (actions == "discrete")
    if actions == "mpe2":
        assert torch.equal(spec.low, torch.zeros_like(spec.low))
        assert torch.equal(spec.high, spec.action_mask.float())
    elif actions == "force":
        moves = torch.zeros_like(spec.low)
        moves[environment.task.movers, :2] = -1
        assert torch.equal(spec.low, moves)
        assert torch.equal(spec.high, spec.action_mask.float())
    transition = environment.step(still(environment))
    assert transition.observation.shape == (2, len(agents), max(observations))
    assert transition.reward.shape == transition.terminated.shape == (2, len(agents))
    behind = torch.arange(max(observations)) >= torch.tensor(observations)[:, None]
    assert not transition.observation[:, behind].any()


@pytest.mark.parametrize("name", ["spread", "navigation", "memory"])
@pytest.mark.parametrize("agents", [1, 2, 8, 32])
def test_team_sizes(name, agents):
    environment = make_environment(name, num_worlds=2, agents=agents)
    assert environment.spec.num_agents == agents
    assert environment.step(still(environment)).observation.isfinite().all()


def test_our_own_tasks_are_driven_by_forces_and_mpe2s_are_not():
    defaults = {name: (task().actions, task().max_steps) for name, task in TASKS.items()}
    assert defaults.pop("navigation") == ("force", 50)
    assert defaults.pop("memory") == ("force", 100)
    assert set(defaults.values()) == {("mpe2", 25)}


def test_worlds_begin_within_the_plane():
    for name in TASKS:
        state = make_environment(name, num_worlds=200).state
        assert state.positions.abs().max() <= 1
        assert state.agents.abs().max() > 0.95
        assert not state.velocities.any()
        assert (state.landmarks.abs().max() <= 0.9) == (name == "tag")
        if "goal" in state.facts:
            assert set(state.facts["goal"].flatten().tolist()) == set(range(state.landmarks.shape[1]))


def test_spread_pays_for_cover_and_against_touching():
    environment = make_environment("spread", num_worlds=1, agents=3, local_ratio=0.25, dtype=torch.float64)
    # Agents 0 and 1 touch (radius 0.15 each); landmarks are 0.5, 0 and 1 from the nearest agent.
    place(environment, [[0.0, 0.0], [0.2, 0.0], [5.0, 0.0], [0.0, 0.5], [5.0, 0.0], [1.2, 0.0]])
    reward = environment.step(still(environment)).reward[0]
    assert reward.tolist() == pytest.approx([-1.5 * 0.75 - 0.25, -1.5 * 0.75 - 0.25, -1.5 * 0.75])


def test_tag_pays_hunters_together_and_keeps_the_hunted_inside():
    environment = make_environment("tag", num_worlds=1, adversaries=2, good=2, obstacles=0, dtype=torch.float64)
    place(environment, [[0.0, 0.0], [5.0, 5.0], [0.1, 0.0], [0.95, 1.5]])
    reward = environment.step(still(environment)).reward[0]
    assert reward.tolist() == pytest.approx([10, 10, -10, -0.5 - math.e])
    place(environment, [[0.0, 0.0], [5.0, 5.0], [1.0, 0.0], [9.0, 0.0]])
    assert environment.step(still(environment)).reward[0].tolist() == pytest.approx([0, 0, -1, -10])


def test_what_a_speaker_says_is_heard_in_the_next_observation():
    environment = make_environment("speaker_listener", num_worlds=1)
    actions = still(environment)
    actions[0, 0, :3] = torch.tensor([0.25, 0.5, 1.0])
    assert environment.step(actions).observation[0, 1, -3:].tolist() == [0.25, 0.5, 1.0]
    assert environment.step(still(environment)).observation[0, 1, -3:].tolist() == [0, 0, 0]
    environment.step(actions)
    assert environment.reset()[0, 1, -3:].tolist() == [0, 0, 0]


def test_a_choice_of_reference_is_a_move_and_a_word():
    environment = make_environment("reference", num_worlds=1, actions="discrete")
    actions = torch.zeros(1, 2, 50)
    actions[0, 0, 2 + 5 * 7] = actions[0, 1, 3 + 5 * 0] = 1
    observation = environment.step(actions).observation[0]
    assert environment.state.velocities[..., 0].T.tolist() == [[0.5, 0.0], [0.0, -0.5]]
    assert observation[:, -10:].argmax(1).tolist() == [0, 7]
    assert observation[:, -10:].sum(1).tolist() == [1, 1]


def navigation(reward="dense", name="navigation", **options):
    environment = make_environment(name, num_worlds=1, agents=2, reward=reward, dtype=torch.float64, **options)
    place(environment, [[0.0, 0.0], [1.0, 0.0], [0.3, 0.4], [1.0, 0.1]])
    return environment


def test_navigation_pays_each_for_its_own_goal():
    assert navigation().step(torch.zeros(1, 2, 2)).reward[0].tolist() == pytest.approx([-0.5, -0.1])
    assert navigation("sparse").step(torch.zeros(1, 2, 2)).reward[0].tolist() == [0, 1]
    assert navigation("sparse", radius=0.6).step(torch.zeros(1, 2, 2)).reward[0].tolist() == [1, 1]
    assert navigation("sparse", radius=0.05).step(torch.zeros(1, 2, 2)).reward[0].tolist() == [0, 0]


def test_navigation_shows_velocity_place_and_goal_and_the_others_if_asked():
    assert navigation().observe()[0].tolist() == [
        pytest.approx([0, 0, 0, 0, 0.3, 0.4]),
        pytest.approx([0, 0, 1, 0, 0, 0.1]),
    ]
    others = navigation(observe_others=True).observe()[0]
    assert others[:, 6:].tolist() == [[1, 0], [-1, 0]]


def test_inverted_actuators_push_the_other_way():
    environment = navigation(inverted=[False, True])
    environment.step(torch.tensor([[[1.0, 0.5], [1.0, 0.5]]]))
    assert environment.state.velocities[..., 0].T.tolist() == [[0.5, 0.25], [-0.5, -0.25]]
    scene = environment.scene(0)
    assert scene.colours[0] != scene.colours[1]
    assert scene.goals == [(0, 2), (1, 3)]


def test_memory_shows_the_goal_at_first_only():
    environment = navigation(name="memory", shown=3, max_steps=5, observe_others=True)
    observation = environment.observe()
    for step in range(5):
        seen = [0.3, 0.4, 1] if step < 3 else [0, 0, 0]
        assert observation[0, 0, 4:7].tolist() == pytest.approx(seen), step
        assert observation[0, 0, 7:].tolist() == [1, 0]
        transition = environment.step(torch.zeros(1, 2, 2))
        assert transition.reward[0].tolist() == pytest.approx([-0.5, -0.1])
        observation = transition.final_observation
    assert transition.ended.all()
    assert not transition.final_observation[..., 4:7].any()
    assert transition.observation[..., 6].tolist() == [[1, 1]]
    assert transition.observation[..., 4:6].all()


def test_memory_may_hold_agents_while_it_shows_the_goal():
    push = torch.ones(1, 2, 2)
    environment = navigation(name="memory", shown=2, held=True)
    for moving in (False, False, True):
        environment.step(push)
        assert bool(environment.state.velocities.any()) == moving
    free = navigation(name="memory", shown=2)
    free.step(push)
    assert free.state.velocities.all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spread", dict(agents=0), "spread: agents must be an integer of at least 1, got 0"),
        ("spread", dict(agents=2.0), "spread: agents must be an integer of at least 1, got 2.0"),
        ("spread", dict(agents=True), "spread: agents must be an integer of at least 1, got True"),
        ("spread", dict(local_ratio=1.5), "spread: local_ratio must be a number from 0 to 1, got 1.5"),
        ("spread", dict(local_ratio="half"), "spread: local_ratio must be a number from 0 to 1, got 'half'"),
        ("spread", dict(max_steps=0), "spread: max_steps must be an integer of at least 1, got 0"),
        ("push", dict(actions="box"), "push: actions must be one of mpe2, force, discrete, got 'box'"),
        ("tag", dict(good=0), "tag: good must be an integer of at least 1, got 0"),
        ("tag", dict(adversaries=0), "tag: adversaries must be an integer of at least 1, got 0"),
        ("tag", dict(obstacles=-1), "tag: obstacles must be an integer of at least 0, got -1"),
        ("adversary", dict(good=0), "adversary: good must be an integer of at least 1, got 0"),
        ("reference", dict(local_ratio=-1), "reference: local_ratio must be a number from 0 to 1, got -1"),
        ("navigation", dict(agents=0), "navigation: agents must be an integer of at least 1, got 0"),
        ("navigation", dict(reward="rare"), "navigation: reward must be one of dense, sparse, got 'rare'"),
        ("navigation", dict(radius=0), "navigation: radius must be a number from 0.001 to 2, got 0"),
        ("navigation", dict(radius=math.nan), "navigation: radius must be a number from 0.001 to 2, got nan"),
        ("navigation", dict(inverted=[True]), "inverted must be a list of 4 times true or false, one an agent"),
        ("navigation", dict(inverted=[0, 1, 0, 1]), "inverted must be a list of 4 times true or false, one an agent"),
        ("navigation", dict(inverted=True), "inverted must be a list of 4 times true or false, one an agent"),
        ("navigation", dict(observe_others=1), "navigation: observe_others must be true or false, got 1"),
        ("navigation", dict(collide="no"), "navigation: collide must be true or false, got 'no'"),
        ("memory", dict(shown=0), "memory: shown must be an integer of at least 1, got 0"),
        ("memory", dict(shown=9, max_steps=8), r"memory: shown must be at most max_steps \(8\), got 9"),
        ("memory", dict(held=0), "memory: held must be true or false, got 0"),
        ("spraed", {}, "there is no world 'spraed', did you mean spread\\?; there are spread, tag, push"),
        ("chess", {}, "there is no world 'chess'; there are spread, tag, push"),
        ("spread", dict(agent=3), "spread: unknown option agent, did you mean agents\\?; it knows actions, max_steps"),
        ("push", dict(zzz=3), "push: unknown option zzz; it knows actions, max_steps"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_rule(name, options, message):
    with pytest.raises(UserError, match=message):
        make_environment(name, num_worlds=1, **options)
