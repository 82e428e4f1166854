"""PyTorch's kernels that give a block's logarithms of sums too, and take merged ones backward (see `blocks`)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

WORTH_PLANNING = 2**32
"""Scores of all heads from which cuDNN's kernel is taken: the faster one on Hopper, but planned anew for every pair of
lengths, which takes the host tens of milliseconds, once for all layers."""


class Kernel(NamedTuple):
    """forward(q, k, v, causal) gives outputs [T, H, D] and logarithms [T, H] fp32, backward(d_out, q, k, v, merged
    outputs, merged logarithms, causal) gradients of q, k and v."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_kernel(q: Tensor, k: Tensor, *, causal: bool) -> Kernel | None:
    """The one for q [T, H, D] and keys k [S, H_kv, D]; None if there is none."""
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256):
        return None
    if len(q) * len(k) * q.shape[1] >= WORTH_PLANNING:
        heads = [x.detach()[None].transpose(1, 2) for x in (q, k, k)]
        if can_use_cudnn_attention(SDPAParams(*heads, None, 0.0, causal, q.shape[1] != k.shape[1])):
            return CUDNN
    return FLASH


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
