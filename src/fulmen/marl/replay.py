"""What each agent remembers of its own life: a ring of steps per world, from which sequences are drawn.

Letters: W worlds, N agents, O and A the widest observation and action, B sequences, T steps of a sequence.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec

if TYPE_CHECKING:
    from fulmen.marl.transfer.base import Experience


class Batch(NamedTuple):
    """B sequences of T steps of every agent; each agent's are its own draw. T is 1 for a team without memory.

    Steps that `valid` excludes stand behind the end of an episode: their numbers mean nothing.
    """

    observation: Tensor  # [B, T + 1, N, O]; the last one is what the last step led to
    action: Tensor  # [B, T, N, A]
    reward: Tensor  # [B, T, N]
    terminated: Tensor  # [B, T, N] bool
    student: Tensor  # [B, T, N] bool
    valid: Tensor  # [B, T, N] bool
    state: dict[str, Tensor] | None  # memory before the first step, [B, N, ...] each; None: an episode's start, or none


class Replay:
    """The last `capacity` steps of every world; a new step takes the place of the oldest.

    An agent's step is one row of fp32 numbers, so that a draw is one gather: observation, what the step led to, action,
    reward, and two flags. What a step led to is stored with every step, not with the last ones of episodes alone: it
    costs up to twice the memory, and no draw has to ask whether the next row belongs to the same life.

    `sequence` is the number of steps T of a drawn sequence: 1 draws single steps, 0 whole episodes, which needs the
    spec's `max_steps`. Sequences lie end to end in an episode, T steps each, the last one cut at its end; all are
    equally likely, so that all steps are too. The memory state at the beginning of a sequence is the one that the agent
    had when it lived it (stored states, as in R2D2: Kapturowski et al. 2019), and zero at the beginning of an episode.
    """

    def __init__(
        self,
        spec: TeamSpec,
        *,
        capacity: int,
        num_worlds: int,
        sequence: int = 1,
        device: torch.device | str = "cpu",
    ):
        if sequence < 0:
            raise UserError(f"sequence must be at least 1, or 0 for whole episodes, got {sequence}")
        if sequence == 0 and spec.max_steps is None:
            raise UserError("whole episodes (sequence = 0) need an environment with max_steps; set sequence above 1")
        self.length = sequence or spec.max_steps
        if capacity < self.length:
            raise UserError(f"the replay must hold a sequence of {self.length} steps in each world, not {capacity}")
        self.spec, self.capacity, self.num_worlds = spec, capacity, num_worlds
        self.whole_episodes, self.device = sequence == 0, torch.device(device)
        # Two sequences of a world begin at least T steps apart, so that their turns, time // T, differ.
        self._turns = (capacity - 1) // self.length + 2
        self._written = 0
        self._age = torch.zeros(num_worlds, dtype=torch.int32, device=self.device)
        self._rows: Tensor | None = None  # [capacity, W, N, numbers]
        self._ages: Tensor  # [capacity, W] int32, steps since the episode began
        self._ended: Tensor  # [capacity, W] bool
        self._states: dict[str, Tensor] = {}
        self._starts: Tensor | None = None

    def __len__(self) -> int:
        """Steps stored, over all worlds."""
        return self._size * self.num_worlds

    def add(self, experience: "Experience", state: Mapping[str, Tensor] | None = None) -> None:
        """Store one step of all worlds. `state`: the memory before it, [W, N, ...] each, zero where an episode begins.

        Raises:
            UserError: there is no room for that many steps.
        """
        if self._rows is None:
            self._allocate({} if self.length == 1 or self.whole_episodes else state or {})
        slot = self._written % self.capacity
        e = experience
        flags = torch.stack((e.reward, e.terminated.to(e.reward.dtype), e.student.to(e.reward.dtype)), dim=-1)
        torch.cat((e.observation, e.next_observation, e.action, flags), dim=-1, out=self._rows[slot])
        self._ages[slot], self._ended[slot] = self._age, e.ended
        if self._states:
            self._store(state)
        self._age = torch.where(e.ended, 0, self._age + 1)
        self._written += 1
        self._starts = None

    def sample(self, batch_size: int, *, shared: bool = False, joint: bool = False) -> Batch:
        """Draw `batch_size` sequences for each agent, with replacement, by torch's global generator.

        T of the batch is that of its longest sequence. joint: all agents' draws are of the same moments, as a central
        critic needs. shared: an agent's draws are from everybody's lives (as SEAC shares experience: Christianos et al.
        2020).

        Raises:
            UserError: shared experience of agents of different sizes, or together with joint draws.
        """
        assert self._written, "nothing is stored yet"
        if shared:
            check_shared(self.spec, joint=joint)
        count = self.spec.num_agents
        begin = self._draw((batch_size, 1 if joint else count))
        agent = torch.arange(count, device=self.device)
        if shared:
            agent = torch.randint(count, (batch_size, count), device=self.device)
        place, valid = self._follow(begin)
        row = place * count + agent[..., None, :]
        # Many times faster than indexing on a CPU.
        rows = self._rows.view(-1, self._row_shape[1]).index_select(0, row.view(-1)).view(*row.shape, -1)
        valid = valid.expand(row.shape)
        if valid.shape[1] > 1:
            rows.masked_fill_(~valid[..., None], 0)
        return self._unpack(rows, valid, self._remembered(begin, agent))

    def state_dict(self) -> dict[str, Any]:
        """All that later draws depend on, but the generator. Views of the storage, as PyTorch's modules give them."""
        state: dict[str, Any] = {"written": self._written, "age": self._age, "states": self._states}
        if self._rows is not None:
            size = self._size
            state |= {"rows": self._rows[:size], "ages": self._ages[:size], "ended": self._ended[:size]}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy what `state_dict` gave.

        Raises:
            UserError: it is of another capacity, another number of worlds or another team.
        """
        size = min(state["written"], self.capacity)
        there = tuple(state["rows"].shape) if "rows" in state else (size, len(state["age"]), *self._row_shape)
        if there != (size, self.num_worlds, *self._row_shape):
            raise UserError(
                f"the stored replay, {there}, does not fit {self.capacity} steps of {self.num_worlds} worlds with "
                f"{self._row_shape} numbers: resume with the same world and the same capacity"
            )
        self._written, self._starts, self._rows = state["written"], None, None
        self._age.copy_(state["age"])
        if "rows" in state:
            self._allocate({})
            self._rows[:size], self._ages[:size], self._ended[:size] = state["rows"], state["ages"], state["ended"]
        self._states = {name: value.to(self.device, copy=True) for name, value in state["states"].items()}

    @property
    def _size(self) -> int:
        return min(self._written, self.capacity)

    @property
    def _row_shape(self) -> tuple[int, int]:
        return self.spec.num_agents, 2 * self.spec.observation_size + self.spec.action_size + 3

    def _allocate(self, state: Mapping[str, Tensor]) -> None:
        ring = (self.capacity, self.num_worlds)
        try:
            self._rows = torch.empty(*ring, *self._row_shape, device=self.device)
            self._ages = torch.zeros(ring, dtype=torch.int32, device=self.device)
            self._ended = torch.zeros(ring, dtype=torch.bool, device=self.device)
            # Not every turn begins a sequence, and a snapshot shall not hold chance numbers.
            self._states = {name: value.new_zeros(self._turns, *value.shape) for name, value in state.items()}
        except RuntimeError as error:
            numbers = self.capacity * self.num_worlds * math.prod(self._row_shape)
            numbers += self._turns * sum(value.numel() for value in state.values())
            raise UserError(
                f"a replay of {self.capacity} steps of {self.num_worlds} worlds needs {numbers * 4 / 1e9:,.1f} GB: "
                "lower its capacity"
            ) from error

    def _store(self, state: Mapping[str, Tensor]) -> None:
        """Keep the memory of the worlds in which a sequence begins, but not an episode."""
        due = (self._age > 0) & (self._age % self.length == 0)
        if due.any():
            turn = self._written // self.length % self._turns
            for name, value in self._states.items():
                value[turn, due] = state[name][due]

    def _draw(self, shape: tuple[int, int]) -> Tensor:
        """Places (slot * W + world) at which a sequence begins, all equally likely."""
        if self.length == 1:
            return torch.randint(len(self), shape, device=self.device)
        if self._starts is None:
            ages = self._ages[: self._size]
            first = ages == 0 if self.whole_episodes else ages % self.length == 0
            self._starts = first.view(-1).nonzero().squeeze(1)
        return self._starts[torch.randint(len(self._starts), shape, device=self.device)]

    def _newer(self, place: Tensor) -> Tensor:
        """How many steps the ring holds that are newer than the one at `place`."""
        return (self._written - 1 - place // self.num_worlds) % self.capacity

    def _follow(self, begin: Tensor) -> tuple[Tensor, Tensor]:
        """The places [B, T, ...] of the sequences that begin at `begin` [B, ...], and which of them belong to it."""
        if self.length == 1:
            place = begin[:, None]
            return place, torch.ones_like(place, dtype=torch.bool)
        step = torch.arange(self.length, device=self.device)[:, None]
        place = (begin[:, None] + step * self.num_worlds) % (self.capacity * self.num_worlds)
        ended = self._ended.view(-1)[place].int()
        # Behind the newest step the ring goes on with the oldest, or with nothing.
        valid = (ended.cumsum(1) == ended) & (step <= self._newer(begin)[:, None])
        longest = int(valid.sum(1).max())
        return place[:, :longest], valid[:, :longest]

    def _remembered(self, begin: Tensor, agent: Tensor) -> dict[str, Tensor] | None:
        if not self._states:
            return None
        time = self._written - 1 - self._newer(begin)
        turn, world = time // self.length % self._turns, begin % self.num_worlds
        begins_episode = self._ages.view(-1)[begin].expand(*begin.shape[:1], agent.shape[-1]) == 0
        states = {name: value[turn, world, agent] for name, value in self._states.items()}
        return {
            n: s.masked_fill_(begins_episode.view(*s.shape[:2], *[1] * (s.dim() - 2)), 0) for n, s in states.items()
        }

    def _unpack(self, rows: Tensor, valid: Tensor, state: dict[str, Tensor] | None) -> Batch:
        o, a = self.spec.observation_size, self.spec.action_size
        first, following, action, flags = rows.split((o, o, a, 3), dim=-1)
        reward, terminated, student = flags.unbind(-1)
        observation = torch.cat((first[:, :1], following), dim=1)
        return Batch(observation, action, reward, terminated != 0, student != 0, valid, state)


def check_shared(spec: TeamSpec, *, joint: bool = False) -> None:
    """Raise UserError for a team whose agents cannot learn from each other's steps."""
    if joint:
        raise UserError("a central critic needs all agents' steps of one moment: drop shared_replay or central_critic")
    for i, agent in enumerate(spec.agents):
        sizes, first = (f"{spec.observation_sizes[k]} observations and {spec.action_sizes[k]} actions" for k in (i, 0))
        if sizes != first:
            raise UserError(
                f"agents of different sizes cannot share their replay: {agent} has {sizes}, {spec.agents[0]} {first}"
            )
