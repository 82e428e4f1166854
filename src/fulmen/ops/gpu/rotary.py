"""Rotary positions, and their gradient, which is the rotation back."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.gpu import apply


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `fulmen.ops.rotary.apply_rotary`; x [B, T, H, D], tables [B or 1, T, rotary_dim / 2] fp32."""
    return apply(_Rotary, x, cos.contiguous(), sin.contiguous())


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        return _turn(d_y, *ctx.saved_tensors, back=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, length, heads, size = x.shape
    y, half = torch.empty_like(x, memory_format=torch.contiguous_format), cos.shape[-1]
    table = cos.stride(0) if len(cos) > 1 else 0
    tile = (triton.next_power_of_2(heads), triton.next_power_of_2(size))
    _rotary_kernel[(length, batch)](
        x, cos, sin, y, *x.stride()[:3], table, length, heads, size, half, BACK=back, HEADS=tile[0], WIDTH=tile[1]
    )
    return y


@triton.jit
def _rotary_kernel(
    p_x, p_cos, p_sin, p_y, x_batch, x_token, x_head, table, length, heads, size, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All heads of a token. Dim i turns with i + half or i - half; from 2 * half on nothing turns."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    turns, first = i < 2 * half, i < half
    other = tl.where(first, i + half, tl.where(turns, i - half, i))
    angle = b * table + t * half + tl.where(first, i, i - half)
    cos = tl.load(p_cos + angle, mask=turns, other=1.0)
    sin = tl.load(p_sin + angle, mask=turns, other=0.0)
    sin = tl.where(first, -sin, sin)
    if BACK:
        sin = -sin
    ok = (h < heads) & (i < size)
    at = p_x + b * x_batch + t * x_token + h * x_head
    x = tl.load(at + i, mask=ok, other=0.0).to(tl.float32)
    partner = tl.load(at + other, mask=ok & turns, other=0.0).to(tl.float32)
    y = x * cos + partner * sin
    tl.store(p_y + ((b * length + t) * heads + h) * size + i, y.to(p_y.dtype.element_ty), mask=ok)
