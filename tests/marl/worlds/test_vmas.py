"""The VMAS adapter on a stand-in that behaves as VMAS does, and on VMAS itself where it is installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fulmen.config import UserError
from fulmen.marl import MarlRecipe, train
from fulmen.marl.learner import LearnerSettings
from fulmen.marl.recipe import RunSection, TransferSection, WorldSection
from fulmen.marl.worlds.vmas import VmasEnvironment


class Walk:
    """Two agents (2 and 1 numbers seen, 1 and 2 done) on a line; a world terminates beyond 2."""

    vmas_random_state = [torch.random.get_rng_state()]  # noqa: RUF012 - shared by all instances, as in VMAS

    def __init__(self, num_envs, device, continuous_actions, max_steps, terminated_truncated, reward=0.0, seen=(2,)):
        assert terminated_truncated
        self.num_envs, self.max_steps, self.continuous, self.extra = num_envs, max_steps, continuous_actions, reward
        self.agents = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
        self.observation_space = [SimpleNamespace(shape=seen), SimpleNamespace(shape=(1,))]
        box = [SimpleNamespace(shape=(n,), low=[-1.0] * n, high=[1.0] * n) for n in (1, 2)]
        self.action_space = box if continuous_actions else [SimpleNamespace(n=2), SimpleNamespace(n=3)]
        self.calls = []
        self.place = self.steps = torch.zeros(num_envs)

    def draw(self, count):
        ours = torch.random.get_rng_state()
        torch.random.set_rng_state(self.vmas_random_state[0])
        drawn = torch.rand(count)
        self.vmas_random_state[0] = torch.random.get_rng_state()
        torch.random.set_rng_state(ours)
        return drawn

    def reset(self, seed=None):
        self.calls.append("reset")
        if seed is not None:
            self.vmas_random_state[0] = torch.Generator().manual_seed(seed).get_state()
        self.place, self.steps = self.draw(self.num_envs), torch.zeros(self.num_envs)
        return self.observe()

    def reset_at(self, index, return_observations):
        assert not return_observations
        self.calls.append(f"reset_at {index}")
        self.place[index], self.steps[index] = self.draw(1)[0], 0

    def observe(self):
        return [self.place[:, None].repeat(1, 2), self.steps[:, None].clone()]

    def get_from_scenario(self, get_observations, get_rewards, get_infos, get_dones):
        assert (get_observations, get_rewards, get_infos, get_dones) == (True, False, False, False)
        return [self.observe()]

    def step(self, actions):
        if self.continuous:
            assert all((action.abs() <= 1).all() for action in actions), "out of range"
            assert [action.shape[1] for action in actions] == [1, 2]
        self.sent = actions
        self.place = self.place + actions[0][:, 0]
        self.steps = self.steps + 1
        reward = self.place + self.extra
        truncated = self.steps >= self.max_steps if self.max_steps else torch.zeros(self.num_envs, dtype=torch.bool)
        return self.observe(), [reward, -reward], self.place > 2, truncated, [{}, {}]


@pytest.fixture(autouse=True)
def vmas(monkeypatch):
    def make_env(scenario, **settings):
        assert scenario == "walk", f"{scenario}.py\nscenario not found."
        return Walk(**settings)

    module = ModuleType("vmas")
    module.make_env = make_env
    monkeypatch.setitem(sys.modules, "vmas", module)


def push(environment, *values):
    actions = torch.zeros(environment.num_worlds, 2, 2)
    actions[:, 0, 0] = torch.tensor(values)
    return environment.step(actions)


def test_spec_tells_sizes_and_bounds():
    spec = VmasEnvironment("walk", 3).spec
    assert (spec.agents, spec.observation_sizes, spec.action_sizes) == (("a", "b"), (2, 1), (1, 2))
    assert (spec.low.tolist(), spec.high.tolist()) == ([[-1, 0], [-1, -1]], [[1, 0], [1, 1]])
    assert spec.max_steps == 100


def test_worlds_that_end_begin_again_and_keep_their_last_observation():
    environment = VmasEnvironment("walk", 3, max_steps=4)
    first = environment.reset(seed=1)
    assert first.shape == (3, 2, 2)
    push(environment, 1.0, 0.0, 0.0)
    transition = push(environment, 1.0, 0.0, 0.0)
    assert transition.terminated.tolist() == [[True, True], [False, False], [False, False]]
    assert transition.ended.tolist() == [True, False, False]
    torch.testing.assert_close(transition.final_observation[0, 0, 0], first[0, 0, 0] + 2)
    assert transition.observation[0, 0, 0] < 1
    assert torch.equal(transition.observation[1:], transition.final_observation[1:])
    push(environment, 0.0, 0.0, 0.0)
    transition = push(environment, 0.0, 0.0, 0.0)
    assert transition.ended.tolist() == [False, True, True]
    assert not transition.terminated.any()
    assert environment._env.calls[1:] == ["reset_at 0", "reset_at 1", "reset_at 2"]


def test_worlds_that_end_together_begin_again_in_one_call():
    environment = VmasEnvironment("walk", 3, max_steps=1)
    environment.reset(seed=1)
    transition = push(environment, 0.0, 0.0, 0.0)
    assert transition.ended.all()
    assert environment._env.calls == ["reset", "reset"]
    assert (transition.observation[:, 1, 0] == 0).all()
    assert (transition.final_observation[:, 1, 0] == 1).all()


def test_rounding_beyond_the_bounds_is_clipped_and_more_is_refused():
    environment = VmasEnvironment("walk", 1)
    environment.reset(seed=0)
    push(environment, 1 + 1e-6)
    assert environment._env.sent[0].item() == 1
    for value, said in ((1.01, "1.01"), (float("nan"), "nan")):
        with pytest.raises(UserError, match=f"agent a: action 0 in world 0 is {said}, the bounds are -1 to 1"):
            push(environment, value)


def test_discrete_actions_become_indices():
    environment = VmasEnvironment("walk", 2, discrete=True)
    assert environment.spec.discrete
    assert environment.spec.action_sizes == (2, 3)
    environment.reset(seed=0)
    environment.step(torch.tensor([[[0.0, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 0, 0]]]))
    assert [sent.tolist() for sent in environment._env.sent] == [[[1], [0]], [[2], [0]]]


def test_environments_do_not_disturb_each_other_nor_torch():
    one, two = VmasEnvironment("walk", 2, max_steps=2), VmasEnvironment("walk", 2, max_steps=2)
    before, shared = torch.random.get_rng_state(), Walk.vmas_random_state[0]
    begun = [one.reset(seed=5)]
    assert torch.equal(begun[0], two.reset(seed=5))
    for _ in range(5):
        ours = push(one, 0.1, 0.2)
        theirs = push(two, 0.1, 0.2)
        assert torch.equal(ours.observation, theirs.observation)
        if ours.ended.all():
            begun.append(ours.observation)
    assert len({tuple(first.flatten().tolist()) for first in begun}) == 3, "every episode begins elsewhere"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Walk.vmas_random_state[0] is shared


def test_without_a_seed_torchs_generator_draws_one():
    environment = VmasEnvironment("walk", 2)
    torch.manual_seed(3)
    first = environment.reset()
    assert not torch.equal(environment.reset(), first)
    torch.manual_seed(3)
    assert torch.equal(environment.reset(), first)


def test_what_vmas_breaks_is_named():
    environment = VmasEnvironment("walk", 2, reward=float("nan"))
    environment.reset(seed=0)
    with pytest.raises(UserError, match="agent a: reward nan in world 0"):
        push(environment, 0.0, 0.0)
    environment._env.extra = 0.0
    environment._env.observe = lambda: [torch.tensor([[0.0, 0], [0, float("inf")]]), torch.zeros(2, 1)]
    environment._env.place = torch.zeros(2)
    with pytest.raises(UserError, match="agent a: observation 1 is inf in world 1"):
        push(environment, 0.0, 0.0)
    environment._env.place = None
    with pytest.raises(UserError, match="VMAS walk: step raised TypeError"):
        push(environment, 0.0, 0.0)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(UserError, match=r"VMAS cannot make wlak: AssertionError: wlak\.py scenario not found"):
        VmasEnvironment("wlak")
    with pytest.raises(UserError, match="num_worlds must be at least 1, got 0"):
        VmasEnvironment("walk", 0)
    with pytest.raises(UserError, match="agent a: observations must be vectors"):
        VmasEnvironment("walk", seen=(2, 2))
    with pytest.raises(UserError, match="discrete must be true or false, got 'yes'"):
        VmasEnvironment("walk", discrete="yes")
    with pytest.raises(UserError, match=r"max_steps must be an integer of at least 1, got 2\.5"):
        VmasEnvironment("walk", max_steps=2.5)
    with pytest.raises(UserError, match=r"VMAS cannot make walk: TypeError.*num_envs"):
        VmasEnvironment("walk", num_envs=3)
    with pytest.raises(UserError, match="VMAS cannot make walk: TypeError: object of type 'int' has no len"):
        VmasEnvironment("walk", seen=3)


def test_it_cannot_be_saved_and_says_so():
    environment = VmasEnvironment("walk", 1)
    with pytest.raises(UserError, match=r"VMAS worlds \(walk\) cannot be saved: set run\.snapshot_every=0"):
        environment.state_dict()
    with pytest.raises(UserError, match="cannot be saved"):
        environment.load_state_dict({})


def test_a_run_says_so_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("fulmen.marl.run.draw_curves", lambda *rest: ())

    def run(**settings):
        recipe = MarlRecipe(
            world=WorldSection(name="vmas:walk", num_worlds=2),
            learner=LearnerSettings(hidden=(8,), batch=4),
            transfer=TransferSection(name="none"),
            run=RunSection(frames=8, episodes=2, **settings),
        )
        return train(recipe, tmp_path / "run")

    with pytest.raises(UserError, match=r"VMAS worlds \(walk\) cannot be saved: set run\.snapshot_every=0"):
        run()
    assert not (tmp_path / "run").exists()
    assert run(snapshot_every=0).checkpoint


def test_without_vmas_it_says_what_to_install_and_under_which_licence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vmas", None)
    with pytest.raises(UserError, match=r"GPL-3\.0.*pip install vmas"):
        VmasEnvironment("walk")


def test_vmas_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "vmas")
    pytest.importorskip("vmas")
    environments = [VmasEnvironment("navigation", 3, max_steps=4, n_agents=2) for _ in range(2)]
    first = [environment.reset(seed=2) for environment in environments]
    assert torch.equal(*first)
    for _ in range(5):
        ours, theirs = (environment.step(torch.full((3, 2, 2), 1 + 1e-7)) for environment in environments)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert environments[0].spec.observation_sizes == (18, 18)
