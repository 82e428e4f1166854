"""RMSNorm over the last dim, with an optional sigmoid gate, in one pass each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.gpu import apply

PARTS = 512
"""Programs of the backward pass, each with its own sum of the weight's gradient: the order of the sum is fixed."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """See `fulmen.ops.norm.rms_norm`; x and gate [..., D], weight [D]."""
    return apply(_RMSNorm, x, weight, eps, gate)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [R, D], every row contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(size: int) -> int:
    return min(16, max(1, size // 512))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None):
        ctx.shape = x.shape
        x, weight, gate = _rows(x), weight.contiguous(), None if gate is None else _rows(gate)
        rows, size = x.shape
        y, inverse = x.new_empty(rows, size), x.new_empty(rows, dtype=torch.float32)
        width = triton.next_power_of_2(size)
        strides = (x.stride(0), 0 if gate is None else gate.stride(0))
        _rms_norm_kernel[(rows,)](
            x,
            gate,
            weight,
            y,
            inverse,
            *strides,
            size,
            eps,
            GATED=gate is not None,
            WIDTH=width,
            num_warps=_warps(width),
        )
        ctx.save_for_backward(x, weight, inverse, gate)
        return y.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, weight, inverse, gate = ctx.saved_tensors
        (rows, size), d_y = x.shape, _rows(d_y)
        d_x, d_gate = x.new_empty(rows, size), None if gate is None else gate.new_empty(rows, size)
        parts, width = min(PARTS, rows), triton.next_power_of_2(size)
        d_weight = torch.empty(parts, size, dtype=torch.float32, device=x.device)
        strides = (x.stride(0), 0 if gate is None else gate.stride(0), d_y.stride(0))
        _rms_norm_backward_kernel[(parts,)](
            x, gate, weight, inverse, d_y, d_x, d_gate, d_weight, *strides, rows, size,
            GATED=gate is not None, WIDTH=width, num_warps=_warps(width),
        )  # fmt: skip
        d_gate = None if gate is None else d_gate.view(ctx.shape)
        return d_x.view(ctx.shape), d_weight.sum(dim=0).to(weight.dtype), None, d_gate


@triton.jit
def _rms_norm_kernel(
    p_x, p_gate, p_weight, p_y, p_inverse, x_row, gate_row, size, eps, GATED: tl.constexpr, WIDTH: tl.constexpr
):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    ok = i < size
    x = tl.load(p_x + row * x_row + i, mask=ok, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / size + eps)
    y = x * inverse * tl.load(p_weight + i, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.sigmoid(tl.load(p_gate + row * gate_row + i, mask=ok, other=0.0).to(tl.float32))
    tl.store(p_y + row * size + i, y.to(p_y.dtype.element_ty), mask=ok)
    tl.store(p_inverse + row, inverse)


@triton.jit
def _rms_norm_backward_kernel(
    p_x, p_gate, p_weight, p_inverse, p_d_y, p_d_x, p_d_gate, p_d_weight, x_row, gate_row, d_y_row, rows, size,
    GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_x = (w dy - normed * mean(w dy . normed)) / rms, row after row with the weight's gradient in registers."""
    part, i = tl.program_id(0), tl.arange(0, WIDTH)
    ok = i < size
    weight = tl.load(p_weight + i, mask=ok, other=0.0).to(tl.float32)
    d_weight = tl.zeros((WIDTH,), dtype=tl.float32)
    for number in range(part, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        inverse = tl.load(p_inverse + row)
        normed = tl.load(p_x + row * x_row + i, mask=ok, other=0.0).to(tl.float32) * inverse
        d_y = tl.load(p_d_y + row * d_y_row + i, mask=ok, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.sigmoid(tl.load(p_gate + row * gate_row + i, mask=ok, other=0.0).to(tl.float32))
            d_gate = d_y * normed * weight * gate * (1 - gate)
            tl.store(p_d_gate + row * size + i, d_gate.to(p_d_gate.dtype.element_ty), mask=ok)
            d_y *= gate
        d_weight += d_y * normed
        d_y *= weight
        d_x = (d_y - normed * (tl.sum(d_y * normed) / size)) * inverse
        tl.store(p_d_x + row * size + i, d_x.to(p_d_x.dtype.element_ty), mask=ok)
    tl.store(p_d_weight + part * size + i, d_weight, mask=ok)
