"""Training with short packed samples on a CPU: scores as matrix products, with C kernels between them.

PyTorch's kernel for CPUs takes three times as long there, most of it in the backward pass. Keeps the probabilities.
"""

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.cpu import training

MOST_PROBABILITIES = 2**22
"""Of one sample, heads * tokens^2: beyond that the memory is better spent otherwise."""


def is_short(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> bool:
    """Whether this form is for these packed samples: gradients are wanted, the CPU computes, every sample is short."""
    longest = max(end - start for start, end in itertools.pairwise(borders))
    if not (
        torch.is_grad_enabled() and q.dtype == k.dtype == v.dtype and q.shape[2] * longest**2 <= MOST_PROBABILITIES
    ):
        return False
    return training.supports(q, k, v)


def short_samples_attention(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> Tensor:
    """`fulmen.ops.softmax.softmax_attention` of packed samples; q [1, T, H, D], k and v [1, T, H_kv, D]."""
    with torch.autocast("cpu", enabled=False):
        return _ShortSamples.apply(q[0], k[0], v[0], borders)[None]


class _ShortSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, borders: list[int]):
        out, scale, kept = torch.empty_like(q, memory_format=torch.contiguous_format), q.shape[2] ** -0.5, []
        for start, end in itertools.pairwise(borders):
            s_q, s_k, s_v = (_by_key_head(x[start:end], k.shape[1]) for x in (q, k, v))
            probs = torch.bmm(s_q, s_k.mT)
            training.causal_softmax_(probs.view(-1, end - start, end - start), scale)
            out[start:end] = _by_token(torch.bmm(probs, s_v), q.shape[1])
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.borders = borders
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        scale = q.shape[2] ** -0.5
        d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for (start, end), probs in zip(itertools.pairwise(ctx.borders), kept, strict=True):
            s_q, s_k, s_v, s_do = (_by_key_head(x[start:end], k.shape[1]) for x in (q, k, v, d_out))
            d_scores = torch.bmm(s_do, s_v.mT)
            training.causal_softmax_backward_(d_scores, probs.view(-1, end - start, end - start), scale)
            d_q[start:end] = _by_token(torch.bmm(d_scores, s_k), q.shape[1])
            d_k[start:end] = _by_token(torch.bmm(d_scores.mT, s_q), k.shape[1])
            d_v[start:end] = _by_token(torch.bmm(probs.mT, s_do), v.shape[1])
        return d_q, d_k, d_v, None


def _by_key_head(x_THD: Tensor, key_heads: int) -> Tensor:
    """[T, H, D] to [H_kv, H / H_kv * T, D]: the query heads that share a key head stand below each other."""
    tokens, heads, width = x_THD.shape
    return x_THD.transpose(0, 1).reshape(key_heads, heads // key_heads * tokens, width)


def _by_token(x: Tensor, heads: int) -> Tensor:
    """The inverse: [H_kv, H / H_kv * T, D] to [T, H, D]."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)
