"""Top-k routing, capacity and the balance loss (MiniMax-01, section 2.2; GShard for the loss)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops import cpu, gpu


class Routing(NamedTuple):
    """Where the T tokens of a call go.

    With T = 3 tokens, E = 4 experts, k = 2: experts = [[2, 0], [2, 1], [3, 2]] sends token 0 to experts 2 and 0, and
    weights[0] = [0.7, 0.3] mixes their answers. counts = [1, 1, 3, 1]; with a capacity of 2, kept[2, 1] is False.
    """

    experts: Tensor  # [T, k] int64, best first
    weights: Tensor  # [T, k] fp32, sum 1 over k
    probs: Tensor  # [T, E] fp32, the softmax over all experts
    counts: Tensor  # [E] int64, choices per expert before any drop
    kept: Tensor | None  # [T, k] bool, which choices found room; None: all did


def expert_capacity(tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Choices that one expert takes: ceil(factor * k * tokens / E)."""
    # Rounded first: 1.1 * 2 * 40 / 8 is 11.000000000000002 in floating point.
    return math.ceil(round(factor * k * tokens / num_experts, 6))


def route(logits: Tensor, k: int, capacity: int | None = None) -> Routing:
    """Softmax over the router's logits [T, E], the k largest of each token, renormalised to sum 1.

    With a `capacity`, an expert keeps the choices of the tokens that come first and the rest is dropped (token-drop,
    for training): the residual passes such a token on. Without, nothing is dropped (inference).
    """
    if capacity is not None:
        return keep_first(route(logits, k), capacity)
    if k <= logits.shape[1] and cpu.serves(len(logits), logits):
        return Routing(*cpu.route(logits, k), kept=None)
    if k <= logits.shape[1] and gpu.serves(logits):
        experts, weights, probs = gpu.experts.route(logits, k)
        return Routing(experts, weights, probs, gpu.experts.count_choices(experts, logits.shape[1]), kept=None)
    probs = logits.float().softmax(dim=-1)
    top, experts = probs.topk(k, dim=-1)
    weights = top / top.sum(dim=-1, keepdim=True)
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    return Routing(experts, weights, probs, counts, kept=None)


def limit(routing: Routing, factor: float) -> Routing:
    """Token-drop: an expert keeps ceil(factor * k * tokens / E) choices, those of the tokens that come first."""
    tokens, k = routing.experts.shape
    return keep_first(routing, expert_capacity(tokens, len(routing.counts), k, factor))


def keep_first(routing: Routing, room: int | Tensor) -> Routing:
    """Of each expert's choices keep so many, those of the tokens that come first; `room` may be of each expert [E]."""
    flat, counts = routing.experts.flatten(), routing.counts
    by_expert = flat.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[by_expert] = torch.arange(len(flat), device=flat.device) - starts[flat[by_expert]]
    most = room[flat] if isinstance(room, Tensor) else room
    return routing._replace(kept=(place < most).view_as(routing.experts))


def balance_loss(routing: Routing) -> Tensor:
    """(1/E) sum_i f_i m_i, with f_i = (choices of expert i) * E / (k T) and m_i = mean probability of i, times E.

    Our convention: f and m are both scaled by E, so perfect balance gives 1, and all tokens to the same k experts gives
    up to E / k. The gradient flows through m alone. Multiply by the recipe's coefficient (0.01 in the report).

    `counts` may be those of more tokens than are here: it is then the share that these have in the loss of all.
    """
    choices, k = routing.counts.sum(), routing.experts.shape[1]
    fraction = routing.counts.float() * (len(routing.counts) / choices)
    return (fraction * routing.probs.sum(dim=0) / (choices / k)).sum()
