"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): its loss, and what is in it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fulmen.checkpoint.names import Model
from fulmen.data.encoding import IGNORE

TOKENS_AT_ONCE = 512
"""Whose logits exist at the same time."""


class PreferenceLoss(NamedTuple):
    """Of N pairs; a reward is beta * log(policy / reference), which the loss makes larger for the chosen answer."""

    losses: Tensor  # [N]
    chosen: Tensor  # [N], rewards, without gradients
    rejected: Tensor  # [N], rewards, without gradients

    def metrics(self) -> dict[str, float]:
        """Means: how often the chosen answer has the larger reward (as large: half), by how much, and both rewards."""
        margins = self.chosen - self.rejected
        return {
            "reward_accuracy": (margins.sign() + 1).mean().item() / 2,
            "reward_margin": margins.mean().item(),
            "reward_chosen": self.chosen.mean().item(),
            "reward_rejected": self.rejected.mean().item(),
        }


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> PreferenceLoss:
    """-log sigmoid(beta * ((chosen - rejected) of the policy - the same of the reference)), per pair.

    All but beta: [N], the log-probabilities of whole answers, nats. beta: how dear it is to leave the reference.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return PreferenceLoss(-F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())


def answer_log_probs(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] fp32: of each of N packed samples the sum of its targets' log-probabilities, without holding all logits.

    hidden: [1, T, hidden] of `model.hidden`. targets: [1, T] int64, IGNORE where nothing counts. cu_seqlens: [N + 1].
    """
    places = torch.nonzero(targets[0] != IGNORE).flatten()
    wanted, answers = hidden[0, places], targets[0, places]
    # Computed again in the backward pass, so that a few logits exist at a time.
    parts: list[Any] = [
        checkpoint(_log_probs, model, *part, use_reentrant=False)
        for part in zip(wanted.split(TOKENS_AT_ONCE), answers.split(TOKENS_AT_ONCE), strict=True)
    ]
    samples = torch.searchsorted(cu_seqlens.to(places), places, right=True) - 1
    total = torch.zeros(len(cu_seqlens) - 1, device=hidden.device)
    return total.index_add(0, samples, torch.cat(parts))


def _log_probs(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """[T] of hidden [T, hidden] and targets [T]."""
    return model.logits(hidden).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
