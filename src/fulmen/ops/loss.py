"""Cross-entropy of a linear head, without ever holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 512) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], a fp32 scalar.

    Args:
        hidden: [T, D].
        weight: [V, D], the head.
        targets: [T] int64; `IGNORE` (-100) marks a token without a target, which adds nothing.
        chunk: tokens whose logits exist at the same time, so the peak is chunk * V instead of T * V.

    Products run in the autocast dtype where autocast is on, else in hidden's dtype; the softmax in fp32 always. The
    gradients are computed in the forward pass, chunk by chunk, where the logits are at hand.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int):
        with torch.autocast(hidden.device.type, enabled=False):
            want_hidden, want_weight = ctx.needs_input_grad[:2]
            operand = weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_hidden = torch.empty_like(hidden) if want_hidden else None
            d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h_TD, target = hidden[part].to(dtype), targets[part]
                log_probs = F.log_softmax(F.linear(h_TD, operand).float(), dim=-1)
                total += F.nll_loss(log_probs, target, ignore_index=IGNORE, reduction="sum")
                if not (want_hidden or want_weight):
                    continue
                d_logits = _softmax_minus_target(log_probs, target).to(dtype)
                if want_hidden:
                    d_hidden[part] = d_logits @ operand
                if want_weight:
                    d_weight += d_logits.T @ h_TD
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _softmax_minus_target(log_probs: Tensor, targets: Tensor) -> Tensor:
    """d loss / d logits, in the storage of log_probs [T, V]; rows without a target are zero."""
    grad = log_probs.exp_()
    counted = targets != IGNORE
    grad[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return grad.mul_(counted[:, None]) if not bool(counted.all()) else grad
