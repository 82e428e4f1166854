"""Every ported task is mpe2's: the same state and actions give the same observations and rewards, step after step."""

import importlib

import numpy as np
import pytest
import torch

from fulmen.marl.worlds import make_environment

pytest.importorskip("mpe2")

STEPS, HOLD = 150, 5
"""Each random action is kept for some steps, so that speeds reach their limits and agents leave the middle."""

CASES = {
    "spread-3": ("spread", dict(agents=3), "simple_spread_v3", dict(N=3)),
    "spread-6": ("spread", dict(agents=6), "simple_spread_v3", dict(N=6)),
    "spread-local": ("spread", dict(agents=3, local_ratio=0.9), "simple_spread_v3", dict(N=3, local_ratio=0.9)),
    "tag-4": ("tag", {}, "simple_tag_v3", {}),
    "tag-3": ("tag", dict(adversaries=2, obstacles=1), "simple_tag_v3", dict(num_adversaries=2, num_obstacles=1)),
    "tag-6": (
        "tag",
        dict(adversaries=3, good=3, obstacles=3),
        "simple_tag_v3",
        dict(num_adversaries=3, num_good=3, num_obstacles=3),
    ),
    "push": ("push", {}, "simple_push_v3", {}),
    "reference": ("reference", {}, "simple_reference_v3", {}),
    "reference-local": ("reference", dict(local_ratio=0.9), "simple_reference_v3", dict(local_ratio=0.9)),
    "speaker_listener": ("speaker_listener", {}, "simple_speaker_listener_v4", {}),
    "adversary-2": ("adversary", {}, "simple_adversary_v3", {}),
    "adversary-3": ("adversary", dict(good=3), "simple_adversary_v3", dict(N=3)),
    "adversary-6": ("adversary", dict(good=6), "simple_adversary_v3", dict(N=6)),
}


def make_pair(case, actions, dtype):
    """The same state in both: mpe2's after its reset, drawn together so that bodies meet."""
    name, options, module, arguments = CASES[case]
    theirs = importlib.import_module(f"mpe2.{module}").parallel_env(
        max_cycles=10 * STEPS, continuous_actions=actions == "mpe2", **arguments
    )
    theirs.reset(seed=7)
    for entity in theirs.unwrapped.world.entities:
        entity.state.p_pos = entity.state.p_pos * 0.5
    ours = make_environment(name, num_worlds=1, dtype=dtype, actions=actions, max_steps=10 * STEPS, **options)
    copy_state(theirs.unwrapped.world, ours)
    return theirs, ours


def copy_state(world, ours):
    state = ours.state
    state.positions[:, :, 0] = torch.tensor(np.stack([entity.state.p_pos for entity in world.entities]).T)
    state.velocities[:, :, 0] = torch.tensor(np.stack([agent.state.p_vel for agent in world.agents]).T)
    goals = [goal for agent in world.agents if (goal := goal_of(agent, world)) is not None]
    if "goal" in state.facts:
        state.facts["goal"][:, 0] = torch.tensor(goals[: len(state.facts["goal"])])
    for i, speaker in enumerate(world.agents[ours.task.speakers]):
        state.messages[i, :, 0] = torch.tensor(speaker.state.c)
    ours.task.settle(state)


def goal_of(agent, world):
    for goal in (getattr(agent, "_goal_b", None), getattr(agent, "_goal_a", None)):
        for i, landmark in enumerate(world.landmarks):
            if goal is landmark:
                return i
    return None


def draw_actions(theirs, ours, random):
    """The actions of mpe2, and the same for us [1, N, A]."""
    sizes = ours.spec.action_sizes
    given, actions = {}, torch.zeros(1, len(sizes), ours.spec.action_size)
    for i, (agent, size) in enumerate(zip(theirs.possible_agents, sizes, strict=True)):
        if ours.spec.discrete:
            assert theirs.action_space(agent).n == size
            given[agent] = int(random.integers(size))
            actions[0, i, given[agent]] = 1
        else:
            assert theirs.action_space(agent).shape == (size,)
            given[agent] = random.random(size).astype(np.float32)
            actions[0, i, :size] = torch.tensor(given[agent])
    return given, actions


def exact_observations(theirs, ours):
    """mpe2's own numbers before it rounds them to fp32, [N, O], zero behind an agent's size."""
    world, scenario = theirs.unwrapped.world, theirs.unwrapped.scenario
    expected = np.zeros((len(world.agents), ours.spec.observation_size))
    for i, agent in enumerate(world.agents):
        seen = scenario.observation(agent, world)
        assert len(seen) == ours.spec.observation_sizes[i]
        expected[i, : len(seen)] = seen
    return expected


@pytest.mark.parametrize("actions", ["mpe2", "discrete"])
@pytest.mark.parametrize("case", CASES)
def test_150_steps_equal_mpe2(case, actions):
    """float64 against float64, from one common state on: 1e-6 in every observation and every reward."""
    theirs, ours = make_pair(case, actions, torch.float64)
    assert list(ours.spec.agents) == theirs.possible_agents
    torch.testing.assert_close(ours.observe()[0].numpy(), exact_observations(theirs, ours), atol=1e-6, rtol=0)
    random = np.random.default_rng(3)
    for step in range(STEPS):
        if step % HOLD == 0:
            given, same = draw_actions(theirs, ours, random)
        observations, rewards, *_ = theirs.step(given)
        transition = ours.step(same)
        seen, paid = transition.observation[0].numpy(), transition.reward[0].numpy()
        np.testing.assert_allclose(seen, exact_observations(theirs, ours), atol=1e-6, rtol=0)
        np.testing.assert_allclose(paid, [rewards[agent] for agent in theirs.possible_agents], atol=1e-6, rtol=0)
        for i, observation in enumerate(observations.values()):
            np.testing.assert_allclose(seen[i, : len(observation)].astype(np.float32), observation, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["spread-6", "tag-6", "reference"])
def test_every_fp32_step_is_as_near_as_fp32_is(case):
    """Contacts amplify rounding, so here each step begins from mpe2's state."""
    theirs, ours = make_pair(case, "mpe2", torch.float32)
    random = np.random.default_rng(3)
    for step in range(STEPS):
        if step % HOLD == 0:
            given, same = draw_actions(theirs, ours, random)
        copy_state(theirs.unwrapped.world, ours)
        theirs.step(given)
        transition = ours.step(same)
        assert transition.observation.dtype == transition.reward.dtype == torch.float32
        np.testing.assert_allclose(transition.observation[0], exact_observations(theirs, ours), atol=1e-5, rtol=1e-6)


def test_the_comparison_meets_contacts_and_limits():
    """What the random steps are to exercise does happen in them."""
    theirs, ours = make_pair("tag-6", "discrete", torch.float64)
    random = np.random.default_rng(3)
    fast = caught = outside = False
    for step in range(STEPS):
        if step % HOLD == 0:
            _, same = draw_actions(theirs, ours, random)
        reward = ours.step(same).reward[0]
        speed = ours.state.velocities[:, :, 0].norm(dim=0)
        fast |= bool((speed >= torch.tensor([1.0] * 3 + [1.3] * 3) - 1e-9).any())
        caught |= bool((reward[:3] > 0).any())
        outside |= bool((ours.state.agents[:, 3:].abs() > 1).any())
    assert fast
    assert caught
    assert outside
