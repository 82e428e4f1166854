"""How knowledge moves between the agents of a team: the interface, and the base case in which it does not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fulmen.marl.replay import Batch

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner


class Decision(NamedTuple):
    """What the agents do in one step, before exploration noise."""

    actions: Tensor  # [W, N, A]
    student: Tensor  # [W, N] bool: who acts by what others know
    attention: Tensor | None  # [W, N, N] weight of teacher j for student i, zero on the diagonal; None: no teachers


class Experience(NamedTuple):
    """One step of all worlds, as it was lived."""

    observation: Tensor  # [W, N, O]
    action: Tensor  # [W, N, A] with its noise
    reward: Tensor  # [W, N]
    terminated: Tensor  # [W, N] bool
    ended: Tensor  # [W] bool
    next_observation: Tensor  # [W, N, O], before any reset
    student: Tensor  # [W, N] bool


class Transfer:
    """No transfer: everybody acts for itself. Every other way is a subclass that changes what it needs to.

    A subclass keeps its own parameters, optimizer, counts; `state_dict` has all of them. Randomness comes from torch's
    global generator.
    """

    def __init__(self, learner: "TeamLearner"):
        self.learner = learner

    def decide(self, observation: Tensor, own: Tensor, *, explore: bool) -> Decision:
        """Modes and actions for observation [W, N, O]; `own` [W, N, A] is what each agent's own policy says.

        explore: training, where modes are drawn; without, an evaluation, where the likeliest mode is taken.
        """
        return Decision(own, torch.zeros(own.shape[:2], dtype=torch.bool, device=own.device), None)

    def begin(self, worlds: Tensor | None = None, *, explore: bool) -> None:
        """Forget what belongs to the episodes under way, in all worlds or in those of a mask [W]."""

    def renew_agent(self, index: int) -> None:
        """Agent `index` starts from scratch, as a newcomer does; the others go on."""

    def observe(self, experience: Experience) -> None:
        """Told of every training step, after it."""

    def actor_loss(self, batch: Batch, actions: Tensor) -> Tensor | None:
        """[N] to add to the actors' losses, from the own policies' actions [B, T, N, A] on the batch, with graph."""
        return None

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from a batch, after the learner has; gives back metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
