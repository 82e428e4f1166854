"""The product with a weight matrix, without bias (MiniMax-01 has none)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops import cpu


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N]; a few tokens on a CPU take `fulmen.ops.cpu`."""
    size = weight.shape[-1]
    if x.shape[-1] == size and cpu.serves(x.numel() // size, x, weight):
        return cpu.linear(x, weight)
    return F.linear(x, weight)


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same in fp32, whatever the dtypes, and under autocast too: for what must not be rounded to bf16."""
    device = x.device.type
    if x.is_cuda and x.dtype == weight.dtype != torch.float32 and not torch.is_grad_enabled():
        # The products of such numbers are exact in fp32, and their sum is kept in it: nothing is converted.
        return torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32).view(*x.shape[:-1], len(weight))
    if not torch.is_autocast_enabled(device):
        x, size = x.float(), weight.shape[-1]
        if x.shape[-1] == size and cpu.serves(x.numel() // size, x, weight, dtypes=cpu.KINDS):
            return cpu.linear(x, weight)  # where weights are bf16, without a copy of them in fp32
        return F.linear(x, weight.float())
    with torch.autocast(device, enabled=False):
        return F.linear(x.float(), weight.float())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
