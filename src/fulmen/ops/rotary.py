"""Rotary positions on the first dims of each head; the others pass through (MiniMax-01, section 2.1)."""

import torch
from torch import Tensor

from fulmen.ops import gpu


def rotary_tables(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [..., rotary_dim / 2] fp32, of angles position * base^(-2i / rotary_dim); positions [...]."""
    angles = positions[..., None].float() * rotary_frequencies(rotary_dim, base, positions.device)
    return angles.cos(), angles.sin()


def rotary_frequencies(rotary_dim: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i / rotary_dim) for i < rotary_dim / 2, fp32: the angle that a position adds."""
    index = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return base ** (-index / rotary_dim)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + rotary_dim / 2) of x [B, T, H, D] by tables [B or 1, T, rotary_dim / 2].

    The rest of D, from rotary_dim on, is untouched. Computed in fp32, given back in x's dtype.
    """
    if gpu.serves(x, cos, sin):
        return gpu.rotary.apply_rotary(x, cos, sin)
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)
