"""Matrices in int8 with one scale for each row: weight-only quantisation, symmetric, for inference.

Half the bytes of bf16, and a decoding step reads nothing but weights. Kernels for a few tokens multiply int8 rows as
they are, in fp32, and scale the sums; products of many tokens take a dense copy of one matrix at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127


class Int8(NamedTuple):
    """A matrix, or a stack of them: numbers times the scales of their rows."""

    numbers: Tensor  # [..., N, K] int8
    scales: Tensor  # [..., N] fp32

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[..., N, K]; multiplied in fp32 and rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.numbers.device)
        return torch.mul(self.numbers, self.scales[..., None], out=out)


def quantize_rows(weight: Tensor) -> Int8:
    """The nearest multiples, from -127 to 127, of each row's scale, its largest magnitude / 127.

    Args:
        weight: [..., N, K], finite, of any floating dtype.

    Raises:
        ValueError: a number is not finite.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=-1)
    if not largest.isfinite().all():
        raise ValueError("a weight is not finite")
    scales = largest / LARGEST
    # A row of zeros has the scale 0; one of numbers so small that theirs is denormal is as good as zeros.
    numbers = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_()
    return Int8(numbers.clamp_(-LARGEST, LARGEST).to(torch.int8), scales)


def dense(weight: Tensor | Int8, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`, whatever it is kept in."""
    return weight.dense(dtype) if isinstance(weight, Int8) else weight.to(dtype)
