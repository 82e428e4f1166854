"""Kernels in C for decoding on a CPU: a few tokens, fp32, no gradients; see README.md.

The operations of `fulmen.ops` come here by themselves where `serves` says so; nothing else need call these functions.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from fulmen.ops.cpu.compiled import load, new_empty
from fulmen.ops.int8 import Int8

__all__ = ["FEW", "KINDS", "experts_mlp", "lightning_step", "linear", "rms_norm", "route", "serves"]

FEW = 64
"""Up to so many tokens (decoding.c has the same number) PyTorch's products, which want large matrices, are slower."""

KINDS = (torch.float32, torch.bfloat16)
"""What weights may be; a kernel that takes bf16 weights computes in fp32 all the same."""

PLAIN = (Tensor, Parameter)
"""No subclass, whose numbers may lie elsewhere."""

WORTH_A_THREAD = 16_384
"""Multiplications below which a second thread costs more than it saves."""


def serves(tokens: int, *tensors: Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether the kernels may compute this: few tokens, plain tensors on the CPU, nobody records or converts.

    The first call without gradients builds the library (a second or two).
    """
    if torch.is_grad_enabled() or not 0 < tokens <= FEW:
        return False
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in dtypes or type(tensor) not in PLAIN:
            return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and load() is not None


def linear(x: Tensor, weight: Tensor | Int8) -> Tensor:
    """x [..., K] fp32 times weight [N, K], fp32, bf16 or int8, transposed: [..., N] fp32."""
    n, k = weight.shape
    x, (kind, *matrix) = x.contiguous(), _matrix(weight)
    rows = x.numel() // k
    y = new_empty(*x.shape[:-1], n)
    kernel = getattr(load(), f"linear_{kind}")
    kernel(y.data_ptr(), x.data_ptr(), *_places(matrix), rows, n, k, _threads(rows * n * k))
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    x, weight = x.contiguous(), weight.contiguous()
    size = x.shape[-1]
    y = torch.empty_like(x)
    load().rms_norm(y.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps)
    return y


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, probabilities and counts of `fulmen.ops.experts.Routing` for logits [T, E]."""
    logits = logits.contiguous()
    tokens, num_experts = logits.shape
    experts, counts = new_empty(tokens, k, dtype=torch.int64), new_empty(num_experts, dtype=torch.int64)
    weights, probs = new_empty(tokens, k), new_empty(tokens, num_experts)
    outputs = (experts.data_ptr(), weights.data_ptr(), probs.data_ptr(), counts.data_ptr())
    load().route(*outputs, logits.data_ptr(), tokens, num_experts, k)
    return experts, weights, probs, counts


def experts_mlp(x: Tensor, w13: Tensor | Int8, w2: Tensor | Int8, experts: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights [T, k] * w2 (SiLU(w1 x) * (w3 x)), each with the matrices of experts [T, k]; x [T, D].

    Matrices are fp32, or both int8.
    """
    x, experts, weights = (t.contiguous() for t in (x, experts, weights))
    (kind, *first), (_, *second) = _matrix(w13), _matrix(w2)
    tokens, k = experts.shape
    num_experts, d, f = w2.shape
    shapes = (x.shape, w13.shape, weights.shape)
    assert shapes == ((tokens, d), (num_experts, 2 * f, d), (tokens, k)), shapes
    out, act = new_empty(tokens, d), new_empty(tokens * k, f)
    inputs = _places((x, *first, *second, experts, weights))
    threads = _threads(tokens * k * d * f)
    kernel = getattr(load(), f"experts_mlp_{kind}")
    kernel(out.data_ptr(), act.data_ptr(), *inputs, tokens, k, num_experts, d, f, threads)
    return out


def lightning_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, 1, H, V] and next states [B, H, K, V] of one token of each sequence; arguments as `naive.py` has."""
    batch, _, heads, key_dim = q.shape
    value_dim, strides = v.shape[3], q.stride()
    if strides != k.stride() or strides != v.stride() or strides[3] != 1:
        return _packed_step(q, k, v, rates, state)
    rates, shape = rates.contiguous(), (batch, heads, key_dim, value_dim)
    out = new_empty(batch, 1, heads, value_dim)
    # The kernel changes it in place, and the caller keeps his.
    following = new_empty(*shape).copy_(state) if state is not None else new_empty(*shape).zero_()
    inputs = (q.data_ptr(), k.data_ptr(), v.data_ptr(), rates.data_ptr())
    sizes = (*shape, strides[0], strides[2], _threads(following.numel()))
    load().lightning_step(out.data_ptr(), following.data_ptr(), *inputs, *sizes)
    return out, following


def _packed_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step for tensors that do not share their strides, by laying them side by side."""
    q, k, v = torch.cat((q, k, v), dim=-1).split((q.shape[3], k.shape[3], v.shape[3]), dim=-1)
    return lightning_step(q, k, v, rates, state)


def _matrix(weight: Tensor | Int8) -> tuple[str | Tensor, ...]:
    """The kernels' name for its numbers, and the tensors that they take for it."""
    if isinstance(weight, Int8):
        return "int8", weight.numbers.contiguous(), weight.scales.contiguous()
    return "bf16" if weight.dtype == torch.bfloat16 else "fp32", weight.contiguous()


def _places(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _threads(multiplications: int) -> int:
    return torch.get_num_threads() if multiplications >= WORTH_A_THREAD else 1
