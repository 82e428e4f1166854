"""Triton kernels for a GPU: what is bound by the memory there, in one launch each.

The operations of `fulmen.ops` come here by themselves where `serves` says so; nothing else need call these functions.
Kernels for lightning attention over a sequence are in `fulmen.ops.lightning.triton`.
"""

import importlib.util

import torch
from torch import Tensor

__all__ = ["DTYPES", "HAS_TRITON", "serves"]

HAS_TRITON = importlib.util.find_spec("triton") is not None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels may compute this: CUDA tensors of dtypes that they take, and nobody compiles around them."""
    if not HAS_TRITON or torch.compiler.is_compiling():
        return False
    return all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors)
