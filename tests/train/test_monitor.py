"""What is watched in the experts, by hand-computed values."""

import math

import pytest
import torch

from fulmen.ops.experts import route
from fulmen.train.monitor import routing_metrics


def logits(*choices, num_experts=4):
    """A router that is sure: each token's first choice gets 20, its second 19, the others 0."""
    rows = torch.zeros(len(choices), num_experts)
    for token, (first, second) in enumerate(choices):
        rows[token, first], rows[token, second] = 20.0, 19.0
    return rows


def test_load_and_drops_by_hand():
    # Experts 0..3 are chosen 3, 2, 1 and 0 times; the fair share is 1.5. With room for 2, one of expert 0 is dropped.
    routing = route(logits((0, 1), (0, 1), (0, 2)), 2, capacity=2)
    metrics = routing_metrics([routing])
    assert metrics["expert_load"] == [pytest.approx([2.0, 4 / 3, 2 / 3, 0.0])]
    assert metrics["expert_load_max"] == pytest.approx(2.0)
    assert metrics["drop_rate"] == pytest.approx(1 / 6)


def test_layers_are_listed_and_averaged():
    balanced = route(logits((0, 1), (2, 3)), 2, capacity=1)
    crowded = route(logits((0, 1), (0, 1)), 2, capacity=1)
    metrics = routing_metrics([balanced, crowded])
    assert metrics["expert_load"] == [[1, 1, 1, 1], [2, 2, 0, 0]]
    assert metrics["expert_load_max"] == 2
    assert metrics["drop_rate"] == pytest.approx((0 + 2 / 4) / 2)


def test_without_capacity_nothing_is_dropped():
    assert routing_metrics([route(logits((0, 1), (0, 1)), 2)])["drop_rate"] == 0


def test_entropy_by_hand():
    undecided, collapsed = torch.zeros(5, 4), torch.tensor([[500.0, 0, 0, 0]] * 5)
    half = torch.tensor([[50.0, 50.0, 0, 0]] * 5)
    entropies = [routing_metrics([route(rows, 2)])["router_entropy"] for rows in (undecided, collapsed, half)]
    assert entropies == pytest.approx([1.0, 0.0, math.log(2) / math.log(4)], abs=1e-6)
    both = routing_metrics([route(undecided, 2), route(collapsed, 2)])
    assert both["router_entropy"] == pytest.approx(0.5)


def test_a_single_expert_has_no_entropy():
    metrics = routing_metrics([route(torch.zeros(3, 1), 1, capacity=2)])
    assert (metrics["router_entropy"], metrics["expert_load"]) == (0, [[1.0]])
    assert metrics["drop_rate"] == pytest.approx(1 / 3)


def test_values_are_what_json_holds():
    rows = torch.randn(6, 4, requires_grad=True)
    metrics = routing_metrics([route(rows, 2, capacity=2)])
    assert all(isinstance(value, float | list) for value in metrics.values())
