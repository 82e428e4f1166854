"""A recipe, a text and a trainer so small that 200 steps take two seconds, on one thread, so that bits repeat."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from fulmen.config import load_recipe
from fulmen.data import Document, PackedLoader, Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.parallel import World
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


def make_text() -> str:
    generator = random.Random(0)
    return "\n".join(" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(250))


def make_trainer(
    folder: Path,
    text: str,
    tokenizer: Tokenizer,
    overrides: Sequence[str] = (),
    world: World | None = None,
    keep_weights: bool = False,
) -> Trainer:
    """Of the recipe in a folder, with some keys changed, on the documents that the text's lines are."""
    settings = load_recipe(folder / "recipe.toml", TrainRecipe, overrides)
    sizes = {name: value for name, value in vars(settings.model).items() if value is not None}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset(sizes.pop("preset"), **sizes))
    documents = [Document(line, f"text#{number}") for number, line in enumerate(text.split("\n"))]
    shape = {"batch_tokens": settings.schedule.batch_tokens, "sequence_length": settings.data.sequence_length}
    loader, cpu = PackedLoader(documents, tokenizer, seed=0, **shape), torch.device("cpu")
    if world is not None:
        world.shard(model, keep_weights=keep_weights)
    return Trainer(LanguageObjective(model, loader, tokenizer, settings, cpu, world=world), settings, cpu, world)
