"""Embedding and head of which each rank of tensor parallelism has the rows of a part of the vocabulary.

The residual stream between them is split over tokens (`sequence.py`); every rank is given all tokens of the row, and
all targets.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fulmen.model.vocabulary import Embedding, Head, Inserted
from fulmen.ops.linear import linear_f32
from fulmen.ops.loss import IGNORE, linear_cross_entropy
from fulmen.parallel.collectives import ALL_GATHER
from fulmen.parallel.sequence import gather_tokens, part_lengths, scatter_sums


class VocabularyEmbedding(Embedding):
    """Tokens [B, T] of the row to vectors [B, T_r, hidden] of this rank's; its weight is a DTensor of rows."""

    group: dist.ProcessGroup

    def forward(self, tokens: Tensor, inserted: Inserted | None = None) -> Tensor:
        """As of `Embedding`; `inserted` has the places in the whole row, and is the same on every rank."""
        if inserted is not None:
            # The sum over the ranks has it once, and each rank a gradient: that of its own share, or zero.
            inserted = inserted._replace(vectors=inserted.vectors * (dist.get_rank(self.group) == 0))
        parts = super().forward(tokens, inserted)
        return scatter_sums(parts, part_lengths(tokens.shape[1], self.group.size()), self.group)

    def rows(self, tokens: Tensor) -> Tensor:
        """Those that this rank has; zeros for other tokens."""
        weight = self.weight.to_local()
        found = _find_rows(tokens, weight, self.group)
        return F.embedding(found.places, weight) * found.are_here[..., None]


class VocabularyHead(Head):
    """Logits of hidden [..., T_r, hidden], this rank's tokens; its weight is a DTensor of rows."""

    group: dist.ProcessGroup

    def forward(self, hidden: Tensor) -> Tensor:
        """Of all ranks' tokens, of which each may have any number, over all of the vocabulary: [..., T, V] fp32.

        Every rank has them. As gradients are sums over ranks, each must take only its share of a loss of them.
        """
        count, ranks = torch.tensor([hidden.shape[-2]], device=hidden.device), self.group.size()
        counts = count.new_empty(ranks)
        ALL_GATHER(counts, count, self.group)
        logits = linear_f32(gather_tokens(hidden, counts.tolist(), self.group), self.weight.to_local())
        return gather_tokens(logits.mT, [logits.shape[-1]] * ranks, self.group).mT.contiguous()

    def nll(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Head`, for the targets [B, T] of the row this rank's share: those in its part of the vocabulary.

        The gradients of all shares are computed together, so every rank must weigh its own the same.
        """
        whole = gather_tokens(hidden, part_lengths(targets.shape[1], self.group.size()), self.group)
        weight, targets = self.weight.to_local(), targets.flatten()
        nll = linear_cross_entropy(whole.flatten(0, 1), weight, targets, of_logits=self._nll_and_gradient)
        return nll, _find_rows(targets, weight, self.group).are_here.sum()

    def _nll_and_gradient(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's logits [t, V_r] its share of the sum, and the gradient of the whole sum."""
        dtype, logits = logits.dtype, logits.float()
        found, counted = _find_rows(targets, logits.T, self.group), targets != IGNORE
        column = (found.places * counted)[:, None]
        at_target, highest = logits.gather(1, column)[:, 0], logits.amax(dim=-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        exps = torch.exp(logits - highest[:, None])
        total = exps.sum(dim=-1)
        dist.all_reduce(total, group=self.group)
        nll = torch.where(found.are_here, (highest - at_target) + total.log(), 0.0).sum()
        probs = exps.div_(total[:, None]).scatter_add_(1, column, -found.are_here[:, None].to(exps.dtype))
        return nll, probs.mul_(counted[:, None]).to(dtype)


class _Rows(NamedTuple):
    places: Tensor  # of tokens among this rank's rows; 0 for others
    are_here: Tensor  # bool


def _find_rows(tokens: Tensor, rows: Tensor, group: dist.ProcessGroup) -> _Rows:
    """Tokens in the rows [V_r, ...] of this rank. What is no token has a place out of range, whatever the rank."""
    count = len(rows)
    places = tokens - dist.get_rank(group) * count
    are_here = (places >= 0) & (places < count)
    are_elsewhere = ~are_here & (tokens >= 0) & (tokens < count * group.size())
    return _Rows(places.masked_fill(are_elsewhere, 0), are_here)
