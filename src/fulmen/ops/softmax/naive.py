"""The definition of causal grouped-query attention, with the whole matrix of scores in fp32 or better."""

import torch
from torch import Tensor


def naive_softmax_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """See `fulmen.ops.softmax.softmax_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query_len, key_len, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * q.shape[3] ** -0.5
    query = torch.arange(key_len - query_len, key_len, device=q.device)[:, None]
    key = torch.arange(key_len, device=q.device)
    visible = key <= query
    if cu_seqlens is not None:
        sample = torch.searchsorted(cu_seqlens, key, right=True)
        visible = visible & (sample == sample[:, None])
    weights = scores_BHTS.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
