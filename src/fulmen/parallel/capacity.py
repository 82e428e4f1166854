"""The global router: one capacity of the experts for the tokens of all ranks; and what is counted over them.

MiniMax-01, section 2.2: with a capacity for each rank's tokens one drops what another has room for.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fulmen.ops.experts import Routing, expert_capacity, keep_first, limit, route
from fulmen.parallel.collectives import gather


def global_capacity(routing: Routing, factor: float, group: ProcessGroup) -> Routing:
    """`fulmen.ops.experts.limit` of the tokens of all ranks of a group, laid end to end in the ranks' order.

    Each expert takes ceil(factor * k * tokens / E) of the choices of all of them, those of the first tokens. The ranks
    tell each other how many choices wait for each expert; all must call it.
    """
    waiting = gather(routing.counts, group)
    (_, k), num_experts = routing.experts.shape, len(routing.counts)
    capacity = expert_capacity(int(waiting.sum()) // k, num_experts, k, factor)
    return keep_first(routing, capacity - waiting[: group.rank()].sum(dim=0))


def sum_counts(routings: Sequence[Routing], group: ProcessGroup) -> list[Routing]:
    """The routings of a model's layers with `counts` of the tokens of all ranks of a group.

    Of ranks that hold one row it makes `balance_loss` each one's share of the row's; and the load of an expert that of
    all.
    """
    counts = torch.stack([routing.counts for routing in routings])
    dist.all_reduce(counts, group=group)
    return [routing._replace(counts=total) for routing, total in zip(routings, counts, strict=True)]


def drop_rate(routings: Sequence[Routing], group: ProcessGroup) -> float:
    """Share of all choices of all ranks of a group, and of all of a model's layers, that found no room."""
    dropped = sum(0 if routing.kept is None else int((~routing.kept).sum()) for routing in routings)
    choices = sum(routing.experts.numel() for routing in routings)
    sums = torch.tensor((dropped, choices), device=routings[0].experts.device)
    dist.all_reduce(sums, group=group)
    return (sums[0] / sums[1]).item()


def drop_rates(logits: Sequence[Tensor], k: int, factor: float) -> tuple[float, float]:
    """Shares of choices that would be dropped of the router's logits [T_r, E] of each rank, computed without ranks.

    First with a capacity of each rank's own tokens, then with the global router.
    """
    local = [limit(route(part, k), factor).kept for part in logits]
    together = limit(route(torch.cat(list(logits)), k), factor).kept
    return 1 - torch.cat(local).float().mean().item(), 1 - together.float().mean().item()
