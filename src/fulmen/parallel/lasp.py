"""LASP+: lightning attention of a row that is cut over ranks (MiniMax-01, section 4.2.2; minimax-01.md, section 8).

Each rank sums the state of what it holds from zero, all states are gathered at once, and each folds those before it
into the state that enters its own tokens. The attention inside a rank's tokens is computed while the states travel.
Backward it is the same with the gradients of the states, from the right.

What enters a segment, of a sample that began in an earlier one, is

    S_in = sum over earlier segments f of the sample of exp(-s (tokens between f and here)) M_f

with M_f the state of the sample's tokens in f, from zero; and o_t += exp(-s (t + 1)) q_t^T S_in.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.lightning import silu_lightning_attention
from fulmen.ops.lightning.context import Context
from fulmen.ops.lightning.parts import Parts, add_reads, backward_pass, forward_pass, sum_states
from fulmen.parallel.collectives import ALL_GATHER
from fulmen.parallel.cut import Cut


def lasp_attention(qkv: Tensor, rates: Tensor, cut: Cut, group: dist.ProcessGroup) -> Tensor:
    """`silu_lightning_attention` of the whole row, for this rank's tokens: [1, T_r, H, D], the dtype of qkv.

    qkv: [1, T_r, H, 3, D], projections of the tokens that this rank of `group` holds of the row `cut`. rates: [H]. All
    ranks call it at the same time, forward and backward; where no sample crosses a rank's edge nothing is sent.
    """
    if cut.is_crossed:
        places = _Places.of(cut, dist.get_rank(group), qkv.device)
        return _LaspAttention.apply(qkv, _Crossing(places, rates, group))
    borders = torch.tensor(cut.local_borders(dist.get_rank(group)), dtype=torch.int32)
    return silu_lightning_attention(qkv, rates, cu_seqlens=borders)[0] if len(borders) > 1 else F.silu(qkv[..., 2, :])


def serial_lasp_attention(qkv: Tensor, rates: Tensor, cut: Cut, group: dist.ProcessGroup) -> Tensor:
    """The forward pass of LASP (arXiv:2404.02882), which LASP+ replaces: rank after rank, each waits for its left one.

    Only to be measured beside it: no gradients, no balanced cut.
    """
    rank, (number,) = dist.get_rank(group), cut.held(dist.get_rank(group))
    before, after = (dist.get_global_rank(group, r) if 0 <= r < cut.ranks else None for r in (rank - 1, rank + 1))
    borders = torch.tensor(cut.local_borders(rank), dtype=torch.int32)
    heads, width, dtype = qkv.shape[2], qkv.shape[4], torch.promote_types(qkv.dtype, torch.float32)
    states = torch.zeros(len(borders) - 1, heads, width, width, dtype=dtype, device=qkv.device)
    if cut.head(number) is not None:
        dist.recv(states[0], before, group)
    out, final = silu_lightning_attention(qkv, rates, state=states, cu_seqlens=borders, return_state=True)
    if cut.tail(number) is not None:
        dist.send(final[-1].contiguous(), after, group)
    return out


class _Places(NamedTuple):
    """What of a row's cut concerns one rank: the same for all layers."""

    borders: list[int]  # of its pieces
    heads: Parts  # of each of its segments, what a state enters
    tails: Parts  # and what leaves one
    count: int  # of all segments, which are gathered rank by rank
    into: "_Reach"  # to each of this rank's segments from all, in that order
    out_of: "_Reach"  # from its segments to all

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def of(cut: Cut, rank: int, device: torch.device) -> "_Places":
        held = cut.held(rank)
        heads, tails = (
            Parts.of([_range(None if part is None else cut.place(rank, part)) for part in map(find, held)], device)
            for find in (cut.head, cut.tail)
        )
        order = [n for r in range(cut.ranks) for n in cut.held(r)]
        distances = cut.distances(later=range(len(cut.segments)))  # [S, S]: to row, from column
        reaches = (_Reach.of(x[:, order], device) for x in (distances[held], distances[:, held].T))
        return _Places(cut.local_borders(rank), heads, tails, len(order), *reaches)


def _range(place: slice | None) -> tuple[int, int]:
    return (0, 0) if place is None else (place.start, place.stop)


class _Reach(NamedTuple):
    """Which states count how much: for m of a rank's segments and S of all, on the device."""

    ages: Tensor  # [m, S, 1] fp32: minus the tokens between
    counts: Tensor  # [m, S, 1] fp32: 1 if there is a sample that reaches over them, else 0

    @staticmethod
    def of(distances: Tensor, device: torch.device) -> "_Reach":
        """Of distances [m, S], -1 where nothing counts. Nobody waits for the device: the next launches follow."""
        both = (-distances.clamp(min=0)).float(), (distances >= 0).float()
        return _Reach(*(x[..., None].to(device, non_blocking=True) for x in both))

    def weights(self, rates: Tensor) -> Tensor:
        """[m, S, H]: exp(-s distance)."""
        return torch.exp(rates * self.ages) * self.counts


class _Crossing:
    """States [m, H, K, V] fp32 of a rank's segments under way: one all-gather, and the fold of what belongs here.

    Once forward and once backward, with gradients.
    """

    def __init__(self, places: _Places, rates: Tensor, group: dist.ProcessGroup):
        self.rates, self.heads, self.tails = rates, places.heads, places.tails
        self._places, self._group = places, group

    def attend(self, active: Tensor) -> tuple[Tensor, Context | None, tuple[Tensor, ...]]:
        """Of a rank's tokens among themselves, `parts.forward_pass`."""
        if len(active):
            return forward_pass(active, self.rates, self._places.borders)
        return active[:, :, 2].clone(), None, ()

    def attend_backward(
        self, d_out: Tensor, active: Tensor, context: Context | None, kept: tuple[Tensor, ...]
    ) -> Tensor:
        """Its `parts.backward_pass`."""
        return backward_pass(d_out, active, context, kept) if len(active) else active.clone()

    def start(self, states: Tensor) -> None:
        """Launch the gathering of what this rank gives."""
        self._mine = states  # alive as long as it travels
        self._all = states.new_empty(self._places.count, *states.shape[1:])
        self._work = ALL_GATHER(self._all, states, self._group, async_op=True)

    def entering(self) -> Tensor:
        """What enters each of this rank's segments."""
        return self._fold(self._places.into)

    def leaving(self) -> Tensor:
        """Of gradients of what enters: those of this rank's own states."""
        return self._fold(self._places.out_of)

    def _fold(self, reach: _Reach) -> Tensor:
        """Of what was gathered, each by its weight: [m, H, K, V]."""
        weights = reach.weights(self.rates).to(self._all.dtype)
        self._work.wait()
        # Autocast would take the states, which are in fp32 on purpose, down to bf16.
        with torch.autocast(self._all.device.type, enabled=False):
            folded = torch.einsum("msh,shkv->mhkv", weights, self._all)
        del self._work, self._all, self._mine
        return folded


class _LaspAttention(torch.autograd.Function):
    """What is computed between `start` and `entering` or `leaving` is computed while the states travel."""

    @staticmethod
    def forward(ctx, qkv: Tensor, crossing: _Crossing):
        active = F.silu(qkv[0])
        q, k, v = active.unbind(2)
        crossing.start(sum_states(k, v, crossing.rates, crossing.tails))
        out, ctx.inside, kept = crossing.attend(active)
        entering = crossing.entering()
        add_reads(out, q, entering, crossing.rates, crossing.heads)
        ctx.crossing = crossing
        ctx.save_for_backward(qkv, entering, *kept)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        (qkv, entering, *kept), crossing, d_out = ctx.saved_tensors, ctx.crossing, d_out[0]
        active, rates = F.silu(qkv[0]), crossing.rates
        q, k, v = active.unbind(2)
        crossing.start(sum_states(q, d_out, rates, crossing.heads, reverse=True))
        d_active = crossing.attend_backward(d_out, active, ctx.inside, kept)
        d_q, d_k, d_v = d_active.unbind(2)
        add_reads(d_q, d_out, entering.mT, rates, crossing.heads)
        d_states = crossing.leaving()
        add_reads(d_k, v, d_states.mT, rates, crossing.tails, reverse=True)
        add_reads(d_v, k, d_states, rates, crossing.tails, reverse=True)
        return torch.ops.aten.silu_backward(d_active, qkv[0])[None], None
