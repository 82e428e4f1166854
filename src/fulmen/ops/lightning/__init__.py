"""Lightning attention: linear attention with one decay rate per head and one fixed state per sequence.

    S_t = exp(-s) S_{t-1} + k_t v_t^T        o_t = q_t^T S_t            (MiniMax-01, section 2.2)

`naive.py` is the definition, `chunked.py` computes the same with matrix products, `triton.py` in one pass on a GPU;
`fulmen.ops.cpu` has a kernel for the next token of a sequence, `batch.py` takes sequences of one and of several new
tokens together; README.md has the mathematics.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops import cpu, gpu
from fulmen.ops.lightning.chunked import chunked_lightning_attention
from fulmen.ops.lightning.naive import naive_lightning_attention
from fulmen.ops.packing import check_borders

__all__ = ["decay_rates", "lightning_attention", "silu_lightning_attention"]


def _cpu_step(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not _is_cpu_step(q, k, v, rates, state):
        raise ValueError(
            'backend "cpu" takes one token of each sequence, fp32 on the CPU, no gradients, and needs a C compiler; '
            f"got {tuple(q.shape)} {q.dtype} on {q.device}, gradients {'on' if torch.is_grad_enabled() else 'off'}"
        )
    return cpu.lightning_step(q, k, v, rates, state)


def _is_cpu_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> bool:
    others = () if state is None else (state,)
    return q.shape[1] == 1 and cpu.serves(1, q, k, v, rates, *others)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not gpu.HAS_TRITON:
        raise ValueError(f'backend "triton" {NO_TRITON}')
    from fulmen.ops.lightning.triton import triton_lightning_attention

    return triton_lightning_attention(q, k, v, rates, state, cu_seqlens)


NO_TRITON = 'needs the triton package; install it, or take backend "chunked"'

BACKENDS = {
    "naive": naive_lightning_attention,
    "chunked": chunked_lightning_attention,
    "triton": _triton,
    "cpu": _cpu_step,
}


def decay_rates(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Decay rates s of the heads of one layer, [H] fp32 on the CPU, all positive.

    s_h = 2^(-8 (h+1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5) with h, l counted from 0 and l the layer's place among all
    L layers, softmax layers included (the released modeling code). The formula holds for any H: no interleave where
    H is not a power of two.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0..{num_layers - 1} (num_layers={num_layers}), got {layer}")
    head = torch.arange(1, num_heads + 1, dtype=torch.float64, device="cpu")
    depth = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    return (2 ** (-8 * head / num_heads) * depth).float()


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with decay; no scale, no normalisation (MiniMax-01, section 2.2.1).

    Args:
        q, k: [B, T, H, K], fp32, bf16, fp16 or fp64, T >= 1.
        v: [B, T, H, V], the dtype of q.
        rates: [H], the decay rates s > 0 per token; a constant, it gets no gradient.
        state: the state before the first token, [B, H, K, V] fp32 (fp64 for fp64 inputs); packed: [N, H, K, V].
            None stands for zeros.
        cu_seqlens: [N+1] int32 borders of N samples laid end to end, from 0 strictly up to T; then B == 1. Nothing
            crosses a border.
        return_state: whether the states after the last token are wanted.
        backend: "naive", "chunked", "triton" (a GPU), "cpu" (a single token without gradients: see `fulmen.ops.cpu`),
            or None to pick: "triton" on a GPU if it takes these tensors, else "chunked"; for a single token "cpu" or
            the recurrence. A GPU's tensors that "triton" does not take are reported by a warning, once.

    Returns:
        The outputs, like v, and the final states in the shape of `state` (None unless `return_state`). Both carry
        gradients to q, k, v and `state`.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit; the message names rule and value.
    """
    _check(q, k, v, rates, state, cu_seqlens)
    if backend is None:
        backend = _pick(q, k, v, rates, state)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    out, final = BACKENDS[backend](q, k, v, rates, state, cu_seqlens)
    return out, final if return_state else None


def silu_lightning_attention(
    qkv: Tensor,
    rates: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention of q, k, v = SiLU(qkv), as MiniMax-01's layers have it (section 2.2; released code).

    Args:
        qkv: [B, T, H, 3, D], the projections of each head side by side, before their activation.

    The rest as for `lightning_attention`. Where the GPU's kernel runs, training keeps qkv alone, not its SiLU, and the
    kernel writes the gradients of q, k and v side by side, so that nobody need put them together.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"the projections must be qkv [B, T, H, 3, D], got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(3)
    if qkv.shape[1] > 1 and gpu.serves(qkv) and _why_not_triton(q, v) is None:
        from fulmen.ops.lightning.triton import triton_silu_lightning_attention

        _check(q, k, v, rates, state, cu_seqlens)
        out, final = triton_silu_lightning_attention(qkv, rates, state, cu_seqlens)
        return out, final if return_state else None
    q, k, v = F.silu(qkv).unbind(3)
    return lightning_attention(q, k, v, rates, state=state, cu_seqlens=cu_seqlens, return_state=return_state)


def _pick(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None) -> str:
    if q.shape[1] == 1:
        return "cpu" if _is_cpu_step(q, k, v, rates, state) else "naive"
    if not q.is_cuda or q.dtype == torch.float64:
        return "chunked"
    refusal = _why_not_triton(q, v)
    if refusal is not None:
        _report(refusal)
    return "triton" if refusal is None else "chunked"


def _why_not_triton(q: Tensor, v: Tensor) -> str | None:
    if not gpu.HAS_TRITON:
        return NO_TRITON
    from fulmen.ops.lightning.triton import why_not

    return why_not(q, v)


@functools.cache
def _report(refusal: str) -> None:
    """Say once why a GPU does not run its own kernel."""
    warnings.warn(
        f'lightning attention runs in its slower form "chunked": the GPU kernel {refusal}', RuntimeWarning, stacklevel=2
    )


def _check(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "lightning attention takes q, k [B, T, H, K] and v [B, T, H, V], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, length, heads, key_dim = q.shape
    if min(batch, length) < 1:
        raise ValueError(f"lightning attention needs at least one sequence of one token, got q {tuple(q.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    others = [t for t in (k, v, rates, state) if t is not None]
    if any(t.device != q.device for t in others):
        raise ValueError(f"all tensors must be on q's device {q.device}, got {[str(t.device) for t in others]}")
    if rates.shape != (heads,):
        raise ValueError(f"rates must be [H] = [{heads}], got {tuple(rates.shape)}")
    samples = batch if cu_seqlens is None else len(check_borders(cu_seqlens, batch, length)) - 1
    if state is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        shape = (samples, heads, key_dim, v.shape[3])
        if state.shape != shape or state.dtype != dtype:
            raise ValueError(f"state must be {shape} {dtype}, got {tuple(state.shape)} {state.dtype}")
