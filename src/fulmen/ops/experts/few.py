"""The experts' products for a handful of tokens, as in decoding: no sorting, each weight read once, where it lies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops import cpu
from fulmen.ops.experts.routing import Routing
from fulmen.ops.int8 import Int8, dense

FEW = 64
"""Up to so many tokens this form is the faster on a CPU, where preparing the grouped products costs more than they."""


def few_tokens_mlp(x: Tensor, w13: Tensor | Int8, w2: Tensor | Int8, routing: Routing) -> Tensor:
    """See `fulmen.ops.experts.experts_mlp`; without gradients and without dropped choices."""
    if cpu.serves(len(x), x, *(() if isinstance(w13, Int8) else (w13, w2)), routing.weights):
        return cpu.experts_mlp(x, w13, w2, routing.experts, routing.weights)
    w13, w2 = dense(w13, x.dtype), dense(w2, x.dtype)
    if len(x) == 1:
        return _one_token(x, w13, w2, routing)
    return _padded(x, w13, w2, routing)


def _one_token(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    out = None
    for expert, weight in zip(routing.experts[0].tolist(), routing.weights[0].tolist(), strict=True):
        gate, up = F.linear(x, w13[expert]).chunk(2, dim=-1)
        answer = F.linear(F.silu(gate).mul_(up), w2[expert])
        out = answer.mul_(weight) if out is None else out.add_(answer, alpha=weight)
    return out


def _padded(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    """Every expert gets as many columns as the busiest has tokens; the weights stand left, which reads them best."""
    tokens, k = routing.experts.shape
    experts = routing.experts.flatten()
    chosen = F.one_hot(experts, len(w13))
    place = chosen.cumsum(dim=0).gather(1, experts[:, None])[:, 0] - 1
    columns = x.new_zeros(len(w13), int(place.max()) + 1, x.shape[1])
    columns[experts, place] = x.repeat_interleave(k, dim=0)
    gate, up = torch.bmm(w13, columns.mT).chunk(2, dim=1)
    answers = torch.bmm(w2, F.silu(gate).mul_(up)).mT[experts, place]
    return torch.einsum("tkd,tk->td", answers.view(tokens, k, -1), routing.weights.to(x.dtype))
