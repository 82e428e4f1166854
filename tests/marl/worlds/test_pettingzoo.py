"""Small PettingZoo environments of our own, well-behaved and not, and one of mpe2, behind the adapter."""

import re
import sys

import numpy as np
import pytest
import torch

from fulmen.config import UserError
from fulmen.marl.worlds.pettingzoo import PettingZooEnvironment

spaces = pytest.importorskip("gymnasium.spaces")
NAN, INF = float("nan"), float("inf")
SIZES = {"a": (2, 1), "b": (3, 2)}


class Walk:
    """Agents a (2 numbers seen, 1 done) and b (3 seen, 2 done) walk on a line from a drawn start, for five steps."""

    possible_agents = ("a", "b")

    def __init__(self):
        self.agents = []
        self.observation_spaces = {name: spaces.Box(-INF, INF, (seen,)) for name, (seen, _) in SIZES.items()}
        self.action_spaces = {name: spaces.Box(-1, 2, (done,)) for name, (_, done) in SIZES.items()}
        self.random = np.random.default_rng()

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def observe(self):
        return {name: np.full(SIZES[name][0], self.place[name], np.float32) for name in self.agents}

    def reset(self, seed=None, options=None):
        self.seed, self.steps = seed, 0
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.place = {name: float(self.random.uniform()) for name in self.agents}
        return self.observe(), {}

    def step(self, actions):
        assert set(actions) == set(self.agents), actions
        self.steps += 1
        for name, action in actions.items():
            assert self.action_space(name).contains(action), (name, action)
            self.place[name] += float(np.sum(action)) + 0.1 * float(self.random.uniform())
        observations, rewards = self.observe(), {name: self.place[name] for name in self.agents}
        terminated, truncated = self.flags()
        self.agents = [name for name in self.agents if not terminated[name] and not truncated[name]]
        return self.spoil(observations, rewards, terminated, truncated, {name: {} for name in rewards})

    def flags(self):
        return dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, self.steps == 5)

    def spoil(self, *given):
        return given

    def close(self):
        self.agents = None


class Uneven(Walk):
    """Agent a is terminated at step 2; b is truncated at step 3 with `cut`, else terminated at 4."""

    cut = False

    def flags(self):
        terminated = {name: name == "a" and self.steps == 2 for name in self.agents}
        truncated = {name: name == "b" and self.steps == 4 for name in self.agents}
        return (terminated, truncated) if not self.cut else (truncated, terminated)


class Cut(Uneven):
    """As Uneven, the other way round: a is truncated, b terminated."""

    cut = True


class Choice(Walk):
    """Agents choose among 2 and 3; counted from 4 for b."""

    def __init__(self):
        super().__init__()
        self.action_spaces = {"a": spaces.Discrete(2), "b": spaces.Discrete(3, start=4)}


def actions_of(environment, value=0.5):
    spec = environment.spec
    if spec.discrete:
        return torch.nn.functional.one_hot(torch.ones(environment.num_worlds, spec.num_agents).long()).float()
    return torch.where(spec.action_mask, value, 0.0).expand(environment.num_worlds, -1, -1).clone()


def random_actions(environment, generator):
    spec = environment.spec
    uniform = torch.rand(environment.num_worlds, spec.num_agents, spec.action_size, generator=generator)
    return spec.low + uniform * (spec.high - spec.low)


def test_spec_tells_sizes_and_bounds():
    spec = PettingZooEnvironment(Walk, 2, max_steps=7).spec
    assert (spec.agents, spec.observation_sizes, spec.action_sizes) == (("a", "b"), (2, 3), (1, 2))
    assert spec.low.tolist() == [[-1, 0], [-1, -1]]
    assert spec.high.tolist() == [[2, 0], [2, 2]]
    assert (spec.discrete, spec.max_steps) == (False, 7)


def test_each_world_has_its_seed_and_every_episode_another():
    environment = PettingZooEnvironment(Walk, 3)
    first = environment.reset(seed=10)
    alone = Walk()
    for world in range(3):
        given, _ = alone.reset(seed=10 + world)
        assert first[world, 0].tolist() == [*given["a"].tolist(), 0]
        assert first[world, 1].tolist() == given["b"].tolist()
    begun = [first]
    for _ in range(10):
        transition = environment.step(actions_of(environment))
        if transition.ended.all():
            begun.append(transition.observation)
    starts = torch.stack(begun)[..., 0].flatten().tolist()
    assert len(begun) == 3
    assert len(set(starts)) == len(starts)
    assert torch.equal(environment.reset(seed=10), first)


def test_without_a_seed_torchs_generator_draws_one():
    environment = PettingZooEnvironment(Walk)
    torch.manual_seed(5)
    first = environment.reset()
    assert not torch.equal(environment.reset(), first)
    torch.manual_seed(5)
    assert torch.equal(environment.reset(), first)


def test_truncation_ends_without_terminating_and_keeps_the_last_observation():
    environment = PettingZooEnvironment(Walk, 2)
    environment.reset(seed=0)
    for _ in range(4):
        transition = environment.step(actions_of(environment))
        assert not transition.ended.any()
        assert torch.equal(transition.observation, transition.final_observation)
    before = transition.observation
    transition = environment.step(actions_of(environment))
    assert transition.ended.all()
    assert not transition.terminated.any()
    assert (transition.final_observation[:, :, 0] > before[:, :, 0] + 0.4).all()
    assert (transition.observation[:, :, 0] < 1).all()
    assert torch.equal(transition.reward, transition.final_observation[:, :, 0])


def test_max_steps_truncates_each_world_of_its_own():
    environment = PettingZooEnvironment(Walk, max_steps=3)
    environment.reset(seed=0)
    ended = [environment.step(actions_of(environment)).ended.item() for _ in range(9)]
    assert ended == [False, False, True] * 3


def test_an_agent_that_is_terminated_early_sees_and_earns_nothing_until_all_have_ended():
    environment = PettingZooEnvironment(Uneven)
    environment.reset(seed=0)
    steps = [environment.step(actions_of(environment)) for _ in range(5)]
    assert [step.terminated[0].tolist() for step in steps[:4]] == [[False, False]] + [[True, False]] * 3
    assert [step.ended.item() for step in steps] == [False, False, False, True, False]
    assert steps[1].reward[0, 0] > 0
    for step in steps[2:4]:
        assert step.reward[0, 0] == 0
        assert step.reward[0, 1] > 0
    assert not steps[1].observation[0, 0].any()
    assert not steps[2].observation[0, 0].any()
    assert steps[2].observation[0, 1].all()
    assert steps[3].observation[0, 0, :2].all(), "the next episode has all agents again"
    assert steps[4].reward[0, 0] > 0


def test_an_agent_that_is_truncated_early_bootstraps_from_its_own_last_observation():
    environment = PettingZooEnvironment(Cut)
    environment.reset(seed=0)
    steps = [environment.step(actions_of(environment)) for _ in range(4)]
    assert [step.terminated[0].tolist() for step in steps] == [[False, False]] * 2 + [[True, False], [True, True]]
    assert steps[1].final_observation[0, 0, :2].all()
    assert not steps[1].observation[0, 0].any()
    assert steps[3].ended.item()


def test_discrete_actions_reach_the_environment_as_its_own_numbers():
    seen = []

    class Told(Choice):
        def step(self, actions):
            seen.append(dict(actions))
            return super().step(actions)

    environment = PettingZooEnvironment(Told)
    assert environment.spec.discrete
    assert environment.spec.action_sizes == (2, 3)
    environment.reset(seed=0)
    environment.step(torch.tensor([[[0.0, 1, 0], [0, 0, 1]]]))
    assert seen == [{"a": 1, "b": 6}]


def test_boxes_of_any_shape_are_flattened_and_bounds_in_fp64_are_kept():
    class Pictures(Walk):
        def __init__(self):
            super().__init__()
            self.observation_spaces["a"] = spaces.Box(0, 255, (2, 2), np.uint8)
            self.action_spaces["b"] = spaces.Box(-0.1, 0.1, (2, 1), np.float64)

        def observe(self):
            return super().observe() | ({"a": np.array([[1, 2], [3, 4]], np.uint8)} if "a" in self.agents else {})

    environment = PettingZooEnvironment(Pictures)
    assert environment.spec.observation_sizes == (4, 3)
    assert environment.reset(seed=0)[0, 0].tolist() == [1, 2, 3, 4]
    assert float(environment.spec.high[1, 0]) > 0.1, "rounded to fp32, the bound lies outside itself"
    environment.step(torch.where(environment.spec.action_mask, environment.spec.high, 0.0)[None])


def test_actions_outside_the_bounds_are_refused():
    environment = PettingZooEnvironment(Walk)
    environment.reset(seed=0)
    with pytest.raises(UserError, match="agent b: action 0 in world 0 is 3, the bounds are -1 to 2"):
        environment.step(torch.tensor([[[0.0, 0], [3, 0]]]))


@pytest.mark.parametrize("kind", [Walk, Uneven, Cut])
@pytest.mark.parametrize("before", [0, 1, 3, 8])
def test_a_saved_environment_goes_on_bit_for_bit(kind, before):
    generator = torch.Generator().manual_seed(1)
    environment = PettingZooEnvironment(kind, 3, max_steps=4)
    environment.reset(seed=3)
    for _ in range(before):
        actions = random_actions(environment, generator)
        environment.step(actions)
        actions.zero_()
    state = environment.state_dict()
    other = PettingZooEnvironment(kind, 3, max_steps=4)
    other.load_state_dict(state)
    for _ in range(9):
        actions = random_actions(environment, generator)
        for ours, theirs in zip(environment.step(actions), other.step(actions), strict=True):
            assert torch.equal(ours, theirs)


def test_an_environment_with_randomness_of_its_own_cannot_be_saved():
    class Unseeded(Walk):
        def reset(self, seed=None, options=None):
            return super().reset(None)

    environment = PettingZooEnvironment(Unseeded)
    environment.reset(seed=0)
    with pytest.raises(UserError, match=r"world 0 cannot be saved.*another observation.*set run\.snapshot_every=0"):
        environment.state_dict()


def test_a_snapshot_of_another_environment_is_refused():
    environment = PettingZooEnvironment(Walk, 2)
    environment.reset(seed=0)
    environment.step(actions_of(environment))
    state = environment.state_dict()
    with pytest.raises(UserError, match=r"the snapshot has observations \(2, 2, 3\).*environment \(1, 2, 3\)"):
        PettingZooEnvironment(Walk).load_state_dict(state)

    class Faster(Walk):
        def step(self, actions):
            self.place = {name: place + 1 for name, place in self.place.items()}
            return super().step(actions)

    with pytest.raises(UserError, match="world 0: playing the 1 actions of the snapshot again led to another"):
        PettingZooEnvironment(Faster, 2).load_state_dict(state)


def spoilt(index=0, agent="b", value=None, step=2, remove=False):
    """An environment whose `index`-th dict of a step has another value for an agent, or none."""

    class Spoilt(Walk):
        def spoil(self, *given):
            if self.steps == step:
                given[index].pop(agent)
                if not remove:
                    given[index][agent] = value
            return given

    return Spoilt


def vanishing(agent="b"):
    class Vanishing(Walk):
        def spoil(self, *given):
            if self.steps == 2:
                self.agents.remove(agent)
                for mapping in given:
                    mapping.pop(agent)
            return given

    return Vanishing


class Quiet(Walk):
    def spoil(self, *given):
        self.agents = self.agents[:1]
        return given


class Staying(Uneven):
    def spoil(self, *given):
        self.agents = ["a", "b"]
        return given


class Stranger(Walk):
    def spoil(self, *given):
        self.agents = [*self.agents, "c"]
        return given


class Raising(Walk):
    def spoil(self, *given):
        raise ZeroDivisionError("no mass\nat all")


class Late(Walk):
    def reset(self, seed=None, options=None):
        observations, infos = super().reset(seed)
        return {"a": observations["a"]}, infos


class Old(Walk):
    def spoil(self, *given):
        return given[:3] + given[4:]


class Listing(Walk):
    def spoil(self, *given):
        return (list(given[0].values()), *given[1:])


class Changing(Walk):
    def reset(self, seed=None, options=None):
        self.observation_spaces["b"] = spaces.Box(-INF, INF, (4,))
        return super().reset(seed)


class Seedless(Walk):
    def reset(self):
        return super().reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (spoilt(1, value=NAN), "world 1, step 2: agent b: reward nan is not a finite number"),
        (spoilt(1, value=None), "world 1, step 2: agent b: reward None is not a finite number"),
        (spoilt(1, value="much"), "world 1, step 2: agent b: reward 'much' is not one number"),
        (spoilt(1, value=[1, 2]), "world 1, step 2: agent b: reward [1, 2] is not one number"),
        (spoilt(1, remove=True), "world 1, step 2: agent b is missing from the rewards"),
        (spoilt(0, value=np.array([0, NAN, 1])), "world 1, step 2: agent b: observation 1 is nan"),
        (spoilt(0, value=np.zeros(2)), "world 1, step 2: agent b: observation of shape (2,), its space says (3,)"),
        (spoilt(0, value="far"), "world 1, step 2: agent b: observation 'far' is not an array of numbers"),
        (spoilt(0, remove=True), "world 1, step 2: agent b is missing from the observations"),
        (spoilt(2, value=None), "world 1, step 2: agent b: None in the terminations is neither True nor False"),
        (spoilt(2, remove=True), "world 1, step 2: agent b is missing from the terminations"),
        (spoilt(3, remove=True), "world 1, step 2: agent b is missing from the truncations"),
        (spoilt(2, value=True), "world 1, step 2: agent b is in env.agents, but has ended"),
        (vanishing(), "world 1, step 2: agent b is missing from the terminations, though it was neither terminated"),
        (Quiet, "world 1, step 1: agent b vanished from env.agents without having been terminated or truncated"),
        (Staying, "world 1, step 2: agent a is in env.agents, but has ended"),
        (Stranger, "world 1, step 1: agent c is in env.agents, but not in env.possible_agents"),
        (Raising, "raised ZeroDivisionError: no mass at all"),
        (Late, "world 1, step 0: agent b is missing from the observations"),
        (Old, "not the dicts (observations, rewards, terminations, truncations, infos)"),
        (Listing, "world 1, step 1: step gave [array("),
        (Changing, "world 1, step 0: agent b: its observation space was Box(-inf, inf, (3,), float32) and is"),
        (Seedless, "world 1, step 0: reset(1) raised TypeError"),
    ],
)
def test_what_misbehaves_is_named_with_world_agent_and_value(make, message):
    kinds = iter([Walk, make])
    environment = PettingZooEnvironment(lambda: next(kinds)(), 2)

    def live():
        environment.reset(seed=0)
        for _ in range(3):
            environment.step(actions_of(environment))

    with pytest.raises(UserError, match=re.escape(message)) as caught:
        live()
    assert "\n" not in str(caught.value)
    assert "world 1" in str(caught.value)


def test_a_terminated_agent_may_be_left_out_of_the_observations():
    class Silent(Uneven):
        def spoil(self, *given):
            if self.steps == 2:
                given[0].pop("a")
            return given

    environment = PettingZooEnvironment(Silent)
    environment.reset(seed=0)
    environment.step(actions_of(environment))
    assert environment.step(actions_of(environment)).terminated.tolist() == [[True, False]]


def with_spaces(**changes):
    class Changed(Walk):
        def __init__(self):
            super().__init__()
            self.observation_spaces["b"] = changes.get("seen", self.observation_spaces["b"])
            self.action_spaces["b"] = changes.get("done", self.action_spaces["b"])

    return Changed


class Turns(Walk):
    def agent_iter(self):
        return iter(())


class Empty(Walk):
    possible_agents = ()


class Spaceless(Walk):
    def __init__(self):
        super().__init__()
        del self.action_spaces["b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_spaces(done=spaces.Box(-INF, 1, (2,))), "agent b: action bounds must be finite"),
        (with_spaces(done=spaces.Box(1, 1, (2,))), "agent b: low must be below high"),
        (with_spaces(done=spaces.Box(0, 5, (2,), np.int32)), "agent b: actions must be a Box of floats or Discrete"),
        (with_spaces(done=spaces.MultiDiscrete([2, 2])), "agent b: actions must be a Box of floats or Discrete"),
        (with_spaces(done=spaces.Discrete(2)), "agent b: actions are Discrete(2), those of a Box(-1.0, 2.0"),
        (with_spaces(seen=spaces.Discrete(4)), "agent b: observations must be a Box, got Discrete(4)"),
        (with_spaces(seen=spaces.Box(0, 1, (0,))), "agent b: observations must be a Box"),
        (Turns, "moves one agent at a time"),
        (Empty, "has no possible_agents"),
        (Spaceless, "does not tell its agents and spaces: KeyError: 'b'"),
        (dict, "make gave {}, which is no PettingZoo parallel environment: it has no possible_agents"),
        (lambda: 1 / 0, "making the environment of world 0 raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_learnt_in_is_refused_when_it_is_made(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PettingZooEnvironment(make)


def test_worlds_must_be_alike_and_of_their_own():
    kinds = iter([Walk, with_spaces(done=spaces.Box(-1, 1, (2,)))])
    with pytest.raises(UserError, match="world 1, step 0: agent b: its action space was Box"):
        PettingZooEnvironment(lambda: next(kinds)(), 2)
    one = Walk()
    with pytest.raises(UserError, match="the same environment twice"):
        PettingZooEnvironment(lambda: one, 2)


def test_arguments_and_order_of_calls_are_checked():
    with pytest.raises(UserError, match="num_worlds must be at least 1, got 0"):
        PettingZooEnvironment(Walk, 0)
    environment = PettingZooEnvironment(Walk)
    with pytest.raises(UserError, match="a seed must be at least 0, got -1"):
        environment.reset(seed=-1)
    with pytest.raises(UserError, match="call reset"):
        environment.step(actions_of(environment))
    with pytest.raises(UserError, match="call reset"):
        environment.state_dict()


def test_without_gymnasium_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium.spaces", None)
    with pytest.raises(UserError, match=r'pip install "fulmen\[marl\]"'):
        PettingZooEnvironment(Walk)


def test_close_closes_every_environment():
    environment = PettingZooEnvironment(Walk, 2)
    environment.reset(seed=0)
    environment.state_dict()
    environment.close()
    assert [world.env.agents for world in [*environment._worlds, environment._spare]] == [None] * 3


def test_one_that_cannot_be_closed_keeps_no_other_from_it():
    class Stuck(Walk):
        def close(self):
            super().close()
            raise OSError("window is gone")

    class Open(Walk):
        close = property()

    kinds = iter([Walk, Open, Stuck, Walk])
    environment = PettingZooEnvironment(lambda: next(kinds)(), 4)
    with pytest.raises(UserError, match=r"world 2, step 0: close\(\) raised OSError: window is gone"):
        environment.close()
    assert [world.env.agents for world in environment._worlds] == [None, [], None, None]


@pytest.mark.parametrize("continuous", [True, False])
def test_mpe2_spread_behind_the_adapter_is_mpe2_spread(continuous):
    simple_spread = pytest.importorskip("mpe2.simple_spread_v3")

    def make():
        return simple_spread.parallel_env(N=2, max_cycles=6, continuous_actions=continuous)

    environment, alone = PettingZooEnvironment(make, 2), make()
    assert environment.spec.action_sizes == (5, 5)
    observation = environment.reset(seed=4)
    expected, _ = alone.reset(seed=5)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        assert torch.equal(observation[1], torch.from_numpy(np.stack(list(expected.values()))))
        actions = torch.rand(2, 2, 5, generator=generator)
        if not continuous:
            actions = torch.nn.functional.one_hot(actions.argmax(-1), 5).float()
        sent = [row.numpy() if continuous else int(row.argmax()) for row in actions[1]]
        expected, rewards, *_ = alone.step(dict(zip(alone.agents, sent, strict=True)))
        transition = environment.step(actions)
        observation = transition.final_observation
        assert transition.reward[1].tolist() == pytest.approx(list(rewards.values()), abs=1e-6)
        assert transition.ended.tolist() == [step == 5] * 2
        if step == 2:
            other = PettingZooEnvironment(make, 2)
            other.load_state_dict(environment.state_dict())
    assert not transition.terminated.any()
    for _ in range(3):
        environment.step(actions)
    assert (environment.state_dict()["steps"], other.state_dict()["steps"]) == ([3, 3], [3, 3])
