"""What a task is: the discs in it, how a world begins, what the agents see and what they are paid.

Letters: W worlds, N agents, E entities (agents first, then landmarks), O the widest observation.

A batch of worlds is one matrix `numbers` [rows, W]. Every column of an observation is one row of it minus another, so a
task lists pairs of rows, and all observations of all worlds come from two gathers and a subtraction.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError

ACTIONS = ("mpe2", "force", "discrete")
GAIN = 5.0
"""Force of a full action where a body does not say otherwise (mpe2's sensitivity)."""

Column = tuple[int, int]
"""A number of an observation: this row of a world minus that row."""

Colour = tuple[float, float, float]
BLUE, GREEN, RED = (0.35, 0.35, 0.85), (0.35, 0.85, 0.35), (0.85, 0.35, 0.35)
GREY, DARK = (0.65, 0.65, 0.65), (0.25, 0.25, 0.25)


@dataclass(frozen=True, kw_only=True)
class Body:
    """A disc. All weigh 1; lengths are in units of the plane, whose middle is -1 to 1."""

    name: str
    radius: float = 0.05
    colour: Colour = GREY
    gain: float = GAIN  # force of a full action; negative: inverted actuators
    max_speed: float = math.inf


class State(NamedTuple):
    """Views of the numbers of W worlds; writing to them changes the worlds."""

    positions: Tensor  # [2, E, W]
    agents: Tensor  # [2, N, W], the first of the positions
    landmarks: Tensor  # [2, E - N, W], the others
    velocities: Tensor  # [2, N, W]
    messages: Tensor  # [speakers, M, W]: what was said in the last step
    facts: dict[str, Tensor]  # [size, W] each: what a task drew for the episode


class Rows:
    """Where each number of a world lies; gives an observation's columns by their meaning."""

    def __init__(self, agents: int, entities: int, speakers: int, message_size: int, facts: dict[str, int]):
        self.agents, self.entities = agents, entities
        self._speakers, self._message_size = speakers, message_size
        self._velocities = 2 * entities
        self._messages = self._velocities + 2 * agents
        self._facts = {}
        row = self._said = self._messages + speakers * message_size
        for name, size in facts.items():
            self._facts[name] = range(row, row + size)
            row += size
        self._zero = row
        self.count = row + 1

    def views(self, numbers: Tensor) -> State:
        """Name the parts of `numbers` [rows, W]."""
        worlds = numbers.shape[1]
        positions = numbers[: self._velocities].view(2, self.entities, worlds)
        return State(
            positions,
            positions[:, : self.agents],
            positions[:, self.agents :],
            numbers[self._velocities : self._messages].view(2, self.agents, worlds),
            numbers[self._messages : self._said].view(self._speakers, self._message_size, worlds),
            {name: numbers[rows.start : rows.stop] for name, rows in self._facts.items()},
        )

    def _plain(self, first: int, count: int) -> list[Column]:
        return [(first + i, self._zero) for i in range(count)]

    def position(self, entity: int) -> list[Column]:
        """Two columns: where an entity is."""
        return [(entity, self._zero), (self.entities + entity, self._zero)]

    def velocity(self, agent: int) -> list[Column]:
        """Two columns: how fast an agent is."""
        row = self._velocities + agent
        return [(row, self._zero), (row + self.agents, self._zero)]

    def message(self, speaker: int) -> list[Column]:
        """What a speaker said, counted among the speakers."""
        return self._plain(self._messages + speaker * self._message_size, self._message_size)

    def fact(self, name: str, start: int = 0, size: int | None = None) -> list[Column]:
        """A fact of the episode, or `size` numbers of it from `start`."""
        rows = self._facts[name]
        return self._plain(rows.start + start, len(rows) - start if size is None else size)

    def zeros(self, count: int) -> list[Column]:
        """Columns that are always zero."""
        return [(self._zero, self._zero)] * count

    def offset(self, agent: int, entity: int) -> list[Column]:
        """Two columns: from an agent to an entity."""
        return [(entity, agent), (self.entities + entity, self.entities + agent)]

    def offset_to_fact(self, agent: int, name: str, start: int = 0) -> list[Column]:
        """Two columns: from an agent to the place that a fact holds."""
        row = self._facts[name].start + start
        return [(row, agent), (row + 1, self.entities + agent)]

    def landmarks(self, agent: int) -> list[Column]:
        """From an agent to every landmark."""
        return [column for entity in range(self.agents, self.entities) for column in self.offset(agent, entity)]

    def others(self, agent: int) -> list[Column]:
        """From an agent to every other agent."""
        return [column for other in range(self.agents) if other != agent for column in self.offset(agent, other)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Options of a task and what follows from them; a subclass is one task.

    actions: "mpe2" is mpe2's Box(0, 1): nothing, left, right, down, up, then the message; "force" is a force in
    [-1, 1] along x and y, then the message; "discrete" is mpe2's one choice among 5 moves times the words.
    max_steps: the time limit, the only way in which an episode ends.
    """

    actions: str = "mpe2"
    max_steps: int = 25

    name: ClassVar[str]
    movers: ClassVar[slice] = slice(None)  # agents that move
    speakers: ClassVar[slice] = slice(0, 0)  # agents that speak
    message_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.require("actions", self.actions in ACTIONS, f"one of {', '.join(ACTIONS)}")
        self.require_integer("max_steps", 1)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        """Agents and landmarks."""
        raise NotImplementedError

    def colliders(self) -> int:
        """How many of the entities, counted from the first, push each other away."""
        return 0

    def facts(self) -> dict[str, int]:
        """Names and sizes of what is drawn for an episode; `goal` is an index among the landmarks."""
        return {}

    def begin(self, state: State, generator: torch.Generator) -> None:
        """Draw new episodes."""
        state.positions.uniform_(-1, 1, generator=generator)
        state.velocities.zero_()
        state.messages.zero_()
        if "goal" in state.facts:
            goal = state.facts["goal"]
            drawn = torch.randint(state.landmarks.shape[1], goal.shape, generator=generator, device=goal.device)
            goal.copy_(drawn)
        self.settle(state)

    def settle(self, state: State) -> None:
        """Fill the facts that follow from the goal and the landmarks' places."""

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        """What an agent sees."""
        raise NotImplementedError

    def conceal(self, observation: Tensor, time: int) -> None:
        """Change observations [W, N, O] that depend on the step of the episode, in place."""

    def control(self, force: Tensor, time: int) -> None:
        """Change the movers' forces [2, movers, W] that depend on the step of the episode, in place."""

    def rewards(self, state: State) -> Tensor:
        """[N, W] after a step."""
        raise NotImplementedError

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        """(agent, landmark) for the picture of one world: who should be where."""
        return []

    def require(self, option: str, rule_holds: bool, rule: str) -> None:
        """Raise UserError naming task, option, rule and value unless the rule holds."""
        if not rule_holds:
            raise UserError(f"{self.name}: {option} must be {rule}, got {getattr(self, option)!r}")

    def require_integer(self, option: str, least: int) -> None:
        """The option is an integer of at least `least`."""
        value = getattr(self, option)
        self.require(option, type(value) is int and value >= least, f"an integer of at least {least}")

    def require_number(self, option: str, low: float, high: float) -> None:
        """The option is a number from `low` to `high`."""
        value = getattr(self, option)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        self.require(option, fits, f"a number from {low:g} to {high:g}")

    def require_flag(self, option: str) -> None:
        """The option is true or false."""
        self.require(option, isinstance(getattr(self, option), bool), "true or false")

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Options and their defaults."""
        return {field.name: field.default for field in fields(cls)}


def numbered(names: str, count: int, **body: Any) -> list[Body]:
    """Equal bodies, named `names` with a number."""
    return [Body(name=f"{names}_{i}", **body) for i in range(count)]


def length(vectors: Tensor) -> Tensor:
    """[..., W]: Euclidean length of vectors [2, ..., W]."""
    x, y = vectors
    return (x * x).addcmul_(y, y).sqrt_()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """[A, B, W]: between every place of a [2, A, W] and every one of b [2, B, W]."""
    return length(a[:, :, None] - b[:, None])


def pick(values: Tensor, index: Tensor) -> Tensor:
    """[size, W]: of values [size, L, W], or of the same [size, L, 1] in all worlds, the one that `index` [W] names."""
    size, _, worlds = *values.shape[:2], len(index)
    return values.expand(-1, -1, worlds).gather(1, index.long().expand(size, 1, worlds))[:, 0]
