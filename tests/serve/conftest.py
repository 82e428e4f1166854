"""A small random model with a tokenizer, engines around it, and engines that say what a test tells them to."""

from dataclasses import replace

import pytest
import torch

from fulmen.checkpoint import make_tiny
from fulmen.data import Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.serve import Engine, EngineSettings
from fulmen.serve.memory import plan_for_model

TEXTS = (
    "user name=user\nai name=assistant\nsystem ai_setting=assistant\n",
    "Lightning keeps a state, softmax keeps keys and values. Grüße, naïve café 🎉 日本語\n",
)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "rotary_dim": 16, "expert_size": 32}
    config = ModelConfig.preset(
        "tiny", vocab_size=320, num_layers=2, layer_plan="LS", num_experts=4, max_positions=400, **sizes
    )
    return LanguageModel(config).eval()


@pytest.fixture
def new_engine(model, tokenizer):
    """new_engine(**settings) has small pages and pieces; no answer ends by itself, as it is chance.

    `pages` and `snapshots` override what the memory would have room for.
    """

    def make(eos_ids=(), pages=None, snapshots=None, **settings):
        small = {"max_sequences": 4, "page_size": 8, "chunk_tokens": 64, "snapshot_interval": 64, "memory": 64_000_000}
        asked = EngineSettings(**small | settings)
        changes = {"pages": pages, "snapshots": snapshots}
        changes = {name: value for name, value in changes.items() if value is not None}
        plan = replace(plan_for_model(model, asked), **changes)
        return Engine(model, tokenizer, asked, eos_ids=eos_ids, plan=plan)

    return make


@pytest.fixture(scope="session")
def seeing_checkpoint(tmp_path_factory):
    """Of a vision-language model; tests only read it."""
    folder = tmp_path_factory.mktemp("seeing") / "tiny-vl"
    make_tiny(folder, vision=True)
    return folder


@pytest.fixture
def seeing_engine(seeing_checkpoint):
    """Of that model. What it says is chance, but the same each time; answers end by chance too."""
    return Engine.load(seeing_checkpoint, EngineSettings(max_sequences=4, max_context=2048, memory=200_000_000))


@pytest.fixture
def engine(new_engine):
    return new_engine()


@pytest.fixture
def speaker(model, tokenizer, monkeypatch):
    """speaker(ids) gives an engine whose model, whatever it reads, says these tokens and then the last for ever."""

    def make(ids):
        engine = Engine(model, tokenizer, EngineSettings(max_sequences=1, memory=64_000_000))
        left = list(ids)

        def run(step):
            sequences = [chunk.sequence for chunk in step.prompts if chunk.is_last] + step.decoding
            logits = torch.zeros(len(sequences), 320)
            for row in logits:
                row[left.pop(0) if len(left) > 1 else left[0]] = 50.0
            return sequences, logits

        monkeypatch.setattr(engine.runner, "run", run)
        return engine

    return make
