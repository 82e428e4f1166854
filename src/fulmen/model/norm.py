"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from fulmen.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """`fulmen.ops.norm.rms_norm` with its weight [size]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, gate)
