"""mpe2's simple_adversary: good agents cover a goal that an adversary must guess from what they do."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fulmen.marl.worlds.tasks.base import BLUE, DARK, RED, Body, Column, Rows, State, Task, length, numbered, pick


@dataclass(frozen=True, kw_only=True)
class Adversary(Task):
    """good: number of good agents, and of landmarks; one adversary, first among the agents, comes on top."""

    good: int = 2

    name: ClassVar[str] = "adversary"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_integer("good", 1)

    def bodies(self) -> tuple[list[Body], list[Body]]:
        agents = numbered("adversary", 1, radius=0.15, colour=RED) + numbered(
            "agent", self.good, radius=0.15, colour=BLUE
        )
        return agents, numbered("landmark", self.good, radius=0.08, colour=DARK)

    def facts(self) -> dict[str, int]:
        return {"goal": 1, "place": 2}

    def settle(self, state: State) -> None:
        state.facts["place"].copy_(pick(state.landmarks, state.facts["goal"][0]))

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        secret = [] if agent == 0 else rows.offset_to_fact(agent, "place")
        return secret + rows.landmarks(agent) + rows.others(agent)

    def rewards(self, state: State) -> Tensor:
        missing = length(state.agents - state.facts["place"][:, None])
        good = missing[0] - missing[1:].amin(0)
        return torch.cat((-missing[:1], good.expand(self.good, -1)))

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        return [(agent, int(facts["goal"][0])) for agent in range(1, 1 + self.good)]
