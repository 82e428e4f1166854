"""Runs of models that see: joined from a text model and an encoder, with parts frozen, resumed, gone on from."""

import json
import os
import random
import signal

import pytest
import torch
from PIL import Image

from fulmen.checkpoint import load_config, load_model
from fulmen.checkpoint.vision import save_encoder
from fulmen.config import UserError, load_recipe
from fulmen.data import Tokenizer
from fulmen.model import VisionConfig, VisionEncoder, VisionLanguageModel
from fulmen.run import SnapshotStore, read_metrics
from fulmen.train import Trainer, TrainRecipe, train
from fulmen.train.language import build
from fulmen.train.objective import Place

COLOURS = {"red": (220, 0, 0), "green": (0, 220, 0), "blue": (0, 0, 220), "white": (250, 250, 250)}

RECIPE = """
[model]
init_from = "text"
[vision]
init_from = "coca"
[data]
sources = ["pictures.jsonl"]
sequence_length = 96
held_out_tokens = 512
train_on = "answers"
[optimizer]
learning_rate = 3e-3
[schedule]
steps = 6
warmup = 2
batch_tokens = 192
[train]
precision = "float32"
snapshot_every = 2
evaluate_every = 3
freeze = ["language_model"]
"""


@pytest.fixture
def see(recipe, folder):
    """see("schedule.steps=3", ...) gives a recipe that joins a text run's model and an encoder, with keys changed."""
    train(recipe("schedule.steps=2", "schedule.warmup=0", "schedule.decay=0"), folder / "text")
    config = VisionConfig(image_size=28, patch_size=14, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32)
    save_encoder(VisionEncoder(config), folder / "coca" / "checkpoint")
    rows, generator = [], random.Random(0)
    for number in range(24):
        colour = generator.choice(list(COLOURS))
        Image.new("RGB", (28, 28 + number % 3 * 14), COLOURS[colour]).save(folder / f"{number}.png")
        part = {"type": "image", "image": f"{number}.png"}
        question = {"role": "user", "content": [part, {"type": "text", "text": "colour?"}]}
        rows.append({"messages": [question, {"role": "assistant", "content": colour}]})
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "see.toml").write_text(RECIPE)
    return lambda *overrides: load_recipe("see.toml", TrainRecipe, overrides)


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_parts(before, after):
    return {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_a_text_model_and_an_encoder_become_one_that_sees(see, folder):
    lines = []
    result = train(see(), folder / "run", report=lines.append)
    assert lines[1].startswith("model: ")
    assert lines[1].endswith("of its text model active for a token, 2 layers LS, on cpu in float32")
    model = load_model(result.checkpoint)
    assert isinstance(model, VisionLanguageModel)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    assert lines[2] == (
        f"trained: image_newline 32, vision_tower {counts['vision_tower']:,}, "
        f"multi_modal_projector {counts['multi_modal_projector']:,}; "
        f"frozen: language_model {counts['language_model']:,}"
    )
    trained = 32 + counts["vision_tower"] + counts["multi_modal_projector"]
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    assert {line["trained_parameters"] for line in metrics if "loss" in line} == {trained}
    text = load_model("text/checkpoint")
    assert all(torch.equal(p, dict(text.named_parameters())[n]) for n, p in model.language_model.named_parameters())
    assert model.config.image_token == Tokenizer.load(result.checkpoint).image_id
    optimizer = [n for n in SnapshotStore(folder / "run/snapshots").load(6).tensors() if n.startswith("optimizer.")]
    assert optimizer
    assert not [name for name in optimizer if name.startswith("optimizer.language_model")]
    assert result.held_out[-1][1] < result.held_out[0][1]


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ("[]", {"vision_tower", "multi_modal_projector", "image_newline", "language_model"}),
        ("['language_model', 'vision_tower']", {"multi_modal_projector", "image_newline"}),
        ("['vision_tower', 'image_newline']", {"multi_modal_projector", "language_model"}),
    ],
)
def test_what_is_frozen_stays_and_all_else_moves(see, folder, freeze, expected):
    first = train(see(), folder / "first").checkpoint
    (folder / "second.toml").write_text(RECIPE.replace('"text"', '"first"').replace('[vision]\ninit_from = "coca"', ""))
    recipe = load_recipe("second.toml", TrainRecipe, [f"train.freeze={freeze}", "schedule.steps=2"])
    second = train(recipe, folder / "second").checkpoint
    assert changed_parts(parameters(load_model(first)), parameters(load_model(second))) == expected


def test_frozen_parts_pass_the_gradients_on(see, folder, monkeypatch):
    """The same gradients as without freezing, for what trains."""
    gradients = {}

    def spy(self):
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        gradients.setdefault(len(self.recipe.train.freeze), found)
        for parameter in self.model.parameters():
            parameter.grad = None

    step = Trainer.train_step

    def train_step(self):
        self.optimizer.step = lambda: spy(self)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    for freeze in ("[]", "['language_model']"):
        train(
            see(f"train.freeze={freeze}", "schedule.steps=1", "schedule.warmup=0", "optimizer.clip=1e9"),
            folder / freeze,
        )
    free, frozen = gradients[0], gradients[1]
    assert {name.split(".")[0] for name in free} - {name.split(".")[0] for name in frozen} == {"language_model"}
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, free[name], rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in frozen.values()) > 1e-4


def test_it_learns_to_look(see, folder):
    """The answer is in the image alone."""
    settings = ("train.freeze=[]", "schedule.steps=120", "optimizer.learning_rate=1e-2", "train.evaluate_every=0")
    losses = [bits for _, bits in train(see(*settings), folder / "run").held_out]
    assert losses[-1] < 0.15 < losses[0]


@pytest.mark.parametrize("dynamic", [True, False])
def test_images_are_cut_into_crops_or_not(see, folder, dynamic):
    recipe = see(f"vision.dynamic={str(dynamic).lower()}")
    place = Place(folder=folder / "run", device=torch.device("cpu"), fresh=True, report=lambda line: None)
    objective = build(recipe, place)
    held_out = objective.held_out["held_out"]
    images = [placed.image for batch in (*objective.next_batches(0), *held_out) for placed in batch.images]
    assert {image.layout.grid != (0, 0) for image in images} == {dynamic}


def test_how_it_sees_and_what_trains_stay(see, folder):
    train(see(), folder / "run")
    with pytest.raises(UserError, match=r"vision\.dynamic = True, the recipe now says False"):
        train(see("vision.dynamic=false", "schedule.steps=7"), folder / "run", resume=True)
    with pytest.raises(UserError, match=r"train\.freeze = \('language_model',\), the recipe now says \(\)"):
        train(see("train.freeze=[]", "schedule.steps=7"), folder / "run", resume=True)


def test_a_run_that_sees_resumes_bit_for_bit(see, folder, monkeypatch):
    """With images cut by the rows' ends, text mixed in and two micro batches; and the encoder is needed no more."""
    settings = ("data.text_sources=['text.txt']", "data.text_every=3", "schedule.micro_batch_tokens=100")
    train(see(*settings), folder / "straight")
    step = Trainer.train_step

    def train_step(self):
        if self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        assert train(see(*settings), folder / "run").step == 3
    (folder / "coca/checkpoint/model.safetensors").unlink()
    (folder / "text/checkpoint/model.safetensors").unlink()
    train(see(*settings), folder / "run", resume=True)
    one, other = (SnapshotStore(folder / name / "snapshots").load(6) for name in ("straight", "run"))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert one.state == other.state
    lines = [line for line in read_metrics(folder / "run/metrics.jsonl") if "held_out_loss" in line]
    assert all(line["held_out_text_bits_per_byte"] > 0 for line in lines)


def test_a_preset_that_sees(see, folder):
    """Text sizes are changed as for text; the tokenizer says which token `<image>` is."""
    sizes = {"preset": '"tiny-vl"', "vocab_size": 300, "hidden_size": 32, "num_layers": 1, "layer_plan": '"L"'}
    sizes |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "rotary_dim": 16, "num_experts": 2, "expert_size": 32}
    model = "\n".join(f"{key} = {value}" for key, value in sizes.items())
    changed = RECIPE.replace('init_from = "text"', model).replace('[vision]\ninit_from = "coca"', "")
    (folder / "drawn.toml").write_text(changed)
    settings = ["schedule.steps=1", "schedule.warmup=0", "data.sequence_length=512", "schedule.batch_tokens=512"]
    recipe = load_recipe("drawn.toml", TrainRecipe, [*settings, "data.tokenizer=text/checkpoint"])
    checkpoint = train(recipe, folder / "run").checkpoint
    config = load_config(checkpoint)
    assert (config.text.hidden_size, config.vision.image_size) == (32, 112)
    assert config.image_token == Tokenizer.load(checkpoint).image_id == 299


def test_text_without_images_trains_a_model_that_sees(see, folder):
    """Nothing happens in a step that has nothing to train, such as text alone before a frozen text model."""
    result = train(see("data.sources=['text.txt']", "data.train_on=all"), folder / "run")
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    assert {line["trained_parameters"] for line in metrics if "loss" in line} == {0}
    assert result.held_out[0][1] == result.held_out[-1][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.freeze=['eyes']"],
            "train.freeze: no parameter's name begins with 'eyes'; the parts are image_newline,",
        ),
        (["vision.init_from=text"], "is of a model of type"),
        (["vision.init_from=nowhere"], "there is no config.json in nowhere"),
        (["data.held_out_tokens=3"], "the held-out part has no text to predict: raise data.held_out_tokens"),
        (["data.text_every=0"], "data: text_every must be at least 1, got 0"),
        (["data.train_on=questions"], "data.train_on must be one of 'all', 'answers', got 'questions'"),
        (["data.text_sources=['missing.txt']"], "no file matches 'missing.txt'"),
        (["model.init_from=seeing"], "and [model] names one that sees already"),
        (["model.init_from=seeing", "vision.init_from=none", "data.tokenizer=other"], "leave data.tokenizer out"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(see, folder, text, overrides, message):
    if "seeing" in overrides[0]:
        train(see("schedule.steps=1", "schedule.warmup=0"), folder / "seeing")
        Tokenizer.train([text], 290).save("other")
    if "vision.init_from=none" in overrides:
        (folder / "see.toml").write_text(RECIPE.replace('[vision]\ninit_from = "coca"', ""))
        overrides = [override for override in overrides if override != "vision.init_from=none"]
    with pytest.raises(UserError) as caught:
        train(see(*overrides), folder / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_a_tokenizer_without_image_is_refused(see, folder, monkeypatch):
    monkeypatch.setattr(Tokenizer, "image_id", None)
    with pytest.raises(UserError, match="the tokenizer has no <image>"):
        train(see(), folder / "run")
