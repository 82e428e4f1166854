"""Particle worlds: W worlds of discs in a plane, advanced together as one matrix of numbers.

The physics is mpe2's (the maintained Multi-agent Particle Environments; Lowe et al., arXiv:1706.02275): positions move
by the old velocity, velocities are damped and then take the force of the actions and of contacts. Letters as in
`tasks.base`: W worlds, N agents, E entities, O observation, A action.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec, Transition, check_actions, check_choices, check_rewards
from fulmen.marl.worlds.tasks.base import Rows, State, Task, length

TIME_STEP = 0.1
DAMPING = 0.25
CONTACT_FORCE = 100.0
CONTACT_MARGIN = 1e-3
MOVES = 5
"""Columns of mpe2's motion: nothing, left, right, down, up."""


class Scene(NamedTuple):
    """One world as a picture: E discs, agents first, then landmarks."""

    positions: Tensor  # [E, 2] fp32 on the CPU; x to the right, y up, most of it within -1 to 1
    radii: Tensor  # [E] fp32 on the CPU, in the same unit
    colours: list[tuple[int, int, int]]  # red, green, blue, 0 to 255
    labels: list[str]  # what to write at a disc; empty: nothing
    goals: list[tuple[int, int]]  # (agent, landmark), indices of discs: lines from an agent to where it should be


class Physics:
    """Moves the bodies of a task's state; knows no actions and no rewards."""

    def __init__(self, task: Task, state: State):
        agents, landmarks = task.bodies()
        colliders = task.colliders()
        self._places, self._velocities = state.agents[:, task.movers], state.velocities[:, task.movers]
        self._touching, self._touched = state.agents[:, :, None], state.positions[:, None, :colliders]
        radii = state.positions.new_tensor([body.radius for body in agents + landmarks][:colliders])
        self._reach = (radii[: len(agents), None] + radii)[..., None]
        self._zero = radii.new_zeros(())
        speeds = radii.new_tensor([body.max_speed for body in agents[task.movers]])
        self._max_speed = speeds[:, None] if speeds.isfinite().any() else None

    def advance(self, force: Tensor) -> None:
        """One step in place, under the movers' control force [2, movers, W], which is changed too."""
        if self._reach.numel():
            force += self._contact_force()
        self._places.add_(self._velocities, alpha=TIME_STEP)
        self._velocities.mul_(1 - DAMPING).add_(force, alpha=TIME_STEP)
        if self._max_speed is not None:
            self._velocities *= (self._max_speed / length(self._velocities)).clamp_max_(1)

    def _contact_force(self) -> Tensor:
        """[2, N, W]: the push on each agent by all that it overlaps; softly, so that it is smooth at the rim."""
        gaps = self._touching - self._touched
        distance = length(gaps)
        penetration = torch.logaddexp((self._reach - distance).div_(CONTACT_MARGIN), self._zero)
        # Of an agent with itself the gap is zero, and so is the force; likewise where two are in the same place.
        strength = penetration.mul_(CONTACT_FORCE * CONTACT_MARGIN).div_(distance.clamp_min_(1e-12))
        return gaps.mul_(strength).sum(2)


class ParticleEnvironment:
    """W worlds of one task (protocol `spec.Environment`).

    No task ends before its time limit, so all worlds keep one clock and begin anew together; `terminated` is never
    true. Worlds are drawn by a generator of the environment's own, on its device. `dtype` is that of the numbers and of
    observations and rewards. `check` looks at every action and reward, which on a GPU waits for it.
    """

    def __init__(
        self,
        task: Task,
        *,
        num_worlds: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        check: bool = True,
    ):
        if type(num_worlds) is not int or num_worlds < 1:
            raise UserError(f"num_worlds must be an integer of at least 1, got {num_worlds!r}")
        self.task, self.num_worlds, self.check = task, num_worlds, check
        # "cuda" alone would not compare equal to the device of a tensor.
        self.device = torch.empty(0, device=device).device
        agents, landmarks = self._bodies = task.bodies()
        rows = Rows(len(agents), len(agents + landmarks), len(agents[task.speakers]), task.message_size, task.facts())
        columns = [task.columns(rows, agent) for agent in range(len(agents))]
        self.spec = _make_spec(task, [body.name for body in agents], [len(seen) for seen in columns])
        width = self.spec.observation_size
        padded = [column for seen in columns for column in seen + rows.zeros(width - len(seen))]
        self._plus, self._minus = torch.tensor(padded, device=self.device).T.contiguous()
        self.numbers = torch.zeros(rows.count, num_worlds, device=self.device, dtype=dtype)
        self.state = rows.views(self.numbers)
        self._physics = Physics(task, self.state)
        everybody = range(len(agents))
        self._movers_speak = everybody[task.movers] == everybody[task.speakers]
        gains = [body.gain for body in agents[task.movers]]
        self._gain = torch.tensor(gains, device=self.device, dtype=dtype)[:, None]
        self._force = self.numbers.new_empty(2, len(gains), num_worlds)
        self._low, self._high = (bound.to(self.device) for bound in _bounds(self.spec))
        self._generator = torch.Generator(self.device)
        self._time = 0
        self.reset(0)

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin new episodes everywhere; without a seed, the next ones. Gives the first observation [W, N, O]."""
        if seed is not None:
            self._generator.manual_seed(seed)
        self.task.begin(self.state, self._generator)
        self._time = 0
        return self.observe()

    def step(self, actions: Tensor) -> Transition:
        """Advance by actions [W, N, A]. Raises UserError naming the agent whose action or reward is not allowed."""
        self._check_actions(actions)
        force = self._read(actions)
        self.task.control(force, self._time)
        self._physics.advance(force)
        self._time += 1
        reward = self.task.rewards(self.state).T.contiguous()
        if self.check:
            check_rewards(self.spec, reward)
        final = self.observe()
        over = self._time >= self.task.max_steps
        observation = self.reset() if over else final
        terminated = torch.zeros_like(reward, dtype=torch.bool)
        return Transition(observation, reward, terminated, terminated.new_full((self.num_worlds,), over), final)

    def observe(self) -> Tensor:
        """What the agents see now, [W, N, O]."""
        # The few numbers are turned over, not the many columns.
        worlds = self.numbers.T.contiguous()
        columns = worlds.index_select(1, self._plus).sub_(worlds.index_select(1, self._minus))
        observation = columns.view(self.num_worlds, self.spec.num_agents, -1)
        self.task.conceal(observation, self._time)
        return observation

    def scene(self, world: int) -> Scene:
        """One world, to be drawn."""
        agents, landmarks = self._bodies
        bodies = agents + landmarks
        speakers = range(len(agents))[self.task.speakers]
        labels = [str(i) if i < len(agents) else "" for i in range(len(bodies))]
        for agent, message in zip(speakers, self.state.messages[:, :, world].tolist(), strict=True):
            if any(message):
                labels[agent] += f": {chr(ord('A') + message.index(max(message)))}"
        facts = {name: fact[:, world].tolist() for name, fact in self.state.facts.items()}
        return Scene(
            positions=self.state.positions[:, :, world].T.to("cpu", torch.float32, copy=True),
            radii=torch.tensor([body.radius for body in bodies]),
            colours=[tuple(round(255 * part) for part in body.colour) for body in bodies],
            labels=labels,
            goals=[(agent, len(agents) + landmark) for agent, landmark in self.task.goals(facts)],
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {"numbers": self.numbers.clone(), "time": self._time, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, bit for bit. Raises UserError if it is the state of other worlds."""
        if state["numbers"].shape != self.numbers.shape:
            have, want = tuple(state["numbers"].shape), tuple(self.numbers.shape)
            raise UserError(f"{self.task.name}: this state has [numbers, worlds] = {have}, these worlds have {want}")
        self.numbers.copy_(state["numbers"])
        self._time = state["time"]
        self._generator.set_state(state["generator"].cpu())

    def _check_actions(self, actions: Tensor) -> None:
        if actions.shape != (self.num_worlds, *self._low.shape):
            check_actions(self.spec, actions, self.num_worlds)
        elif self.check and self.spec.discrete:
            check_choices(self.spec, actions, self._high)
        # One pass finds that all is well; the message is left to the slower check.
        elif self.check and not torch.equal(actions.clamp(self._low, self._high), actions):
            check_actions(self.spec, actions, self.num_worlds)

    def _read(self, actions: Tensor) -> Tensor:
        """The movers' forces [2, movers, W]; what is said goes into the state."""
        task, size = self.task, self.task.message_size
        numbers = actions.detach().permute(1, 2, 0)
        steer = 2 if task.actions == "force" else MOVES
        moves, words = numbers[task.movers, :steer], numbers[task.speakers]
        if not self._movers_speak:
            words = words[:, :size]
        elif task.actions == "discrete":
            # One choice for both: move + MOVES * word.
            choices = numbers.unflatten(1, (size, MOVES))
            moves, words = choices.sum(1), choices.sum(2)
        else:
            words = words[:, steer : steer + size]
        if size:
            self.state.messages.copy_(words)
        moves = moves.transpose(0, 1)
        if task.actions == "force":
            return torch.mul(moves, self._gain, out=self._force)
        return torch.sub(moves[2::2], moves[1::2], out=self._force).mul_(self._gain)


def _make_spec(task: Task, agents: list[str], observation_sizes: list[int]) -> TeamSpec:
    """Action sizes and bounds of every agent."""
    count, words = len(agents), task.message_size
    moves, speaks = set(range(count)[task.movers]), set(range(count)[task.speakers])
    discrete, steer = task.actions == "discrete", 2 if task.actions == "force" else MOVES
    sizes = []
    for agent in range(count):
        parts = [steer] * (agent in moves) + [words] * (agent in speaks)
        sizes.append(parts[0] * parts[-1] if discrete and len(parts) == 2 else sum(parts))
    high = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).float()
    low = torch.zeros_like(high)
    if task.actions == "force":
        low[task.movers, :2] = -1
    return TeamSpec(
        agents=tuple(agents),
        observation_sizes=tuple(observation_sizes),
        action_sizes=tuple(sizes),
        low=None if discrete else low,
        high=None if discrete else high,
        discrete=discrete,
        max_steps=task.max_steps,
    )


def _bounds(spec: TeamSpec) -> tuple[Tensor, Tensor]:
    """[N, A] each: the least and the most of every number of an action."""
    if spec.low is None or spec.high is None:
        return torch.zeros(spec.num_agents, spec.action_size), spec.action_mask.float()
    return spec.low, spec.high
