"""The softmax layer against section 4 of the model's description, one token and one head at a time in float64."""

import math

import pytest
import torch

from fulmen.model.cache import KeyValues
from fulmen.model.softmax import SoftmaxAttention
from fulmen.ops.rotary import rotary_tables


def rotate(head, position, rotary_dim, base):
    turned, half = head.clone(), rotary_dim // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rotary_dim)
        turned[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
        turned[i + half] = head[i] * math.sin(angle) + head[i + half] * math.cos(angle)
    return turned


def formula(layer, config, x):
    """x [T, hidden]; scale D^-0.5, rotary on the first dims, query head h reads key head h // group."""
    w = {name.removesuffix("_proj.weight"): parameter.double() for name, parameter in layer.named_parameters()}
    x, width, group = x.double(), config.head_dim, config.num_heads // config.num_kv_heads
    q, k, v = ((x @ w[name].T).unflatten(-1, (-1, width)) for name in "qkv")
    turn = [
        torch.stack([torch.stack([rotate(head, t, config.rotary_dim, config.rope_theta) for head in row])
                     for t, row in enumerate(y)])
        for y in (q, k)
    ]  # fmt: skip
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(config.num_heads):
            scores = turn[1][: t + 1, h // group] @ turn[0][t, h] / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            heads.append(weights @ v[: t + 1, h // group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["o"].T


@pytest.fixture
def layer(config):
    layer = SoftmaxAttention(config)
    layer.init_weights(1.0)
    return layer


def tables(config, start, end):
    return rotary_tables(torch.arange(start, end)[None], config.rotary_dim, config.rope_theta)


@torch.no_grad()
def test_the_formula(config, layer):
    x = 3 * torch.randn(2, 14, config.hidden_size)
    actual = layer(x, tables(config, 0, 14))
    expected = torch.stack([formula(layer, config, row) for row in x])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pieces_with_the_cache_equal_the_whole(config, layer):
    x, cache, start, pieces = torch.randn(2, 30, config.hidden_size), KeyValues(), 0, []
    for piece in x.split([1, 17, 1, 11], dim=1):
        pieces.append(layer(piece, tables(config, start, start + piece.shape[1]), cache=cache))
        start += piece.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x, tables(config, 0, 30)), rtol=1e-5, atol=1e-5)


def test_init_is_xavier_with_the_gain_on_values_and_output(config, layer):
    layer.init_weights(0.3)
    for weight, gain in (
        (layer.q_proj.weight, 1.0),
        (layer.k_proj.weight, 1.0),
        (layer.v_proj.weight, 0.3),
        (layer.o_proj.weight, 0.3),
    ):
        assert weight.std().item() == pytest.approx(gain * (2 / sum(weight.shape)) ** 0.5, rel=0.06)
