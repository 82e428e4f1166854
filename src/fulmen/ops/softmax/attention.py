"""Causal grouped-query attention over `torch.nn.functional.scaled_dot_product_attention`."""

import inspect
import itertools
from typing import NamedTuple

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
    if can_pack(q) and len(borders) > 2 and q.shape[1] < (len(borders) - 1) * MANY:
        places = torch.tensor(borders, dtype=torch.int32).to(q.device, non_blocking=True)
        longest = max(b - a for a, b in itertools.pairwise(borders))
        return packed_attention(q[0], k[0], v[0], Packing(places, longest), Packing(places, longest))[None]
    samples = [slice(a, b) for a, b in itertools.pairwise(borders)]
    return torch.cat([_one_sequence(q[:, s], k[:, s], v[:, s]) for s in samples], dim=1)


class Packing(NamedTuple):
    """Samples laid end to end."""

    borders: Tensor  # [N+1] int32, on the samples' device
    longest: int  # tokens


def can_pack(q: Tensor) -> bool:
    """Whether `packed_attention` takes such tensors."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def packed_attention(q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing) -> Tensor:
    """q [T, H, D], k, v [S, H_kv, D]: PyTorch's one launch for all samples; a sample's queries are its last tokens.

    One each may be faster for a long sample, but only where its length comes again: kernels are chosen by length.
    """
    # Newer versions want to be told that a key head serves several query heads, older ones know no such word.
    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    more = {"enable_gqa": True} if asked and q.shape[1] != k.shape[1] else {}
    places, longest = zip(queries, keys, strict=True)
    return varlen_attn(q, k, v, *places, *longest, window_size=(-1, 0), **more)


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
