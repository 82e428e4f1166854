"""Lightning attention on a GPU: one Triton kernel that walks the tokens once, for outputs and all gradients.

With `scan(a, b, c)` for the recurrence of keys b, values c and queries a, the forward pass is scan(q, k, v), and so are
its gradients: dq = scan(do, v, k), and from the last token to the first dk = scan(v, do, q), dv = scan(k, q, do).
Letters: N samples cut into M segments, H heads, K and V the widths of a, b and of c, C tokens of a block.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.errors import OutOfResources

from fulmen.ops.gpu import DTYPES, apply, tuning
from fulmen.ops.lightning.context import Context
from fulmen.ops.lightning.tiling import Tiling, choose_tiling, fill, processors_of
from fulmen.ops.packing import sample_borders

WIDTHS = (32, 64, 96, 128, 256)
"""Key and value widths that the kernel takes."""


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    tiling: Tiling | None = None,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [B or N, H, K, V]; see `fulmen.ops.lightning.lightning_attention`.

    `segment` tokens of a sample are walked by one program; None: as many as fill the GPU with programs. A `tiling` of
    None is the fastest of `candidates`, timed once where that is worth it.
    """
    refusal = why_not(q, v)
    if refusal is not None:
        raise ValueError(f'backend "triton" {refusal}')
    shape, values = q.shape[:3], v.shape[3]
    flat = [as_rows(x.reshape(-1, *x.shape[2:])) for x in (q, k, v)]
    return _attend(flat, shape, values, rates, state, cu_seqlens, tiling, segment, has_silu=False)


def triton_silu_lightning_attention(
    qkv: Tensor, rates: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of q, k, v = SiLU(qkv) [B, T, H, 3, D], whose gradient is put together in place."""
    flat = [qkv.reshape(-1, *qkv.shape[2:])]
    return _attend(flat, qkv.shape[:3], qkv.shape[4], rates, state, cu_seqlens, None, None, has_silu=True)


def forward_pass(qkv: Tensor, rates: Tensor, borders: Sequence[int]) -> tuple[Tensor, Context, tuple[Tensor, ...]]:
    """See `fulmen.ops.lightning.parts.forward_pass`."""
    launch = _launch([qkv], qkv.shape[3], rates, None, tuple(borders), None, None, False, wants_gradients=True)
    context = Context()
    out, _ = _Lightning.forward(context, rates.contiguous(), None, *launch, False, qkv)
    rates, entering, _ = context.take_saved()
    return out, context, (rates, entering)


def backward_pass(d_out: Tensor, qkv: Tensor, context: Context, kept: tuple[Tensor, ...]) -> Tensor:
    """See `fulmen.ops.lightning.parts.backward_pass`."""
    context.save_for_backward(*kept, qkv)
    d_final = torch.zeros_like(_new_states(context.segments.samples[1:], qkv[:, :, 0], qkv[:, :, 2]))
    return _Lightning.backward(context, d_out, d_final)[-1]


def _attend(
    flat: list[Tensor],
    shape: torch.Size,
    values: int,
    rates: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    tiling: Tiling | None,
    segment: int | None,
    *,
    has_silu: bool,
) -> tuple[Tensor, Tensor]:
    """Of the tokens of all samples laid end to end: q, k, v, or their one tensor before SiLU; shape is [B, T, H]."""
    borders, rates = tuple(sample_borders(*shape[:2], cu_seqlens)), rates.contiguous()
    wants_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*flat, state))
    how = (tiling, segment, has_silu)
    launch = _launch(flat, values, rates, state, borders, *how, wants_gradients=wants_gradients)
    out, final = apply(_Lightning, rates, state, *launch, has_silu, *flat)
    return out.view(*shape, values), final


def _launch(
    flat: list[Tensor],
    values: int,
    rates: Tensor,
    state: Tensor | None,
    borders: tuple[int, ...],
    tiling: Tiling | None,
    segment: int | None,
    has_silu: bool,
    *,
    wants_gradients: bool,
) -> "tuple[Segments, Tiling]":
    """How the tokens are cut; a tiling of None is the fastest one."""
    heads, device = flat[0].shape[1], flat[0].device

    def cut(tiling: Tiling) -> Segments:
        programs = heads * triton.cdiv(values, tiling.columns)
        return Segments.cut(borders, segment or _segment_length(borders, programs, device), device)

    if tiling is None:

        def seconds(tiling: Tiling) -> float:
            return _trial(flat, rates, state, cut(tiling), tiling, has_silu, backward=wants_gradients)

        tiling = choose_tiling(flat[0], values, len(borders) - 1, wants_gradients, seconds)
    return cut(tiling), tiling


def why_not(q: Tensor, v: Tensor) -> str | None:
    """The rule that these tensors break, their value and the way out; None if the kernel takes them."""
    if not (q.is_cuda or triton.knobs.runtime.interpret):
        return f'needs tensors on a CUDA device, got {q.device}; move them there, or take backend "chunked"'
    if q.dtype not in DTYPES:
        return f'takes bf16, fp16 or fp32, got {q.dtype}; convert q, k and v, or take backend "chunked"'
    for name, width in (("K", q.shape[3]), ("V", v.shape[3])):
        if width not in WIDTHS:
            return f'takes {name} of {", ".join(map(str, WIDTHS))}, got {width}; pad it, or take backend "chunked"'
    return None


@torch.no_grad()
def _trial(
    flat: list[Tensor],
    rates: Tensor,
    state: Tensor | None,
    segments: "Segments",
    tiling: Tiling,
    has_silu: bool,
    *,
    backward: bool,
) -> float:
    """Seconds of a pass over these inputs, or of both passes; infinity if this GPU cannot run the tiling.

    Autograd takes no part: those who watch what it keeps, such as checkpointing, must not notice.
    """

    def run() -> None:
        context = Context()
        _, final = _Lightning.forward(context, rates, state, segments, tiling, has_silu, *flat)
        if backward:
            # Any gradient of the outputs will do; the values have its shape.
            values = flat[0][:, :, 2] if len(flat) == 1 else flat[2]
            _Lightning.backward(context, values, torch.zeros_like(final))

    try:
        return tuning.gpu_seconds(run)
    except OutOfResources:
        return math.inf


def _segment_length(borders: tuple[int, ...], programs_per_segment: int, device: torch.device) -> int:
    """One segment a sample where samples fill the GPU, else segments of equal length, about two per multiprocessor."""
    longest = max(b - a for a, b in itertools.pairwise(borders))
    processors = processors_of(device)
    if fill(programs_per_segment * (len(borders) - 1), processors):
        return longest
    share = triton.cdiv(borders[-1] * programs_per_segment, 2 * processors)
    return min(longest, max(512, triton.cdiv(share, 128) * 128))


class Segments(NamedTuple):
    """The parts that programs walk: with borders (0, 5, 7) and 3 tokens a segment, 0..3, 3..5 and 5..7."""

    ranges: Tensor  # [M, 2] int32, first token and end
    samples: Tensor  # [N + 1] int32, each sample's first segment, and M
    is_whole: bool  # every sample is one segment

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def cut(borders: tuple[int, ...], size: int, device: torch.device) -> "Segments":
        """Each sample into segments of `size` tokens from its own start; kept, as all layers cut alike."""
        ranges, samples = [], [0]
        for begin, end in itertools.pairwise(borders):
            ranges += [(a, min(a + size, end)) for a in range(begin, end, size)]
            samples.append(len(ranges))
        tables = (torch.tensor(x, dtype=torch.int32).to(device, non_blocking=True) for x in (ranges, samples))
        return Segments(*tables, is_whole=len(ranges) == len(borders) - 1)


class _Lightning(torch.autograd.Function):
    """Of q, k, v [T, H, D], or of one tensor [T, H, 3, D]; with `has_silu` of its SiLU, and it alone is kept."""

    @staticmethod
    def forward(ctx, rates, initial, segments: Segments, tiling: Tiling, has_silu: bool, *inputs: Tensor):
        scan = _Scan(rates, segments, tiling)
        q, k, v = _activated(inputs, has_silu)
        entering, final = _entering(scan, k, v, initial, reverse=False)
        last = None
        if final is None:
            last = final = _new_states(segments.samples[1:], k, v)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        scan(out, q, k, v, entering, last)
        ctx.save_for_backward(rates, entering, *inputs)
        ctx.segments, ctx.tiling, ctx.has_silu, ctx.has_initial = segments, tiling, has_silu, initial is not None
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_final: Tensor):
        rates, entering, *inputs = ctx.saved_tensors
        scan = _Scan(rates, ctx.segments, ctx.tiling)
        q, k, v = _activated(inputs, ctx.has_silu)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        d_q, d_k, d_v = grads[0].unbind(2) if len(grads) == 1 else grads
        d_out, d_final = as_rows(d_out), d_final.contiguous()
        leaving, d_initial = _entering(scan, q, d_out, d_final, reverse=True)
        last = None
        if d_initial is None and ctx.has_initial:
            last = d_initial = torch.empty_like(d_final)
        scan(d_q, d_out, v, k, None if entering is None else entering.mT, None)
        scan(d_k, v, d_out, q, leaving.mT, None, reverse=True)
        scan(d_v, k, q, d_out, leaving, last, reverse=True)
        if ctx.has_silu:
            grads = [torch.ops.aten.silu_backward(grads[0], inputs[0])]
        return None, d_initial if ctx.has_initial else None, None, None, None, *grads


def _activated(inputs, has_silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    if len(inputs) == 3:
        return inputs
    return (F.silu(inputs[0]) if has_silu else inputs[0]).unbind(2)


def _entering(
    scan: "_Scan", b: Tensor, c: Tensor, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The state that each segment begins with, and each sample's last; None for the last if no extra pass found it."""
    segments, initial = scan.segments, None if initial is None else initial.contiguous()
    if segments.is_whole:
        return initial, None
    local = _new_states(segments.ranges, b, c)
    scan(None, None, b, c, None, local, reverse=reverse)
    final = _new_states(segments.samples[1:], b, c)
    heads, size = len(scan.rates), local[0, 0].numel()
    grid = (len(final) * heads, triton.cdiv(size, 1024))
    # Each segment's own sum is replaced by the state before it.
    _chain_kernel[grid](
        local, initial, final, scan.rates, segments.ranges, segments.samples,
        heads, size, HAS_INITIAL=initial is not None, REVERSE=reverse, SIZE=1024,
    )  # fmt: skip
    return local, final


class _Scan(NamedTuple):
    """What all launches of `_scan_kernel` in one pass share."""

    rates: Tensor
    segments: Segments
    tiling: Tiling

    def __call__(
        self,
        out: Tensor | None,
        a: Tensor | None,
        b: Tensor,
        c: Tensor,
        entering: Tensor | None,
        final: Tensor | None,
        *,
        reverse: bool = False,
    ) -> None:
        """scan(a, b, c) into `out` [T, H, V] if there is one, the states at last into `final` [M, H, K, V] likewise."""
        heads, keys, values = b.shape[1], b.shape[2], c.shape[2]
        columns = min(self.tiling.columns, triton.next_power_of_2(values))
        grid = (triton.cdiv(values, columns), heads, len(self.segments.ranges))
        _scan_kernel[grid](
            a, b, c, out, self.rates, entering, final, self.segments.ranges,
            *(stride for x in (a, b, c, out) for stride in ((0, 0) if x is None else x.stride()[:2])),
            *(stride for x in (entering, final) for stride in ((0, 0, 0, 0) if x is None else x.stride())),
            K=keys, V=values, BLOCK_K=triton.next_power_of_2(keys), COLUMNS=columns, C=self.tiling.block,
            HAS_OUT=out is not None, HAS_ENTERING=entering is not None, HAS_FINAL=final is not None, REVERSE=reverse,
            PRECISION="ieee" if b.dtype == torch.float32 else "tf32",
            STAGES=self.tiling.stages, num_warps=self.tiling.warps,
        )  # fmt: skip


def _new_states(like: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.empty(len(like), b.shape[1], b.shape[2], c.shape[2], dtype=torch.float32, device=b.device)


def as_rows(x: Tensor) -> Tensor:
    """The same with its last dim contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _scan_kernel(
    p_a, p_b, p_c, p_out, p_rates, p_entering, p_final, p_ranges,
    a_token, a_head, b_token, b_head, c_token, c_head, out_token, out_head,
    entering_m, entering_h, entering_k, entering_v, final_m, final_h, final_k, final_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_ENTERING: tl.constexpr, HAS_FINAL: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One segment, one head, some columns of c and the state: block after block with the state in registers."""
    column, i_h, i_m = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = tl.load(p_ranges + 2 * i_m), tl.load(p_ranges + 2 * i_m + 1)
    rate = tl.load(p_rates + i_h).to(tl.float32)
    place, i_k, i_v = tl.arange(0, C), tl.arange(0, BLOCK_K), column + tl.arange(0, COLUMNS)
    ok_k, ok_v = i_k < K, i_v < V
    # The gradient of a state is that after the token, a state that before it: one decay less on the way in.
    late = 1 if REVERSE else 0
    distance = place[:, None] - place[None, :]
    inside = tl.where(distance >= 0, tl.exp(-rate * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    on_entry = tl.exp(-rate * (place + 1 - late).to(tl.float32))

    state = tl.zeros((BLOCK_K, COLUMNS), dtype=tl.float32)
    ok_state = ok_k[:, None] & ok_v[None, :]
    if HAS_ENTERING:
        where = i_m * entering_m + i_h * entering_h + i_k[:, None] * entering_k + i_v[None, :] * entering_v
        state += tl.load(p_entering + where, mask=ok_state, other=0.0)

    for start in tl.range(0, end - begin, C, num_stages=STAGES):
        here = start + place
        real = here < end - begin
        token = (end - 1 - here if REVERSE else begin + here).to(tl.int64)
        at_b = token[:, None] * b_token + i_h * b_head + i_k[None, :]
        at_c = token[:, None] * c_token + i_h * c_head + i_v[None, :]
        ok_b, ok_c = real[:, None] & ok_k[None, :], real[:, None] & ok_v[None, :]
        b_b = tl.load(p_b + at_b, mask=ok_b, other=0.0)
        b_c = tl.load(p_c + at_c, mask=ok_c, other=0.0)
        if HAS_OUT:
            at_a = token[:, None] * a_token + i_h * a_head + i_k[None, :]
            b_a = tl.load(p_a + at_a, mask=ok_b, other=0.0)
            b_out = tl.dot(b_a, state.to(b_a.dtype), input_precision=PRECISION) * on_entry[:, None]
            scores = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * inside
            b_out = tl.dot(scores.to(b_c.dtype), b_c, b_out, input_precision=PRECISION)
            at_out = token[:, None] * out_token + i_h * out_head + i_v[None, :]
            tl.store(p_out + at_out, b_out.to(p_out.dtype.element_ty), mask=ok_c)
        size = tl.minimum(end - begin - start, C)
        left = tl.exp(-rate * (tl.maximum(size - 1 - place, 0) + late).to(tl.float32))
        b_c = (b_c * left[:, None]).to(b_c.dtype)
        state *= tl.exp(-rate * size.to(tl.float32))
        state = tl.dot(tl.trans(b_b), b_c, state, input_precision=PRECISION)

    if HAS_FINAL:
        where = i_m * final_m + i_h * final_h + i_k[:, None] * final_k + i_v[None, :] * final_v
        tl.store(p_final + where, state, mask=ok_state)


@triton.jit
def _chain_kernel(
    p_local, p_initial, p_final, p_rates, p_ranges, p_samples, heads, size,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The states before all segments of a sample, in place of what each segment alone adds, and the last."""
    i_n, i_h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    ok = i < size
    rate = tl.load(p_rates + i_h).to(tl.float32)
    first, end = tl.load(p_samples + i_n), tl.load(p_samples + i_n + 1)
    state = tl.zeros((SIZE,), dtype=tl.float32)
    if HAS_INITIAL:
        state += tl.load(p_initial + (i_n * heads + i_h) * size + i, mask=ok, other=0.0)
    for step in range(0, end - first):
        m = (end - 1 - step if REVERSE else first + step).to(tl.int64)
        tokens = tl.load(p_ranges + 2 * m + 1) - tl.load(p_ranges + 2 * m)
        where = p_local + (m * heads + i_h) * size + i
        added = tl.load(where, mask=ok, other=0.0)
        tl.store(where, state, mask=ok)
        state = state * tl.exp(-rate * tokens.to(tl.float32)) + added
    tl.store(p_final + (i_n * heads + i_h) * size + i, state, mask=ok)
