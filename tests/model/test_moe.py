"""The mixture-of-experts layer against section 5 of the model's description, token by token in float64."""

from dataclasses import replace

import pytest
import torch

from fulmen.model.moe import MixtureOfExperts


def formula(layer, x, k):
    """Softmax over all experts, the k best renormalised, each w2 (SiLU(w1 x) * (w3 x)); x [hidden]."""
    gate, w13, w2 = (y.detach().double() for y in (layer.gate.weight, layer.experts.w13, layer.experts.w2))
    probs = (gate @ x).exp() / (gate @ x).exp().sum()
    best = probs.sort(descending=True).indices[:k]
    out = torch.zeros_like(x)
    for e in best:
        w1, w3 = w13[e, : w13.shape[1] // 2], w13[e, w13.shape[1] // 2 :]
        out += probs[e] / probs[best].sum() * (w2[e] @ ((w1 @ x) / (1 + (-(w1 @ x)).exp()) * (w3 @ x)))
    return out


@torch.no_grad()
def build(config, gain=1.0):
    layer = MixtureOfExperts(config)
    layer.init_weights(gain)
    return layer


@pytest.fixture
def layer(config):
    return build(config)


@pytest.mark.parametrize("k", [1, 2, 6])
@torch.no_grad()
def test_the_formula(config, k):
    layer = build(replace(config, experts_per_token=k))
    x = torch.randn(2, 9, config.hidden_size)
    out, routing = layer(x)
    expected = torch.stack([torch.stack([formula(layer, token.double(), k) for token in row]) for row in x])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert routing.experts.shape == (18, k)
    assert routing.kept is None


@pytest.mark.parametrize("tokens", [9, 100])
@torch.no_grad()
def test_the_residual_sum(layer, config, tokens):
    x = torch.randn(2, tokens, config.hidden_size)
    torch.testing.assert_close(layer(x, alpha=1.7, beta=0.6)[0], 1.7 * x + 0.6 * layer(x)[0])


@torch.no_grad()
def test_a_capacity_factor_drops_what_exceeds_its_share(config, layer):
    x = torch.randn(1, 60, config.hidden_size)
    _, routing = layer(x, 0.5)
    # ceil(0.5 * 2 * 60 / 6) choices an expert.
    kept = torch.bincount(routing.experts[routing.kept], minlength=6)
    assert kept.max() == 10
    assert torch.equal(kept, routing.counts.clamp(max=10))
    _, roomy = layer(x, 6.0)
    assert roomy.kept.all()


def test_autocast_leaves_the_router_in_fp32(config, layer):
    x = torch.randn(1, 50, config.hidden_size)
    expected = layer(x)[1].probs
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[1].probs, expected)


@pytest.mark.parametrize(
    ("hidden", "expert"),
    # Where hidden is 2 F, w2 has as many rows as w13.
    [(48, 40), (64, 32), (32, 64)],
)
def test_init_is_xavier_of_each_matrix_with_the_gain_on_experts(config, hidden, expert):
    layer = build(replace(config, hidden_size=hidden, expert_size=expert, num_experts=16), gain=0.3)
    std = 0.3 * (2 / (hidden + expert)) ** 0.5
    w1, w3 = layer.experts.w13.chunk(2, dim=1)
    for weight in (w1, w3, layer.experts.w2):
        assert weight.std().item() == pytest.approx(std, rel=0.04)
        # Every expert is drawn on its own.
        assert len(set(weight.sum(dim=(1, 2)).tolist())) == 16
    assert layer.gate.weight.std().item() == pytest.approx((2 / (hidden + 16)) ** 0.5, rel=0.15)
