"""The task preference: it learns which answer is better, against the model that the run began with."""

import json
import math
import os
import signal

import pytest
import torch

from fulmen.align.preference import build
from fulmen.align.recipe import PreferenceRecipe
from fulmen.checkpoint import load_model, save_model
from fulmen.cli.tasks import load_task
from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.run import SnapshotStore, read_metrics
from fulmen.train import Trainer, train
from fulmen.train.objective import Place

RECIPE = """
task = "preference"
[model]
init_from = "before"
[data]
sources = ["pairs.jsonl"]
sequence_length = 128
held_out = 0.2
[optimizer]
learning_rate = 3e-3
weight_decay = 0.0
[schedule]
steps = 4
warmup = 0
batch_pairs = 3
[train]
precision = "float32"
snapshot_every = 2
"""


def write(folder, pairs, model, tokenizer):
    rows = []
    for number, pair in enumerate(pairs):
        content = [dict(part) for part in pair.messages[-1]["content"]]
        for part in content:
            if part["type"] == "image":
                part["image"].save(folder / f"{number}.png")
                part["image"] = f"{number}.png"
        messages = [*pair.messages[:-1], {"role": "user", "content": content}]
        rows.append({"messages": messages, "chosen": pair.chosen, "rejected": pair.rejected})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_model(model, folder / "before", tokenizer=tokenizer)
    (folder / "recipe.toml").write_text(RECIPE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prefer(folder, pairs, model, tokenizer):
    """prefer("schedule.steps=3", ...) gives the small recipe of text with some keys changed."""
    write(folder, pairs, model, tokenizer)
    return lambda *overrides: load_recipe("recipe.toml", PreferenceRecipe, overrides)


@pytest.fixture
def prefer_shown(folder, shown, seeing, tokenizer):
    """The same with pictures."""
    write(folder, shown, seeing, tokenizer)
    return lambda *overrides: load_recipe("recipe.toml", PreferenceRecipe, overrides)


def objective_of(recipe, folder, fresh=True):
    lines = []
    place = Place(folder=folder / "run", device=torch.device("cpu"), fresh=fresh, report=lines.append)
    return build(recipe, place), lines


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_at_first_it_is_the_reference(prefer, folder):
    objective, lines = objective_of(prefer(), folder)
    assert lines[0] == "preferences: 16 pairs to train on, 8 held out"
    assert lines[-1].endswith("2 layers LS, on cpu in float32")
    metrics = objective.backward(objective.next_batches(0), 1)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert metrics["balance"] > 0.9
    assert all(parameter.grad is None for parameter in objective.reference.parameters())
    with torch.no_grad():
        held_out = objective.evaluate()
    assert held_out["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out["held_out_reward_accuracy"] == 0.5


def test_micro_batches_are_one_big_batch(prefer, folder):
    settings = ("train.balance=0", "train.capacity_factor=0", "schedule.batch_pairs=5", "schedule.steps=1")
    found = []
    for micro in (5, 2):
        objective, _ = objective_of(prefer(*settings, f"schedule.micro_batch_pairs={micro}"), folder)
        with torch.no_grad():
            for number, parameter in enumerate(objective.model.parameters()):
                parameter.mul_(1 + 0.01 * (number % 5))
        batches = objective.next_batches(0)
        assert [objective.size([batch]) for batch in batches] == [min(micro, 5 - start) for start in range(0, 5, micro)]
        metrics = objective.backward(batches, 1)
        found.append((metrics, {name: p.grad for name, p in objective.model.named_parameters()}))
    (one, gradients), (other, parts) = found
    del one["balance"], other["balance"]
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - parts[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_it_learns_a_preference_and_the_reference_stays(prefer, folder):
    recipe = prefer("schedule.steps=30", "preference.stop_before_epoch_ends=false", "train.keep_snapshots=1")
    result = train(recipe, folder / "run", build=build)
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    assert result.held_out == [(0, 0.5), (30, 1.0)]
    steps = [line for line in metrics if "loss" in line]
    assert steps[-1]["loss"] < 0.3 < 0.69 < steps[0]["loss"]
    assert steps[-1]["reward_margin"] > 1
    assert steps[-1]["reward_accuracy"] == 1
    assert [(line["batch_pairs"], line["pairs"]) for line in steps[:2]] == [(3, 3), (3, 6)]
    before, kept, after = (
        parameters(load_model(folder / name)) for name in ("before", "run/reference", "run/checkpoint")
    )
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    snapshot = SnapshotStore(folder / "run" / "snapshots").load(30).tensors()
    assert {name.split(".", 1)[1] for name in snapshot if name.startswith("model.")} == set(after)


def test_beta_holds_it_near_the_reference(prefer, folder):
    moved = {}
    for beta in (0.1, 10):
        train(prefer(f"preference.beta={beta}", "train.balance=0"), folder / str(beta), build=build)
        lines = [line for line in read_metrics(folder / str(beta) / "metrics.jsonl") if "loss" in line]
        moved[beta] = lines[-1]["reward_margin"] / beta
    assert moved[0.1] > moved[10] > 0


@pytest.mark.parametrize("reference", ["float32", "bfloat16"])
def test_it_looks_at_pictures(prefer_shown, folder, reference):
    """Both answers are as often the better one, so it has to look. The reference may be kept in bfloat16."""
    settings = ("schedule.steps=60", "preference.stop_before_epoch_ends=false", "optimizer.learning_rate=1e-2")
    settings += (f"preference.reference={reference}", "train.evaluate_every=0", "train.balance=0")
    result = train(prefer_shown(*settings), folder / "run", build=build)
    assert result.held_out[-1][1] == 1.0
    kept = load_model(folder / "run" / "reference", dtype=torch.bfloat16)
    before = load_model(folder / "before", dtype=torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(kept.parameters(), before.parameters(), strict=True))
    config = json.loads((folder / "run" / "reference" / "config.json").read_text())
    assert reference in json.dumps(config)


@pytest.mark.parametrize("kind", ["prefer", "prefer_shown"])
def test_resumes_bit_for_bit_without_what_it_began_from(request, folder, monkeypatch, kind):
    recipe = request.getfixturevalue(kind)(
        "train.freeze=['image_newline']" if kind == "prefer_shown" else "train.freeze=[]"
    )
    train(recipe, folder / "straight", build=build)
    step = Trainer.train_step

    def train_step(self):
        if self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        assert train(recipe, folder / "run", build=build).stopped_by == signal.SIGTERM
    (folder / "before" / "model.safetensors").unlink()
    train(recipe, folder / "run", build=build, resume=True)
    one, other = (SnapshotStore(folder / name / "snapshots").load(4) for name in ("straight", "run"))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert one.state == other.state
    lines = [
        [
            {k: v for k, v in line.items() if k != "pairs_per_second"}
            for line in read_metrics(folder / name / "metrics.jsonl")
        ]
        for name in ("straight", "run")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule.steps=6"],
            "schedule.steps 6 of 3 pairs are an epoch of the 16 pairs or more, and the run is to stop "
            "before: take at most 5 steps, or preference.stop_before_epoch_ends = false",
        ),
        (["data.sources=['nothing.jsonl']"], "no file matches 'nothing.jsonl'"),
        (["data.sequence_length=257"], "data.sequence_length 257 exceeds model.max_positions 256"),
        (["train.freeze=['eyes']"], "train.freeze: no parameter's name begins with 'eyes'"),
        (["preference.beta=0"], "preference: beta must be above 0, got 0.0"),
        (["preference.reference=int8"], "preference.reference must be one of 'float32', 'bfloat16', got 'int8'"),
        (["schedule.batch_pairs=0"], "schedule: batch_pairs must be at least 1, got 0"),
        (["schedule.micro_batch_pairs=0"], "schedule: micro_batch_pairs must be at least 1, got 0"),
        (["data.held_out_pairs=0"], "data: held_out_pairs must be at least 1, got 0"),
        (["data.sequence_length=0"], "data: sequence_length must be at least 1, got 0"),
        (["data.held_out=1"], "held_out = 1.0 is not a share"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(prefer, folder, overrides, message):
    with pytest.raises(UserError) as caught:
        train(prefer(*overrides), folder / "run", build=build)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_an_epoch_less_one_pair_is_allowed(prefer, folder):
    recipe = prefer("schedule.steps=15", "schedule.batch_pairs=1")
    objective_of(recipe, folder)
    with pytest.raises(UserError, match="take at most 15 steps"):
        objective_of(prefer("schedule.steps=16", "schedule.batch_pairs=1"), folder)


def test_a_model_to_begin_with_is_needed(prefer, folder):
    (folder / "drawn.toml").write_text(RECIPE.replace('init_from = "before"', 'preset = "tiny"'))
    with pytest.raises(UserError, match=r"needs model\.init_from: the checkpoint of a model that answers"):
        train(load_recipe("drawn.toml", PreferenceRecipe), folder / "run", build=build)


def test_pictures_are_refused_by_a_model_that_sees_none(prefer_shown, folder, model, tokenizer):
    save_model(model, folder / "before", tokenizer=tokenizer)
    with pytest.raises(UserError, match="it has an image, and the model sees none"):
        train(prefer_shown(), folder / "run", build=build)


def test_resume_refuses_another_beta_and_another_task(prefer, folder):
    train(prefer(), folder / "run", build=build)
    with pytest.raises(UserError, match=r"begun with preference\.beta = 0\.1, the recipe now says 0\.2"):
        train(prefer("preference.beta=0.2"), folder / "run", build=build, resume=True)
    (folder / "run" / "recipe.toml").write_text("task = 'language'\n")
    with pytest.raises(UserError, match="begun with task = 'language', the recipe now says 'preference'"):
        train(prefer(), folder / "run", build=build, resume=True)


def test_the_command_line(prefer, folder, fulmen):
    code, out, err = fulmen("train", "recipe.toml", "--dir", "run")
    assert (code, err) == (0, "")
    assert "step 4: the better of two held-out answers has the larger reward " in out
    assert "checkpoint: run/checkpoint" in out
    assert load_task("run/recipe.toml") == (prefer(), build)
    assert load_recipe("run/recipe.toml", PreferenceRecipe) == prefer()
    code, _, err = fulmen("train", "recipe.toml", "--dir", "other", "--set", "task=preferences")
    assert code == 2
    assert "task = 'preferences' is not known: the tasks are language, coca, preference" in err


def test_the_recipe_comes_back(prefer, folder):
    (folder / "again.toml").write_text(dump_recipe(prefer()))
    assert load_recipe("again.toml", PreferenceRecipe) == prefer()


def test_some_metrics_are_measured_now_and_then(prefer, folder):
    objective, _ = objective_of(prefer("train.routing_every=3"), folder)
    batches = objective.next_batches(0)
    assert ["expert_load" in objective.backward(batches, step) for step in (1, 2, 3)] == [False, False, True]
