"""The experts' products: choices sorted by expert, then one grouped product per matrix, without a loop over experts.

Letters: T tokens, k choices each, N kept choices, R rows of the grouped products, E experts, D hidden, F expert width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.experts.few import FEW, few_tokens_mlp
from fulmen.ops.experts.routing import Routing
from fulmen.ops.linear import product_dtype
from fulmen.ops.swiglu import swiglu, swiglu_backward

ROUND = 64


def experts_mlp(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    """sum over a token's kept choices of weight * w2 (SiLU(w1 x) * (w3 x)) (MiniMax-01, section 2).

    Args:
        x: [T, D].
        w13: [E, 2F, D], each expert's w1 (gate) over its w3 (up).
        w2: [E, D, F].
        routing: from `route`; its weights carry the gradient to the router.

    Returns:
        [T, D], the dtype of x. Products run in the autocast dtype where autocast is on, else in x's dtype.

    Raises:
        ValueError: rows of D or F numbers do not fill whole 16 bytes, which grouped products ask for.
    """
    device, dtype = x.device.type, product_dtype(x)
    if any(width * dtype.itemsize % 16 for width in (x.shape[1], w2.shape[2])):
        raise ValueError(
            f"hidden size and expert width must be multiples of {16 // dtype.itemsize} in {dtype}, "
            f"got {x.shape[1]} and {w2.shape[2]}"
        )
    if device == "cpu" and len(x) <= FEW and routing.kept is None and not torch.is_grad_enabled():
        return few_tokens_mlp(x.to(dtype), w13.to(dtype), w2.to(dtype), routing).to(x.dtype)
    with torch.autocast(device, enabled=False):
        out = _ExpertsMLP.apply(x.to(dtype), w13.to(dtype), w2.to(dtype), routing.weights, _plan(routing, dtype))
    return out.to(x.dtype)


class Plan(NamedTuple):
    """Which choice each row of the grouped products computes.

    Each expert's rows are padded to a multiple of `ROUND`, so that a CPU's matrix library meets few different shapes
    (it prepares a kernel per shape, which costs more than the product). Padding has weight 0 and is never read back.
    """

    rows: Tensor  # [N] the rows that hold the kept choices
    choices: Tensor  # [N] their choices, as t * k + slot
    tokens: Tensor  # [R] the token that each row reads, padding included
    weights: Tensor  # [R, 1] the row's weight in its token's answer
    ends: Tensor  # [E] int32, where each expert's rows end


def _plan(routing: Routing, dtype: torch.dtype) -> Plan:
    experts, num_experts = routing.experts.flatten(), len(routing.counts)
    choices, counts = experts.argsort(stable=True), routing.counts
    if routing.kept is not None:
        choices = choices[routing.kept.flatten()[choices]]
        counts = torch.bincount(experts[choices], minlength=num_experts)
    step = ROUND if len(choices) > num_experts * ROUND else 1
    ends = ((counts + step - 1) // step * step).cumsum(0)
    # An expert's rows move up by the padding of all experts before it.
    padding_before = torch.cat((ends.new_zeros(1), (ends - counts.cumsum(0))[:-1]))
    rows = torch.arange(len(choices), device=choices.device) + padding_before[experts[choices]]
    total = int(ends[-1])
    tokens = torch.zeros(total, dtype=torch.int64, device=choices.device)
    tokens[rows] = choices // routing.experts.shape[1]
    weights = torch.zeros(total, 1, dtype=dtype, device=choices.device)
    weights[rows, 0] = routing.weights.detach().flatten()[choices].to(dtype)
    return Plan(rows, choices, tokens, weights, ends.to(torch.int32))


class _ExpertsMLP(torch.autograd.Function):
    """Keeps the gate and up products [R, 2F]; what follows from them is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, plan: Plan):
        gate_up = F.grouped_mm(x.index_select(0, plan.tokens), w13.mT, offs=plan.ends)
        y_RD = F.grouped_mm(swiglu(gate_up), w2.mT, offs=plan.ends)
        ctx.save_for_backward(x, w13, w2, gate_up, *plan)
        ctx.weights_shape = weights.shape
        return _sum_per_token(y_RD.mul_(plan.weights), plan, weights.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, w13, w2, gate_up, *saved = ctx.saved_tensors
        plan = Plan(*saved)
        d_y = d_out.index_select(0, plan.tokens)
        # The weight's own gradient is (w2^T d_y) . act, so the answers y need not be kept.
        d_act = F.grouped_mm(d_y, w2, offs=plan.ends)
        d_gate_up, weighted_act, d_rows = swiglu_backward(d_act, gate_up, plan.weights)
        d_weights = torch.zeros(ctx.weights_shape, dtype=torch.float32, device=x.device)
        d_weights.view(-1)[plan.choices] = d_rows[plan.rows]
        d_w2 = F.grouped_mm(d_y.T, weighted_act, offs=plan.ends)
        d_w13 = F.grouped_mm(d_gate_up.T, x.index_select(0, plan.tokens), offs=plan.ends)
        d_x = _sum_per_token(F.grouped_mm(d_gate_up, w13, offs=plan.ends), plan, ctx.weights_shape)
        return d_x, d_w13, d_w2, d_weights, None


def _sum_per_token(rows_RD: Tensor, plan: Plan, shape: torch.Size) -> Tensor:
    """Sum the rows of each token's kept choices: [R, D] to [T, D]."""
    # A dropped choice reads some row and counts it as zero.
    if len(plan.choices) == 0:
        return rows_RD.new_zeros(shape[0], rows_RD.shape[1])
    row_of = torch.zeros(shape, dtype=torch.int64, device=rows_RD.device)
    row_of.view(-1)[plan.choices] = plan.rows
    dropped = None
    if len(plan.choices) < row_of.numel():
        dropped = torch.ones(shape, dtype=torch.bool, device=rows_RD.device)
        dropped.view(-1)[plan.choices] = False
    total = None
    for slot in range(shape[1]):
        part = rows_RD.index_select(0, row_of[:, slot])
        if dropped is not None:
            part.masked_fill_(dropped[:, slot, None], 0)
        total = part if total is None else total.add_(part)
    return total
