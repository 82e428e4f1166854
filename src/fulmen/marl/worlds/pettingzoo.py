"""Any PettingZoo parallel environment as W worlds, everything that it gives back checked.

An agent that ended before the others sees zeros, earns zeros and counts as terminated until all have ended; the step in
which it ended has its true last observation in `final_observation`. An episode is over when no agent is left.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec, Transition, check_actions
from fulmen.marl.worlds.errors import describe_error, shorten

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from pettingzoo import ParallelEnv

_GIVEN = ("observations", "rewards", "terminations", "truncations", "infos")


class PettingZooEnvironment:
    """W worlds, each an environment of its own from `make`, advanced one after the other on the CPU.

    Observations are boxes of any shape, flattened; actions of all agents are finite boxes, or all are discrete. All
    agents begin every episode. `max_steps` truncates an episode, beside the limits of the environment itself.

    Episode 0 of world w begins with `env.reset(seed=seed + w)`, each later one with a seed drawn from (seed, w,
    episode). A snapshot is therefore the seeds and the actions of the episodes under way: loading plays them again.
    That is exact where an environment keeps PettingZoo's promise to be a function of seed and actions; `state_dict`
    tries it out, and raises UserError for an environment that breaks it.
    """

    def __init__(
        self,
        make: "Callable[[], ParallelEnv]",
        num_worlds: int = 1,
        device: str | torch.device = "cpu",
        max_steps: int | None = None,
    ) -> None:
        if num_worlds < 1:
            raise UserError(f"num_worlds must be at least 1, got {num_worlds}")
        envs = [_call_make(make, index) for index in range(num_worlds)]
        if len({id(env) for env in envs}) < num_worlds:
            raise UserError("make gave the same environment twice: each world needs one of its own")
        self._make = make
        self._layout = _read_layout(envs[0])
        self.spec = self._layout.spec(max_steps)
        self.num_worlds = num_worlds
        self.device = torch.device(device)
        self._worlds = [_World(env, self._layout, index) for index, env in enumerate(envs)]
        self._spare: _World | None = None
        self._seed: int | None = None
        self._episodes = [0] * num_worlds

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin new episodes everywhere; without a seed, one is drawn from torch's global generator."""
        if seed is not None and seed < 0:
            raise UserError(f"a seed must be at least 0, got {seed}")
        self._seed = int(torch.randint(2**31, ())) if seed is None else seed
        self._episodes = [0] * self.num_worlds
        for world in self._worlds:
            world.reset(self._episode_seed(world.index))
        return self._tensor([world.observation for world in self._worlds])

    def step(self, actions: Tensor) -> Transition:
        """Advance by actions [W, N, A] fp32 within the bounds (one-hot where discrete)."""
        self._check_begun()
        check_actions(self.spec, actions, self.num_worlds)
        rows = actions.detach().cpu().float().numpy()
        steps = [world.step(row) for world, row in zip(self._worlds, rows, strict=True)]
        ended = [step.over or step.number == self.spec.max_steps for step in steps]
        for world, over in zip(self._worlds, ended, strict=True):
            if over:
                self._episodes[world.index] += 1
                world.reset(self._episode_seed(world.index))
        return Transition(
            observation=self._tensor([world.observation for world in self._worlds]),
            reward=self._tensor([step.reward for step in steps]),
            terminated=self._tensor([step.terminated for step in steps]),
            ended=self._tensor(ended),
            final_observation=self._tensor([step.observation for step in steps]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Seeds and the actions [W, T, N, A] of the episodes under way, zeros behind a world's `steps`.

        Raises UserError if playing the longest of them again, in an environment made for the purpose, leads elsewhere.
        """
        self._check_begun()
        self._check_repeatable(max(self._worlds, key=lambda world: len(world.history)))
        steps = [len(world.history) for world in self._worlds]
        actions = torch.zeros(self.num_worlds, max(steps), self.spec.num_agents, self.spec.action_size)
        for world in self._worlds:
            for step, action in enumerate(world.history):
                actions[world.index, step] = torch.from_numpy(action)
        observation = torch.from_numpy(np.stack([world.observation for world in self._worlds]))
        return {
            "seed": self._seed,
            "episodes": list(self._episodes),
            "steps": steps,
            "actions": actions,
            "observation": observation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the episodes under way again; UserError if they lead elsewhere, or if the team is another one."""
        observation, actions = state["observation"].cpu().numpy(), state["actions"].cpu().numpy()
        shape = (self.num_worlds, self.spec.num_agents, self.spec.observation_size)
        if observation.shape != shape or actions.shape[2:] != (self.spec.num_agents, self.spec.action_size):
            raise UserError(
                f"the snapshot has observations {observation.shape} and actions {actions.shape[2:]}, the environment "
                f"{shape} and {(self.spec.num_agents, self.spec.action_size)}: make it as it was when saved"
            )
        self._seed, self._episodes = int(state["seed"]), [int(episode) for episode in state["episodes"]]
        for world, steps in zip(self._worlds, state["steps"], strict=True):
            world.replay(self._episode_seed(world.index), actions[world.index, : int(steps)])
            if not np.array_equal(world.observation, observation[world.index]):
                raise UserError(
                    f"world {world.index}: playing the {steps} actions of the snapshot again led to another "
                    "observation: the environment, or a setting of it, has changed since"
                )

    def close(self) -> None:
        """Let every environment free what it holds. Raises UserError if one cannot, after the others have."""
        with ExitStack() as worlds:
            for world in [*self._worlds, *([self._spare] if self._spare else [])]:
                worlds.callback(world.close)

    def _check_begun(self) -> None:
        if self._seed is None:
            raise UserError("an environment must be reset before it is stepped or saved: call reset() first")

    def _check_repeatable(self, world: "_World") -> None:
        if self._spare is None:
            self._spare = _World(_call_make(self._make, self.num_worlds), self._layout, self.num_worlds)
        self._spare.replay(self._episode_seed(world.index), world.history)
        if not np.array_equal(self._spare.observation, world.observation):
            raise UserError(
                f"world {world.index} cannot be saved: its seed and {len(world.history)} actions led to another "
                "observation when played again; let reset(seed) make the generator of all its randomness, or set "
                "run.snapshot_every=0"
            )

    def _episode_seed(self, index: int) -> int:
        episode = self._episodes[index]
        if not episode:
            return self._seed + index
        return int(np.random.SeedSequence((self._seed, index, episode)).generate_state(1)[0])

    def _tensor(self, rows: list) -> Tensor:
        return torch.from_numpy(np.stack(rows)).to(self.device)


class _Layout(NamedTuple):
    """What the agents of a team see and do, in PettingZoo's words."""

    agents: tuple[Any, ...]
    observation_spaces: tuple["Space", ...]
    action_spaces: tuple["Space", ...]
    discrete: bool

    def spec(self, max_steps: int | None) -> TeamSpec:
        sizes = [int(space.n) if self.discrete else _size(space) for space in self.action_spaces]
        low = high = None
        if not self.discrete:
            low, high = torch.zeros(2, len(sizes), max(sizes)).unbind()
            for i, (space, size) in enumerate(zip(self.action_spaces, sizes, strict=True)):
                low[i, :size] = torch.from_numpy(np.array(space.low, np.float32).ravel())
                high[i, :size] = torch.from_numpy(np.array(space.high, np.float32).ravel())
        return TeamSpec(
            agents=tuple(map(str, self.agents)),
            observation_sizes=tuple(map(_size, self.observation_spaces)),
            action_sizes=tuple(sizes),
            low=low,
            high=high,
            discrete=self.discrete,
            max_steps=max_steps,
        )

    def action(self, index: int, action: np.ndarray) -> int | np.ndarray:
        """What the environment takes for a row [A] of our actions."""
        space = self.action_spaces[index]
        if self.discrete:
            return int(space.start) + int(action[: int(space.n)].argmax())
        # Bounds in fp64 may lie just inside their own rounding to fp32.
        inside = action[: _size(space)].reshape(space.shape).astype(space.dtype)
        return np.clip(inside, space.low, space.high)


class _Step(NamedTuple):
    """What a step of one world led to, before any reset."""

    observation: np.ndarray  # [N, O]
    reward: np.ndarray  # [N]
    terminated: np.ndarray  # [N] bool
    over: bool  # no agent is left
    number: int  # of the step in its episode, from 1


class _World:
    """One environment. `observation` [N, O] is what its agents act on next, `history` the actions of this episode."""

    def __init__(self, env: "ParallelEnv", layout: _Layout, index: int) -> None:
        self.env = env
        self.index = index
        self._layout = layout
        self._shape = (len(layout.agents), max(map(_size, layout.observation_spaces)))
        self._alive = np.zeros(len(layout.agents), bool)
        self.observation = np.zeros(self._shape, np.float32)
        self.history: list[np.ndarray] = []
        self._check_spaces()

    def reset(self, seed: int) -> None:
        self.history = []
        with self._calling("reset", seed):
            given = self.env.reset(seed=seed)
        self._check_given("reset", given, (_GIVEN[0], _GIVEN[-1]))
        self._check_spaces()
        self._alive[:] = True
        self.observation = np.zeros(self._shape, np.float32)
        for i, _ in self._living():
            self._read_observation(self.observation, i, given[0])
        self._check_agents()

    def step(self, actions: np.ndarray) -> _Step:
        """Advance by actions [N, A]; agents that have ended do not act."""
        self.history.append(actions.copy())
        sent = {agent: self._layout.action(i, actions[i]) for i, agent in self._living()}
        with self._calling("step", sent):
            given = self.env.step(sent)
        return self._read_step(given)

    def replay(self, seed: int, actions: "list[np.ndarray] | np.ndarray") -> None:
        """Go through an episode again up to where it was."""
        self.reset(seed)
        for action in actions:
            self.step(action)

    def close(self) -> None:
        if hasattr(self.env, "close"):
            with self._calling("close"):
                self.env.close()

    def _read_step(self, given: Any) -> _Step:
        self._check_given("step", given, _GIVEN)
        observations, rewards, terminations, truncations = given[:4]
        observation = np.zeros(self._shape, np.float32)
        reward = np.zeros(self._shape[0], np.float32)
        terminated, ended = ~self._alive, ~self._alive
        for i, agent in self._living():
            terminated[i] = self._read_flag("terminations", agent, terminations)
            ended[i] = self._read_flag("truncations", agent, truncations) or terminated[i]
            reward[i] = self._read_reward(agent, rewards)
            # Nothing is learnt from what a terminated agent would have seen: an environment may leave it out.
            if not terminated[i] or agent in observations:
                self._read_observation(observation, i, observations)
        self._alive = ~ended
        self._check_agents()
        self.observation = np.where(ended[:, None], np.float32(0), observation)
        return _Step(observation, reward, terminated, bool(ended.all()), len(self.history))

    def _living(self) -> list[tuple[int, Any]]:
        return [(i, agent) for i, agent in enumerate(self._layout.agents) if self._alive[i]]

    def _read_observation(self, into: np.ndarray, i: int, observations: Mapping) -> None:
        agent, space = self._layout.agents[i], self._layout.observation_spaces[i]
        value = self._look_up(observations, "observations", agent)
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            self._fail(f"agent {agent}: observation {_brief(value)} is not an array of numbers")
        if array.shape != space.shape:
            self._fail(f"agent {agent}: observation of shape {array.shape}, its space says {space.shape}")
        if not np.isfinite(array).all():
            place = int(np.flatnonzero(~np.isfinite(array))[0])
            self._fail(f"agent {agent}: observation {place} is {array.ravel()[place]}")
        into[i, : array.size] = array.ravel()

    def _read_reward(self, agent: Any, rewards: Mapping) -> float:
        value = self._look_up(rewards, "rewards", agent)
        try:
            reward = np.asarray(value, np.float32).item()
        except (TypeError, ValueError):
            self._fail(f"agent {agent}: reward {_brief(value)} is not one number")
        if not np.isfinite(reward):
            self._fail(f"agent {agent}: reward {value} is not a finite number")
        return reward

    def _read_flag(self, name: str, agent: Any, mapping: Mapping) -> bool:
        value = self._look_up(mapping, name, agent)
        if not isinstance(value, bool | np.bool_ | int | np.integer):
            self._fail(f"agent {agent}: {_brief(value)} in the {name} is neither True nor False")
        return bool(value)

    def _look_up(self, mapping: Mapping, name: str, agent: Any) -> Any:
        if agent not in mapping:
            self._fail(
                f"agent {agent} is missing from the {name}, though it was neither terminated nor truncated before"
            )
        return mapping[agent]

    def _check_given(self, call: str, given: Any, names: tuple[str, ...]) -> None:
        if not (isinstance(given, tuple) and len(given) == len(names)):
            self._fail(f"{call} gave {_brief(given)}, not the dicts ({', '.join(names)})")
        for name, mapping in zip(names, given, strict=True):
            if not isinstance(mapping, Mapping):
                self._fail(f"{call} gave {_brief(mapping)} as {name}, not a dict with an entry per agent")

    def _check_agents(self) -> None:
        """`env.agents` must be those who have neither been terminated nor truncated."""
        listed, expected = list(getattr(self.env, "agents", ())), [agent for _, agent in self._living()]
        for agent in expected:
            if agent not in listed:
                self._fail(f"agent {agent} vanished from env.agents without having been terminated or truncated")
        for agent in listed:
            if agent not in expected:
                why = "but has ended" if agent in self._layout.agents else "but not in env.possible_agents"
                self._fail(f"agent {agent} is in env.agents, {why}")

    def _check_spaces(self) -> None:
        agents, observation_spaces, action_spaces, _ = self._layout
        for agent, seen, done in zip(agents, observation_spaces, action_spaces, strict=True):
            with self._calling("observation_space or action_space", agent):
                found = self.env.observation_space(agent), self.env.action_space(agent)
            for name, was, now in zip(("observation", "action"), (seen, done), found, strict=True):
                if was != now:
                    self._fail(f"agent {agent}: its {name} space was {was} and is {now} now; it must stay the same")

    @contextmanager
    def _calling(self, what: str, *arguments: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            call = f"{what}({', '.join(map(_brief, arguments))})"
            raise UserError(f"{self._place()}: {call} raised {describe_error(error)}") from error

    def _fail(self, what: str) -> None:
        raise UserError(f"{self._place()}: {what}")

    def _place(self) -> str:
        return f"world {self.index}, step {len(self.history)}"


def _call_make(make: "Callable[[], ParallelEnv]", index: int) -> "ParallelEnv":
    try:
        env = make()
    except Exception as error:
        raise UserError(f"making the environment of world {index} raised {describe_error(error)}") from error
    if hasattr(env, "agent_iter"):
        raise UserError(f"{env} moves one agent at a time: make its parallel form (parallel_env, or aec_to_parallel)")
    for name in ("possible_agents", "observation_space", "action_space", "reset", "step"):
        if not hasattr(env, name):
            raise UserError(f"make gave {_brief(env)}, which is no PettingZoo parallel environment: it has no {name}")
    return env


def _read_layout(env: "ParallelEnv") -> _Layout:
    """Raises UserError that names the agent whose space is of another kind than we can learn in."""
    try:
        from gymnasium.spaces import Box, Discrete
    except ImportError as error:
        raise UserError('PettingZoo environments need gymnasium: pip install "fulmen[marl]"') from error
    try:
        agents = tuple(env.possible_agents)
        observation_spaces = tuple(env.observation_space(agent) for agent in agents)
        action_spaces = tuple(env.action_space(agent) for agent in agents)
    except Exception as error:
        raise UserError(f"{_brief(env)} does not tell its agents and spaces: {describe_error(error)}") from error
    if not agents:
        raise UserError(f"{env} has no possible_agents: a team needs at least one")
    for agent, space in zip(agents, observation_spaces, strict=True):
        if not isinstance(space, Box) or not _size(space):
            raise UserError(f"agent {agent}: observations must be a Box, got {space}; flatten them with a wrapper")
    discrete = isinstance(action_spaces[0], Discrete)
    for agent, space in zip(agents, action_spaces, strict=True):
        if not isinstance(space, Discrete) and not (isinstance(space, Box) and np.issubdtype(space.dtype, np.floating)):
            raise UserError(f"agent {agent}: actions must be a Box of floats or Discrete, got {space}")
        if isinstance(space, Discrete) != discrete:
            raise UserError(
                f"agent {agent}: actions are {space}, those of {agents[0]} {action_spaces[0]}: one kind, please"
            )
    return _Layout(agents, observation_spaces, action_spaces, discrete)


def _size(space: "Space") -> int:
    return int(np.prod(space.shape))


def _brief(value: Any) -> str:
    return shorten(repr(value), 120)
