"""What crosses from one part of a sample to the next: the state that a part leaves, and what an entering one adds.

For n tokens of keys b and values c, or queries a, with the decay rate s of a head:

    sum_state    S = sum_t w_t b_t c_t^T          w_t = exp(-s (n - 1 - t))
    add_read     out_t += w_t a_t^T S             w_t = exp(-s (t + 1))

Each is the gradient of the other with the weights the other way round, which `reverse` takes.
"""

import torch
from torch import Tensor

from fulmen.ops import gpu


def sum_state(b: Tensor, c: Tensor, rates: Tensor, *, reverse: bool = False) -> Tensor:
    """The state [H, K, V] fp32 (fp64 of fp64) of b [n, H, K], c [n, H, V] of one dtype, n >= 1; rates [H]."""
    if _kernels_take(b, c):
        from fulmen.ops.lightning.triton import triton_sum_state

        return triton_sum_state(b, c, rates, reverse=reverse)
    decayed = (b * _weights(len(b), rates, later=reverse)).to(b.dtype)
    wide = torch.promote_types(b.dtype, torch.float32)
    return torch.bmm(decayed.permute(1, 2, 0).to(wide), c.transpose(0, 1).to(wide))


def add_read(out: Tensor, a: Tensor, state: Tensor, rates: Tensor, *, reverse: bool = False) -> None:
    """Add to `out` [n, H, V], in place, what queries a [n, H, K] of its dtype read of a state [H, K, V]."""
    if _kernels_take(a, out):
        from fulmen.ops.lightning.triton import triton_add_read

        return triton_add_read(out, a, state, rates, reverse=reverse)
    read = torch.bmm(a.transpose(0, 1), state.to(a.dtype)).transpose(0, 1)
    out += (read * _weights(len(a), rates, later=not reverse)).to(out.dtype)


def _kernels_take(key: Tensor, value: Tensor) -> bool:
    if not (gpu.HAS_TRITON and gpu.serves(key)):
        return False
    from fulmen.ops.lightning.triton import why_not

    return why_not(key[None], value[None]) is None


def _weights(count: int, rates: Tensor, *, later: bool) -> Tensor:
    """[n, H, 1]: exp(-s (t + 1)) if `later`, else exp(-s (n - 1 - t))."""
    ages = torch.arange(count, device=rates.device)
    ages = ages + 1 if later else ages.flip(0)
    return torch.exp(-ages[:, None] * rates)[..., None]
