"""PyTorch's kernels that give a block's logarithms of sums too, and take merged ones backward (see `blocks`).

On Hopper cuDNN's is twice as fast, but it is planned anew for every pair of lengths, which takes the host tens of
milliseconds and some megabytes (docs/log.md, 2026-11-28), and no plan is ever dropped. So large blocks are cut: what is
round goes to cuDNN, with lengths that come again, and the rest, less than an eighth of each length, to
FlashAttention-2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

LEADING_BITS, SHORTEST, STEP = 4, 1024, 4096
"""Lengths given to cuDNN have at least SHORTEST tokens and at most LEADING_BITS significant bits, so that there are
eight to each power of two; long ones are multiples of STEP."""

WORTH_CUTTING = 2**28
"""Scores of all heads from which a block is cut."""


class Kernel(NamedTuple):
    """forward(q, k, v, causal) gives outputs [T, H, D] and logarithms [T, H] fp32, backward(d_out, q, k, v, merged
    outputs, merged logarithms, causal) gradients of q, k and v."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Piece(NamedTuple):
    """Some queries of a block over some of its keys, those up to its own place if `causal`."""

    queries: slice
    keys: slice
    causal: bool


def cut_block(q: Tensor, k: Tensor, *, causal: bool) -> list[Piece]:
    """The pieces of q [T, H, D] over keys k [S, H_kv, D], T == S if `causal`; one where nothing is gained."""
    queries, keys = _round(len(q)), _round(len(k))
    if not (queries and keys and len(q) * len(k) * q.shape[1] >= WORTH_CUTTING and _prefers_cudnn(q, k, causal)):
        return [Piece(slice(0, len(q)), slice(0, len(k)), causal)]
    upper, lower, left, right = slice(0, queries), slice(queries, len(q)), slice(0, keys), slice(keys, len(k))
    pieces = [Piece(upper, left, causal), Piece(lower, left, False), Piece(lower, right, causal)]
    pieces += [] if causal else [Piece(upper, right, False)]
    return [p for p in pieces if p.queries.start < p.queries.stop and p.keys.start < p.keys.stop]


def fused_kernel(q: Tensor, k: Tensor, *, causal: bool) -> Kernel | None:
    """The one for a piece; None if there is none."""
    if not _has_kernel(q):
        return None
    is_round = all(_round(len(x)) == len(x) for x in (q, k))
    return CUDNN if is_round and _prefers_cudnn(q, k, causal) else FLASH


def _round(length: int) -> int:
    """The largest length up to this one that cuDNN is given; 0 for none."""
    if length < SHORTEST:
        return 0
    return length - length % min(STEP, 1 << length.bit_length() - LEADING_BITS)


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _prefers_cudnn(q: Tensor, k: Tensor, causal: bool) -> bool:
    if not _has_kernel(q) or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    heads = [x.detach()[None].transpose(1, 2) for x in (q, k, k)]
    return can_use_cudnn_attention(SDPAParams(*heads, None, 0.0, causal, q.shape[1] != k.shape[1]))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, len(q), len(k), 0.0, causal, False
    )
    return out[0], lse[0].T


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    grads = torch.ops.aten._flash_attention_backward(
        *(x[None].contiguous() for x in (d_out, q, k, v, out)),
        lse.T[None].contiguous(),
        *(None, None, len(q), len(k), 0.0, causal, rng, rng),
    )
    return tuple(grad[0] for grad in grads)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x[None].transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False
    )
    return out[0].transpose(0, 1), lse.view(q.shape[1], len(q)).T


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v, out = (x[None].contiguous().transpose(1, 2) for x in (d_out, q, k, v, out))
    rng = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(d_out, q, k, v, out, lse.T[None, :, :, None].contiguous(), rng, rng),
        *(None, None, None, q.shape[2], k.shape[2], 0.0, causal),
    )
    return tuple(grad[0].transpose(0, 1) for grad in grads)


FLASH = Kernel(_flash_forward, _flash_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
