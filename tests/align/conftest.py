"""A tokenizer, models and preference pairs so small that a hundred steps take seconds."""

import pytest
from PIL import Image

from fulmen.data import Tokenizer
from fulmen.data.documents import PreferencePair
from fulmen.model import LanguageModel, ModelConfig, VisionConfig, VisionLanguageConfig, VisionLanguageModel

TEXT = "user name=user\nai name=assistant\nwhat is it? one two three four five six seven eight yes no\n"
SIZES = {"vocab_size": 290, "hidden_size": 32, "num_layers": 2, "layer_plan": "LS", "num_heads": 2, "num_kv_heads": 1}
SIZES |= {"head_dim": 16, "rotary_dim": 16, "num_experts": 4, "expert_size": 32, "max_positions": 256}
ENCODER = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 32}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], 290)


@pytest.fixture
def model():
    return LanguageModel(ModelConfig.preset("tiny", **SIZES))


@pytest.fixture
def seeing(tokenizer, model):
    config = VisionLanguageConfig(text=model.config, vision=VisionConfig(**ENCODER), image_token=tokenizer.image_id)
    return VisionLanguageModel(config)


def ask(*parts):
    spelled = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return ({"role": "user", "content": spelled},)


@pytest.fixture(scope="session")
def pairs():
    """The longer answer is the better one; earlier answers of the assistant are no answers."""
    earlier = (*ask("what"), {"role": "assistant", "content": "no"})
    return [
        PreferencePair((*earlier, *ask(f"{number}?")), f"yes, it is {number} {number}", "no", f"pairs#{row}")
        for row, number in enumerate(NUMBERS * 3)
    ]


@pytest.fixture(scope="session")
def shown():
    """Which answer is the better one is in the picture alone."""
    found = []
    for row in range(24):
        red = row % 2 == 0
        picture = Image.new("RGB", (28, 28 + 14 * (row % 3)), (230, 0, 0) if red else (0, 0, 230))
        found.append(
            PreferencePair(ask(picture, "what?"), *(("one", "two") if red else ("two", "one")), f"shown#{row}")
        )
    return found
