"""Causal grouped-query attention over `torch.nn.functional.scaled_dot_product_attention`."""

import inspect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from fulmen.ops.packing import check_borders
from fulmen.ops.softmax.short import is_short, short_samples_attention

MANY = 8192
"""Samples that are shorter on average go through a GPU in one launch."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention with scale D^-0.5 (MiniMax-01, section 2.1).

    Args:
        q: [B, T, H, D]; its T tokens are the last T of the S that the keys cover.
        k, v: [B, S, H_kv, D], S >= T, H a multiple of H_kv; query head h reads key head h // (H / H_kv).
        cu_seqlens: [N+1] int32 borders of packed samples from 0 to T; then B == 1, S == T and no token sees another
            sample's.

    Returns:
        [B, T, H, D], the dtype of q.

    Raises:
        ValueError: head counts or lengths that do not fit together.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] > k.shape[1] or (cu_seqlens is not None and q.shape[1] != k.shape[1]):
        raise ValueError(
            "queries must be the last of the keys' tokens, and with packed samples all of them, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if cu_seqlens is None:
        return _one_sequence(q, k, v)
    borders = check_borders(cu_seqlens, q.shape[0], q.shape[1])
    if is_short(q, k, v, borders):
        return short_samples_attention(q, k, v, borders)
    if _are_many(q, borders):
        return _many_samples(q[0], k[0], v[0], borders)[None]
    samples = [slice(a, b) for a, b in itertools.pairwise(borders)]
    return torch.cat([_one_sequence(q[:, s], k[:, s], v[:, s]) for s in samples], dim=1)


def _are_many(q: Tensor, borders: list[int]) -> bool:
    """Whether one launch for all samples beats one each, whose kernel is the faster one for a long sample."""
    takes = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return takes and len(borders) > 2 and q.shape[1] < (len(borders) - 1) * MANY


def _many_samples(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> Tensor:
    """q [T, H, D], k, v [T, H_kv, D] of samples laid end to end, through PyTorch's kernel for them."""
    places = torch.tensor(borders, dtype=torch.int32).to(q.device, non_blocking=True)
    longest = max(b - a for a, b in itertools.pairwise(borders))
    # Newer versions want to be told that a key head serves several query heads, older ones know no such word.
    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    more = {"enable_gqa": True} if asked and q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, places, places, longest, longest, window_size=(-1, 0), **more)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query_len, key_len = q.shape[1], k.shape[1]
    mask = None
    if 1 < query_len < key_len:
        mask = _continuing(query_len, key_len, q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = mask is None and query_len > 1
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _continuing(query_len: int, key_len: int, q: Tensor) -> Tensor:
    """The causal mask of queries that are the last of the keys' tokens."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return causal_lower_right(query_len, key_len)  # never written out
    return torch.ones(query_len, key_len, dtype=torch.bool, device=q.device).tril(key_len - query_len)
