"""mpe2's simple_reference: each of two agents knows where the other one should go, and can tell it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fulmen.marl.worlds.tasks.base import Body, Column, Rows, State, Task, length, numbered, pick

_COLOURS = ((0.75, 0.25, 0.25), (0.25, 0.75, 0.25), (0.25, 0.25, 0.75))


@dataclass(frozen=True, kw_only=True)
class Reference(Task):
    """local_ratio: weight of the goal that an agent alone knows; the rest is on the mean of both."""

    local_ratio: float = 0.5

    name: ClassVar[str] = "reference"
    speakers: ClassVar[slice] = slice(0, 2)
    message_size: ClassVar[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("local_ratio", 0, 1)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        landmarks = [Body(name=f"landmark_{i}", colour=colour) for i, colour in enumerate(_COLOURS)]
        return numbered("agent", 2), landmarks

    def facts(self) -> dict[str, int]:
        """Of each agent: the goal that it knows, its place, its colour."""
        return {"goal": 2, "place": 4, "colour": 6}

    def settle(self, state: State) -> None:
        facts, goals = state.facts, state.facts["goal"]
        colours = goals.new_tensor(_COLOURS).T[..., None]
        for agent, goal in enumerate(goals):
            facts["place"][2 * agent : 2 * agent + 2] = pick(state.landmarks, goal)
            facts["colour"][3 * agent : 3 * agent + 3] = pick(colours, goal)

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        colour = rows.fact("colour", 3 * agent, 3)
        return rows.velocity(agent) + rows.landmarks(agent) + colour + rows.message(1 - agent)

    def rewards(self, state: State) -> Tensor:
        places = state.facts["place"].unflatten(0, (2, 2)).transpose(0, 1)
        known = length(state.agents.flip(1) - places)
        return known * -self.local_ratio + known.mean(0) * (self.local_ratio - 1)

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        return [(1 - agent, int(goal)) for agent, goal in enumerate(facts["goal"])]
