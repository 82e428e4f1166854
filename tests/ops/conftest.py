"""How an operation is held against its oracle: every output and every gradient, by one relative error.

And the oracle of the experts: dense, in float64, gradients by autograd, drops decided by a loop in Python.
"""

import pytest
import torch


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; absolute where nothing but rounding is expected."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm > 1e-12 else 1.0)


def _compare(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: _relative_error(actual[name], expected[name]) for name in expected}
    # Written so that a nan fails.
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.fixture
def relative_error():
    return _relative_error


@pytest.fixture
def compare():
    """compare(actual, expected, tolerance) holds dicts of tensors against each other."""
    return _compare


def _dense_experts(x, w13, w2, logits, k, capacity=None):
    """Every expert answers every token; a choice that is not taken, or is dropped, has weight zero."""
    num_experts = logits.shape[1]
    exps = (logits - logits.max(dim=1, keepdim=True).values).exp()
    probs = exps / exps.sum(dim=1, keepdim=True)
    chosen, room = torch.zeros(probs.shape, dtype=torch.float64), [capacity] * num_experts
    kept = torch.zeros_like(chosen)
    for t, row in enumerate(probs.tolist()):
        for e in sorted(range(num_experts), key=lambda e: -row[e])[:k]:
            chosen[t, e] = 1
            if capacity is None or room[e] > 0:
                kept[t, e] = 1
                room[e] = None if capacity is None else room[e] - 1
    weights = probs * chosen / (probs * chosen).sum(dim=1, keepdim=True) * kept
    gate, up = torch.einsum("efd,td->tef", w13, x).chunk(2, dim=-1)
    act = gate / (1 + (-gate).exp()) * up
    return torch.einsum("te,edf,tef->td", weights, w2, act)


@pytest.fixture
def oracle():
    """oracle(x, w13, w2, logits, k, capacity)."""
    return _dense_experts
