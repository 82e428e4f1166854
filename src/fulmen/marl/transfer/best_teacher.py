"""The best teacher by the own critic, argmax_j Q_i(o_i, mu_j(o_i)), itself among them: a hard rule for attention."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fulmen.marl.transfer.adhoc import check_memoryless, check_own_critics, own_values
from fulmen.marl.transfer.uniform import StudentSettings, UniformTeacher

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner


class BestTeacher(UniformTeacher):
    """A student follows the one teacher that its own critic values most, and itself where none is better."""

    def __init__(self, learner: "TeamLearner", settings: StudentSettings | None = None):
        super().__init__(learner, settings)
        check_memoryless(learner, "best_teacher")
        check_own_critics(learner, "best_teacher")

    def attend(self, observation: Tensor, actions: Tensor) -> Tensor:
        """As `UniformTeacher.attend`."""
        count = actions.shape[1]
        # Each teacher in turn acts for everybody: N joint actions for each world.
        seen = observation[:, None].expand(-1, count, -1, -1).flatten(0, 1)
        values = own_values(self.learner, seen, actions.transpose(1, 2).flatten(0, 1))
        values = values.view(-1, count, count).transpose(1, 2)
        own = values.diagonal(dim1=1, dim2=2)
        best, teacher = values.masked_fill(~self.teachers, -torch.inf).max(-1)
        followed = torch.nn.functional.one_hot(teacher, count).to(values.dtype)
        # A difference by rounding alone is no reason to follow.
        better = (best > own) & ~torch.isclose(best, own)
        return followed * better[..., None]
