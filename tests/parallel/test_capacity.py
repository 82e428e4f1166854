"""The global router against one process over the tokens of all ranks, and what is summed over ranks."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks

from fulmen.ops.experts import balance_loss, expert_capacity, limit, route
from fulmen.parallel.capacity import drop_rate, drop_rates, global_capacity, sum_counts
from fulmen.train.monitor import routing_metrics

E = 6
TOKENS = (31, 0, 7, 50)
SKEWS = ((0.0,) * E, (2.0, 1, 0, 0, 0, -1), (99.0, 0, 0, 0, 0, -99))


def logits_of(skew, seed=0):
    """Of each rank; what is wanted by each differs, so that some have room for others."""
    torch.manual_seed(seed)
    return [torch.randn(n, E) + torch.tensor(skew).roll(rank % 2) for rank, n in enumerate(TOKENS)]


CASES = [(skew, k, factor) for skew in SKEWS for k in (1, 2) for factor in (0.5, 1.0, 1.25, 100.0)]


def kept_by_a_rank():
    rank, group = dist.get_rank(), dist.group.WORLD
    found = []
    for skew, k, factor in CASES:
        routing = route(logits_of(skew)[rank], k)
        kept = global_capacity(routing, factor, group)
        assert all(new is old for new, old in zip(kept[:4], routing[:4], strict=True))
        found.append((kept.kept, drop_rate([limit(routing, factor)], group), drop_rate([kept], group)))
    return found


def test_the_choices_that_are_kept_are_those_of_one_process():
    for (skew, k, factor), *ranks in zip(CASES, *run_ranks(len(TOKENS), kept_by_a_rank), strict=True):
        logits = logits_of(skew)
        expected = route(torch.cat(logits), k, expert_capacity(sum(TOKENS), E, k, factor))
        assert torch.equal(torch.cat([kept for kept, *_ in ranks]), expected.kept), (skew, k, factor)
        rates = drop_rates(logits, k, factor)
        assert rates[1] == pytest.approx(1 - expected.kept.float().mean().item())
        for _, *shares in ranks:
            assert shares == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_room_that_some_ranks_have_lowers_the_drop_rate_of_all(seed):
    own, shared = drop_rates(logits_of(SKEWS[1], seed), 2, 1.25)
    assert shared < own - 0.03
    assert drop_rates(logits_of(SKEWS[1], seed), 2, E) == (0, 0)


def test_a_share_of_capacity_by_hand():
    """Two ranks of two tokens, k = 1: each of 2 experts takes ceil(4 / 2) = 2 of all tokens, or 1 of each rank's."""
    first, other = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    assert drop_rates([torch.cat((first, first))] * 2, 1, 1.0) == (0.5, 0.5)
    assert drop_rates([torch.cat((first, first)), torch.cat((other, other))], 1, 1.0) == (0.5, 0)


def share_of_a_rank(skews, k):
    rank, group = dist.get_rank(), dist.group.WORLD
    logits = [logits_of(skew)[rank].requires_grad_() for skew in skews]
    routings = [limit(route(layer, k), 1.0) for layer in logits]
    shares = [balance_loss(routing) for routing in sum_counts(routings, group)]
    grads = torch.autograd.grad(sum(shares), logits)
    load = routing_metrics(sum_counts(routings, group))["expert_load"]
    return [share.detach() for share in shares], grads, drop_rate(routings, group), load


@pytest.mark.parametrize("k", [1, 2])
def test_shares_of_the_balance_loss_add_up_to_that_of_the_whole_row(k):
    ranks = run_ranks(len(TOKENS), share_of_a_rank, SKEWS, k)
    for layer, skew in enumerate(SKEWS):
        logits = torch.cat(logits_of(skew)).requires_grad_()
        expected = balance_loss(route(logits, k))
        expected.backward()
        torch.testing.assert_close(sum(shares[layer] for shares, *_ in ranks), expected.detach())
        torch.testing.assert_close(torch.cat([grads[layer] for _, grads, *_ in ranks]), logits.grad)
    routings = [route(torch.cat(logits_of(skew)), k) for skew in SKEWS]
    own = [drop_rates(logits_of(skew), k, 1.0)[0] for skew in SKEWS]
    for *_, dropped, load in ranks:
        assert dropped == pytest.approx(sum(own) / len(own), abs=1e-6)
        torch.testing.assert_close(torch.tensor(load), torch.tensor(routing_metrics(routings)["expert_load"]))
