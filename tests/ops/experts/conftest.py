"""The oracle of the experts: dense, in float64, gradients by autograd, drops decided by a loop in Python."""

import pytest
import torch


def _oracle(x, w13, w2, logits, k, capacity=None):
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
    return _oracle
