"""The definition of lightning attention: the recurrence, one token after the other.

Slow for long inputs and what every faster form is compared with; for a single token it is also the fastest.
"""

import itertools

import torch
from torch import Tensor


def naive_lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [B or N, H, K, V]; see `fulmen.ops.lightning.lightning_attention`."""
    if cu_seqlens is None:
        return _recurrence(q, k, v, rates, state)
    outs, finals = [], []
    borders = cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(borders)):
        initial = None if state is None else state[n : n + 1]
        out, final = _recurrence(q[:, start:end], k[:, start:end], v[:, start:end], rates, initial)
        outs.append(out)
        finals.append(final)
    return torch.cat(outs, dim=1), torch.cat(finals)


def _recurrence(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    decay_H11 = torch.exp(-rates.to(dtype))[:, None, None]
    outs = []
    for t in range(q.shape[1]):
        update_BHKV = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = update_BHKV if state is None else torch.addcmul(update_BHKV, state, decay_H11)
        outs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    return torch.stack(outs, dim=1).to(out_dtype), state
