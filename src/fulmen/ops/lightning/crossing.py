"""`parts.sum_states` and `parts.add_reads` on a GPU: Triton kernels that pass over tokens of no weight.

Most heads forget within a few thousand tokens: what is left out is exactly zero in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.lightning.parts import FARTHEST, SHARE, SHARES, Parts
from fulmen.ops.lightning.triton import as_rows


def triton_sum_states(b: Tensor, c: Tensor, rates: Tensor, parts: Parts, *, reverse: bool) -> Tensor:
    """See `fulmen.ops.lightning.parts.sum_states`."""
    (_, heads, keys), values = b.shape, c.shape[2]
    b, c, count = as_rows(b), as_rows(c), len(parts.ranges)
    share = max(SHARE, triton.cdiv(parts.longest, SHARES))
    shares = max(1, triton.cdiv(parts.longest, share))
    sums = torch.empty(shares, count, heads, keys, values, dtype=torch.float32, device=b.device)
    columns = min(64, triton.next_power_of_2(values))
    grid = (shares * count, heads, triton.cdiv(values, columns))
    _sum_kernel[grid](
        b, c, sums, rates.contiguous(), parts.table, count, share, *b.stride()[:2], *c.stride()[:2],
        K=keys, V=values, BLOCK_K=triton.next_power_of_2(keys), COLUMNS=columns, REVERSE=reverse,
        FARTHEST=FARTHEST, **_sizes(b.dtype),
    )  # fmt: skip
    return sums.sum(0) if shares > 1 else sums[0]


def triton_add_reads(out: Tensor, a: Tensor, states: Tensor, rates: Tensor, parts: Parts, *, reverse: bool) -> None:
    """See `fulmen.ops.lightning.parts.add_reads`."""
    (_, heads, keys), values, sizes = a.shape, out.shape[2], _sizes(a.dtype)
    a, blocks = as_rows(a), triton.cdiv(parts.longest, sizes["C"])
    if blocks == 0:
        return
    columns = min(64, triton.next_power_of_2(values))
    grid = (blocks * len(parts.ranges), heads, triton.cdiv(values, columns))
    _read_kernel[grid](
        a, states, out, rates.contiguous(), parts.table, blocks, *a.stride()[:2], *states.stride(), *out.stride(),
        K=keys, V=values, BLOCK_K=triton.next_power_of_2(keys), COLUMNS=columns, REVERSE=reverse, **sizes,
    )  # fmt: skip


def _sizes(dtype: torch.dtype) -> dict[str, object]:
    """Tokens of a block, and the precision of products."""
    return {"C": 32, "PRECISION": "ieee"} if dtype == torch.float32 else {"C": 64, "PRECISION": "tf32"}


@triton.jit
def _sum_kernel(
    p_b, p_c, p_sums, p_rates, p_parts, count, share, b_token, b_head, c_token, c_head,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, FARTHEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part's state, some columns of one head's, of a share of its tokens."""
    i_s, i_m = tl.program_id(0) // count, tl.program_id(0) % count
    i_h, i_k = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_K)
    first = tl.load(p_parts + 2 * i_m)
    tokens = tl.load(p_parts + 2 * i_m + 1) - first
    i_v = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    ok_k, ok_v = i_k < K, i_v < V
    rate = tl.load(p_rates + i_h).to(tl.float32)
    begin, end = i_s * share, tl.minimum((i_s + 1) * share, tokens)
    reach = tl.minimum((FARTHEST / tl.maximum(rate, 1e-7)).to(tl.int32), tokens) + 1
    if REVERSE:
        end = tl.minimum(end, reach)
    else:
        begin = tl.maximum(begin, tokens - reach)
    state = tl.zeros((BLOCK_K, COLUMNS), dtype=tl.float32)
    for start in tl.range(begin, end, C, num_stages=2):
        token = start + tl.arange(0, C)
        real, row = token < end, (first + token).to(tl.int64)[:, None]
        age = token + 1 if REVERSE else tokens - 1 - token
        weight = tl.exp(-rate * tl.maximum(age, 0).to(tl.float32))
        at_b, at_c = row * b_token + i_h * b_head + i_k[None, :], row * c_token + i_h * c_head + i_v[None, :]
        b_b = tl.load(p_b + at_b, mask=real[:, None] & ok_k[None, :], other=0.0)
        b_c = tl.load(p_c + at_c, mask=real[:, None] & ok_v[None, :], other=0.0)
        b_b = (b_b * weight[:, None]).to(b_b.dtype)  # of c, gradients may be too small for fp16 already
        state = tl.dot(tl.trans(b_b), b_c, state, input_precision=PRECISION)
    at = ((tl.program_id(0) * tl.num_programs(1) + i_h).to(tl.int64) * K + i_k[:, None]) * V + i_v[None, :]
    tl.store(p_sums + at, state, mask=ok_k[:, None] & ok_v[None, :])


@triton.jit
def _read_kernel(
    p_a, p_states, p_out, p_rates, p_parts, blocks, a_token, a_head,
    state_m, state_h, state_k, state_v, out_token, out_head, out_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tokens of a part read some columns of its state, one head's, added to what is there."""
    i_m, token = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * C + tl.arange(0, C)
    first = tl.load(p_parts + 2 * i_m)
    tokens = tl.load(p_parts + 2 * i_m + 1) - first
    i_h, i_k = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_K)
    i_v = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real, ok_k, ok_v = token < tokens, i_k < K, i_v < V
    age = tl.maximum(tokens - 1 - token, 0) if REVERSE else token + 1
    weight = tl.where(real, tl.exp(-tl.load(p_rates + i_h).to(tl.float32) * age.to(tl.float32)), 0.0)
    if tl.max(weight, 0) > 0:
        row = (first + token).to(tl.int64)[:, None]
        at_a = row * a_token + i_h * a_head + i_k[None, :]
        b_a = tl.load(p_a + at_a, mask=real[:, None] & ok_k[None, :], other=0.0)
        at_state = i_m * state_m + i_h * state_h + i_k[:, None] * state_k + i_v[None, :] * state_v
        state = tl.load(p_states + at_state, mask=ok_k[:, None] & ok_v[None, :], other=0.0)
        read = tl.dot(b_a, state.to(b_a.dtype), input_precision=PRECISION) * weight[:, None]
        at_out = row * out_token + i_h * out_head + i_v[None, :] * out_v
        ok = real[:, None] & ok_v[None, :]
        read += tl.load(p_out + at_out, mask=ok, other=0.0).to(tl.float32)
        tl.store(p_out + at_out, read.to(p_out.dtype.element_ty), mask=ok)
