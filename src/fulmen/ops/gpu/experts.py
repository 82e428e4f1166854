"""A mixture of experts around its grouped products: routing, sorting by expert, permutation and back.

Nothing here asks the GPU for a number, so the host can run ahead. The sort is a counting sort in three launches: how
many choices of each block of choices go to each expert, where that puts them, and then each choice into its row.
Letters: T tokens, k choices each, E experts, R rows, G blocks of choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.gpu import apply

ALIGN = 8
"""Each expert's rows begin at a multiple of so many, as PyTorch's grouped products ask (16 bytes of bf16)."""

TOKENS = 32
"""Tokens that a program of the router takes."""

CHOICES = 128
"""Choices of a block of the sort."""


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [T, k] int64, weights [T, k] fp32 and probabilities [T, E] fp32 of `fulmen.ops.experts.route`."""
    return apply(_Route, logits, k)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, k: int):
        logits = logits.contiguous()
        (tokens, num_experts), device = logits.shape, logits.device
        experts = torch.empty(tokens, k, dtype=torch.int64, device=device)
        weights = torch.empty(tokens, k, dtype=torch.float32, device=device)
        probs = torch.empty(tokens, num_experts, dtype=torch.float32, device=device)
        width = triton.next_power_of_2(num_experts)
        _route_kernel[(triton.cdiv(tokens, TOKENS),)](
            logits, experts, weights, probs, tokens, num_experts, K=k, WIDTH=width, TOKENS=TOKENS
        )
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(experts, weights, probs)
        ctx.dtype = logits.dtype
        return experts, weights, probs

    @staticmethod
    @once_differentiable
    def backward(ctx, _, d_weights: Tensor, d_probs: Tensor):
        experts, weights, probs = ctx.saved_tensors
        (tokens, k), num_experts = experts.shape, probs.shape[1]
        d_logits = torch.empty_like(probs, dtype=ctx.dtype)
        _route_backward_kernel[(triton.cdiv(tokens, TOKENS),)](
            experts, weights, probs, d_weights.contiguous(), d_probs.contiguous(), d_logits, tokens, num_experts,
            K=k, WIDTH=triton.next_power_of_2(num_experts), TOKENS=TOKENS,
        )  # fmt: skip
        return d_logits, None


def count_choices(experts: Tensor, num_experts: int) -> Tensor:
    """Choices per expert, [..., E] int64, of experts [..., T, k] int64."""
    rows, choices = experts.shape[:-2].numel(), experts.shape[-2:].numel()
    counts = torch.zeros(rows, num_experts, dtype=torch.int64, device=experts.device)
    _tally_kernel[(triton.cdiv(choices, CHOICES), rows)](
        experts.contiguous(), counts, choices, num_experts, WIDTH=triton.next_power_of_2(num_experts), CHOICES=CHOICES
    )
    return counts.view(*experts.shape[:-2], num_experts)


def _histogram(experts: Tensor, num_experts: int) -> Tensor:
    """Choices per expert of each block of them, [G, E] int32."""
    choices = experts.numel()
    blocks = triton.cdiv(choices, CHOICES)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=experts.device)
    width = triton.next_power_of_2(num_experts)
    _count_kernel[(blocks,)](experts, counts, choices, num_experts, WIDTH=width, CHOICES=CHOICES)
    return counts


def sort_choices(
    experts: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row for every choice, by expert and in the choices' order.

    Args:
        experts, weights: [T, k] int64, -1 for a dropped choice, and fp32.
        dtype: that the rows' weights are wanted in.

    Returns:
        row_of [T, k] int32, -1 for a dropped choice; the rows' tokens [R] int32, -1 for padding, and weights [R, 1],
        0 for padding; ends [E] int32, where each expert's rows end. R is what suffices for any routing.
    """
    experts, weights, device = experts.contiguous(), weights.contiguous(), experts.device
    (tokens, k), choices = experts.shape, experts.numel()
    rows = triton.cdiv(choices + num_experts * (ALIGN - 1), ALIGN) * ALIGN
    before = _histogram(experts, num_experts)
    starts, ends = torch.empty(2, num_experts, dtype=torch.int32, device=device)
    row_of = torch.empty(tokens, k, dtype=torch.int32, device=device)
    row_tokens = torch.full((rows,), -1, dtype=torch.int32, device=device)
    row_weights = torch.zeros(rows, 1, dtype=dtype, device=device)
    width = triton.next_power_of_2(num_experts)
    _start_kernel[(1,)](before, starts, ends, len(before), num_experts, ALIGN=ALIGN, WIDTH=width, BLOCKS=64)
    _place_kernel[(len(before),)](
        experts, weights, before, starts, row_of, row_tokens, row_weights, choices, num_experts, k,
        WIDTH=width, CHOICES=CHOICES,
    )  # fmt: skip
    return row_of, row_tokens, row_weights, ends


def permute(x: Tensor, row_tokens: Tensor) -> Tensor:
    """The rows' tokens: x [T, D] to [R, D], zeros where there is none."""
    x = x.contiguous()
    out = x.new_empty(len(row_tokens), x.shape[1])
    width = min(1024, triton.next_power_of_2(x.shape[1]))
    _permute_kernel[(len(out),)](x, row_tokens, out, x.shape[1], WIDTH=width)
    return out


def unpermute(
    rows: Tensor, row_of: Tensor, weights: Tensor | None = None, *, residual: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Sum of each token's rows, weighted by weights [T, k] or not, and of alpha * residual [T, D]: [R, D] to [T, D]."""
    (tokens, k), size = row_of.shape, rows.shape[1]
    out, width = rows.new_empty(tokens, size), min(1024, triton.next_power_of_2(size))
    weighted, added = weights is not None, alpha != 0
    _unpermute_kernel[(tokens, triton.cdiv(size, width))](
        rows, row_of, weights.contiguous() if weighted else None, residual.contiguous() if added else None, out,
        alpha, size, K=k, WEIGHTED=weighted, ADDED=added, WIDTH=width,
    )  # fmt: skip
    return out


@triton.jit
def _route_kernel(
    p_logits, p_experts, p_weights, p_probs, tokens, num_experts, K: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    t, e = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64), tl.arange(0, WIDTH)[None, :]
    real = t < tokens
    x = tl.load(p_logits + t * num_experts + e, mask=real & (e < num_experts), other=0.0).to(tl.float32)
    choose_experts(x, t, real, p_experts, p_weights, p_probs, num_experts, K, WIDTH, TOKENS)


@triton.jit
def choose_experts(
    x, t, real, p_experts, p_weights, p_probs, num_experts, K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):
    """Write probabilities, the K best and their weights of the logits x [TOKENS, WIDTH] of the tokens t [TOKENS, 1]."""
    e = tl.arange(0, WIDTH)[None, :]
    is_expert = e < num_experts
    x = tl.where(is_expert, x, float("-inf"))
    probs = tl.exp(x - tl.max(x, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    tl.store(p_probs + t * num_experts + e, probs, mask=real & is_expert)
    # A nan is chosen before any number, so that it shows; the padding after everything.
    left = tl.where(is_expert, tl.where(probs != probs, 2.0, probs), -2.0)
    total = tl.zeros((TOKENS, 1), dtype=tl.float32)
    for _ in tl.static_range(K):
        best = tl.argmax(left, axis=1)[:, None]
        total += tl.sum(tl.where(e == best, probs, 0.0), axis=1)[:, None]
        left = tl.where(e == best, -1.0, left)
    left = tl.where(is_expert, tl.where(probs != probs, 2.0, probs), -2.0)
    for slot in tl.static_range(K):
        best = tl.argmax(left, axis=1)[:, None]
        weight = tl.sum(tl.where(e == best, probs, 0.0), axis=1)[:, None] / total
        tl.store(p_experts + t * K + slot, best.to(tl.int64), mask=real)
        tl.store(p_weights + t * K + slot, weight, mask=real)
        left = tl.where(e == best, -1.0, left)


@triton.jit
def _route_backward_kernel(
    p_experts, p_weights, p_probs, p_d_weights, p_d_probs, p_d_logits, tokens, num_experts, K: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """With w = p / S over the chosen: dp = (dw - sum(dw . w)) / S there, then d_logits = p (dp - sum(dp . p))."""
    t, e = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64), tl.arange(0, WIDTH)[None, :]
    real, is_expert = t < tokens, e < num_experts
    at = t * num_experts + e
    probs = tl.load(p_probs + at, mask=real & is_expert, other=0.0)
    d_probs = tl.load(p_d_probs + at, mask=real & is_expert, other=0.0).to(tl.float32)
    along, total = tl.zeros((TOKENS, 1), dtype=tl.float32), tl.zeros((TOKENS, 1), dtype=tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(p_experts + t * K + slot, mask=real, other=0)
        d_weight = tl.load(p_d_weights + t * K + slot, mask=real, other=0.0).to(tl.float32)
        along += d_weight * tl.load(p_weights + t * K + slot, mask=real, other=0.0)
        total += tl.sum(tl.where(e == expert, probs, 0.0), axis=1)[:, None]
    for slot in tl.static_range(K):
        expert = tl.load(p_experts + t * K + slot, mask=real, other=0)
        d_weight = tl.load(p_d_weights + t * K + slot, mask=real, other=0.0).to(tl.float32)
        d_probs += tl.where(e == expert, (d_weight - along) / total, 0.0)
    d_logits = probs * (d_probs - tl.sum(d_probs * probs, axis=1)[:, None])
    tl.store(p_d_logits + at, d_logits.to(p_d_logits.dtype.element_ty), mask=real & is_expert)


@triton.jit
def _tally_kernel(p_experts, p_counts, choices, num_experts, WIDTH: tl.constexpr, CHOICES: tl.constexpr):
    """Added up by atomics, which for whole numbers come to the same in any order."""
    row, c, e = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHOICES + tl.arange(0, CHOICES), tl.arange(0, WIDTH)
    expert = tl.load(p_experts + row * choices + c, mask=c < choices, other=-1)
    counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int64), axis=0)
    tl.atomic_add(p_counts + row * num_experts + e, counts, mask=e < num_experts)


@triton.jit
def _count_kernel(p_experts, p_counts, choices, num_experts, WIDTH: tl.constexpr, CHOICES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    c, e = block * CHOICES + tl.arange(0, CHOICES), tl.arange(0, WIDTH)
    expert = tl.load(p_experts + c, mask=c < choices, other=-1)
    counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(p_counts + block * num_experts + e, counts, mask=e < num_experts)


@triton.jit
def _start_kernel(
    p_counts, p_starts, p_ends, blocks, num_experts, ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):
    """Each expert's first row and end; the counts of a block become those of all blocks before it."""
    g, e = tl.arange(0, BLOCKS)[:, None], tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.int32)
    for first in range(0, blocks, BLOCKS):
        ok = (first + g < blocks) & (e[None, :] < num_experts)
        at = p_counts + (first + g) * num_experts + e[None, :]
        counts = tl.load(at, mask=ok, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=ok)
        total += tl.sum(counts, axis=0)
    rows = (total + ALIGN - 1) // ALIGN * ALIGN
    ends = tl.cumsum(rows, axis=0)
    tl.store(p_starts + e, ends - rows, mask=e < num_experts)
    tl.store(p_ends + e, ends, mask=e < num_experts)


@triton.jit
def _place_kernel(
    p_experts, p_weights, p_before, p_starts, p_row_of, p_row_tokens, p_row_weights, choices, num_experts, k,
    WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    c, e = block * CHOICES + tl.arange(0, CHOICES), tl.arange(0, WIDTH)
    real = c < choices
    expert = tl.load(p_experts + c, mask=real, other=-1)
    chosen = expert[:, None] == e[None, :]
    rank = tl.sum(tl.where(chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1, 0), axis=1)
    place = rank + tl.load(p_before + block * num_experts + expert, mask=expert >= 0, other=0)
    row = tl.load(p_starts + expert, mask=expert >= 0, other=0) + place
    kept = expert >= 0
    tl.store(p_row_of + c, tl.where(kept, row, -1), mask=real)
    tl.store(p_row_tokens + row, (c // k).to(tl.int32), mask=kept)
    weight = tl.load(p_weights + c, mask=kept, other=0.0)
    tl.store(p_row_weights + row, weight.to(p_row_weights.dtype.element_ty), mask=kept)


@triton.jit
def _permute_kernel(p_x, p_row_tokens, p_out, size, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(p_row_tokens + row).to(tl.int64)
    there = tl.where(token >= 0, size, 0)
    for start in range(0, size, WIDTH):
        i = start + tl.arange(0, WIDTH)
        x = tl.load(p_x + token * size + i, mask=i < there, other=0.0)
        tl.store(p_out + row * size + i, x, mask=i < size)


@triton.jit
def _unpermute_kernel(
    p_rows, p_row_of, p_weights, p_residual, p_out, alpha, size,
    K: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    if ADDED:
        total += alpha * tl.load(p_residual + token * size + i, mask=i < size, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(p_row_of + token * K + slot).to(tl.int64)
        x = tl.load(p_rows + row * size + i, mask=i < tl.where(row >= 0, size, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(p_weights + token * K + slot)
        total += x
    tl.store(p_out + token * size + i, total.to(p_out.dtype.element_ty), mask=i < size)
