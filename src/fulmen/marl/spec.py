"""What a team acts in: the sizes of its observations and actions, and the protocol that every environment keeps.

Letters: W worlds that advance together, N agents, O and A the widest observation and action of an agent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fulmen.config import UserError


@dataclass(frozen=True, kw_only=True)
class TeamSpec:
    """Sizes and bounds. Agents may differ: narrower observations are zero behind their size, narrower actions too.

    Continuous actions lie between `low` and `high` [N, A] fp32, whose columns behind an agent's size are both 0. A
    discrete action is a one-hot vector among the agent's `action_sizes[i]` choices.
    """

    agents: tuple[str, ...]
    observation_sizes: tuple[int, ...]
    action_sizes: tuple[int, ...]
    low: Tensor | None = None
    high: Tensor | None = None
    discrete: bool = False
    max_steps: int | None = None  # an episode is truncated after so many steps

    def __post_init__(self) -> None:
        count = len(self.agents)
        if not count or len(set(self.agents)) != count:
            raise UserError(f"a team needs at least one agent and a name of its own for each, got {self.agents}")
        for name, sizes in (("observation", self.observation_sizes), ("action", self.action_sizes)):
            if len(sizes) != count:
                raise UserError(f"{count} agents need {count} {name} sizes, got {sizes}")
            for agent, size in zip(self.agents, sizes, strict=True):
                if size < 1:
                    raise UserError(f"agent {agent}: its {name} size must be at least 1, got {size}")
        if self.max_steps is not None and (type(self.max_steps) is not int or self.max_steps < 1):
            raise UserError(f"max_steps must be an integer of at least 1, got {self.max_steps!r}")
        if not self.discrete:
            self._check_bounds()

    def _check_bounds(self) -> None:
        shape = (self.num_agents, self.action_size)
        if self.low is None or self.high is None or self.low.shape != shape or self.high.shape != shape:
            raise UserError(f"continuous actions need bounds low and high of shape {shape}")
        for i, agent in enumerate(self.agents):
            low, high = self.low[i], self.high[i]
            if not (low.isfinite().all() and high.isfinite().all()):
                raise UserError(f"agent {agent}: action bounds must be finite, got {low.tolist()} to {high.tolist()}")
            inside = slice(self.action_sizes[i])
            if not (low[inside] < high[inside]).all():
                raise UserError(f"agent {agent}: low must be below high, got {low.tolist()} to {high.tolist()}")

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    @property
    def observation_size(self) -> int:
        """The widest observation, O."""
        return max(self.observation_sizes)

    @property
    def action_size(self) -> int:
        """The widest action, A."""
        return max(self.action_sizes)

    @property
    def action_mask(self) -> Tensor:
        """[N, A] bool: which columns of an action are an agent's own."""
        return torch.arange(self.action_size) < torch.tensor(self.action_sizes)[:, None]


class Transition(NamedTuple):
    """What a step of all worlds led to. Worlds whose episode ended have begun the next one already.

    An episode ends where all its agents are terminated, or at the time limit. A learner bootstraps from
    `final_observation` unless `terminated`: a time limit says nothing about what would have come.
    """

    observation: Tensor  # [W, N, O] to act on next
    reward: Tensor  # [W, N] fp32
    terminated: Tensor  # [W, N] bool: no future reward for this agent
    ended: Tensor  # [W] bool: the episode is over, for either reason
    final_observation: Tensor  # [W, N, O] what the step led to; like `observation` where the episode goes on


class Environment(Protocol):
    """W worlds, one team in each, on one device.

    Steps raise UserError that names agent and value if the world breaks its own rules (a NaN reward, a missing agent).
    """

    spec: TeamSpec
    num_worlds: int
    device: torch.device

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin new episodes everywhere; the first observation [W, N, O] fp32. The same seed gives the same worlds."""

    def step(self, actions: Tensor) -> Transition:
        """Advance by actions [W, N, A] fp32 within the bounds (one-hot where discrete)."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, numbers, generator state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, bit for bit."""


def check_actions(spec: TeamSpec, actions: Tensor, num_worlds: int) -> None:
    """Raise UserError naming the agent and the value that is not allowed."""
    shape = (num_worlds, spec.num_agents, spec.action_size)
    if actions.shape != shape:
        raise UserError(f"actions must be [worlds, agents, size] = {shape}, got {tuple(actions.shape)}")
    if spec.discrete:
        check_choices(spec, actions, spec.action_mask.to(actions))
        return
    wrong = ~((actions >= spec.low.to(actions.device)) & (actions <= spec.high.to(actions.device)))
    if wrong.any():
        world, agent, dim = wrong.nonzero()[0].tolist()
        raise UserError(
            f"agent {spec.agents[agent]}: action {dim} in world {world} is {actions[world, agent, dim].item():g}, "
            f"the bounds are {spec.low[agent, dim].item():g} to {spec.high[agent, dim].item():g}"
        )


def check_choices(spec: TeamSpec, actions: Tensor, mask: Tensor) -> None:
    """Raise UserError naming the agent whose action is not one-hot among its choices: where `mask` [N, A] is 1."""
    wrong = ((actions != 0) & (actions != mask)).any(-1) | (actions.sum(-1) != 1)
    if wrong.any():
        world, agent = wrong.nonzero()[0].tolist()
        raise UserError(
            f"agent {spec.agents[agent]}: its action in world {world} must be one-hot among {spec.action_sizes[agent]} "
            f"choices, got {actions[world, agent].tolist()}"
        )


def check_rewards(spec: TeamSpec, reward: Tensor) -> None:
    """Raise UserError naming the agent whose reward [W, N] is not a finite number."""
    wrong = ~reward.isfinite()
    if wrong.any():
        world, agent = wrong.nonzero()[0].tolist()
        raise UserError(f"agent {spec.agents[agent]}: reward {reward[world, agent].item()} in world {world}")
