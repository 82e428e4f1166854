"""RMSNorm over the last dim, in fp32 whatever the input's dtype (MiniMax-01 uses no other norm in its text model)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops import cpu, gpu
from fulmen.ops.cpu import training


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 and given back in x's dtype; x [..., D], weight [D].

    A `gate` [..., D], the dtype of x, multiplies that by sigmoid(gate).
    """
    size = x.shape[-1]
    if gpu.serves(x, weight) and weight.shape == (size,) and (gate is None or gpu.serves(gate)):
        return gpu.norm.rms_norm(x, weight, eps, gate)
    if gate is not None:
        return rms_norm(x, weight, eps) * gate.sigmoid()
    if weight.shape[0] == size and cpu.serves(x.numel() // size, x, weight):
        return cpu.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor, alpha: float, beta: float, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of the residual sum alpha * x + beta * branch; x, branch [..., D]. A GPU never rounds the sum."""
    keeps_dtype = torch.promote_types(x.dtype, branch.dtype) == x.dtype
    if gpu.serves(x, branch, weight) and weight.shape == x.shape[-1:] and keeps_dtype:
        return gpu.norm.add_rms_norm(x, branch, alpha, beta, weight, eps)
    return rms_norm(residual(x, branch, alpha, beta), weight, eps)


def residual(x: Tensor, branch: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * x + beta * branch."""
    return torch.add(branch if beta == 1 else beta * branch, x, alpha=alpha)


class _RMSNorm(torch.autograd.Function):
    """PyTorch has a fused kernel on GPUs only; on a CPU it takes about twenty passes over x, this about ten."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        ctx.fused = weight.dtype == torch.float32 and training.fuses(x, weight)
        if ctx.fused:
            y, inverse = training.rms_norm_forward(x, weight, eps)
            ctx.save_for_backward(x, inverse, weight)
            return y
        x_f32 = x.float()
        norm = torch.linalg.vector_norm(x_f32, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(x_f32, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, inverse, weight = ctx.saved_tensors
        if ctx.fused:
            return *training.rms_norm_backward(grad.contiguous(), x, inverse, weight), None
        size = x.shape[-1]
        grad = grad.float().reshape(-1, size)
        normed = torch.mul(x.float(), inverse).reshape(-1, size)
        along = grad * normed
        d_weight = along.sum(dim=0).to(weight.dtype)
        # dx = (w grad - normed * mean(w grad . normed)) / rms
        share = torch.mv(along, weight.float()).div_(-size)[:, None]
        d_x = torch.mul(grad, weight).addcmul_(normed, share).view(x.shape).mul_(inverse)
        return d_x.to(x.dtype), d_weight, None
