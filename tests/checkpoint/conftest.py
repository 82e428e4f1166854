"""Small models for checkpoints, with nothing at a default that a reader could fill in by luck."""

import json
from pathlib import Path

import pytest
import torch

from fulmen.checkpoint import save_model
from fulmen.model import LanguageModel, ModelConfig

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=5,
    layer_plan="LLS",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=8,
    rope_theta=5000.0,
    num_experts=3,
    experts_per_token=2,
    expert_size=40,
    max_positions=700,
    norm_eps=2e-5,
    lightning_alpha=1.3,
    lightning_beta=0.9,
    softmax_alpha=1.7,
    softmax_beta=0.8,
    mlp_alpha=1.1,
    mlp_beta=1.2,
)


def _random_model(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def _edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def config():
    return SMALL


@pytest.fixture
def random_model():
    """Builds a model from a config; its norms' weights are random too, so that a swapped one shows."""
    return _random_model


@pytest.fixture
def edit_json():
    """Sets keys of a JSON file; the value `...` deletes one."""
    return _edit_json


@pytest.fixture
def model():
    return _random_model(SMALL)


@pytest.fixture
def sharded(model, tmp_path):
    """A checkpoint in several shards."""
    save_model(model, tmp_path / "sharded", max_shard_bytes=20_000)
    return tmp_path / "sharded"


@pytest.fixture
def single(model, tmp_path):
    """The same in one file."""
    save_model(model, tmp_path / "single")
    return tmp_path / "single"
