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
from fulmen.ops.lightning.parts import add_read, backward_pass, forward_pass, sum_state
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
    heads, width = qkv.shape[2], qkv.shape[4]
    states = torch.zeros(len(borders) - 1, heads, width, width, dtype=_state_dtype(qkv), device=qkv.device)
    if cut.head(number) is not None:
        dist.recv(states[0], before, group)
    out, final = silu_lightning_attention(qkv, rates, state=states, cu_seqlens=borders, return_state=True)
    if cut.tail(number) is not None:
        dist.send(final[-1].contiguous(), after, group)
    return out


class _Places(NamedTuple):
    """What of a row's cut concerns one rank: the same for all layers."""

    count: int  # of its segments
    borders: list[int]  # of its pieces
    heads: list[tuple[int, slice]]  # parts that a state enters: which of its segments, where among its tokens
    tails: list[tuple[int, slice]]  # parts that leave one
    order: list[int]  # segments as they are gathered
    into: Tensor  # [m, S] distances to its segments from all, in that order, on the device; -1: none
    out_of: Tensor  # [m, S] from its segments to all

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def of(cut: Cut, rank: int, device: torch.device) -> "_Places":
        held = cut.held(rank)
        heads, tails = (
            [(i, cut.place(rank, part)) for i, part in enumerate(map(find, held)) if part is not None]
            for find in (cut.head, cut.tail)
        )
        order = [n for r in range(cut.ranks) for n in cut.held(r)]
        distances = cut.distances(later=range(len(cut.segments)))  # [S, S]: to row, from column
        # Nobody waits for the device here, and so the next launches are ready when it is.
        into, out_of = (x[:, order].to(device, non_blocking=True) for x in (distances[held], distances[:, held].T))
        return _Places(len(held), cut.local_borders(rank), heads, tails, order, into, out_of)


class _Crossing:
    """States [m, H, K, V] fp32 of a rank's segments under way: one all-gather, and the fold of what belongs here.

    Once forward and once backward, with gradients.
    """

    def __init__(self, places: _Places, rates: Tensor, group: dist.ProcessGroup):
        self.rates, self.heads, self.tails = rates, places.heads, places.tails
        self._places, self._group = places, group

    def new_states(self, qkv: Tensor) -> Tensor:
        """Zeros, for this rank's segments."""
        heads, width = qkv.shape[2], qkv.shape[4]
        return torch.zeros(self._places.count, heads, width, width, dtype=_state_dtype(qkv), device=qkv.device)

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
        self._all = states.new_empty(len(self._places.order), *states.shape[1:])
        self._work = ALL_GATHER(self._all, states, self._group, async_op=True)

    def entering(self) -> Tensor:
        """What enters each of this rank's segments."""
        return self._fold(self._places.into)

    def leaving(self) -> Tensor:
        """Of gradients of what enters: those of this rank's own states."""
        return self._fold(self._places.out_of)

    def _fold(self, distances: Tensor) -> Tensor:
        """Of what was gathered, each times exp(-s distance): [m, H, K, V]."""
        distances = distances[..., None]
        weights = torch.exp(-self.rates * distances.clamp(min=0)) * (distances >= 0)
        self._work.wait()
        # Autocast would take the states, which are in fp32 on purpose, down to bf16.
        with torch.autocast(self._all.device.type, enabled=False):
            folded = torch.einsum("msh,shkv->mhkv", weights.to(self._all.dtype), self._all)
        del self._work, self._all, self._mine
        return folded


class _LaspAttention(torch.autograd.Function):
    """What is computed between `start` and `entering` or `leaving` is computed while the states travel."""

    @staticmethod
    def forward(ctx, qkv: Tensor, crossing: _Crossing):
        active, states = F.silu(qkv[0]), crossing.new_states(qkv)
        for i, place in crossing.tails:
            states[i] = sum_state(*active[place, :, 1:].unbind(2), crossing.rates)
        crossing.start(states)
        out, ctx.inside, kept = crossing.attend(active)
        entering = crossing.entering()
        for i, place in crossing.heads:
            add_read(out[place], active[place, :, 0], entering[i], crossing.rates)
        ctx.crossing = crossing
        ctx.save_for_backward(qkv, entering, *kept)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        (qkv, entering, *kept), crossing, d_out = ctx.saved_tensors, ctx.crossing, d_out[0]
        active, d_entering = F.silu(qkv[0]), crossing.new_states(qkv)
        for i, place in crossing.heads:
            d_entering[i] = sum_state(active[place, :, 0], d_out[place], crossing.rates, reverse=True)
        crossing.start(d_entering)
        d_active = crossing.attend_backward(d_out, active, ctx.inside, kept)
        for i, place in crossing.heads:
            add_read(d_active[place, :, 0], d_out[place], entering[i].mT, crossing.rates)
        d_states = crossing.leaving()
        for i, place in crossing.tails:
            _, k, v = active[place].unbind(2)
            _, d_k, d_v = d_active[place].unbind(2)
            add_read(d_k, v, d_states[i].mT, crossing.rates, reverse=True)
            add_read(d_v, k, d_states[i], crossing.rates, reverse=True)
        return torch.ops.aten.silu_backward(d_active, qkv[0])[None], None


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
