"""The product with a weight matrix, without bias (MiniMax-01 has none)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops import cpu, gpu
from fulmen.ops.int8 import Int8


def linear(x: Tensor, weight: Tensor | Int8) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N]; a few tokens take `fulmen.ops.cpu`, of int8 also a GPU's."""
    size, is_int8 = weight.shape[-1], isinstance(weight, Int8)
    if x.shape[-1] == size and cpu.serves(x.numel() // size, x, *(() if is_int8 else (weight,))):
        return cpu.linear(x, weight)
    if not is_int8:
        return F.linear(x, weight)
    if x.shape[-1] == size and x.numel() // size <= gpu.FEW and gpu.serves(x):
        return gpu.decoding.linear_int8(x.reshape(-1, size), *weight).view(*x.shape[:-1], -1)
    return F.linear(x, weight.dense(x.dtype))


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same in fp32, whatever the dtypes, and under autocast too: for what must not be rounded to bf16."""
    device = x.device.type
    if x.is_cuda and _is_exact(x, weight):
        flat = x.reshape(-1, x.shape[-1])
        return gpu.apply(_ExactProduct, flat, weight).view(*x.shape[:-1], len(weight))
    if not torch.is_autocast_enabled(device):
        x, size = x.float(), weight.shape[-1]
        if x.shape[-1] == size and cpu.serves(x.numel() // size, x, weight, dtypes=cpu.KINDS):
            return cpu.linear(x, weight)  # where weights are bf16, without a copy of them in fp32
        return F.linear(x, weight.float())
    with torch.autocast(device, enabled=False):
        return F.linear(x.float(), weight.float())


def _is_exact(x: Tensor, weight: Tensor) -> bool:
    """Whether `_ExactProduct` serves: a fp32 weight of more rows than a router's would cost it too much memory."""
    if x.dtype == torch.bfloat16:
        return weight.dtype == x.dtype or (weight.dtype == torch.float32 and len(weight) <= 1024)
    # The second term of a fp16 gradient would be lost below 6e-8.
    return x.dtype == weight.dtype == torch.float16 and not torch.is_grad_enabled()


class _ExactProduct(torch.autograd.Function):
    """x [T, K] times weight [N, K] transposed, in fp32 by narrow products: those of narrow numbers are exact in it.

    A fp32 matrix is taken as the sum of narrow ones: three for the result, two for the weight's gradient (an error of
    2^-17 in bf16), one for the gradient of x, which is narrow itself. A GPU's fp32 products cost many times more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor):
        ctx.save_for_backward(x, weight)
        if weight.dtype == x.dtype:
            return _product_f32(x, weight.T)
        terms = _narrow_terms(weight, x.dtype, 3)
        return _product_f32(x, terms.flatten(0, 1).T).view(len(x), 3, len(weight)).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, weight = ctx.saved_tensors
        terms = _narrow_terms(d_y, x.dtype, 2)
        d_x = terms[0] @ weight.to(x.dtype)
        d_weight = _product_f32(terms.transpose(0, 1).flatten(1).T, x).view(2, *weight.shape).sum(dim=0)
        return d_x, d_weight.to(weight.dtype)


def _narrow_terms(x: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Narrow numbers [count, *x.shape], each the rounding of what those before it leave of x."""
    terms, rest = [], x.float()
    for _ in range(count):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].float()
    return torch.stack(terms)


def _product_f32(a: Tensor, b: Tensor) -> Tensor:
    """Of two narrow matrices; their sums stay in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
