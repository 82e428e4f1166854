"""Every guard of a recipe, and every shipped recipe."""

import dataclasses
from pathlib import Path

import pytest

from fulmen.cli.tasks import load_task
from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.model import ModelConfig
from fulmen.train import TrainRecipe
from fulmen.train.recipe import ModelSection

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.held_out_tokens=0", "data: held_out_tokens must be at least 1, got 0"),
        ("data.sequence_length=0", "data: sequence_length must be at least 1, got 0"),
        ("data.tokenizer_sample_bytes=-1", "data: tokenizer_sample_bytes must be at least 1, got -1"),
        ("optimizer.learning_rate=0", "optimizer: learning_rate must be above 0, got 0.0"),
        ("optimizer.learning_rate=inf", "optimizer: learning_rate must be above 0, got inf"),
        ("optimizer.learning_rate=nan", "optimizer: learning_rate must be above 0, got nan"),
        ("optimizer.eps=-1e-8", "optimizer: eps must be above 0, got -1e-08"),
        ("optimizer.clip=0", "optimizer: clip must be above 0, got 0.0"),
        ("optimizer.weight_decay=-0.1", "optimizer: weight_decay must be at least 0, got -0.1"),
        ("optimizer.beta1=1", "optimizer: beta1 must be at least 0 and below 1, got 1.0"),
        ("optimizer.beta2=-0.5", "optimizer: beta2 must be at least 0 and below 1, got -0.5"),
        ("schedule.steps=0", "schedule: steps must be at least 1, got 0"),
        ("schedule.batch_tokens=0", "schedule: batch_tokens must be at least 1, got 0"),
        ("schedule.warmup=-1", "schedule: warmup must be at least 0, got -1"),
        ("schedule.decay=-1", "schedule: decay must be at least 0, got -1"),
        ("schedule.decay=191", "schedule: warmup 10 and decay 191 exceed steps 200"),
        ("schedule.final=0", "schedule: final must be above 0 and at most 1, got 0.0"),
        ("schedule.final=1.5", "schedule: final must be above 0 and at most 1, got 1.5"),
        ("schedule.final=nan", "schedule: final must be above 0 and at most 1, got nan"),
        ("schedule.ramp=[[5, 10], [5, 20]]", "schedule: ramp must rise in tokens seen, got [[5, 10], [5, 20]]"),
        ("schedule.ramp=[[-1, 10]]", "schedule: ramp takes pairs of tokens seen and batch_tokens, got [[-1, 10]]"),
        ("schedule.ramp=[[1, 0]]", "schedule: ramp takes pairs of tokens seen and batch_tokens, got [[1, 0]]"),
        ("schedule.ramp=[[1, 2, 3]]", "schedule.ramp[0] must be a list of 2, got a list of 3"),
        ("schedule.micro_batch_tokens=0", "schedule: micro_batch_tokens must be at least 1, got 0"),
        ("schedule.decay_shape=cosine", "schedule.decay_shape must be one of 'exponential', 'linear', got 'cosine'"),
        ("train.seed=-1", "train: seed must be at least 0 and below 2**63, got -1"),
        (f"train.seed={2**63}", f"train: seed must be at least 0 and below 2**63, got {2**63}"),
        ("train.capacity_factor=-1", "train: capacity_factor must be at least 0, got -1.0"),
        ("train.balance=-1", "train: balance must be at least 0, got -1.0"),
        ("train.evaluate_every=-1", "train: evaluate_every must be at least 0, got -1"),
        ("train.routing_every=0", "train: routing_every must be at least 1, got 0"),
        ("train.snapshot_every=0", "train: snapshot_every must be at least 1, got 0"),
        ("train.keep_snapshots=0", "train: keep_snapshots must be at least 1, got 0"),
        ("train.precision=float16", "train.precision must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
        ("export.dialect=hf", "export.dialect must be one of 'original', 'transformers', got 'hf'"),
        ("schedule.step=3", "unknown key schedule.step; did you mean schedule.steps?"),
        ("optimiser.clip=3", "unknown key optimiser; did you mean optimizer?"),
        ("model.hiden_size=3", "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ("train.steps=3", "unknown key train.steps"),
        ("model.num_layers=8.5", "model.num_layers must be an integer, got 8.5"),
    ],
)
def test_guard(recipe, override, message):
    with pytest.raises(UserError) as caught:
        recipe(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_must_be_given(folder):
    (folder / "empty.toml").write_text('[model]\npreset = "tiny"\n')
    with pytest.raises(UserError, match=r"missing key schedule\.steps: give it an integer"):
        load_recipe("empty.toml", TrainRecipe)


def test_edges_are_allowed(recipe):
    recipe("schedule.warmup=0", "schedule.decay=200", "schedule.final=1", "optimizer.beta1=0", "train.balance=0")
    recipe("schedule.ramp=[[0, 1]]", "train.capacity_factor=0", "optimizer.weight_decay=0", f"train.seed={2**63 - 1}")


def test_every_field_of_a_model_can_be_set():
    sizes = {field.name for field in dataclasses.fields(ModelConfig)}
    section = {field.name: field for field in dataclasses.fields(ModelSection)}
    assert set(section) == sizes | {"preset", "init_from"}
    assert all(field.default is None for field in section.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_comes_back(path, tmp_path):
    recipe, build = load_task(path)
    assert load_task(path.stem) == (recipe, build)
    (tmp_path / "again.toml").write_text(dump_recipe(recipe))
    assert load_task(tmp_path / "again.toml") == (recipe, build)


def test_there_are_shipped_recipes():
    assert "quickstart" in [path.stem for path in SHIPPED]
