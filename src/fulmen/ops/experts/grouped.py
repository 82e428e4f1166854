"""The experts' products: choices sorted by expert, then one grouped product per matrix, without a loop over experts.

Letters: T tokens, k choices each, R rows (the kept choices, sorted by expert), E experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.experts.routing import Routing


def experts_mlp(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    """sum over a token's kept choices of weight * w2 (SiLU(w1 x) * (w3 x)) (MiniMax-01, section 2).

    Args:
        x: [T, D].
        w13: [E, 2F, D], each expert's w1 (gate) over its w3 (up).
        w2: [E, D, F].
        routing: from `route`; its weights carry the gradient to the router.

    Returns:
        [T, D], the dtype of x. Products run in the autocast dtype where autocast is on, else in x's dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    choices, ends = _sort_by_expert(routing, len(w13))
    with torch.autocast(device, enabled=False):
        out = _ExpertsMLP.apply(x.to(dtype), w13.to(dtype), w2.to(dtype), routing.weights, choices, ends)
    return out.to(x.dtype)


def _sort_by_expert(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor]:
    """The kept choices (flat numbers t * k + slot) in the order of their experts [R], and where each expert ends [E]."""
    experts = routing.experts.flatten()
    choices = experts.argsort(stable=True)
    counts = routing.counts
    if routing.kept is not None:
        choices = choices[routing.kept.flatten()[choices]]
        counts = torch.bincount(experts[choices], minlength=num_experts)
    return choices, counts.cumsum(0, dtype=torch.int32)


class _ExpertsMLP(torch.autograd.Function):
    """Keeps the gate and up products [R, 2F]; what follows from them is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, choices: Tensor, ends: Tensor):
        k = weights.shape[1]
        gate_up = F.grouped_mm(x[choices // k], w13.mT, offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate).mul_(up), w2.mT, offs=ends)
        ctx.save_for_backward(x, w13, w2, weights, choices, ends, gate_up)
        return _unsort(y_RD.mul_(weights.flatten()[choices].to(y_RD.dtype)[:, None]), choices, weights.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        x, w13, w2, weights, choices, ends, gate_up = ctx.saved_tensors
        tokens = choices // weights.shape[1]
        weight_R1 = weights.flatten()[choices].to(x.dtype)[:, None]
        gate, up = gate_up.chunk(2, dim=-1)
        d_y = d_out[tokens]

        # The weight's own gradient is (w2^T d_y) . act, so the answers y need not be kept.
        act_gate = F.silu(gate)
        act = act_gate * up
        d_act = F.grouped_mm(d_y, w2, offs=ends)
        d_weights = torch.zeros_like(weights).view(-1)
        d_weights[choices] = (d_act * act).sum(dim=-1, dtype=torch.float32)
        d_act *= weight_R1
        d_w2 = F.grouped_mm(d_y.T, act.mul_(weight_R1), offs=ends)

        d_gate_up = torch.cat((torch.ops.aten.silu_backward(d_act * up, gate), d_act.mul_(act_gate)), dim=-1)
        d_w13 = F.grouped_mm(d_gate_up.T, x[tokens], offs=ends)
        d_x = _unsort(F.grouped_mm(d_gate_up, w13, offs=ends), choices, weights.shape)
        return d_x, d_w13, d_w2, d_weights.view_as(weights), None, None


def _unsort(rows_RD: Tensor, choices: Tensor, shape: torch.Size) -> Tensor:
    """Sum the rows of each token: [R, D] in the order of `choices` to [T, D]. Dropped choices count as zero."""
    tokens, k = shape
    filled = torch.empty if len(choices) == tokens * k else torch.zeros
    slots = filled(tokens * k, rows_RD.shape[1], dtype=rows_RD.dtype, device=rows_RD.device)
    slots[choices] = rows_RD
    return slots.view(tokens, k, -1).sum(dim=1)
