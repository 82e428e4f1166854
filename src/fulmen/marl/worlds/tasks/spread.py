"""mpe2's simple_spread: n agents cover n landmarks together and keep clear of each other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fulmen.marl.worlds.tasks.base import BLUE, DARK, Body, Column, Rows, State, Task, distances, numbered


@dataclass(frozen=True, kw_only=True)
class Spread(Task):
    """agents: team size, and the number of landmarks. local_ratio: weight of an agent's own collisions.

    The rest of the weight is on the team's distance to the landmarks, of each to the agent that is nearest.
    """

    agents: int = 3
    local_ratio: float = 0.5

    name: ClassVar[str] = "spread"
    _radius: ClassVar[float] = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_integer("agents", 1)
        self.require_number("local_ratio", 0, 1)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        return numbered("agent", self.agents, radius=self._radius, colour=BLUE), numbered(
            "landmark", self.agents, colour=DARK
        )

    def colliders(self) -> int:
        return self.agents

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        # mpe2's silent agents are still heard: two zeros from each.
        silence = rows.zeros(2 * (self.agents - 1))
        place = rows.velocity(agent) + rows.position(agent)
        return place + rows.landmarks(agent) + rows.others(agent) + silence

    def rewards(self, state: State) -> Tensor:
        to_agents, to_landmarks = distances(state.positions, state.agents).split(self.agents)
        uncovered = to_landmarks.amin(1).sum(0)
        # Everybody touches itself, which does not count.
        touched = (to_agents < 2 * self._radius).sum(1) - 1
        return (uncovered * (self.local_ratio - 1)).sub(touched, alpha=self.local_ratio)
