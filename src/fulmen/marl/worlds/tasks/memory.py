"""Memory: navigation whose goals are shown only at the beginning of an episode."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fulmen.marl.worlds.tasks.base import Column, Rows
from fulmen.marl.worlds.tasks.navigation import Navigation


@dataclass(frozen=True, kw_only=True)
class Memory(Navigation):
    """shown: in how many of an episode's first observations the goal is seen; behind it a column says whether it is.

    held: agents cannot move while the goal is shown. Without, an agent that remembers nothing can still set out
    towards the goal and read the direction from its own velocity.
    """

    max_steps: int = 100
    shown: int = 5
    held: bool = False

    name: ClassVar[str] = "memory"
    _goal: ClassVar[slice] = slice(4, 6)
    _flag: ClassVar[int] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_integer("shown", 1)
        self.require("shown", self.shown <= self.max_steps, f"at most max_steps ({self.max_steps})")
        self.require_flag("held")

    def columns(self, rows: Rows, agent: int) -> list[Column]:
        navigation = super().columns(rows, agent)
        return navigation[: self._flag] + rows.zeros(1) + navigation[self._flag :]

    def conceal(self, observation: Tensor, time: int) -> None:
        if time < self.shown:
            observation[..., self._flag] = 1
        else:
            observation[..., self._goal] = 0

    def control(self, force: Tensor, time: int) -> None:
        if self.held and time < self.shown:
            force.zero_()
