"""Navigation: each agent has a goal of its own and is paid alone; dense or sparse, with equal or inverted actuators."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fulmen.marl.worlds.tasks.base import BLUE, GAIN, RED, Body, Column, Rows, State, Task, length

REWARDS = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True)
class Navigation(Task):
    """agents: team size. reward: "dense" pays minus the distance to the goal, "sparse" 1 a step within `radius` of it.

    inverted: one flag an agent, empty for nobody: its actuators push the other way, so its task is another one.

    observe_others: agents also see where the others are. collide: agents push each other away.
    """

    actions: str = "force"
    max_steps: int = 50
    agents: int = 4
    reward: str = "dense"
    radius: float = 0.15
    inverted: tuple[bool, ...] = ()
    observe_others: bool = False
    collide: bool = False

    name: ClassVar[str] = "navigation"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_integer("agents", 1)
        self.require("reward", self.reward in REWARDS, f"one of {', '.join(REWARDS)}")
        self.require_number("radius", 0.001, 2)
        flags = self.inverted
        fits = isinstance(flags, list | tuple) and len(flags) in (0, self.agents)
        rule = f"a list of {self.agents} times true or false, one an agent, or empty"
        self.require("inverted", fits and all(isinstance(flag, bool) for flag in flags), rule)
        self.require_flag("observe_others")
        self.require_flag("collide")

    def bodies(self) -> tuple[list[Body], list[Body]]:
        kinds = {False: dict(colour=BLUE), True: dict(colour=RED, gain=-GAIN)}
        flags = self.inverted or (False,) * self.agents
        agents = [Body(name=f"agent_{i}", **kinds[inverted]) for i, inverted in enumerate(flags)]
        goals = [Body(name=f"goal_{i}", radius=self.radius) for i in range(self.agents)]
        return agents, goals

    def colliders(self) -> int:
        return self.agents if self.collide else 0

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        goal = rows.offset(agent, self.agents + agent)
        others = rows.others(agent) if self.observe_others else []
        return rows.velocity(agent) + rows.position(agent) + goal + others

    def rewards(self, state: State) -> Tensor:
        missing = length(state.landmarks - state.agents)
        return -missing if self.reward == "dense" else (missing < self.radius).to(missing)

    def goals(self, facts: dict[str, list[float]]) -> list[tuple[int, int]]:
        return [(agent, agent) for agent in range(self.agents)]
