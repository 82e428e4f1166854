"""The next token of each of a few sequences, whose memories are parts of a pool: slots for states, pages for keys.

Every launch has a grid that follows from shapes alone and reads slots, positions, tables and experts on the GPU, so all
of it can be recorded in a CUDA graph. A slot of -1 pads a batch: nothing of the pool is read or written for it.
Letters: B sequences, S slots, P pages of R tokens, H heads, H_kv key heads, D their width, T = B tokens, k choices.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.gpu.experts import choose_experts
from fulmen.ops.int8 import Int8

KEYS = 64
"""Keys at a time."""

SPLITS = 64
"""Programs at most that share the keys of one sequence and key head."""

ROWS = 16
"""Tokens of an expert at a time: the fewest rows that a matrix product takes."""


def lightning_step_(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, pool: Tensor, slots: Tensor, *, silu: bool = False
) -> Tensor:
    """One step of the recurrence on the pool's states in place; outputs [B, H, V], the dtype of v.

    q, k [B, H, K] and v [B, H, V], strided as they come, their last dim contiguous; `silu` is taken of them first.
    rates [H] fp32; pool [S, H, K, V] fp32, of each state a contiguous matrix; slots [B] int32, no slot twice.
    """
    batch, heads, keys = q.shape
    values = v.shape[2]
    out = v.new_empty(batch, heads, values)
    columns = min(32, triton.next_power_of_2(values))
    _lightning_kernel[(triton.cdiv(values, columns), heads, batch)](
        q, k, v, rates, pool, slots, out, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *pool.stride()[:2],
        K=keys, V=values, BLOCK_K=triton.next_power_of_2(keys), COLUMNS=columns, SILU=silu, num_warps=2, **early(q),
    )  # fmt: skip
    return out


class Tables(NamedTuple):
    """The pages of each sequence's tokens: token t is in row t % R of page tables[begins[b] + t // R]."""

    begins: Tensor  # [B] int32
    tables: Tensor  # int32, one table after the other


def append_keys_(
    k: Tensor, v: Tensor, frequencies: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor,
    pages: Tables | None = None,
) -> None:  # fmt: skip
    """Write k, turned to its position, and v [B, H_kv, D] at `positions` [B] int32 of the sequences' pages.

    frequencies: [rotary_dim / 2] fp32, see `fulmen.ops.rotary`; keys, values: [P, R, H_kv, D], one layout. Without
    `pages` the slot is the sequence's only page.
    """
    batch, heads, size = k.shape
    _append_kernel[(heads, batch)](
        k, v, frequencies, keys, values, slots, positions, *(pages or (None, None)), *k.stride()[:2], *v.stride()[:2],
        *keys.stride()[:3], keys.shape[1], len(frequencies), size, PAGED=pages is not None,
        WIDTH=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip


def attention_step(
    q: Tensor, frequencies: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor,
    pages: Tables | None = None, *, longest: int | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of q [B, H, D], turned to its position, over the keys 0..position of its pages: [B, H, D].

    As `append_keys_`; query head h reads key head h // (H / H_kv). Keys of a long sequence are shared among programs,
    in as many shares as suit `longest` tokens; None: R.
    """
    batch, heads, size = q.shape
    page_size, key_heads = keys.shape[1:3]
    group = heads // key_heads
    longest = page_size if longest is None else longest
    splits = max(1, min(SPLITS, triton.cdiv(longest, 2 * KEYS), triton.cdiv(264, batch * key_heads)))
    out = q.new_empty(batch, heads, size)
    partial = torch.empty(batch, heads, splits, size, dtype=torch.float32, device=q.device)
    weights = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(size))
    _attention_kernel[(splits, key_heads, batch)](
        q, frequencies, keys, values, slots, positions, *(pages or (None, None)), partial, weights, *q.stride()[:2],
        *keys.stride()[:3], page_size, len(frequencies), heads, group, size, size**-0.5, PAGED=pages is not None,
        ROWS=max(ROWS, triton.next_power_of_2(group)), WIDTH=width,
        KEYS=KEYS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_stages=2,
    )  # fmt: skip
    _combine_kernel[(heads, batch)](
        partial, weights, slots, out, heads, splits, size, SPLITS=16 if splits <= 16 else SPLITS, WIDTH=width
    )  # two kernels, as a server should seldom wait for one to be compiled
    return out


def linear_int8(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, K] times an int8 matrix [N, K] with scales [N], transposed: [T, N]; for T up to some hundreds."""
    (rows, size), n = x.shape, len(numbers)
    x, out = x.contiguous(), x.new_empty(rows, n)
    tile = min(64, max(ROWS, triton.next_power_of_2(rows)))
    columns = 16 if n < 8192 else 32
    _linear_int8_kernel[(triton.cdiv(n, columns), triton.cdiv(rows, tile))](
        x, numbers, scales, out, rows, n, size, ROWS=tile, COLUMNS=columns,
        DEPTH=min(256 if tile == ROWS else 128, max(16, triton.next_power_of_2(size))),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3, **early(x),
    )  # fmt: skip
    return out


def experts_mlp(x: Tensor, w13: Tensor | Int8, w2: Tensor | Int8, experts: Tensor) -> Tensor:
    """Each choice's answer w2 (SiLU(w1 x) * (w3 x)), not yet weighted: [T, k, D]; x [T, D], experts [T, k] int64.

    No sorting: a program of an expert finds that expert's tokens by itself and reads its part of the weights once for
    16 of them.
    """
    act = _few_products(x, w13, experts, is_first=True)
    return _few_products(act, w2, experts, is_first=False).view(*experts.shape, -1)


def _few_products(x: Tensor, weight: Tensor | Int8, experts: Tensor, *, is_first: bool) -> Tensor:
    """Of every choice: its token x [T, K] times weight [E, 2N, K], gated, or its row of x [T k, K] times [E, N, K]."""
    (tokens, k), (num_experts, outputs, size) = experts.shape, weight.shape
    numbers, scales = weight if isinstance(weight, Int8) else (weight, None)
    n = outputs // 2 if is_first else outputs
    out = x.new_empty(tokens * k, n)
    # Of one token no two choices share an expert: no program need look for work.
    groups = k if tokens == 1 else num_experts
    columns, depth = (16, 256) if tokens == 1 and is_first else (16, 128) if tokens == 1 else (32, 128)
    _few_kernel[(triton.cdiv(n, columns), groups)](
        x, numbers, scales, experts.contiguous(), out, tokens * k, k if is_first else 1, n, size,
        ONE=tokens == 1, GATED=is_first, SCALED=scales is not None, CHOICES=max(16, triton.next_power_of_2(tokens * k)),
        ROWS=ROWS, COLUMNS=columns, DEPTH=min(depth, max(16, triton.next_power_of_2(size))),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=2, num_stages=3,
        **early(x),
    )  # fmt: skip
    return out


class Router(NamedTuple):
    """A router's matrix, and where its choices go: what `fulmen.ops.experts.route` gives, one layer's."""

    weight: Tensor  # [E, D]
    experts: Tensor  # [B, k] int64
    weights: Tensor  # [B, k] fp32
    probs: Tensor  # [B, E] fp32


def add_norm(
    normed: Tensor, branch: Tensor, alpha: float, beta: float, weight: Tensor, eps: float,
    *, mix: Tensor | None = None, router: Router | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm of alpha * normed + beta * branch, with the sum in fp32; normed [B, D], branch [B, D].

    With `mix` [B, k] fp32 the branch [B, k, D] is the sum of its k rows with these weights. With a `router` the result
    is also multiplied by its matrix, in fp32, and its experts are chosen.
    """
    rows, size = normed.shape
    out, k, width = torch.empty_like(normed), 1 if mix is None else mix.shape[1], triton.next_power_of_2(size)
    routed, num_experts, chosen = router is not None, 1, 1
    if routed:
        num_experts, chosen = len(router.weight), router.experts.shape[1]
    experts = triton.next_power_of_2(num_experts)
    _add_norm_kernel[(rows,)](
        normed, branch, mix, weight, out, *(router or (None,) * 4), alpha, beta, size, num_experts, eps,
        K=k, MIXED=mix is not None, WIDTH=width, ROUTED=routed, CHOSEN=chosen, EXPERTS=experts,
        GROUP=max(1, min(experts, 16384 // width)), num_warps=min(16, max(1, width // (128 if routed else 256))),
        **early(normed),
    )  # fmt: skip
    return out


def early(x: Tensor) -> dict[str, bool]:
    """Options of a launch that begins while the one before it ends, from Hopper on; its kernel must `_wait` first."""
    is_able = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if is_able else {}


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Let the next kernel be scheduled, then wait for all that the ones before wrote."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _silu(x, SILU: tl.constexpr):
    x = x.to(tl.float32)
    return x * tl.sigmoid(x) if SILU else x


@triton.jit
def _lightning_kernel(
    p_q, p_k, p_v, p_rates, p_pool, p_slots, p_out, q_b, q_h, k_b, k_h, v_b, v_h, pool_s, pool_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """One head of one sequence, some columns of its state: read, decayed, added to, read out and written once."""
    _wait(EARLY)
    i_v, h, b = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_k, heads = tl.arange(0, BLOCK_K), tl.num_programs(1)
    slot = tl.load(p_slots + b).to(tl.int64)
    ok_k, ok_v = i_k < tl.where(slot >= 0, K, 0), i_v < tl.where(slot >= 0, V, 0)
    q = _silu(tl.load(p_q + b * q_b + h * q_h + i_k, mask=ok_k, other=0.0), SILU)
    k = _silu(tl.load(p_k + b * k_b + h * k_h + i_k, mask=ok_k, other=0.0), SILU)
    v = _silu(tl.load(p_v + b * v_b + h * v_h + i_v, mask=ok_v, other=0.0), SILU)
    at = p_pool + slot * pool_s + h * pool_h + i_k[:, None] * V + i_v[None, :]
    ok = ok_k[:, None] & ok_v[None, :]
    state = tl.load(at, mask=ok, other=0.0) * tl.exp(-tl.load(p_rates + h).to(tl.float32))
    state += k[:, None] * v[None, :]
    tl.store(at, state, mask=ok)
    out = tl.sum(q[:, None] * state, axis=0)
    tl.store(p_out + (b * heads + h) * V + i_v, out.to(p_out.dtype.element_ty), mask=i_v < V)


@triton.jit
def _turned(p_x, p_frequencies, position, ok, i, half):
    """A head's dims i at p_x, the first 2 * half of them turned to `position` (see `fulmen.ops.rotary`), fp32."""
    turns, first = i < 2 * half, i < half
    frequency = tl.load(p_frequencies + tl.where(first, i, i - half), mask=turns, other=0.0)
    angle = position.to(tl.float32) * frequency
    other = tl.where(first, i + half, i - half)
    x = tl.load(p_x + i, mask=ok, other=0.0).to(tl.float32)
    partner = tl.load(p_x + other, mask=ok & turns, other=0.0).to(tl.float32)
    return x * tl.cos(angle) + tl.where(first, -partner, partner) * tl.sin(angle)


@triton.jit
def _append_kernel(
    p_k, p_v, p_frequencies, p_keys, p_values, p_slots, p_positions, p_begins, p_tables, k_b, k_h, v_b, v_h,
    pool_p, pool_t, pool_h, page_size, half, size, PAGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    h, b, i = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    slot, position = tl.load(p_slots + b), tl.load(p_positions + b)
    ok = i < tl.where(slot >= 0, size, 0)
    page, row = slot, position
    if PAGED:
        page = tl.load(p_tables + tl.load(p_begins + b) + position // page_size, mask=slot >= 0, other=0)
        row = position % page_size
    at = page.to(tl.int64) * pool_p + row.to(tl.int64) * pool_t + h * pool_h + i
    k = _turned(p_k + b * k_b + h * k_h, p_frequencies, position, ok, i, half)
    v = tl.load(p_v + b * v_b + h * v_h + i, mask=ok, other=0.0)
    tl.store(p_keys + at, k.to(p_keys.dtype.element_ty), mask=ok)
    tl.store(p_values + at, v, mask=ok)


@triton.jit
def _attention_kernel(
    p_q, p_frequencies, p_keys, p_values, p_slots, p_positions, p_begins, p_tables, p_partial, p_weights, q_b, q_h,
    pool_p, pool_t, pool_h, page_size, half, heads, group, size, scale, PAGED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads that share a key head, over this split's part of the keys: an online softmax."""
    split, key_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, position = tl.load(p_slots + b), tl.load(p_positions + b)
    length = tl.where(slot >= 0, position + 1, 0)
    if PAGED:
        p_tables += tl.load(p_begins + b)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, length)

    row, i = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head, is_query = key_head * group + row, row < group
    q_rows = p_q + b * q_b + head[:, None] * q_h
    ok = is_query[:, None] & (i < tl.where(slot >= 0, size, 0))[None, :]
    q = _turned(q_rows, p_frequencies, position, ok, i[None, :], half)
    q = q.to(p_q.dtype.element_ty)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    out = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(begin, end, KEYS):
        token = start + tl.arange(0, KEYS)
        real = token < end
        if PAGED:
            page = tl.load(p_tables + token // page_size, mask=real, other=0).to(tl.int64)
            place = page * pool_p + (token % page_size) * pool_t
        else:
            place = slot.to(tl.int64) * pool_p + token.to(tl.int64) * pool_t
        at = place[:, None] + key_head * pool_h + i[None, :]
        inside = real[:, None] & (i < size)[None, :]
        keys = tl.load(p_keys + at, mask=inside, other=0.0)
        values = tl.load(p_values + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(real[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        probs = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        total = total * fade + tl.sum(probs, axis=1)
        out = tl.dot(probs.to(values.dtype), values, out * fade[:, None], input_precision=PRECISION)
        highest = higher
    at = (b * heads + head) * tl.num_programs(0) + split
    tl.store(p_weights + 2 * at, highest, mask=is_query)
    tl.store(p_weights + 2 * at + 1, total, mask=is_query)
    tl.store(p_partial + at[:, None] * size + i[None, :], out, mask=is_query[:, None] & (i < size)[None, :])


@triton.jit
def _combine_kernel(
    p_partial, p_weights, p_slots, p_out, heads, splits, size, SPLITS: tl.constexpr, WIDTH: tl.constexpr
):
    """The splits' sums, brought to one highest score."""
    h, b, i, s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    used = tl.load(p_slots + b) >= 0
    at = (b * heads + h) * splits + s
    ok = s < tl.where(used, splits, 0)
    highest = tl.load(p_weights + 2 * at, mask=ok, other=float("-inf"))
    total = tl.load(p_weights + 2 * at + 1, mask=ok, other=0.0)
    share = tl.where(highest > float("-inf"), tl.exp(highest - tl.max(highest, axis=0)), 0.0)
    inside = ok[:, None] & (i < size)[None, :] & (highest > float("-inf"))[:, None]
    partial = tl.load(p_partial + at[:, None] * size + i[None, :], mask=inside, other=0.0)
    sum_total = tl.sum(total * share, axis=0)
    out = tl.sum(partial * share[:, None], axis=0) / tl.where(used, sum_total, 1.0)
    tl.store(p_out + (b * heads + h) * size + i, out.to(p_out.dtype.element_ty), mask=i < size)


@triton.jit
def _linear_int8_kernel(
    p_x, p_numbers, p_scales, p_out, rows, n, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    _wait(EARLY)
    i_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, size, DEPTH):
        i = start + tl.arange(0, DEPTH)
        x = tl.load(p_x + row[:, None] * size + i[None, :], mask=(row < rows)[:, None] & (i < size)[None, :], other=0.0)
        at = p_numbers + i_n[None, :] * tl.cast(size, tl.int64) + i[:, None]
        w = tl.load(at, mask=(i < size)[:, None] & (i_n < n)[None, :], other=0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    total *= tl.load(p_scales + i_n, mask=i_n < n, other=0.0)[None, :]
    ok = (row < rows)[:, None] & (i_n < n)[None, :]
    tl.store(p_out + row[:, None] * n + i_n[None, :], total.to(p_out.dtype.element_ty), mask=ok)


@triton.jit
def _few_kernel(
    p_x, p_weight, p_scales, p_experts, p_out, choices, per_row, n, size,
    ONE: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Some output columns of one expert, for its choices ROWS at a time."""
    _wait(EARLY)
    i_n, c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, CHOICES)
    group, r = tl.program_id(1), tl.arange(0, ROWS)
    chosen = tl.load(p_experts + c, mask=c < choices, other=-1)
    if ONE:
        expert = tl.load(p_experts + group)
        mine = c == group
    else:
        expert = group.to(tl.int64)
        mine = chosen == expert
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    count = tl.sum(mine.to(tl.int32), axis=0)
    per_expert = (2 if GATED else 1) * tl.cast(n, tl.int64) * size
    for first in range(0, count, ROWS):
        is_row = mine[:, None] & (rank[:, None] == first + r[None, :])
        choice = tl.sum(tl.where(is_row, c[:, None], 0), axis=0)
        real = first + r < count
        row = choice // per_row
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        ups = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, size, DEPTH):
            i = start + tl.arange(0, DEPTH)
            x = tl.load(p_x + row[:, None] * size + i[None, :], mask=real[:, None] & (i < size)[None, :], other=0.0)
            at = p_weight + expert * per_expert + i_n[None, :] * tl.cast(size, tl.int64) + i[:, None]
            ok = (i < size)[:, None] & (i_n < n)[None, :]
            total = tl.dot(x, tl.load(at, mask=ok, other=0.0).to(x.dtype), total, input_precision=PRECISION)
            if GATED:
                up = tl.load(at + tl.cast(n, tl.int64) * size, mask=ok, other=0.0).to(x.dtype)
                ups = tl.dot(x, up, ups, input_precision=PRECISION)
        if SCALED:
            scales = p_scales + expert * (2 if GATED else 1) * n + i_n
            total *= tl.load(scales, mask=i_n < n, other=0.0)[None, :]
            if GATED:
                ups *= tl.load(scales + n, mask=i_n < n, other=0.0)[None, :]
        if GATED:
            total = total * tl.sigmoid(total) * ups
        ok = real[:, None] & (i_n < n)[None, :]
        tl.store(p_out + choice[:, None].to(tl.int64) * n + i_n[None, :], total.to(p_out.dtype.element_ty), mask=ok)


@triton.jit
def _add_norm_kernel(
    p_normed, p_branch, p_mix, p_weight, p_out, p_router, p_experts, p_weights, p_probs,
    alpha, beta, size, num_experts, eps, K: tl.constexpr, MIXED: tl.constexpr, WIDTH: tl.constexpr,
    ROUTED: tl.constexpr, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    _wait(EARLY)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    ok = i < size
    branch = tl.zeros((WIDTH,), dtype=tl.float32)
    for slot in tl.static_range(K):
        part = tl.load(p_branch + (row * K + slot) * size + i, mask=ok, other=0.0).to(tl.float32)
        branch += part * tl.load(p_mix + row * K + slot) if MIXED else part
    x = alpha * tl.load(p_normed + row * size + i, mask=ok, other=0.0).to(tl.float32) + beta * branch
    y = x * tl.rsqrt(tl.sum(x * x) / size + eps) * tl.load(p_weight + i, mask=ok, other=0.0).to(tl.float32)
    y = y.to(p_out.dtype.element_ty)
    tl.store(p_out + row * size + i, y, mask=ok)
    if ROUTED:
        logits = tl.zeros((1, EXPERTS), dtype=tl.float32)
        for first in tl.static_range(0, EXPERTS, GROUP):
            e = first + tl.arange(0, GROUP)
            inside = (e < num_experts)[:, None] & ok[None, :]
            w = tl.load(p_router + e[:, None] * size + i[None, :], mask=inside, other=0.0).to(tl.float32)
            part = tl.sum(w * y.to(tl.float32)[None, :], axis=1)
            here = e[:, None] == tl.arange(0, EXPERTS)[None, :]
            logits += tl.sum(tl.where(here, part[:, None], 0.0), axis=0)[None, :]
        token = tl.zeros((1, 1), dtype=tl.int64) + row
        choose_experts(logits, token, token >= 0, p_experts, p_weights, p_probs, num_experts, CHOSEN, EXPERTS, 1)
