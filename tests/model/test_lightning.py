"""The lightning layer against section 3 of the model's description, written out in float64."""

import math
from dataclasses import replace

import pytest
import torch

from fulmen.model import LanguageModel
from fulmen.model.cache import LightningState
from fulmen.model.lightning import LightningAttention


def silu(x):
    return x / (1 + (-x).exp())


def formula(layer, config, number, x):
    """out_proj(RMSNorm over H*D (attention(SiLU(qkv))) * sigmoid(gate)); each head's rows are q, then k, then v."""
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    heads, width = config.num_heads, config.head_dim
    packed = silu(x.double() @ w["qkv_proj.weight"].T).unflatten(-1, (heads, 3 * width))
    q, k, v = packed.split(width, dim=-1)
    outs = []
    for h in range(heads):
        rate = 2 ** (-8 * (h + 1) / heads) * (1 - number / (config.num_layers - 1 + 1e-5) + 1e-5)
        state, rows = torch.zeros(len(x), width, width, dtype=torch.float64), []
        for t in range(x.shape[1]):
            state = math.exp(-rate) * state + k[:, t, h, :, None] * v[:, t, h, None]
            rows.append((q[:, t, h, None] @ state)[:, 0])
        outs.append(torch.stack(rows, dim=1))
    y = torch.cat(outs, dim=-1)
    y = y / (y.square().mean(dim=-1, keepdim=True) + config.lightning_norm_eps).sqrt() * w["norm.weight"]
    return (y / (1 + (-(x.double() @ w["output_gate.weight"].T)).exp())) @ w["out_proj.weight"].T


@pytest.fixture
def build(config):
    def build(number, **changes):
        settings = replace(config, **changes)
        layer = LightningAttention(settings, number)
        layer.init_weights(1.0)
        torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
        return layer, settings

    return build


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("changes", [{}, {"lightning_norm_eps": 0.3}, {"num_heads": 3, "num_kv_heads": 3}])
def test_the_formula(build, number, changes):
    layer, config = build(number, **changes)
    x, d_out = torch.randn(2, 33, config.hidden_size, requires_grad=True), torch.randn(2, 33, config.hidden_size)
    expected = formula(layer, config, number, x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    (d_x,) = torch.autograd.grad((layer(x) * d_out).sum(), x)
    (expected_d_x,) = torch.autograd.grad((expected * d_out).sum(), x)
    torch.testing.assert_close(d_x, expected_d_x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pieces_with_the_cache_equal_the_whole(build):
    layer, config = build(1)
    x, cache = torch.randn(2, 40, config.hidden_size), LightningState()
    pieces = [layer(piece, cache=cache) for piece in x.split([1, 20, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_sample_is_the_sample_alone(build):
    layer, config = build(0)
    x = torch.randn(1, 30, config.hidden_size)
    packed = layer(x, cu_seqlens=torch.tensor([0, 11, 12, 30], dtype=torch.int32))
    alone = torch.cat([layer(x[:, a:b]) for a, b in ((0, 11), (11, 12), (12, 30))], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_rates_are_those_of_the_place_among_all_layers(config, model):
    depth = config.num_layers - 1 + 1e-5
    for number in (0, 1, 3, 4):
        expected = torch.tensor([2 ** (-2.0 * (h + 1)) * (1 - number / depth + 1e-5) for h in range(4)])
        torch.testing.assert_close(model.layers[number].self_attn.rates, expected, rtol=1e-6, atol=0)


def test_rates_are_no_part_of_a_checkpoint(model):
    assert not any("rates" in name for name in model.state_dict())


def test_rates_and_states_stay_fp32_in_a_bf16_model(config):
    model = LanguageModel(config)
    rates = model.layers[0].self_attn.rates.clone()
    cache = model.new_cache(1)
    with torch.no_grad():
        model.to(torch.bfloat16)(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
    assert cache.layers[0].state.dtype == torch.float32
    # A rate that is rounded to 8 bits moves a head's whole horizon.
    assert torch.equal(model.layers[0].self_attn.rates.float(), rates)


def test_init_is_xavier_with_the_gain_on_values_and_output(build):
    layer, _ = build(0, hidden_size=96, num_heads=8, num_kv_heads=8, head_dim=32)
    gain = 0.3
    layer.init_weights(gain)
    inner, hidden = 8 * 32, 96
    xavier = (2 / (hidden + inner)) ** 0.5
    q, k, v = layer.qkv_proj.weight.detach().view(8, 3, 32, hidden).unbind(dim=1)
    for weight, std in (
        (q, xavier),
        (k, xavier),
        (v, gain * xavier),
        (layer.output_gate.weight, xavier),
        (layer.out_proj.weight, gain * xavier),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.04)
        assert abs(weight.mean().item()) < 0.05 * std
    # Every head of its own.
    assert len(set(layer.qkv_proj.weight.detach().view(24, -1).sum(dim=1).tolist())) == 24
