"""The dtype of matrix products; weights and optimizer states stay in float32."""

from contextlib import AbstractContextManager

import torch

from fulmen.model import multiplies_bf16


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what the recipe says, or bf16 where the device multiplies it in hardware."""
    if precision != "auto":
        return getattr(torch, precision)
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Within it, products are of `dtype`; float32 changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
