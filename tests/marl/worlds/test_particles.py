"""Physics by hand, episodes, seeds, resuming, and the guards of the particle worlds."""

import io
import math

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.worlds import ParticleEnvironment, make_environment
from fulmen.marl.worlds.tasks import Navigation, Spread


def make(num_worlds=2, **options):
    return make_environment("navigation", num_worlds=num_worlds, **(dict(agents=2) | options))


def place(environment, positions, velocities=None):
    """The same places [E, 2] of all entities in every world; agents at rest unless velocities [N, 2] are given."""
    environment.state.positions.copy_(torch.tensor(positions).T[..., None])
    environment.state.velocities.zero_()
    if velocities is not None:
        environment.state.velocities.copy_(torch.tensor(velocities).T[..., None])


def draw(environment, generator=None):
    spec, shape = environment.spec, (environment.num_worlds, environment.spec.num_agents, environment.spec.action_size)
    if spec.discrete:
        scores = torch.rand(shape, generator=generator).masked_fill(~spec.action_mask, -1)
        return torch.nn.functional.one_hot(scores.argmax(-1), spec.action_size).float()
    return spec.low + (spec.high - spec.low) * torch.rand(shape, generator=generator)


def test_positions_move_by_the_old_velocity():
    environment = make(1, agents=1, dtype=torch.float64)
    place(environment, [[0.0, 0.0], [1.0, 0.0]])
    push = torch.tensor([[[1.0, -0.5]]])
    first = environment.step(push).observation[0, 0].tolist()
    # A full action is a force of 5, a step takes 0.1: the velocity is there, the way is not yet.
    assert first == pytest.approx([0.5, -0.25, 0, 0, 1, 0])
    second = environment.step(push).observation[0, 0].tolist()
    assert second == pytest.approx([0.875, -0.4375, 0.05, -0.025, 0.95, 0.025])


def test_three_kinds_of_actions_are_one_force():
    """Right at full power, and down."""
    actions = {
        "force": [[1.0, 0.0], [0.0, -1.0]],
        "mpe2": [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]],
        "discrete": [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]],
    }
    for kind, action in actions.items():
        environment = make(1, actions=kind)
        environment.step(torch.tensor([action]))
        assert environment.state.velocities[..., 0].T.tolist() == [[0.5, 0.0], [0.0, -0.5]], kind


def test_overlap_pushes_both_away_with_mpe2s_force():
    environment = make(1, collide=True, dtype=torch.float64)
    place(environment, [[0.0, 0.0], [0.06, 0.08], [1.0, 0.0], [0.0, 1.0]])
    environment.step(torch.zeros(1, 2, 2))
    # Discs of radius 0.05 that just touch: 100 * 0.001 * log(1 + e^0), along (0.6, 0.8), for 0.1.
    push = 100 * 1e-3 * math.log(2) * 0.1
    expected = torch.tensor([[-0.6 * push, -0.8 * push], [0.6 * push, 0.8 * push]], dtype=torch.float64)
    torch.testing.assert_close(environment.state.velocities[..., 0].T, expected)


def test_there_is_no_push_from_afar_nor_without_collide():
    apart = make(1, collide=True)
    place(apart, [[0.0, 0.0], [0.3, 0.0], [1.0, 0.0], [0.0, 1.0]])
    through = make(1, collide=False)
    place(through, [[0.0, 0.0], [0.01, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for environment in (apart, through):
        environment.step(torch.zeros(1, 2, 2))
        assert not environment.state.velocities.any()


def test_two_in_one_place_stay_finite():
    environment = make(1, collide=True)
    place(environment, [[0.2, 0.2], [0.2, 0.2], [1.0, 0.0], [0.0, 1.0]])
    assert environment.step(torch.zeros(1, 2, 2)).observation.isfinite().all()


def test_speed_has_a_limit_in_tag():
    environment = make_environment("tag", num_worlds=1, adversaries=1, good=1, obstacles=0, actions="force")
    place(environment, [[-0.9, 0.0], [0.9, 0.0]], [[0.6, 0.8], [0.0, 0.5]])
    environment.step(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    hunter, hunted = environment.state.velocities[..., 0].T
    # Damped and pushed it would be (0.75, 0.9): 1.17, above the hunter's 1.
    torch.testing.assert_close(hunter, torch.tensor([0.75, 0.9]) / math.hypot(0.75, 0.9))
    torch.testing.assert_close(hunted, torch.tensor([0.0, 0.375]))


def test_obstacles_stand_still_but_push():
    environment = make_environment("tag", num_worlds=1, adversaries=1, good=1, obstacles=1, actions="force")
    place(environment, [[-0.9, 0.0], [0.2, 0.0], [0.0, 0.0]])
    environment.step(torch.zeros(1, 2, 2))
    assert environment.state.landmarks.tolist() == [[[0.0]], [[0.0]]]
    assert environment.state.velocities[0, 1, 0] > 0.1


@pytest.mark.parametrize("name", ["spread", "tag"])
def test_worlds_do_not_touch_each_other(name):
    together = make_environment(name, num_worlds=3)
    alone = [make_environment(name, num_worlds=1) for _ in range(3)]
    for i, environment in enumerate(alone):
        environment.numbers.copy_(together.numbers[:, i : i + 1])
    for _ in range(10):
        actions = draw(together)
        transition = together.step(actions)
        for i, environment in enumerate(alone):
            single = environment.step(actions[i : i + 1])
            torch.testing.assert_close(single.observation[0], transition.observation[i])
            torch.testing.assert_close(single.reward[0], transition.reward[i])


def test_a_seed_means_the_same_worlds_whatever_ran_before():
    environment, other = make(), make()
    environment.reset(5)
    environment.step(draw(environment))
    environment.reset()
    again = environment.reset(5)
    torch.rand(3)
    assert torch.equal(again, other.reset(5))
    assert not torch.equal(again, other.reset(6))
    assert not torch.equal(again[0], again[1])
    assert not torch.equal(environment.reset(), again)


def test_worlds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    environment = make(max_steps=1)
    environment.step(torch.zeros(2, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_time_limit_truncates_and_begins_anew():
    environment = make(max_steps=3)
    start = environment.reset(0)
    for step in range(1, 4):
        transition = environment.step(draw(environment))
        assert not transition.terminated.any()
        assert transition.ended.tolist() == [step == 3] * 2
        if step < 3:
            assert torch.equal(transition.observation, transition.final_observation)
    assert torch.equal(transition.observation, environment.observe())
    # The new episode begins at rest at another place; the last observation of the old one was in motion.
    assert not transition.observation[..., :2].any()
    assert transition.final_observation[..., :2].all()
    assert not torch.equal(transition.observation, start)
    assert not environment.step(draw(environment)).ended.any()


@pytest.mark.parametrize("name", ["spread", "reference", "memory"])
def test_resuming_goes_on_bit_for_bit(name):
    """Across the end of an episode, in a fresh environment, through a file."""
    environment = make_environment(name, num_worlds=3, max_steps=7)
    environment.reset(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        environment.step(draw(environment, generator))
    file = io.BytesIO()
    torch.save(environment.state_dict(), file)
    actions = [draw(environment, generator) for _ in range(6)]
    expected = [environment.step(action) for action in actions]
    file.seek(0)
    resumed = make_environment(name, num_worlds=3, max_steps=7)
    resumed.reset(99)
    resumed.load_state_dict(torch.load(file))
    for action, transition in zip(actions, expected, strict=True):
        for got, want in zip(resumed.step(action), transition, strict=True):
            assert torch.equal(got, want)
    assert any(transition.ended.all() for transition in expected)


def test_a_saved_state_does_not_move_on():
    environment = make()
    state = environment.state_dict()
    numbers = state["numbers"].clone()
    environment.step(draw(environment))
    assert torch.equal(state["numbers"], numbers)


def test_the_state_of_other_worlds_is_refused():
    with pytest.raises(UserError, match=r"navigation: this state has .* \(13, 3\), these worlds have \(13, 2\)"):
        make(2).load_state_dict(make(3).state_dict())


def test_what_a_step_gave_is_not_overwritten_by_the_next():
    environment = make()
    transition = environment.step(draw(environment))
    copies = [tensor.clone() for tensor in transition]
    environment.step(draw(environment))
    assert all(torch.equal(a, b) for a, b in zip(transition, copies, strict=True))


def test_nothing_is_left_unwritten(poisoned_memory):
    for name in ("tag", "memory", "reference"):
        environment = make_environment(name, num_worlds=2, max_steps=6)
        for _ in range(8):
            transition = environment.step(draw(environment))
            assert transition.observation.isfinite().all()
            assert transition.reward.isfinite().all()


def test_numbers_are_fp32_and_contiguous_unless_said():
    transition = make().step(torch.zeros(2, 2, 2))
    assert transition.observation.dtype == transition.reward.dtype == torch.float32
    assert transition.observation.is_contiguous()
    assert transition.reward.is_contiguous()
    assert make(dtype=torch.float64).step(torch.zeros(2, 2, 2)).reward.dtype == torch.float64


def with_action(environment, world, agent, dim, value):
    actions = torch.zeros(environment.num_worlds, environment.spec.num_agents, environment.spec.action_size)
    if environment.spec.discrete:
        actions[..., 0] = 1
    actions[world, agent, dim] = value
    return actions


@pytest.mark.parametrize("value", [1.01, -2.0, math.nan, math.inf])
def test_an_action_out_of_bounds_names_agent_and_value(value):
    environment = make()
    with pytest.raises(UserError, match=f"agent agent_1: action 0 in world 1 is {value:g}, the bounds are -1 to 1"):
        environment.step(with_action(environment, 1, 1, 0, value))


def test_an_action_behind_an_agents_size_is_refused():
    environment = make_environment("speaker_listener", num_worlds=1)
    with pytest.raises(UserError, match="agent speaker_0: action 4 in world 0 is 1, the bounds are 0 to 0"):
        environment.step(with_action(environment, 0, 0, 4, 1.0))


@pytest.mark.parametrize("value", [1.0, 0.5, -1.0, math.nan])
def test_a_choice_that_is_not_one_hot_names_the_agent(value):
    environment = make(actions="discrete")
    with pytest.raises(UserError, match="agent agent_1: its action in world 0 must be one-hot among 5 choices, got"):
        environment.step(with_action(environment, 0, 1, 3, value))


def test_a_choice_behind_an_agents_own_is_refused():
    environment = make_environment("speaker_listener", num_worlds=1, actions="discrete")
    for instead in (0, 1):
        actions = with_action(environment, 0, 0, 4, 1.0)
        actions[0, 0, 0] = instead
        with pytest.raises(UserError, match="agent speaker_0: its action in world 0 must be one-hot among 3 choices"):
            environment.step(actions)


def test_actions_of_another_shape_are_refused_even_unchecked():
    for check in (True, False):
        with pytest.raises(UserError, match=r"= \(2, 2, 2\), got \(2, 2, 3\)"):
            make(check=check).step(torch.zeros(2, 2, 3))


def test_unchecked_worlds_take_what_they_are_given():
    environment = make(check=False)
    environment.step(with_action(environment, 0, 0, 0, 3.0))
    assert environment.state.velocities[0, 0, 0] == 1.5


def test_a_reward_that_is_no_number_names_the_agent():
    environment = make()
    environment.state.agents[0, 1, 1] = math.nan
    with pytest.raises(UserError, match="agent agent_1: reward nan in world 1"):
        environment.step(torch.zeros(2, 2, 2))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "4"])
def test_the_number_of_worlds_is_checked(count):
    with pytest.raises(UserError, match="num_worlds must be an integer of at least 1, got"):
        ParticleEnvironment(Spread(), num_worlds=count)


def test_a_scene_has_all_that_a_picture_needs():
    environment = make_environment("speaker_listener", num_worlds=3, actions="discrete")
    environment.state.facts["goal"][0, 2] = 1
    actions = torch.zeros(3, 2, 5)
    actions[:, 0, 2] = actions[:, 1, 1] = 1
    environment.step(actions)
    scene = environment.scene(2)
    assert torch.equal(scene.positions, environment.state.positions[:, :, 2].T)
    before = scene.positions.clone()
    environment.step(actions)
    environment.step(actions)
    assert torch.equal(scene.positions, before)
    assert scene.radii.tolist() == pytest.approx([0.075, 0.075, 0.04, 0.04, 0.04])
    assert scene.labels == ["0: C", "1", "", "", ""]
    assert scene.goals == [(1, 3)]
    assert scene.colours[2:] == [(166, 38, 38), (38, 166, 38), (38, 38, 166)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["spread", "tag", "reference", "memory"])
def test_a_gpu_makes_the_same_steps(name):
    """Its CPU twin is every other test: only the device differs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here, there = (make_environment(name, num_worlds=4, device=device, max_steps=5) for device in ("cpu", "cuda"))
    there.numbers.copy_(here.numbers)
    for _ in range(4):
        actions = draw(here)
        expected, got = here.step(actions), there.step(actions.cuda())
        assert got.observation.device == there.device
        torch.testing.assert_close(got.observation.cpu(), expected.observation, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.reward.cpu(), expected.reward, atol=1e-5, rtol=1e-5)
    assert there.step(draw(here).cuda()).ended.all()
    resumed = make_environment(name, num_worlds=4, device="cuda", max_steps=5)
    resumed.load_state_dict(there.state_dict())
    assert torch.equal(resumed.reset(), there.reset())


def test_a_task_may_be_given_as_an_object():
    environment = ParticleEnvironment(Navigation(agents=3), num_worlds=2)
    assert environment.spec.agents == ("agent_0", "agent_1", "agent_2")
