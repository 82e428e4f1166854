"""Lightning attention in parts: for whoever puts something between them, as those do who hold one part of a sample.

`forward_pass` and `backward_pass` are the two halves of the attention; and of what crosses from one part of a sample to
the next, `sum_states` are the states that parts leave and `add_reads` what entering ones add. For n tokens of keys b
and values c, or queries a, with the decay rate s of a head:

    sum_states    S = sum_t w_t b_t c_t^T          w_t = exp(-s (n - 1 - t))
    add_reads     out_t += w_t a_t^T S             w_t = exp(-s (t + 1))

Each is the gradient of the other with the weights the other way round, which `reverse` takes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops import gpu
from fulmen.ops.lightning import chunked
from fulmen.ops.lightning.context import Context

FARTHEST = 104.0
"""Times 1 / s tokens away nothing counts: exp(-104) is zero in fp32. A GPU's kernels pass over such tokens."""

SHARE, SHARES = 4096, 16
"""Tokens that a program of a GPU sums at least, and into how many sums at most: they are added up at the end."""


def forward_pass(qkv: Tensor, rates: Tensor, borders: Sequence[int]) -> tuple[Tensor, Context, tuple[Tensor, ...]]:
    """Outputs [n, H, D] of q, k, v = qkv [n, H, 3, D], and what `backward_pass` asks for: a context, and tensors.

    borders: of the samples that the tokens are, from 0 strictly up to n; each begins with a state of zero.
    """
    return _backend(qkv).forward_pass(qkv, rates, borders)


def backward_pass(d_out: Tensor, qkv: Tensor, context: Context, kept: tuple[Tensor, ...]) -> Tensor:
    """Gradients of qkv, in a tensor of its shape that may be changed."""
    return _backend(qkv).backward_pass(d_out, qkv, context, kept)


class Parts(NamedTuple):
    """Stretches of tokens that are computed together: m of [begin, end), (0, 0) for none."""

    ranges: tuple[tuple[int, int], ...]
    table: Tensor  # the same, [m, 2] int32 on the device

    @staticmethod
    def of(ranges: Sequence[tuple[int, int]], device: torch.device) -> "Parts":
        """Nobody waits for the device."""
        return Parts(tuple(ranges), torch.tensor(ranges, dtype=torch.int32).to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(end - begin for begin, end in self.ranges)


def sum_states(b: Tensor, c: Tensor, rates: Tensor, parts: Parts, *, reverse: bool = False) -> Tensor:
    """States [m, H, K, V] fp32 (fp64 of fp64) of parts of b [n, H, K], c [n, H, V] of one dtype; zero of none.

    rates: [H].
    """
    if _kernels_take(b, c):
        from fulmen.ops.lightning.crossing import triton_sum_states

        return triton_sum_states(b, c, rates, parts, reverse=reverse)
    wide = torch.promote_types(b.dtype, torch.float32)
    states = b.new_zeros(len(parts.ranges), *b.shape[1:], c.shape[2], dtype=wide)
    with torch.autocast(b.device.type, enabled=False):
        for state, (begin, end) in zip(states, parts.ranges, strict=True):
            decayed = (b[begin:end] * _weights(end - begin, rates, later=reverse)).to(b.dtype)
            state.copy_(torch.bmm(decayed.permute(1, 2, 0).to(wide), c[begin:end].transpose(0, 1).to(wide)))
    return states


def add_reads(out: Tensor, a: Tensor, states: Tensor, rates: Tensor, parts: Parts, *, reverse: bool = False) -> None:
    """Add to `out` [n, H, V], in place, what queries a [n, H, K] of its dtype read of their part's state [H, K, V]."""
    if _kernels_take(a, out):
        from fulmen.ops.lightning.crossing import triton_add_reads

        return triton_add_reads(out, a, states, rates, parts, reverse=reverse)
    with torch.autocast(a.device.type, enabled=False):
        for state, (begin, end) in zip(states, parts.ranges, strict=True):
            read = torch.bmm(a[begin:end].transpose(0, 1), state.to(a.dtype)).transpose(0, 1)
            out[begin:end] += (read * _weights(end - begin, rates, later=not reverse)).to(out.dtype)


def _kernels_take(key: Tensor, value: Tensor) -> bool:
    if not (gpu.HAS_TRITON and gpu.serves(key)):
        return False
    from fulmen.ops.lightning.triton import why_not

    return why_not(key[None], value[None]) is None


def _backend(qkv: Tensor):
    if not _kernels_take(qkv[:, :, 0], qkv[:, :, 2]):
        return chunked
    from fulmen.ops.lightning import triton

    return triton


def _weights(count: int, rates: Tensor, *, later: bool) -> Tensor:
    """[n, H, 1]: exp(-s (t + 1)) if `later`, else exp(-s (n - 1 - t))."""
    ages = torch.arange(count, device=rates.device)
    ages = ages + 1 if later else ages.flip(0)
    return torch.exp(-ages[:, None] * rates)[..., None]
