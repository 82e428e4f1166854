"""Attention to one block of keys at a time: what several blocks give is merged by their logarithms of sums.

    o = sum_b exp(l_b - l) o_b        l = log sum_b exp(l_b)        (online softmax)

A block's gradients need nothing of the other blocks but the merged l and what `row_dots` gives.
Letters: T queries, S keys of the block, H heads, H_kv key heads, D their width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.softmax.fused import cut_block, fused_kernel

SCORES = 2**24
"""Scores that exist at a time where the block's attention is plain products."""


class Attended(NamedTuple):
    """What queries have seen so far."""

    out: Tensor  # [T, H, D] fp32
    lse: Tensor  # [T, H] fp32, the logarithm of the sum of exp(scores)


def attend_block(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attended:
    """q [T, H, D] over k, v [S, H_kv, D], all of them or, if `causal` (T == S), those up to its own place."""
    rows: dict[int, Attended] = {}
    for queries, keys, on_diagonal in cut_block(q, k, causal=causal):
        part = _attend(q[queries], k[keys], v[keys], on_diagonal)
        rows[queries.start] = merge(rows.get(queries.start), part)
    if len(rows) == 1:
        return rows[0]
    return Attended(*(torch.cat(parts) for parts in zip(*rows.values(), strict=True)))


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Attended:
    if kernel := fused_kernel(q, k, causal=causal):
        out, lse = kernel.forward(q, k, v, causal)
        return Attended(out.float(), lse)
    outs, lses = [], []
    for rows in _chunks(len(q), q.shape[1] * len(k)):
        scores = _scores(q[rows], k, rows.start if causal else None)
        lse = scores.logsumexp(-1)
        outs.append(_mix((scores - lse[..., None]).exp_(), v))
        lses.append(lse.flatten(0, 1).T)
    return Attended(torch.cat(outs), torch.cat(lses))


def merge(one: Attended | None, other: Attended) -> Attended:
    """Of two blocks, in any order."""
    if one is None:
        return other
    lse = torch.logaddexp(one.lse, other.lse)
    parts = ((part.lse - lse).exp()[..., None] * part.out for part in (one, other))
    return Attended(sum(parts), lse)


def row_dots(out: Tensor, d_out: Tensor) -> Tensor:
    """[T, H] fp32: of each query's merged output with its gradient."""
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.to(wide) * d_out.to(wide)).sum(-1)


def attend_block_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Attended, dots: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 gradients of q, k and v by this block's part in the merged outputs; dots: from `row_dots`."""
    pieces = cut_block(q, k, causal=causal)
    if len(pieces) == 1:
        return _attend_backward(d_out, q, k, v, merged, dots, causal)
    sums = [torch.zeros_like(x, dtype=merged.out.dtype) for x in (q, k, v)]
    for rows, keys, on_diagonal in pieces:
        seen = Attended(merged.out[rows], merged.lse[rows])
        grads = _attend_backward(d_out[rows], q[rows], k[keys], v[keys], seen, dots[rows], on_diagonal)
        for total, place, grad in zip(sums, (rows, keys, keys), grads, strict=True):
            total[place] += grad
    return tuple(sums)


def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Attended, dots: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel := fused_kernel(q, k, causal=causal):
        rounded = d_out.to(q.dtype), q, k, v, merged.out.to(q.dtype)
        return tuple(grad.float() for grad in kernel.backward(*rounded, merged.lse, causal))
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=merged.out.dtype) for x in (q, k, v))
    scale = q.shape[2] ** -0.5
    for rows in _chunks(len(q), q.shape[1] * len(k)):
        lse, dot = (_by_key_head(x[rows, :, None], k.shape[1]) for x in (merged.lse, dots))
        probs = (_scores(q[rows], k, rows.start if causal else None) - lse).exp_()
        grad = _by_key_head(d_out[rows].to(probs.dtype), k.shape[1])
        d_scores = (torch.einsum("hgtd,shd->hgts", grad, v.to(probs.dtype)) - dot) * probs * scale
        d_q[rows] = _by_token(torch.einsum("hgts,shd->hgtd", d_scores, k.to(probs.dtype)))
        d_k += torch.einsum("hgts,hgtd->shd", d_scores, _by_key_head(q[rows].to(probs.dtype), k.shape[1]))
        d_v += torch.einsum("hgts,hgtd->shd", probs, grad)
    return d_q, d_k, d_v


def _chunks(queries: int, scores_each: int) -> list[slice]:
    step = max(1, SCORES // max(1, scores_each))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _scores(q: Tensor, k: Tensor, first: int | None) -> Tensor:
    """[H_kv, H / H_kv, T, S] fp32, scaled; of queries from place `first` on each sees the keys up to its own place."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("hgtd,shd->hgts", _by_key_head(q.to(dtype), k.shape[1]), k.to(dtype)).mul_(q.shape[2] ** -0.5)
    if first is not None:
        visible = torch.arange(len(k), device=q.device) <= torch.arange(first, first + len(q), device=q.device)[:, None]
        scores.masked_fill_(~visible, float("-inf"))
    return scores


def _mix(probs: Tensor, v: Tensor) -> Tensor:
    return _by_token(torch.einsum("hgts,shd->hgtd", probs, v.to(probs.dtype)))


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[T, H, D] to [H_kv, H / H_kv, T, D]."""
    return x.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """The inverse."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
