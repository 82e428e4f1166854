"""Scenarios of VMAS (Bettini et al., arXiv:2207.03530) as worlds of ours, for whoever has VMAS.

VMAS is under the GPL-3.0 and therefore no dependency of fulmen: nothing here works until you have installed it.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec, Transition, check_actions, check_rewards
from fulmen.marl.worlds.errors import describe_error

if TYPE_CHECKING:
    from vmas.simulator.scenario import BaseScenario

_ROUNDING = 1e-5
"""Of the width of the bounds: so far outside them an action is taken for the nearest one inside."""


class VmasEnvironment:
    """W worlds of a VMAS scenario, given by its name or as an object; `options` are the scenario's own.

    Terminates all agents of a world together, as VMAS does, and truncates after `max_steps`. VMAS raises if an action
    lies outside its bounds by a rounding error, and takes NaN as far as an assertion: actions are checked and clipped.
    VMAS keeps one stream of random numbers for all its environments; here each environment has its own. On a GPU it
    draws from torch's generator of that GPU, which `reset(seed)` then seeds for everybody.
    """

    def __init__(
        self,
        scenario: "str | BaseScenario",
        num_worlds: int = 32,
        device: str | torch.device = "cpu",
        max_steps: int | None = 100,
        *,
        discrete: bool = False,
        **options: Any,
    ) -> None:
        if num_worlds < 1:
            raise UserError(f"num_worlds must be at least 1, got {num_worlds}")
        if type(discrete) is not bool:
            raise UserError(f"discrete must be true or false, got {discrete!r}")
        self._name = scenario if isinstance(scenario, str) else type(scenario).__name__
        self.num_worlds = num_worlds
        self.device = torch.device(device)
        vmas = _import_vmas()
        try:
            self._env = vmas.make_env(
                scenario,
                num_envs=num_worlds,
                device=self.device,
                continuous_actions=not discrete,
                max_steps=max_steps,
                terminated_truncated=True,
                **options,
            )
            self.spec = self._read_spec(discrete, max_steps)
            self._random = list(self._env.vmas_random_state)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"VMAS cannot make {self._name}: {describe_error(error)}") from error

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin new episodes everywhere; without a seed, one is drawn from torch's global generator."""
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        return self._observations(self._call("reset", seed=seed))

    def step(self, actions: Tensor) -> Transition:
        """Advance by actions [W, N, A] fp32 within the bounds (one-hot where discrete)."""
        observations, rewards, terminated, truncated, _ = self._call("step", self._split(actions))
        reward = torch.stack(list(rewards), dim=1).float()
        check_rewards(self.spec, reward)
        final = self._observations(observations)
        terminated = terminated.bool()
        ended = terminated | truncated.bool()
        return Transition(
            observation=self._begin(ended, final),
            reward=reward,
            terminated=terminated[:, None].expand(-1, self.spec.num_agents).clone(),
            ended=ended,
            final_observation=final,
        )

    def state_dict(self) -> NoReturn:
        """Always raises UserError: VMAS has no way to save its worlds, and they hold functions that none can save."""
        raise UserError(f"VMAS worlds ({self._name}) cannot be saved: set run.snapshot_every=0")

    def load_state_dict(self, state: Mapping[str, Any]) -> NoReturn:
        """Always raises UserError, as there is nothing to load."""
        self.state_dict()

    def _read_spec(self, discrete: bool, max_steps: int | None) -> TeamSpec:
        agents = tuple(agent.name for agent in self._env.agents)
        seen, done = list(self._env.observation_space), list(self._env.action_space)
        for agent, space in zip(agents, seen, strict=True):
            if not space.shape or len(space.shape) != 1:
                raise UserError(f"agent {agent}: observations must be vectors, VMAS gives {space}")
        sizes = tuple(int(space.n if discrete else space.shape[0]) for space in done)
        low = high = None
        if not discrete:
            low, high = torch.zeros(2, len(agents), max(sizes)).unbind()
            for i, (space, size) in enumerate(zip(done, sizes, strict=True)):
                low[i, :size], high[i, :size] = torch.as_tensor(space.low), torch.as_tensor(space.high)
        return TeamSpec(
            agents=agents,
            observation_sizes=tuple(int(space.shape[0]) for space in seen),
            action_sizes=sizes,
            low=low,
            high=high,
            discrete=discrete,
            max_steps=max_steps,
        )

    def _split(self, actions: Tensor) -> list[Tensor]:
        """A tensor per agent, as VMAS takes them: [W, size] within the bounds, or [W, 1] the index of a choice."""
        if self.spec.discrete:
            check_actions(self.spec, actions, self.num_worlds)
            return [
                actions[:, i, :size].argmax(-1, keepdim=True).float() for i, size in enumerate(self.spec.action_sizes)
            ]
        low, high = self.spec.low.to(actions.device), self.spec.high.to(actions.device)
        inside = actions.clamp(low, high)
        rounded = torch.where((actions - inside).abs() <= _ROUNDING * (high - low), inside, actions)
        check_actions(self.spec, rounded, self.num_worlds)
        return [rounded[:, i, :size] for i, size in enumerate(self.spec.action_sizes)]

    def _begin(self, ended: Tensor, final: Tensor) -> Tensor:
        """What to act on next: new episodes where the last has ended."""
        if not ended.any():
            return final.clone()
        if ended.all():
            return self._observations(self._call("reset"))
        for index in ended.nonzero().flatten().tolist():
            self._call("reset_at", index, return_observations=False)
        (observations,) = self._call(
            "get_from_scenario", get_observations=True, get_rewards=False, get_infos=False, get_dones=False
        )
        return torch.where(ended[:, None, None], self._observations(observations), final)

    def _observations(self, given: list[Tensor]) -> Tensor:
        """[W, N, O] with zeros behind the narrower ones."""
        into = given[0].new_zeros(self.num_worlds, self.spec.num_agents, self.spec.observation_size)
        for i, (observation, size) in enumerate(zip(given, self.spec.observation_sizes, strict=True)):
            into[:, i, :size] = observation
        wrong = ~into.isfinite()
        if wrong.any():
            world, agent, place = wrong.nonzero()[0].tolist()
            value = into[world, agent, place].item()
            raise UserError(f"agent {self.spec.agents[agent]}: observation {place} is {value} in world {world}")
        return into.float()

    def _call(self, name: str, *arguments: Any, **settings: Any) -> Any:
        """Have VMAS do something with this environment's own random numbers."""
        shared = self._env.vmas_random_state
        before, shared[:] = list(shared), self._random
        try:
            return getattr(self._env, name)(*arguments, **settings)
        except Exception as error:
            raise UserError(f"VMAS {self._name}: {name} raised {describe_error(error)}") from error
        finally:
            self._random, shared[:] = list(shared), before


def _import_vmas() -> ModuleType:
    try:
        import vmas
    except ImportError as error:
        raise UserError(
            "VMAS worlds need VMAS, which is under the GPL-3.0 and not a part of fulmen: pip install vmas"
        ) from error
    return vmas
