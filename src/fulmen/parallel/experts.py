"""A mixture of experts spread over ranks: the rows of tokens' choices travel to their experts, and answers back.

Of the ranks along `ep` each has some of the experts, of those along `etp` each has a part of every expert's width, and
every rank has tokens of its own. What happens to them:

    dispatch   each choice's row to the rank along ep that has its expert
    gather     the rows there to all along etp that have a part of it
    compute    the rows of each expert together, by grouped products
    scatter    each row's partial answers back along etp and summed
    combine    the answers back along ep, and summed per token

The tokens are cut into groups, and while one group is computed those before and after it travel. Letters: T tokens, k
choices each, R rows that leave, N rows that are computed here, E experts, e of them here, D hidden, F expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fulmen.ops.experts import Routing, experts_mlp
from fulmen.ops.experts.rows import Places, RowsOfTokens, SumsOfRows
from fulmen.ops.linear import product_dtype
from fulmen.parallel.collectives import Travelling, Waits, gather, launch


def spread_experts_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    routing: Routing,
    *,
    ep: ProcessGroup,
    etp: ProcessGroup,
    groups: int = 1,
    alpha: float = 0.0,
    beta: float = 1.0,
    waits: Waits | None = None,
) -> Tensor:
    """`fulmen.ops.experts.experts_mlp` of experts that are spread over the ranks of two groups, which all call it.

    Args:
        x: [T, D], this rank's tokens, of which each rank may have another number, also 0.
        w13: [E / ep, 2 F / etp, D]: rank i along ep has the experts from i * E / ep on; rank j along etp of each expert
            the gate rows and under them the up rows from j * F / etp on.
        w2: [E / ep, D, F / etp]. Gradients of both are sums over the tokens of all ranks of the two groups.
        routing: of the tokens here over all E experts.
        groups: that the tokens are cut into, the same number on every rank. Each rank's gradients must be asked for.
        alpha, beta: of the residual sum.
        waits: counts the time lost to communication.

    Returns:
        [T, D], the dtype of x. Products run and rows travel in the autocast dtype where autocast is on, else in x's.

    Raises:
        ValueError: matrices of another number of experts than the routing's; rows that do not fill whole 16 bytes.
    """
    if len(w13) * ep.size() != len(routing.counts):
        raise ValueError(f"{len(w13)} experts on each of {ep.size()} ranks, and a routing over {len(routing.counts)}")
    if ep.size() == etp.size() == 1:
        return experts_mlp(x, w13, w2, routing, alpha=alpha, beta=beta)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        stages = _Stages(w13.to(dtype), w2.to(dtype), ep, etp, waits or Waits())
        rows_of = routing._replace(weights=beta * routing.weights)
        parts = _cut(x.to(dtype), rows_of, groups, ep, etp)
        out = torch.cat(_pipelined(parts, stages.in_order())).to(x.dtype)
    return torch.add(out, x, alpha=alpha) if alpha else out


@dataclass(frozen=True)
class _Stages:
    """What is done with a group of tokens; each stage takes what the one before it began, and begins something."""

    w13: Tensor
    w2: Tensor
    ep: ProcessGroup
    etp: ProcessGroup
    waits: Waits

    def in_order(self) -> list[Callable]:
        if self.etp.size() == 1:
            return [self.dispatch, self.compute, self.combine]
        return [self.dispatch, self.gather, self.compute, self.scatter, self.combine]

    def dispatch(self, group: "_Group", _: None) -> Travelling:
        rows = RowsOfTokens.apply(group.x, group.places)
        # A row's weight travels beside it, for what it is multiplied by is kept where it is computed.
        return launch(torch.cat((rows, group.weights), dim=1), group.send, group.receive, self.ep, self.waits)

    def gather(self, group: "_Group", arriving: Travelling) -> Travelling:
        rows = arriving.wait()
        send = [len(rows)] * self.etp.size()
        return launch(rows.repeat(len(send), 1), send, group.gathered, self.etp, self.waits)

    def compute(self, group: "_Group", arriving: Travelling) -> Travelling:
        rows, weights = arriving.wait().split((self.w2.shape[1], 1), dim=1)
        # The router's probabilities are not asked for.
        routing = Routing(group.experts, weights.float(), weights.new_empty(0), group.counts, kept=None)
        answers = experts_mlp(rows.contiguous(), self.w13, self.w2, routing)
        if self.etp.size() == 1:
            return self._return(group, answers)
        receive = [sum(group.receive)] * self.etp.size()
        return launch(answers, group.gathered, receive, self.etp, self.waits)

    def scatter(self, group: "_Group", arriving: Travelling) -> Travelling:
        parts = arriving.wait().view(self.etp.size(), sum(group.receive), self.w2.shape[1])
        return self._return(group, parts.sum(dim=0))

    def combine(self, group: "_Group", arriving: Travelling) -> Tensor:
        return SumsOfRows.apply(arriving.wait(), group.places)

    def _return(self, group: "_Group", answers: Tensor) -> Travelling:
        return launch(answers, group.receive, group.send, self.ep, self.waits)


def _pipelined(groups: Sequence[Any], stages: Sequence[Callable]) -> list[Any]:
    """Each group through all stages, which take it and what the stage before gave.

    At every step each group is one stage further than the next, and the latest is served first: so what a group's stage
    began travels while earlier groups are computed.
    """
    states: list[Any] = [None] * len(groups)
    for step in range(len(groups) + len(stages) - 1):
        for number, stage in enumerate(stages):
            if 0 <= (at := step - number) < len(groups):
                states[at] = stage(groups[at], states[at])
    return states


@dataclass(frozen=True)
class _Group:
    """Some of this rank's tokens; their rows lie in the order of their experts' numbers."""

    x: Tensor  # [T, D]
    places: Places  # of its R rows
    weights: Tensor  # [R, 1]
    send: list[int]  # rows to each rank along ep
    receive: list[int]  # rows from each
    gathered: list[int]  # rows that each rank along etp received; together N
    experts: Tensor  # [N, 1] int64, the expert of each row that is computed here, by its number here
    counts: Tensor  # [e] int64, rows of each


def _cut(x: Tensor, routing: Routing, groups: int, ep: ProcessGroup, etp: ProcessGroup) -> list[_Group]:
    """The groups of tokens; asks the other ranks, once for all groups, how many rows there are."""
    num_experts, here = len(routing.counts), len(routing.counts) // ep.size()
    experts = routing.experts if routing.kept is None else routing.experts.masked_fill(~routing.kept, num_experts)
    ordered = [_by_expert(part, num_experts) for part in experts.tensor_split(groups)]
    counts = torch.stack([counts for *_, counts in ordered])  # [groups, E]
    coming = gather(counts, ep)[..., ep.rank() * here :][..., :here]
    coming = gather(coming, etp)  # [etp, ep, groups, e]
    send = counts.view(groups, ep.size(), here).sum(dim=2).tolist()
    gathered = coming.sum(dim=3).movedim(2, 0).tolist()  # [groups][etp][ep]
    numbers = torch.arange(here, device=x.device).repeat(etp.size() * ep.size())
    found, tokens, weights = [], x.tensor_split(groups), routing.weights.tensor_split(groups)
    for i, (order, row_of, _) in enumerate(ordered):
        choices, total = order[: sum(send[i])], sum(map(sum, gathered[i]))
        found.append(
            _Group(
                x=tokens[i],
                places=Places(row_of, choices // row_of.shape[1]),
                weights=weights[i].flatten().index_select(0, choices)[:, None].to(x.dtype),
                send=send[i],
                receive=gathered[i][etp.rank()],
                gathered=list(map(sum, gathered[i])),
                experts=numbers.repeat_interleave(coming[:, :, i].flatten(), output_size=total)[:, None],
                counts=coming[:, :, i].sum(dim=(0, 1)),
            )
        )
    return found


def _by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order choices by expert; experts [T, k], E for a dropped choice.

    Returns that order [T k], dropped ones last, each choice's row [T, k], -1 for these, and counts [E] of the others.
    """
    ordered, order = experts.flatten().sort(stable=True)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(len(order), device=order.device)
    starts = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=order.device))
    return order, row_of.view_as(experts).masked_fill_(experts == num_experts, -1), starts.diff()
