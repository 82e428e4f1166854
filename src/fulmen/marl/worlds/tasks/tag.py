"""mpe2's simple_tag: slow adversaries hunt fast good agents around obstacles."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fulmen.marl.worlds.tasks.base import DARK, GREEN, RED, Body, Column, Rows, State, Task, distances, numbered


@dataclass(frozen=True, kw_only=True)
class Tag(Task):
    """adversaries: hunters, first among the agents. good: the hunted. obstacles: landmarks that nobody passes."""

    adversaries: int = 3
    good: int = 1
    obstacles: int = 2

    name: ClassVar[str] = "tag"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_integer("adversaries", 1)
        self.require_integer("good", 1)
        self.require_integer("obstacles", 0)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        hunters = numbered("adversary", self.adversaries, radius=0.075, colour=RED, gain=3.0, max_speed=1.0)
        hunted = numbered("agent", self.good, radius=0.05, colour=GREEN, gain=4.0, max_speed=1.3)
        return hunters + hunted, numbered("landmark", self.obstacles, radius=0.2, colour=DARK)

    def colliders(self) -> int:
        return self.adversaries + self.good + self.obstacles

    def begin(self, state: State, generator: torch.Generator) -> None:
        super().begin(state, generator)
        state.landmarks.mul_(0.9)

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        hunted = range(self.adversaries, self.adversaries + self.good)
        velocities = [column for other in hunted if other != agent for column in rows.velocity(other)]
        place = rows.velocity(agent) + rows.position(agent)
        return place + rows.landmarks(agent) + rows.others(agent) + velocities

    def rewards(self, state: State) -> Tensor:
        hunters, hunted = state.agents.split((self.adversaries, self.good), dim=1)
        caught = (distances(hunters, hunted) < 0.075 + 0.05) * 10.0
        escaped = _leaving(hunted.abs()).sum(0)
        return torch.cat((caught.sum((0, 1)).expand(self.adversaries, -1), -caught.sum(0) - escaped))


def _leaving(x: Tensor) -> Tensor:
    """The price of being outside: nothing up to 0.9, then a slope to 1, then exponential up to 10."""
    return torch.where(x < 1, (x - 0.9).clamp_min(0) * 10, (2 * x - 2).exp().clamp_max(10))
