"""Sizes, their cost, the plan of layers, and every combination that is refused."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from fulmen.config import UserError
from fulmen.model import PRESETS, LanguageModel, ModelConfig


def test_the_released_model_counts_what_the_report_says():
    count = ModelConfig.preset("minimax-text-01").count_parameters()
    assert round(count.total / 1e9, 1) == 456.1
    assert round(count.active / 1e9, 1) == 45.9


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_modules(name):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    count = config.count_parameters()
    embeddings = sizes["embed_tokens.weight"] + sizes["lm_head.weight"]
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert count.total == sum(sizes.values())
    assert count.embeddings == embeddings
    idle = experts // config.num_experts * (config.num_experts - config.experts_per_token)
    assert count.active == count.total - embeddings - idle


@pytest.mark.parametrize("name", ["70m", "160m", "410m", "1b", "3b", "7b"])
def test_a_rung_of_the_ladder_is_named_by_its_parameters(name):
    size = int(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert ModelConfig.preset(name).count_parameters().total == pytest.approx(size, rel=0.1)


def test_the_plan_of_the_released_model():
    layers = ModelConfig.preset("minimax-text-01").layers
    assert len(layers) == 80
    assert [layer for layer, kind in enumerate(layers) if kind == "S"] == list(range(7, 80, 8))
    assert set(layers) == {"L", "S"}


@pytest.mark.parametrize(
    ("plan", "num_layers", "layers"),
    [("LLS", 5, "LLSLL"), ("LLS", 2, "LL"), ("S", 3, "SSS"), ("LLLS", 4, "LLLS"), ("SL", 5, "SLSLS")],
)
def test_a_plan_is_repeated_and_cut_to_the_depth(config, plan, num_layers, layers):
    assert replace(config, layer_plan=plan, num_layers=num_layers).layers == layers


def test_alpha_is_deepnorms_unless_given():
    config = ModelConfig.preset("minimax-text-01")
    assert config.lightning_alpha == config.softmax_alpha == config.mlp_alpha == 3.5565588200778455
    assert config.lightning_beta == config.softmax_beta == config.mlp_beta == 1
    given = replace(config, softmax_alpha=1.0)
    assert (given.softmax_alpha, given.mlp_alpha) == (1.0, 3.5565588200778455)


def test_defaults_that_follow_from_another_field_follow_its_change():
    shallow = ModelConfig.preset("minimax-text-01", num_layers=8)
    assert shallow.lightning_alpha == shallow.softmax_alpha == shallow.mlp_alpha == 2.0
    assert ModelConfig.preset("70m", head_dim=32).rotary_dim == 16


def test_half_of_a_head_is_rotated_unless_said_otherwise():
    assert ModelConfig.preset("minimax-text-01").rotary_dim == 64
    assert ModelConfig.preset("1b").rotary_dim == 64
    assert ModelConfig.preset("tiny").rotary_dim == ModelConfig.preset("tiny").head_dim


def test_memory_at_inference():
    config = ModelConfig.preset("minimax-text-01")
    memory = config.estimate_memory(context=1000, batch=3, dtype="int8")
    assert memory.weights == 458_828_541_952
    # Section 1: 293.6 MB of state per request whatever the length, 40 960 B of keys and values per token.
    assert memory.state == 3 * 293_601_280
    assert memory.key_values == 3 * 1000 * 40_960


def test_int8_weights_are_counted_by_their_shapes(model, config):
    """Norms, routers, embedding and head stay in bf16; the others have one fp32 scale a row."""
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "moe.gate" in name or "embed" in name or "lm_head" in name:
            expected += 2 * parameter.numel()
        else:
            expected += parameter.numel() + 4 * parameter.numel() // parameter.shape[-1]
    assert config.weight_bytes("int8") == expected


def test_estimated_caches_are_the_caches(config, model):
    model(torch.zeros(2, 7, dtype=torch.int64), cache=(cache := model.new_cache(2)))
    memory = config.estimate_memory(context=7, batch=2, dtype="float32")
    lightning = [layer for layer, kind in zip(cache.layers, config.layers, strict=True) if kind == "L"]
    softmax = [layer for layer, kind in zip(cache.layers, config.layers, strict=True) if kind == "S"]
    assert memory.state == sum(layer.state.nbytes for layer in lightning)
    used = sum(2 * layer.keys[:, : layer.length].numel() * layer.keys.element_size() for layer in softmax)
    assert memory.key_values == used
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({name: 0}, f"{name} must be at least 1, got 0")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "experts_per_token",
            "expert_size",
            "max_positions",
        )
    ]
    + [
        ({"layer_plan": ""}, "layer_plan is a string of L and S, got ''"),
        ({"layer_plan": "LLX"}, "layer_plan is a string of L and S, got 'LLX'"),
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"experts_per_token": 7}, "experts_per_token 7 exceeds num_experts 6"),
        ({"rotary_dim": 7}, r"rotary_dim must be even and in 2\.\.head_dim 16, got 7"),
        ({"rotary_dim": 18}, r"rotary_dim must be even and in 2\.\.head_dim 16, got 18"),
        ({"rotary_dim": 0}, r"rotary_dim must be even and in 2\.\.head_dim 16, got 0"),
    ],
)
def test_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


def test_an_unknown_size_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"no model size named '2b'; there are tiny, 70m, .*minimax-text-01"):
        ModelConfig.preset("2b")


def test_a_config_is_frozen(config):
    with pytest.raises(FrozenInstanceError):
        config.num_layers = 3
