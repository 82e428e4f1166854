"""The experts' products: choices sorted by expert, then one grouped product per matrix, without a loop over experts.

Letters: T tokens, k choices each, N kept choices, R rows of the grouped products, E experts, D hidden, F expert width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops import gpu
from fulmen.ops.experts.few import FEW, few_tokens_mlp
from fulmen.ops.experts.routing import Routing
from fulmen.ops.experts.rows import permute, sum_per_token
from fulmen.ops.int8 import Int8, dense
from fulmen.ops.linear import product_dtype
from fulmen.ops.swiglu import swiglu, swiglu_backward

ROUND = 64


def experts_mlp(
    x: Tensor,
    w13: Tensor | Int8,
    w2: Tensor | Int8,
    routing: Routing,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
) -> Tensor:
    """alpha * x + beta * sum over a token's kept choices of weight * w2 (SiLU(w1 x) * (w3 x)) (MiniMax-01, section 2).

    Args:
        x: [T, D].
        w13: [E, 2F, D], each expert's w1 (gate) over its w3 (up).
        w2: [E, D, F]. Both may be int8, without gradients of them or of x.
        routing: from `route`; its weights carry the gradient to the router.
        alpha, beta: of the residual sum; a GPU adds x where it sums the choices, forward and backward.

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
    if beta != 1:
        routing = routing._replace(weights=beta * routing.weights)
    if device == "cpu" and 0 < len(x) <= FEW and routing.kept is None and not torch.is_grad_enabled():
        if not isinstance(w13, Int8):
            w13, w2 = w13.to(dtype), w2.to(dtype)
        out = few_tokens_mlp(x.to(dtype), w13, w2, routing).to(x.dtype)
        return torch.add(out, x, alpha=alpha) if alpha else out
    within = alpha if gpu.serves(x) and x.dtype == dtype else 0.0
    with torch.autocast(device, enabled=False):
        rest = (routing.weights, _plan(routing, dtype), within)
        if isinstance(w13, Int8):
            out = _experts_int8(x.to(dtype), w13, w2, *rest).to(x.dtype)
        else:
            out = gpu.apply(_ExpertsMLP, x.to(dtype), w13.to(dtype), w2.to(dtype), *rest).to(x.dtype)
    return torch.add(out, x, alpha=alpha) if alpha != within else out


class Plan(NamedTuple):
    """Which choice each row of the grouped products computes.

    Each expert's rows are padded: on a CPU to a multiple of `ROUND`, so that its matrix library meets few different
    shapes (it prepares a kernel per shape, which costs more than the product); on a GPU as the products ask. Padding
    has weight 0 and is never read back.
    """

    row_of: Tensor  # [T, k] each choice's row, -1 for a dropped one
    tokens: Tensor  # [R] the token that each row reads; of padding any, or -1 for zeros
    weights: Tensor  # [R, 1] the row's weight in its token's answer
    ends: Tensor  # [E] int32, where each expert's rows end


def _plan(routing: Routing, dtype: torch.dtype) -> Plan:
    if not gpu.serves(routing.weights):
        return _plan_on_host(routing, dtype)
    experts = routing.experts if routing.kept is None else routing.experts.masked_fill(~routing.kept, -1)
    return Plan(*gpu.experts.sort_choices(experts, routing.weights.detach(), len(routing.counts), dtype))


def _plan_on_host(routing: Routing, dtype: torch.dtype) -> Plan:
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
    row_of = torch.full_like(routing.experts, -1)
    row_of.view(-1)[choices] = rows
    return Plan(row_of, tokens, weights, ends.to(torch.int32))


class _ExpertsMLP(torch.autograd.Function):
    """Keeps the gate and up products [R, 2F]; what follows from them is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, plan: Plan, alpha: float):
        gate_up = F.grouped_mm(permute(x, plan.tokens), w13.mT, offs=plan.ends)
        y_RD = F.grouped_mm(swiglu(gate_up), w2.mT, offs=plan.ends)
        ctx.save_for_backward(x, w13, w2, gate_up, *plan)
        ctx.alpha = alpha
        return _mix(y_RD, x, weights, plan, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, w13, w2, gate_up, *saved = ctx.saved_tensors
        plan = Plan(*saved)
        d_y = permute(d_out, plan.tokens)
        # The weight's own gradient is (w2^T d_y) . act, so the answers y need not be kept.
        d_act = F.grouped_mm(d_y, w2, offs=plan.ends)
        d_gate_up, weighted_act, d_rows = swiglu_backward(d_act, gate_up, plan.weights)
        d_w2 = F.grouped_mm(d_y.T, weighted_act, offs=plan.ends)
        d_w13 = F.grouped_mm(d_gate_up.T, permute(x, plan.tokens), offs=plan.ends)
        d_x = sum_per_token(F.grouped_mm(d_gate_up, w13, offs=plan.ends), plan.row_of, d_out, ctx.alpha)
        # A dropped choice has no row to read.
        padded = torch.cat((d_rows, d_rows.new_zeros(1)))
        d_weights = padded[torch.where(plan.row_of < 0, len(d_rows), plan.row_of)]
        return d_x, d_w13, d_w2, d_weights, None, None


def _experts_int8(x: Tensor, w13: Int8, w2: Int8, weights: Tensor, plan: Plan, alpha: float) -> Tensor:
    """The forward pass with one of the matrices at a time in x's dtype."""
    gate_up = F.grouped_mm(permute(x, plan.tokens), dense(w13, x.dtype).mT, offs=plan.ends)
    return _mix(F.grouped_mm(swiglu(gate_up), dense(w2, x.dtype).mT, offs=plan.ends), x, weights, plan, alpha)


def _mix(y_RD: Tensor, x: Tensor, weights: Tensor, plan: Plan, alpha: float) -> Tensor:
    """The weighted sum of each token's rows, which may be overwritten; on a GPU alpha * x [T, D] as well."""
    if gpu.serves(y_RD):
        return gpu.experts.unpermute(y_RD, plan.row_of, weights, residual=x, alpha=alpha)
    return sum_per_token(y_RD.mul_(plan.weights), plan.row_of)
