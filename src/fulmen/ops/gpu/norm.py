"""RMSNorm over the last dim, of a sum with a residual or not, with a sigmoid gate or not, in one pass each way."""

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
    return apply(_RMSNorm, x, None, 1.0, 1.0, weight, eps, gate)


def add_rms_norm(x: Tensor, branch: Tensor, alpha: float, beta: float, weight: Tensor, eps: float) -> Tensor:
    """See `fulmen.ops.norm.add_rms_norm`; the sum is never in memory, the backward pass adds it up again."""
    return apply(_RMSNorm, x, branch, alpha, beta, weight, eps, None)


def _rows(x: Tensor | None) -> Tensor | None:
    """[..., D] as [R, D], every row contiguous."""
    if x is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _row_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def _warps(size: int) -> int:
    return min(16, max(1, size // 512))


class _RMSNorm(torch.autograd.Function):
    """Of x, or of alpha * x + beta * branch."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor | None, alpha: float, beta: float, weight: Tensor, eps: float, gate):
        ctx.shape, ctx.sum = x.shape, (alpha, beta)
        x, branch, weight, gate = _rows(x), _rows(branch), weight.contiguous(), _rows(gate)
        rows, size = x.shape
        y, inverse = x.new_empty(rows, size), x.new_empty(rows, dtype=torch.float32)
        width = triton.next_power_of_2(size)
        _rms_norm_kernel[(rows,)](
            x, branch, gate, weight, y, inverse, *_row_strides(x, branch, gate), alpha, beta, size, eps,
            SUM=branch is not None, GATED=gate is not None, WIDTH=width, num_warps=_warps(width),
        )  # fmt: skip
        ctx.save_for_backward(x, branch, weight, inverse, gate)
        return y.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, branch, weight, inverse, gate = ctx.saved_tensors
        (rows, size), (alpha, beta), d_y = x.shape, ctx.sum, _rows(d_y)
        d_x, d_gate = x.new_empty(rows, size), None if gate is None else gate.new_empty(rows, size)
        # Where both have the weight 1 their gradients are one tensor.
        d_branch = None if branch is None else d_x if alpha == beta == 1 else branch.new_empty(rows, size)
        parts, width = min(PARTS, rows), triton.next_power_of_2(size)
        d_weight = torch.empty(parts, size, dtype=torch.float32, device=x.device)
        _rms_norm_backward_kernel[(parts,)](
            x, branch, gate, weight, inverse, d_y, d_x, d_branch, d_gate, d_weight,
            *_row_strides(x, branch, gate, d_y), alpha, beta, rows, size,
            SUM=branch is not None, GATED=gate is not None, WIDTH=width, num_warps=_warps(width),
        )  # fmt: skip
        d_x, d_branch, d_gate = (None if d is None else d.view(ctx.shape) for d in (d_x, d_branch, d_gate))
        return d_x, d_branch, None, None, d_weight.sum(dim=0).to(weight.dtype), None, d_gate


@triton.jit
def _summed(p_x, p_branch, at_x, at_branch, ok, alpha, beta, SUM: tl.constexpr):
    x = tl.load(p_x + at_x, mask=ok, other=0.0).to(tl.float32)
    if SUM:
        x = alpha * x + beta * tl.load(p_branch + at_branch, mask=ok, other=0.0).to(tl.float32)
    return x


@triton.jit
def _rms_norm_kernel(
    p_x, p_branch, p_gate, p_weight, p_y, p_inverse, x_row, branch_row, gate_row, alpha, beta, size, eps,
    SUM: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    ok = i < size
    x = _summed(p_x, p_branch, row * x_row + i, row * branch_row + i, ok, alpha, beta, SUM)
    inverse = tl.rsqrt(tl.sum(x * x) / size + eps)
    y = x * inverse * tl.load(p_weight + i, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.sigmoid(tl.load(p_gate + row * gate_row + i, mask=ok, other=0.0).to(tl.float32))
    tl.store(p_y + row * size + i, y.to(p_y.dtype.element_ty), mask=ok)
    tl.store(p_inverse + row, inverse)


@triton.jit
def _rms_norm_backward_kernel(
    p_x, p_branch, p_gate, p_weight, p_inverse, p_d_y, p_d_x, p_d_branch, p_d_gate, p_d_weight,
    x_row, branch_row, gate_row, d_y_row, alpha, beta, rows, size,
    SUM: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_x = (w dy - normed * mean(w dy . normed)) / rms, row after row with the weight's gradient in registers."""
    part, i = tl.program_id(0), tl.arange(0, WIDTH)
    ok = i < size
    weight = tl.load(p_weight + i, mask=ok, other=0.0).to(tl.float32)
    d_weight = tl.zeros((WIDTH,), dtype=tl.float32)
    for number in range(part, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        inverse = tl.load(p_inverse + row)
        normed = _summed(p_x, p_branch, row * x_row + i, row * branch_row + i, ok, alpha, beta, SUM) * inverse
        d_y = tl.load(p_d_y + row * d_y_row + i, mask=ok, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.sigmoid(tl.load(p_gate + row * gate_row + i, mask=ok, other=0.0).to(tl.float32))
            d_gate = d_y * normed * weight * gate * (1 - gate)
            tl.store(p_d_gate + row * size + i, d_gate.to(p_d_gate.dtype.element_ty), mask=ok)
            d_y *= gate
        d_weight += d_y * normed
        d_y *= weight
        d_x = (d_y - normed * (tl.sum(d_y * normed) / size)) * inverse
        if SUM:
            d_branch = (beta * d_x).to(p_d_branch.dtype.element_ty)
            tl.store(p_d_branch + row * size + i, d_branch, mask=ok)
            d_x *= alpha
        tl.store(p_d_x + row * size + i, d_x.to(p_d_x.dtype.element_ty), mask=ok)
    tl.store(p_d_weight + part * size + i, d_weight, mask=ok)
