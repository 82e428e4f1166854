"""mpe2's simple_speaker_listener: one sees the goal and can only speak, one can only move and listen."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fulmen.marl.worlds.tasks.base import Body, Column, Rows, State, Task, pick

_COLOURS = ((0.65, 0.15, 0.15), (0.15, 0.65, 0.15), (0.15, 0.15, 0.65))


@dataclass(frozen=True, kw_only=True)
class SpeakerListener(Task):
    """A speaker, a listener and three landmarks, as in mpe2."""

    name: ClassVar[str] = "speaker_listener"
    movers: ClassVar[slice] = slice(1, 2)
    speakers: ClassVar[slice] = slice(0, 1)
    message_size: ClassVar[int] = 3

    def bodies(self) -> tuple[list[Body], list[Body]]:
        agents = [Body(name="speaker_0", radius=0.075), Body(name="listener_0", radius=0.075)]
        landmarks = [Body(name=f"landmark_{i}", radius=0.04, colour=colour) for i, colour in enumerate(_COLOURS)]
        return agents, landmarks

    def facts(self) -> dict[str, int]:
        return {"goal": 1, "place": 2, "colour": 3}

    def settle(self, state: State) -> None:
        goal = state.facts["goal"][0]
        state.facts["place"].copy_(pick(state.landmarks, goal))
        state.facts["colour"].copy_(pick(goal.new_tensor(_COLOURS).T[..., None], goal))

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        if agent == 0:
            return rows.fact("colour")
        return rows.velocity(agent) + rows.landmarks(agent) + rows.message(0)

    def rewards(self, state: State) -> Tensor:
        missing = state.agents[:, 1] - state.facts["place"]
        return -missing.square().sum(0).expand(2, -1)

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        return [(1, int(facts["goal"][0]))]
