"""LASP+: lightning attention of a row that is cut over ranks (MiniMax-01, section 4.2.2; minimax-01.md, section 8).

Each rank sums the state of what it holds from zero, all states are gathered at once, and each folds those before it
into the state that enters its own tokens. The attention inside a rank's tokens is computed while the states travel.
Backward it is the same with the gradients of the states, from the right.

What enters a segment, of a sample that began in an earlier one, is

    S_in = sum over earlier segments f of the sample of exp(-s (tokens between f and here)) M_f

with M_f the state of the sample's tokens in f, from zero; and o_t += exp(-s (t + 1)) q_t^T S_in.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.lightning import silu_lightning_attention
from fulmen.parallel.collectives import ALL_GATHER
from fulmen.parallel.cut import Cut


def lasp_attention(qkv: Tensor, rates: Tensor, cut: Cut, group: dist.ProcessGroup) -> Tensor:
    """`silu_lightning_attention` of the whole row, for this rank's tokens: [1, T_r, H, D], the dtype of qkv.

    qkv: [1, T_r, H, 3, D], projections of the tokens that this rank of `group` holds of the row `cut`. rates: [H]. All
    ranks call it at the same time, forward and backward; where no sample crosses a rank's edge nothing is sent.
    """
    rank = dist.get_rank(group)
    held = cut.held(rank)
    heads, tails = [cut.head(n) for n in held], [cut.tail(n) for n in held]
    if not cut.is_crossed:
        return _inside(qkv, rates, cut, rank)
    exchange = _Exchange(cut, rank, rates, group)
    states = [_final_state(qkv, rates, None if tail is None else cut.place(rank, tail)) for tail in tails]
    sent = _Send.apply(torch.stack(states), qkv, exchange)
    # Between the two, so that it is computed while the states travel, and backward while their gradients do.
    out = _inside(qkv, rates, cut, rank)
    entering = _Receive.apply(sent, exchange)
    out = _Attach.apply(out, entering)
    for state, head in zip(entering, heads, strict=True):
        if head is not None:
            out = _add_entering(out, qkv, rates, state, cut.place(rank, head))
    return out


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


def _inside(qkv: Tensor, rates: Tensor, cut: Cut, rank: int) -> Tensor:
    """Attention of a rank's tokens among themselves."""
    borders = cut.local_borders(rank)
    if len(borders) == 1:
        return F.silu(qkv[..., 2, :])  # no token at all
    out, _ = silu_lightning_attention(qkv, rates, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    return out


def _final_state(qkv: Tensor, rates: Tensor, tail: slice | None) -> Tensor:
    """sum_j exp(-s (n - 1 - j)) k_j v_j^T over the n tokens of a tail, [H, K, V]; zeros without one."""
    if tail is None:
        heads, width = qkv.shape[2], qkv.shape[4]
        return torch.zeros(heads, width, width, dtype=_state_dtype(qkv), device=qkv.device)
    k, v = F.silu(qkv[0, tail, :, 1:]).unbind(2)
    ages = torch.arange(len(k) - 1, -1, -1, device=k.device)
    return _SumStates.apply(k, v, _decay(rates, ages))


def _add_entering(out: Tensor, qkv: Tensor, rates: Tensor, state: Tensor, head: slice) -> Tensor:
    """`out` [1, T_r, H, D] with exp(-s (t + 1)) q_t^T S added for the tokens t of a head."""
    q = F.silu(qkv[0, head, :, 0])
    ages = torch.arange(1, len(q) + 1, device=q.device)
    added = out[:, head] + _ReadState.apply(q, state, _decay(rates, ages))
    return torch.cat([out[:, : head.start], added, out[:, head.stop :]], dim=1)


def _decay(rates: Tensor, ages: Tensor) -> Tensor:
    """exp(-s age), [n, H, 1]."""
    return torch.exp(-ages[:, None] * rates)[..., None]


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Exchange:
    """One all-gather of states [m, H, K, V] fp32 and the fold of what belongs to this rank, forward and backward."""

    def __init__(self, cut: Cut, rank: int, rates: Tensor, group: dist.ProcessGroup):
        self._group, self._order = group, [n for r in range(cut.ranks) for n in cut.held(r)]
        numbers = cut.held(rank)
        distances = cut.distances(later=range(len(cut.segments)))  # [S, S]: to row, from column
        self._into = self._weights(distances[numbers], rates)
        self._out_of = self._weights(distances[:, numbers].T, rates)

    def start(self, mine: Tensor) -> None:
        """Launch the gathering of what this rank gives, [m, H, K, V]."""
        self._mine = mine.contiguous()  # alive as long as it travels
        self._all = mine.new_empty(len(self._order), *mine.shape[1:])
        self._work = ALL_GATHER(self._all, self._mine, self._group, async_op=True)

    def entering(self) -> Tensor:
        """What enters each of this rank's segments, [m, H, K, V]."""
        return self._fold(self._into)

    def leaving(self) -> Tensor:
        """Of gradients of what enters: those of this rank's own states, [m, H, K, V]."""
        return self._fold(self._out_of)

    def _weights(self, distances: Tensor, rates: Tensor) -> Tensor:
        """exp(-s distance), zero where there is none: [m, S, H], the segments in the order of the gathered ones."""
        distances = distances[:, self._order].to(rates.device)[..., None]
        return torch.exp(-rates * distances.clamp(min=0)) * (distances >= 0)

    def _fold(self, weights: Tensor) -> Tensor:
        self._work.wait()
        folded = torch.einsum("msh,shkv->mhkv", weights.to(self._all.dtype), self._all)
        del self._work, self._all, self._mine
        return folded


class _Send(torch.autograd.Function):
    """Launches the exchange. `anchor` lets every rank take part in the backward pass, whether it has states or not."""

    @staticmethod
    def forward(ctx, states: Tensor, anchor: Tensor, exchange: _Exchange):
        ctx.exchange = exchange
        exchange.start(states)
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sent: Tensor):
        return ctx.exchange.leaving(), None, None


class _Receive(torch.autograd.Function):
    """Waits for the exchange; backward, launches that of the gradients."""

    @staticmethod
    def forward(ctx, sent: Tensor, exchange: _Exchange):
        ctx.exchange = exchange
        return exchange.entering()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_entering: Tensor):
        ctx.exchange.start(d_entering)
        return d_entering, None  # what `_Send` gets it does not read: it waits for the exchange


class _Attach(torch.autograd.Function):
    """x, made to depend on what it may have no use for, so that the backward pass comes by there on every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor):
        ctx.shape, ctx.dtype = other.shape, other.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x: Tensor):
        return d_x, d_x.new_zeros(ctx.shape, dtype=ctx.dtype)


class _SumStates(torch.autograd.Function):
    """sum_n decay_n k_n v_n^T in fp32 of k [n, H, K], v [n, H, V], decay [n, H, 1]: [H, K, V]."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, decay: Tensor):
        decayed = (k * decay).to(k.dtype)
        ctx.save_for_backward(decayed, v, decay)
        return _outer(decayed, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state: Tensor):
        decayed, v, decay = ctx.saved_tensors
        d_state = d_state.to(v.dtype)
        return (_read(v, d_state.mT) * decay).to(v.dtype), _read(decayed, d_state), None


class _ReadState(torch.autograd.Function):
    """decay_n q_n^T S of q [n, H, K], S [H, K, V] fp32: [n, H, V], the dtype of q."""

    @staticmethod
    def forward(ctx, q: Tensor, state: Tensor, decay: Tensor):
        decayed = (q * decay).to(q.dtype)
        ctx.save_for_backward(decayed, state, decay)
        return _read(decayed, state.to(q.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        decayed, state, decay = ctx.saved_tensors
        d_q = (_read(d_out, state.to(d_out.dtype).mT) * decay).to(d_out.dtype)
        return d_q, _outer(decayed, d_out).to(state.dtype), None


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_n b_n^T: [n, H, K], [n, H, V] to [H, K, V] fp32; a GPU's narrow products are not rounded on the way."""
    a, b = a.permute(1, 2, 0), b.transpose(0, 1)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.to(_state_dtype(a)), b.to(_state_dtype(b)))


def _read(a: Tensor, state: Tensor) -> Tensor:
    """a_n^T S: [n, H, K], [H, K, V] to [n, H, V]."""
    return torch.bmm(a.transpose(0, 1), state).transpose(0, 1)
