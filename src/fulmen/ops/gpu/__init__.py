"""Triton kernels for a GPU: what is bound by the memory there, in few launches.

`norm`, `swiglu`, `rotary` and `loss` are the passes between matrix products, `experts` sorts tokens by expert without a
word to the host, `decoding` has the next token of each sequence, and `step` all layers of it; `tuning` chooses among
tilings. The operations of `fulmen.ops` come here by themselves where `serves` says so; nothing else need call these
functions. Kernels for lightning attention over a sequence are in `fulmen.ops.lightning.triton`; docs/gpu.md has what
all of them reach.
"""

import importlib
import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels take; they compute in fp32."""

FEW = 256
"""Tokens up to which products with int8 matrices read these as they are."""

MODULES = ("decoding", "experts", "loss", "norm", "rotary", "step", "swiglu")


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels may compute this: CUDA tensors of dtypes that they take, and nobody compiles around them."""
    if not HAS_TRITON or torch.compiler.is_compiling():
        return False
    return all(tensor.is_cuda and tensor.dtype in DTYPES and tensor.numel() for tensor in tensors)


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, or where nobody records its forward pass alone: recording costs as much as a launch."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Nobody(), *arguments)


class _Nobody:
    """The context of a forward pass without a backward pass."""

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def __getattr__(name: str):
    """The modules with kernels, imported when first used: Triton takes a second, and need not be installed."""
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
