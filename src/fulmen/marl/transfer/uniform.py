"""The uniform teacher: a student weighs all others alike. PAT without attention and without a choice of mode."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.transfer.base import Decision, Experience, Transfer
from fulmen.marl.transfer.gate import Held
from fulmen.marl.transfer.selector import Teaching, mix_actions, teacher_mask

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """Of rivals that are students by chance alone."""

    epsilon_self: float = 0.25  # share of training episodes by the own policy, as PAT's

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon_self <= 1:
            raise UserError(f"epsilon_self is a share from 0 to 1, got {self.epsilon_self}")


class UniformTeacher(Transfer):
    """a_i^S = mean of mu_j(o_i) over the N - 1 teachers; without exploration everybody is a student."""

    def __init__(self, learner: "TeamLearner", settings: StudentSettings | None = None):
        super().__init__(learner)
        self.settings = settings or StudentSettings()
        self.teachers = teacher_mask(learner.spec).to(next(learner.parameters()).device)
        self.teaching = Teaching(learner)
        self.held = Held()

    @torch.no_grad()
    def decide(self, observation: Tensor, own: Tensor, *, explore: bool) -> Decision:
        if not self.teachers.any():
            return super().decide(observation, own, explore=explore)
        advice = self.teaching.while_acting(observation, explore=explore)
        attention = self.attend(observation, advice.actions)
        student = attention.sum(-1) > 0
        if explore:
            student = student & ~self.held.hold_alone(student.shape, self.settings.epsilon_self, student.device)
        taught = self.learner.clamp(mix_actions(attention, advice.actions))
        return Decision(torch.where(student[..., None], taught, own), student, attention)

    def attend(self, observation: Tensor, actions: Tensor) -> Tensor:
        """[W, N, N] weight for student i of teacher j, who would do actions [W, N, N, A]; zeros: it acts alone."""
        teachers = self.teachers.float()
        weights = teachers / teachers.sum(-1, keepdim=True).clamp(min=1)
        return weights.expand(len(observation), -1, -1)

    def begin(self, worlds: Tensor | None = None, *, explore: bool) -> None:
        """As `PAT.begin`."""
        self.teaching.begin(worlds, explore=explore)
        if explore and worlds is None:
            self.held.begin()

    def observe(self, experience: Experience) -> None:
        self.teaching.begin(experience.ended, explore=True)
        self.held.observe(experience.ended)

    def state_dict(self) -> dict[str, Any]:
        return {"teaching": self.teaching.state_dict(), "held": self.held.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.teaching.load_state_dict(state["teaching"])
        self.held.load_state_dict(state["held"], self.teachers.device)
