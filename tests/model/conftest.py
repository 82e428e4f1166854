"""Small models of both kinds of attention, with no two sizes alike."""

import pytest
import torch

from fulmen.model import LanguageModel, ModelConfig

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    num_layers=5,
    layer_plan="LLS",
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    num_experts=6,
    experts_per_token=2,
    expert_size=40,
    max_positions=400,
)


@pytest.fixture
def config():
    return SMALL


@pytest.fixture
def model(config):
    """Norm weights are random too, so that one left out shows."""
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model
