"""A small random model with a tokenizer, and models that say what a test tells them to."""

import pytest
import torch

from fulmen.data import Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.serve import TextGenerator

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
def generator(model, tokenizer):
    """Its answers never end by themselves, because what a random model says is chance."""
    return TextGenerator(model, tokenizer, eos_ids=())


@pytest.fixture
def speaker(model, tokenizer, monkeypatch):
    """speaker(ids) gives a generator whose model, whatever it reads, says these tokens and then the last for ever."""

    def make(ids):
        generator = TextGenerator(model, tokenizer)
        left = list(ids)

        def advance(tokens, context):
            context.seen.extend(tokens)
            logits = torch.zeros(320)
            logits[left.pop(0) if len(left) > 1 else left[0]] = 50.0
            return logits

        monkeypatch.setattr(generator, "_advance", advance)
        return generator

    return make
