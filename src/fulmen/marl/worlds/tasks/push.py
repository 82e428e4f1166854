"""mpe2's simple_push: an agent goes to its landmark, an adversary that does not know which keeps it away."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fulmen.marl.worlds.tasks.base import BLUE, RED, Body, Column, Rows, State, Task, length, pick

_LANDMARKS = ((0.1, 0.9, 0.1), (0.1, 0.1, 0.9))
_GOALS = ((0.25, 0.75, 0.25), (0.25, 0.25, 0.75))
"""Colour of the good agent for each goal."""


@dataclass(frozen=True, kw_only=True)
class Push(Task):
    """One adversary, one good agent, two landmarks, as in mpe2."""

    name: ClassVar[str] = "push"

    def bodies(self) -> tuple[list[Body], list[Body]]:
        agents = [Body(name="adversary_0", colour=RED), Body(name="agent_0", colour=BLUE)]
        return agents, [Body(name=f"landmark_{i}", colour=colour) for i, colour in enumerate(_LANDMARKS)]

    def colliders(self) -> int:
        return 2

    def facts(self) -> dict[str, int]:
        return {"goal": 1, "place": 2, "colour": 3, "landmark_colours": 6}

    def settle(self, state: State) -> None:
        facts, goal = state.facts, state.facts["goal"][0]
        facts["place"].copy_(pick(state.landmarks, goal))
        facts["colour"].copy_(pick(goal.new_tensor(_GOALS).T[..., None], goal))
        facts["landmark_colours"].copy_(goal.new_tensor(_LANDMARKS).view(6, 1))

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        if agent == 0:
            return rows.velocity(0) + rows.landmarks(0) + rows.others(0)
        knowledge = rows.offset_to_fact(agent, "place") + rows.fact("colour")
        return (
            rows.velocity(agent)
            + knowledge
            + rows.landmarks(agent)
            + rows.fact("landmark_colours")
            + rows.others(agent)
        )

    def rewards(self, state: State) -> Tensor:
        adversary, good = length(state.agents - state.facts["place"][:, None])
        return torch.stack((good - adversary, -good))

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        return [(1, int(facts["goal"][0]))]
