"""The task coca: losses, sizes of pictures, held-out figures, going on, and what its checkpoint holds."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fulmen.checkpoint.vision import load_coca, load_encoder
from fulmen.cli.tasks import load_task
from fulmen.config import UserError, load_recipe
from fulmen.data.images import normalise
from fulmen.model.coca import CoCaConfig
from fulmen.run import SnapshotStore, read_metrics
from fulmen.train import Trainer, train
from fulmen.train.coca import build, match_metrics
from fulmen.train.coca_recipe import (
    CaptionDataSection,
    CaptionScheduleSection,
    CoCaModelSection,
    CoCaRecipe,
    CoCaTrainSection,
)
from fulmen.train.objective import Place
from fulmen.train.recipe import LoopSection, ScheduleSection

RECIPE = """
task = "coca"

[model]
preset = "tiny"
vocab_size = 300
hidden_size = 32
num_heads = 2
mlp_size = 40
unimodal_layers = 1
multimodal_layers = 1
caption_queries = 3
image_sizes = [[0, 12], [3, 20]]

[model.vision]
patch_size = 4
hidden_size = 24
num_layers = 2
num_heads = 2
mlp_size = 40

[data]
sources = ["words"]
held_out_pictures = 24

[optimizer]
learning_rate = 2e-3

[schedule]
steps = 5
warmup = 2
batch_pictures = 8

[train]
device = "cpu"
precision = "float32"
evaluate_every = 2
snapshot_every = 2
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe("schedule.steps=3", ...) gives the small recipe with some keys changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "recipe.toml", CoCaRecipe, overrides)


@pytest.fixture
def objective(recipe, tmp_path):
    """objective("data.held_out=0") gives that of the small recipe with some keys changed."""

    def make(*overrides):
        torch.manual_seed(0)
        place = Place(folder=tmp_path, device=torch.device("cpu"), fresh=True, report=lambda line: None)
        return build(recipe(*overrides), place)

    return make


def run(settings, path, **options):
    return train(settings, path, build=build, **options)


def lines(path):
    """The metrics, without what depends on the clock."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in read_metrics(path / "metrics.jsonl")]


def test_a_run(recipe, tmp_path):
    reported = []
    result = run(recipe(), tmp_path / "run", report=reported.append)
    assert reported[0] == "pictures: 7082 to train on, 373 held out"
    assert reported[1] == "tokenizer: training 300 tokens"
    assert "of them the encoder's, on cpu in float32" in reported[2]
    logged = lines(tmp_path / "run")
    steps = [line for line in logged if "loss" in line]
    assert [line["image_size"] for line in steps] == [12, 12, 12, 20, 20]
    assert [line["pictures"] for line in steps] == [8, 16, 24, 32, 40]
    assert all(line["loss"] == pytest.approx(line["contrastive"] + 2 * line["caption"]) for line in steps)
    assert all(line["temperature"] == pytest.approx(0.07, rel=0.05) for line in steps)
    evaluations = [line for line in logged if "held_out_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]
    ways = [f"held_out_{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    losses = ["held_out_loss", "held_out_contrastive", "held_out_caption", "held_out_zero_shot_top_1"]
    assert set(evaluations[0]) == {"step", *losses, *ways}
    assert evaluations[-1]["held_out_loss"] < evaluations[0]["held_out_loss"]
    assert result.held_out == [(line["step"], line[ways[1]]) for line in evaluations]


def test_the_checkpoint_holds_the_encoder_at_the_last_size_and_all_of_coca(recipe, tmp_path):
    result = run(recipe(), tmp_path / "run")
    coca, tokenizer = load_coca(result.checkpoint)
    assert tokenizer.vocab_size == 300
    snapshot = SnapshotStore(tmp_path / "run" / "snapshots").latest().tensors()
    first = snapshot["model.encoder.embeddings.position_embedding.weight"]
    assert first.shape == (1 + 9, 24)
    positions = coca.encoder.embeddings.position_embedding.weight
    assert positions.shape == (1 + 25, 24)
    assert torch.equal(positions[0], first[0])
    square = first[1:].T.reshape(1, 24, 3, 3)
    expected = F.interpolate(square, (5, 5), mode="bicubic").reshape(24, 25).T
    torch.testing.assert_close(positions[1:], expected)
    assert torch.equal(coca.lm_head.weight, snapshot["model.lm_head.weight"])
    encoder = load_encoder(result.checkpoint)
    assert encoder.config.image_size == 20
    assert encoder(torch.randn(1, 3, 20, 20)).shape == (1, 25, 24)


@pytest.mark.parametrize(("at", "workers"), [(2, 0), (3, 2), (4, 0)])
def test_goes_on_bit_for_bit(recipe, tmp_path, at, workers):
    """Before, at and behind the step where the pictures grow, and with processes that draw ahead."""
    run(recipe(), tmp_path / "straight")
    stopped = recipe(f"train.workers={workers}")
    trainer_steps = Trainer.train_step

    def interrupted(self):
        if self.step == at:
            raise KeyboardInterrupt
        return trainer_steps(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, tmp_path / "stopped")
    run(stopped, tmp_path / "stopped", resume=True)
    one, two = (SnapshotStore(tmp_path / name / "snapshots").latest() for name in ("straight", "stopped"))
    assert one.state == two.state
    tensors = two.tensors()
    assert all(torch.equal(value, tensors[name]) for name, value in one.tensors().items())
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def test_gradients_are_those_of_both_losses(objective):
    make = objective("train.contrastive=0.5", "train.caption=3")
    [batch] = batches = make.next_batches(0)
    assert make.size(batches) == 8
    metrics = make.backward(batches, 1)
    loss = make.model.loss(normalise(batch.crops), batch.tokens, batch.targets)
    total = 0.5 * loss.contrastive + 3 * loss.nll / loss.targets
    assert metrics["loss"] == pytest.approx(total.item())
    parameters = dict(make.model.named_parameters())
    for parameter, expected in zip(
        parameters.values(), torch.autograd.grad(total, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected)


@torch.no_grad()
def test_held_out_losses(objective):
    """Over several batches they are those of all pairs; an evaluation gives the same every time."""
    make = objective("schedule.batch_pictures=7")
    make.model.eval()
    found = make.evaluate()
    assert make.evaluate() == found
    losses = [
        (len(batch), make.model.loss(normalise(batch.crops), batch.tokens, batch.targets))
        for batch, _ in make._held_out_batches()
    ]
    assert [count for count, _ in losses] == [7, 7, 7, 3]
    contrastive = sum(count * loss.contrastive.item() for count, loss in losses) / 24
    caption = sum(loss.nll.item() for _, loss in losses) / sum(loss.targets.item() for _, loss in losses)
    assert found["held_out_contrastive"] == pytest.approx(contrastive)
    assert found["held_out_caption"] == pytest.approx(caption)
    assert found["held_out_loss"] == pytest.approx(contrastive + 2 * caption)
    assert objective("data.held_out=0").evaluate() == {}


def test_without_image_sizes_the_model_has_its_own(objective):
    assert objective("model.image_sizes=[]").image_size == 112


def test_match_metrics():
    """Picture 2 is nearest to a caption of the other source, which its zero-shot figure leaves out of account."""
    texts = torch.eye(4)
    images = F.normalize(torch.tensor([[9.0, 1, 0, 0], [9, 1, 0, 0], [9, 0, 5, 0], [0, 0, 9, 1]]), dim=-1)
    found = match_metrics(images, texts, ["a", "a", "c", "d"], [0, 0, 1, 1])
    assert found["zero_shot_top_1"] == 0.75
    assert found["image_to_text_recall_at_1"] == 0.5
    assert found["image_to_text_recall_at_5"] == 1.0
    assert found["text_to_image_recall_at_1"] == pytest.approx(2 / 3)


def test_a_second_run_from_the_first_one_at_a_larger_size(recipe, tmp_path):
    first = run(recipe("model.image_sizes=[[0,12]]", "data.held_out=0.5"), tmp_path / "first")
    (tmp_path / "second.toml").write_text(
        '[model]\ninit_from = "first/checkpoint"\nimage_sizes = [[0, 20]]\n' + RECIPE[RECIPE.index("[data]") :]
    )
    settings = load_recipe(tmp_path / "second.toml", CoCaRecipe, ["schedule.steps=2"])
    reported = []
    second = run(settings, tmp_path / "second", report=reported.append)
    assert not any("tokenizer" in line for line in reported)
    one, its_tokenizer = load_coca(first.checkpoint)
    two, tokenizer = load_coca(second.checkpoint)
    assert tokenizer.fingerprint == its_tokenizer.fingerprint
    assert two.encoder.config == dataclasses.replace(one.encoder.config, image_size=20)
    one.resize(20)
    torch.testing.assert_close(
        two.encoder.embeddings.position_embedding.weight,
        one.encoder.embeddings.position_embedding.weight,
        atol=0.01,
        rtol=0,
    )
    assert run(settings, tmp_path / "second", resume=True).step == 2
    with pytest.raises(UserError, match=r"model\.init_from brings its own sizes"):
        run(dataclasses.replace(settings, model=dataclasses.replace(settings.model, mlp_size=64)), tmp_path / "third")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule.batch_pictures=9000"], "batch_pictures 9000 exceeds the 7082 pictures"),
        (["model.image_sizes=[[0,14]]"], "image_size 14 of an encoder must be a multiple of patch_size 4"),
        (["model.image_sizes=[[0,12],[5,20]]"], "image_sizes names step 5, but schedule.steps is 5"),
        (["model.preset=huge"], "no CoCa named 'huge'; there are tiny, large"),
        (["model.num_heads=5"], "multiple of num_heads 5"),
        (["data.sources=[]"], "no source of captioned pictures"),
        (["data.tokenizer=here"], "the tokenizer of 320 tokens must have"),
    ],
)
def test_what_cannot_begin_leaves_nothing(recipe, tmp_path, overrides, words):
    from fulmen.data import Tokenizer

    if "data.tokenizer=here" in overrides:
        Tokenizer.train(["It is a long way, and the road goes ever on, " * 9, *map(str, range(99))], 320).save("here")
    with pytest.raises(UserError, match=words):
        run(recipe(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_preset_is_needed(tmp_path):
    (tmp_path / "none.toml").write_text('task = "coca"\n[schedule]\nsteps = 2\nwarmup = 1\n')
    with pytest.raises(UserError, match=r"\[model\] needs a preset"):
        run(load_recipe(tmp_path / "none.toml", CoCaRecipe), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.image_sizes=[[1,12]]", "must begin at step 0 and rise"),
        ("model.image_sizes=[[0,12],[4,20],[4,12]]", "must begin at step 0 and rise"),
        ("data.held_out_pictures=1", "held_out_pictures must be at least 2"),
        ("schedule.batch_pictures=1", "batch_pictures must be at least 2"),
        ("train.caption=-1", "caption must be at least 0"),
        ("model.image_size=12", "unknown key model.image_size"),
    ],
)
def test_checks_of_the_sections(recipe, override, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        recipe(override)


def test_two_weights_of_zero(recipe):
    with pytest.raises(UserError, match="both 0"):
        recipe("train.contrastive=0", "train.caption=0")


def test_what_may_change_within_a_run(recipe, tmp_path):
    run(recipe(), tmp_path / "run")
    changed = ["train.workers=1", "schedule.batch_pictures=6", "train.evaluate_every=1", "schedule.steps=6"]
    assert run(recipe(*changed), tmp_path / "run", resume=True).step == 6
    with pytest.raises(UserError, match=r"begun with model\.image_sizes"):
        run(recipe("model.image_sizes=[[0,12]]"), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"begun with model\.vision"):
        run(recipe("model.vision.mlp_size=48"), tmp_path / "run", resume=True)


def test_the_shipped_recipe(tmp_path):
    settings, builder = load_task("vision-coca")
    assert builder is build
    assert isinstance(settings, CoCaRecipe)
    kept = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert kept["model"]["preset"] == "tiny"


PAGE = (Path(__file__).parents[2] / "docs" / "vision.md").read_text()
SECTIONS = {
    "model": {"preset": None, "init_from": None, "vision": {}, "image_sizes": []},
    "data": dataclasses.asdict(CaptionDataSection()),
    "schedule": {"batch_pictures": CaptionScheduleSection(steps=500).batch_pictures},
    "train": {name: getattr(CoCaTrainSection(), name) for name in ("contrastive", "caption")},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_documented_keys_and_defaults(name):
    below = PAGE.split(f"\n#### `[{name}]`\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", below, re.MULTILINE)
    documented = {key: None if default == "none" else json.loads(default) for key, default in rows}
    assert documented == {
        key: list(value) if isinstance(value, tuple) else value for key, value in SECTIONS[name].items()
    }


def test_documented_keys_are_those_of_the_sections():
    schedule, train_section = CaptionScheduleSection(steps=500), CoCaTrainSection()
    assert set(vars(schedule)) - set(vars(ScheduleSection(steps=500))) == set(SECTIONS["schedule"])
    assert set(vars(train_section)) - set(vars(LoopSection())) == set(SECTIONS["train"])
    fields = {field.name for field in dataclasses.fields(CoCaConfig)} - {"vision"}
    assert set(vars(CoCaModelSection())) == set(SECTIONS["model"]) | fields
    prose = PAGE.split("Any field of `CoCaConfig`", 1)[1].split("####", 1)[0]
    assert set(re.findall(r"`(\w+)`", prose)) == fields | {"preset"}


def test_documented_recipe_and_example(tmp_path, recipe):
    (tmp_path / "page.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert load_recipe(tmp_path / "page.toml", CoCaRecipe).model.image_sizes == ((0, 224), (90_000, 336))
    run(recipe("schedule.steps=4"), tmp_path / "runs" / "coca")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], 512)
    assert names["encoder"].config == names["coca"].encoder.config
