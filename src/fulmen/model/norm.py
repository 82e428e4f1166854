"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from fulmen.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`fulmen.ops.norm.rms_norm` with its weight [size]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        branch: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> Tensor:
        """Of x, times sigmoid(gate) if there is one; with a `branch` of alpha * x + beta * branch."""
        if branch is not None:
            return add_rms_norm(x, branch, alpha, beta, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, gate)
