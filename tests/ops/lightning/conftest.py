"""The oracle: the recurrence of section 3.3 in float64, gradients by autograd, independent of the package's code."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fulmen.ops.lightning import decay_rates


def _recurrence(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = exp(-s) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, token by token."""
    batch, _, heads, key_dim = q.shape
    decay = (-rates.double()).exp().view(1, heads, 1, 1)
    if state is None:
        state = torch.zeros(batch, heads, key_dim, v.shape[-1], dtype=torch.float64)
    outs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = decay * state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        outs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outs, dim=1), state


def _oracle(q, k, v, rates, state=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    state = None if state is None else state.double()
    if cu_seqlens is None:
        return _recurrence(q, k, v, rates, state)
    results = [
        _recurrence(q[:, a:b], k[:, a:b], v[:, a:b], rates, None if state is None else state[n : n + 1])
        for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    return torch.cat([out for out, _ in results], dim=1), torch.cat([final for _, final in results])


class Case(NamedTuple):
    """One input of lightning attention and the gradients that arrive at its outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    state: Tensor
    cu_seqlens: Tensor | None
    d_out: Tensor
    d_final: Tensor

    def results(self, function) -> dict[str, Tensor]:
        """Outputs, final states and the gradients of a loss of both, by function(q, k, v, rates, state, cu_seqlens)."""
        leaves = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v, self.state)]
        out, final = function(*leaves[:3], self.rates, leaves[3], self.cu_seqlens)
        loss = (out * self.d_out.to(out.dtype)).sum() + (final * self.d_final.to(final.dtype)).sum()
        grads = torch.autograd.grad(loss, leaves)
        names = ("out", "final", "d_q", "d_k", "d_v", "d_state")
        return dict(zip(names, (out.detach(), final.detach(), *grads), strict=True))

    def truth(self) -> dict[str, Tensor]:
        """The same by the oracle, all of it in float64."""
        doubles = {name: getattr(self, name).double() for name in ("q", "k", "v", "state", "d_out", "d_final")}
        return self._replace(**doubles).results(_oracle)


def _make_case(
    length, *, layer=0, borders=None, batch=1, heads=(0, 20, 63), key_dim=16, value_dim=24, dtype=torch.float32
) -> Case:
    """Normal inputs; `heads` are picked out of 64, so that the quickest and the slowest are among them."""
    samples = batch if borders is None else len(borders) - 1
    keys, values, states = (batch, length, len(heads), key_dim), (batch, length, len(heads), value_dim), None
    states = (samples, len(heads), key_dim, value_dim)
    q, k, v, d_out = (torch.randn(shape).to(dtype) for shape in (keys, keys, values, values))
    state, d_final = (torch.randn(states, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    return Case(q, k, v, decay_rates(64, layer, 80)[list(heads)], state, cu_seqlens, d_out, d_final)


@pytest.fixture
def oracle():
    return _oracle


@pytest.fixture
def make_case():
    return _make_case
