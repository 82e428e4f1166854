"""SiLU(gate) * up and its gradient, one pass each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 1024
"""Columns at a time."""


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2F] to [R, F]; see `fulmen.ops.swiglu`."""
    gate_up = gate_up.contiguous()
    rows, size = len(gate_up), gate_up.shape[1] // 2
    act, width = gate_up.new_empty(rows, size), min(MOST, triton.next_power_of_2(size))
    _swiglu_kernel[(rows, triton.cdiv(size, width))](gate_up, act, size, WIDTH=width)
    return act


def swiglu_backward(d_act: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate_up [R, 2F], weights * act [R, F] and d_weights [R] fp32; see `fulmen.ops.swiglu`."""
    d_act, gate_up, weights = d_act.contiguous(), gate_up.contiguous(), weights.contiguous()
    rows, size = d_act.shape
    d_gate_up, weighted = torch.empty_like(gate_up), torch.empty_like(d_act)
    d_weights = torch.empty(rows, dtype=torch.float32, device=d_act.device)
    width = min(MOST, triton.next_power_of_2(size))
    _swiglu_backward_kernel[(rows,)](d_act, gate_up, weights, d_gate_up, weighted, d_weights, size, WIDTH=width)
    return d_gate_up, weighted, d_weights


@triton.jit
def _swiglu_kernel(p_gate_up, p_act, size, WIDTH: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    ok = i < size
    gate = tl.load(p_gate_up + row * 2 * size + i, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(p_gate_up + row * 2 * size + size + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(p_act + row * size + i, (gate * tl.sigmoid(gate) * up).to(p_act.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward_kernel(
    p_d_act, p_gate_up, p_weights, p_d_gate_up, p_weighted, p_d_weights, size, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(p_weights + row).to(tl.float32)
    d_weight = tl.zeros((WIDTH,), dtype=tl.float32)
    kind = p_weighted.dtype.element_ty
    for start in range(0, size, WIDTH):
        i = start + tl.arange(0, WIDTH)
        ok = i < size
        at = row * 2 * size + i
        d_act = tl.load(p_d_act + row * size + i, mask=ok, other=0.0).to(tl.float32)
        gate = tl.load(p_gate_up + at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(p_gate_up + at + size, mask=ok, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        act_gate = gate * open_
        d_weight += d_act * act_gate * up
        tl.store(p_weighted + row * size + i, (act_gate * up * weight).to(kind), mask=ok)
        d_act *= weight
        tl.store(p_d_gate_up + at, (d_act * up * (open_ + act_gate * (1 - open_))).to(kind), mask=ok)
        tl.store(p_d_gate_up + at + size, (d_act * act_gate).to(kind), mask=ok)
    tl.store(p_d_weights + row, tl.sum(d_weight))
