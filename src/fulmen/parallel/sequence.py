"""Sequence parallelism: between the attentions the tokens of a row are split over the ranks of tensor parallelism.

Before an attention they are gathered, behind it each rank has a part of a sum for every token, and the sums are split
over the ranks again (Korthikanti et al., arXiv:2205.05198). Each is the other one's backward pass, as gradients are
sums of what each rank contributes.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.parallel.collectives import ALL_GATHER, REDUCE_SCATTER


def part_lengths(tokens: int, ranks: int) -> list[int]:
    """How many of a row's tokens each rank has: the r-th those of r * tokens // ranks to (r + 1) * tokens // ranks."""
    borders = [rank * tokens // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in itertools.pairwise(borders)]


def gather_tokens(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All tokens [..., T, D] of x [..., T_r, D], of which each rank of `group` has `lengths[r]`."""
    return _Gather.apply(x, lengths, group)


def scatter_sums(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens [..., T_r, D] of the sum over the ranks of their x [..., T, D]."""
    return _ScatterSums.apply(x, lengths, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup):
        ctx.how = lengths, group
        return _gather(x, lengths, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_whole: Tensor):
        return _scatter_sums(d_whole, *ctx.how), None, None


class _ScatterSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup):
        ctx.how = lengths, group
        return _scatter_sums(x, lengths, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_part: Tensor):
        return _gather(d_part, *ctx.how), None, None


# What travels has the same number of tokens for each rank, the longest; of a row that divides nothing is copied.


def _gather(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(lengths)
    mine = F.pad(x, (0, 0, 0, longest - x.shape[-2]))[None].contiguous()
    all_ = mine.new_empty(len(lengths), *mine.shape[1:])
    ALL_GATHER(all_, mine, group)
    whole = all_.movedim(0, -3).flatten(-3, -2)
    if min(lengths) == longest:
        return whole
    return torch.cat([whole.narrow(-2, rank * longest, length) for rank, length in enumerate(lengths)], dim=-2)


def _scatter_sums(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(lengths)
    if min(lengths) < longest:
        parts = x.split(lengths, dim=-2)
        x = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts], dim=-2)
    all_ = x.unflatten(-2, (len(lengths), longest)).movedim(-3, 0).contiguous()
    mine = all_.new_empty(1, *all_.shape[1:])
    REDUCE_SCATTER(mine, all_, group=group)
    return mine[0].narrow(-2, 0, lengths[dist.get_rank(group)])
