"""A recipe, a text and a trainer so small that 200 steps take two seconds, on one thread, so that bits repeat."""

import random

import pytest
import torch

from fulmen.config import load_recipe
from fulmen.data import Document, PackedLoader, Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.train import Trainer, TrainRecipe
from fulmen.train.language import LanguageObjective

RECIPE = """
[model]
preset = "tiny"
vocab_size = 300
hidden_size = 32
num_layers = 2
layer_plan = "LS"
num_heads = 2
num_kv_heads = 1
head_dim = 16
rotary_dim = 16
num_experts = 4
expert_size = 32
max_positions = 256

[data]
sources = ["text.txt"]
sequence_length = 48
held_out_tokens = 256

[optimizer]
learning_rate = 1e-2

[schedule]
steps = 200
warmup = 10
decay = 50
batch_tokens = 64

[train]
precision = "float32"
snapshot_every = 7
evaluate_every = 50
"""

WORDS = (
    "the",
    "state",
    "of",
    "lightning",
    "layers",
    "decays",
    "while",
    "keys",
    "and",
    "values",
    "stay",
    "as",
    "written",
)


@pytest.fixture(scope="session")
def text():
    generator = random.Random(0)
    return "\n".join(" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(250))


@pytest.fixture
def folder(tmp_path, monkeypatch, text):
    """The working directory, with `recipe.toml` and the text that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def recipe(folder):
    """recipe("schedule.steps=3", ...) gives the small recipe with some keys changed."""
    return lambda *overrides: load_recipe(folder / "recipe.toml", TrainRecipe, overrides)


@pytest.fixture(scope="session")
def tokenizer(text):
    return Tokenizer.train([text], 300)


@pytest.fixture
def trainer(recipe, text, tokenizer):
    """trainer("optimizer.clip=2") gives a trainer of the small recipe with some keys changed."""

    def make(*overrides):
        settings = recipe(*overrides)
        sizes = {name: value for name, value in vars(settings.model).items() if value is not None}
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig.preset(sizes.pop("preset"), **sizes))
        documents = [Document(line, f"text#{number}") for number, line in enumerate(text.split("\n"))]
        shape = {"batch_tokens": settings.schedule.batch_tokens, "sequence_length": settings.data.sequence_length}
        loader = PackedLoader(documents, tokenizer, seed=0, **shape)
        cpu = torch.device("cpu")
        return Trainer(LanguageObjective(model, loader, tokenizer, settings, cpu), settings, cpu)

    return make
