"""Cross-entropy of a linear head, without ever holding all logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops import gpu
from fulmen.ops.cpu import training
from fulmen.ops.linear import product_dtype

IGNORE = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], a fp32 scalar.

    Args:
        hidden: [T, D].
        weight: [V, D], the head.
        targets: [T] int64; `IGNORE` (-100) marks a token without a target, which adds nothing.
        chunk: tokens whose logits exist at the same time, so the peak is chunk * V instead of T * V. None: 512, on a
            GPU 4096.
        of_logits: what gives, in the place of the softmax, the sum and its gradient by the logits, in their dtype, of
            logits [t, V] of some tokens and their targets [t].

    Products run in the autocast dtype where autocast is on, else in hidden's dtype; the softmax in fp32 always. The
    gradients are computed in the forward pass, chunk by chunk, where the logits are at hand.

    Raises:
        IndexError: a target is no token. A GPU's kernel, which nobody waits for, makes the loss nan instead.
    """
    if chunk is None:
        chunk = 4096 if hidden.is_cuda else 512
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, product_dtype(hidden), chunk, of_logits or _nll_and_gradient
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int, of_logits):
        with torch.autocast(hidden.device.type, enabled=False):
            want_hidden, want_weight = ctx.needs_input_grad[:2]
            operand = weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_hidden = torch.empty_like(hidden) if want_hidden else None
            d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h_TD, target = hidden[part].to(dtype), targets[part]
                nll, d_logits = of_logits(F.linear(h_TD, operand), target)
                total += nll
                if want_hidden:
                    d_hidden[part] = d_logits @ operand
                if want_weight:
                    d_weight = _add_product(d_weight, d_logits.T, h_TD)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [V, D] fp32 + a @ b; a GPU's narrow products are added without being rounded first."""
    if total.is_cuda and a.dtype != torch.float32:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(a @ b)


def _nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed -log softmax(logits)[target], and its gradient by the logits [T, V], in their dtype."""
    if gpu.serves(logits):
        return gpu.loss.cross_entropy_(logits, targets, IGNORE).sum(), logits
    counted = targets != IGNORE
    if bool(((targets < 0) & counted).any()) or int(targets.max()) >= logits.shape[1]:
        raise IndexError(f"a target must be {IGNORE} or a token of 0..{logits.shape[1] - 1}")
    if training.fuses(logits):
        return training.cross_entropy_(logits, targets, IGNORE).sum(), logits
    dtype, logits = logits.dtype, logits.float()
    column = targets.clamp(min=0)[:, None]
    at_target, highest = logits.gather(1, column)[:, 0], logits.amax(dim=-1)
    probs = torch.softmax(logits, dim=-1)
    # The largest probability is at least 1 / V, so its logarithm is exact where that of the target's may underflow.
    nll = torch.where(counted, (highest - at_target) - probs.amax(dim=-1).log(), 0.0).sum()
    probs.scatter_add_(1, column, torch.full_like(column, -1, dtype=probs.dtype))
    return nll, probs.mul_(counted[:, None]).to(dtype)
