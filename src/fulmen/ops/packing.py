"""Samples laid end to end in one row, told apart by their borders."""

import itertools

import torch
from torch import Tensor


def check_borders(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """The borders [N+1] of N packed samples on the host, after checking that they cut `length` tokens of one row.

    Raises ValueError unless `batch` is 1 and the borders are int32, from 0 strictly up to `length`.
    """
    if batch != 1:
        raise ValueError(f"packed samples (cu_seqlens) need B == 1, got B == {batch}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N+1] int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != length or any(a >= b for a, b in itertools.pairwise(borders)):
        raise ValueError(f"cu_seqlens must rise strictly from 0 to T == {length}, got {borders}")
    return borders


def sample_borders(batch: int, length: int, cu_seqlens: Tensor | None) -> list[int]:
    """The borders of all samples laid end to end: those of a packed row, or of `batch` rows of `length` tokens."""
    return list(range(0, batch * length + 1, length)) if cu_seqlens is None else cu_seqlens.tolist()
