"""Who gets which token: top-k, renormalisation, capacity, balance."""

import math

import pytest
import torch

from fulmen.ops.experts import Routing, balance_loss, expert_capacity, keep_first, limit, route


def test_the_example_of_the_docstring():
    logits = torch.tensor([[0.3, 0, 0.7, 0], [0, 0.4, 0.6, 0], [0, 0, 0.4, 0.6]]).clamp(min=1e-9).log()
    routing = route(logits, 2, capacity=2)
    assert routing.experts.tolist() == [[2, 0], [2, 1], [3, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.6, 0.4]]))
    assert routing.counts.tolist() == [1, 1, 3, 1]
    assert routing.kept.tolist() == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (8, 1), (8, 8), (1, 1), (32, 2)])
def test_softmax_over_all_experts_then_the_k_best_renormalised(num_experts, k):
    logits = torch.randn(40, num_experts)
    routing = route(logits, k)
    for t, row in enumerate(logits.double().tolist()):
        exps = [math.exp(x) for x in row]
        best = sorted(range(num_experts), key=lambda e: -row[e])[:k]
        assert routing.experts[t].tolist() == best
        expected = torch.tensor([exps[e] for e in best]) / sum(exps[e] for e in best)
        torch.testing.assert_close(routing.weights[t], expected)
        torch.testing.assert_close(routing.probs[t], torch.tensor(exps) / sum(exps))
    assert routing.kept is None
    assert routing.counts.tolist() == [(routing.experts == e).sum() for e in range(num_experts)]


def test_bf16_logits_are_routed_in_fp32():
    logits = torch.randn(9, 4).bfloat16()
    routing = route(logits, 2)
    assert routing.weights.dtype == routing.probs.dtype == torch.float32
    assert torch.equal(routing.probs, logits.float().softmax(dim=-1))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0, 1, 5, 11, 1000])
def test_the_tokens_that_come_first_find_room(k, capacity):
    logits = torch.randn(50, 6) + torch.tensor([2.0, 1, 0, 0, 0, -1])
    routing = route(logits, k, capacity)
    taken = [0] * 6
    for t in range(50):
        for slot in range(k):
            expert = routing.experts[t, slot]
            assert routing.kept[t, slot] == (taken[expert] < capacity)
            taken[expert] += 1
    assert routing.counts.tolist() == taken
    # What is kept is weighed as before: a dropped choice is lost, not spread over the others.
    assert torch.equal(routing.weights, route(logits, k).weights)


def test_gradients_of_the_weights():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    best = logits.topk(2, dim=1).indices
    d_weights = torch.randn(5, 2, dtype=torch.float64)
    expected = torch.autograd.grad((logits.gather(1, best).softmax(dim=1) * d_weights).sum(), logits)[0]
    actual = torch.autograd.grad((route(logits, 2).weights * d_weights).sum(), logits)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "factor", "expected"),
    [(64, 8, 2, 1.0, 16), (64, 8, 2, 1.25, 20), (10, 3, 1, 1.0, 4), (1, 32, 2, 1.0, 1), (100, 8, 2, 0.5, 13)],
)
def test_capacity_is_rounded_up(tokens, num_experts, k, factor, expected):
    assert expert_capacity(tokens, num_experts, k, factor) == expected


def test_a_limit_is_the_capacity_of_the_tokens():
    logits = torch.randn(50, 6) + torch.tensor([2.0, 1, 0, 0, 0, -1])
    expected = route(logits, 2, expert_capacity(50, 6, 2, 1.1))
    limited = limit(route(logits, 2), 1.1)
    assert limited.kept.logical_not().any()
    assert all(torch.equal(found, wanted) for found, wanted in zip(limited, expected, strict=True))


def test_each_expert_may_have_its_own_room():
    routing = route(torch.randn(50, 6), 2)
    kept = keep_first(routing, torch.tensor([3, 0, -4, 100, 1, 7])).kept
    for expert, room in enumerate((3, 0, 0, 100, 1, 7)):
        mine = routing.experts == expert
        assert torch.equal(kept[mine], torch.arange(int(mine.sum())) < room)


def routing_of(probs, experts):
    probs, experts = torch.tensor(probs), torch.tensor(experts)
    counts = torch.bincount(experts.flatten(), minlength=probs.shape[1])
    return Routing(experts, torch.ones(experts.shape), probs, counts, None)


def test_perfect_balance_is_1():
    assert balance_loss(routing_of([[0.25] * 4] * 4, [[0, 1], [1, 2], [2, 3], [3, 0]])) == 1
    # Balanced counts are enough, whatever the probabilities.
    probs = torch.rand(4, 4).softmax(dim=1).tolist()
    assert balance_loss(routing_of(probs, [[0], [1], [2], [3]])).item() == pytest.approx(1)


def test_all_tokens_to_one_expert_is_the_number_of_experts():
    assert balance_loss(routing_of([[0.0, 1, 0, 0]] * 5, [[1]] * 5)) == 4
    assert balance_loss(routing_of([[0.0, 0.5, 0.5, 0]] * 5, [[1, 2]] * 5)) == 2


def test_balance_loss_and_its_gradient_by_the_formula(compare):
    logits = torch.randn(30, 5, requires_grad=True)
    routing = route(logits, 2)
    loss = balance_loss(routing)
    fraction = torch.tensor([(routing.experts == e).sum() / 60 for e in range(5)], dtype=torch.float64)
    leaf = logits.detach().double().requires_grad_()
    expected = 5 * (fraction * leaf.softmax(dim=1).mean(dim=0)).sum()
    names, results = ("loss", "d_logits"), []
    for value, of in ((loss, logits), (expected, leaf)):
        results.append(dict(zip(names, (value.detach(), torch.autograd.grad(value, of)[0]), strict=True)))
    compare(*results, 1e-5)


def test_descending_the_balance_loss_balances():
    logits = (torch.randn(200, 4) * 0.1 + torch.tensor([1.0, 0.5, 0, 0])).requires_grad_()
    before = route(logits, 1).counts
    for _ in range(200):
        (grad,) = torch.autograd.grad(balance_loss(route(logits, 1)), logits)
        logits = (logits - 20 * grad).detach().requires_grad_()
    assert route(logits, 1).counts.max() < before.max() / 2


def test_drops_do_not_change_the_counts_that_balance_sees():
    logits = torch.randn(30, 5)
    assert balance_loss(route(logits, 2, capacity=1)) == balance_loss(route(logits, 2))


def test_shares_of_the_balance_loss_of_parts_add_up_to_that_of_the_whole():
    logits = torch.randn(30, 5)
    whole = route(logits, 2)
    shares = [balance_loss(route(part, 2)._replace(counts=whole.counts)) for part in logits.split([4, 0, 26])]
    torch.testing.assert_close(sum(shares), balance_loss(whole))
    assert shares[1] == 0
