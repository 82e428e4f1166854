"""What is watched in the experts: load, drops, the router's entropy."""

import math

import torch
from torch import Tensor

from fulmen.ops.experts import Routing


def routing_metrics(routing: list[Routing]) -> dict[str, float | list]:
    """Metrics of one batch's routing, of all layers.

    expert_load: [layers][E], an expert's choices over its fair share (1 is balance); expert_load_max: the largest of
    them; drop_rate: share of all choices that found no room; router_entropy: mean over tokens and layers of the
    router's entropy over log E (1 is undecided, 0 collapsed).
    """
    loads, dropped, entropies = [], [], []
    for layer in routing:
        num_experts = layer.probs.shape[1]
        loads.append(layer.counts.float() * num_experts / layer.counts.sum())
        dropped.append(torch.zeros(()) if layer.kept is None else 1 - layer.kept.float().mean().cpu())
        entropies.append(_entropy(layer.probs).mean() / math.log(max(num_experts, 2)))
    load = torch.stack(loads)
    return {
        "expert_load": load.tolist(),
        "expert_load_max": load.max().item(),
        "drop_rate": torch.stack(dropped).mean().item(),
        "router_entropy": torch.stack(entropies).mean().item(),
    }


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs.detach()).sum(dim=-1)
