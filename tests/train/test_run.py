"""A run from recipe to checkpoint, in this process: what it leaves, how it is stopped, what it refuses."""

import json
import math
import os
import shutil
import signal

import pytest
import torch

from fulmen.checkpoint import load_model
from fulmen.config import UserError, load_recipe
from fulmen.data import Tokenizer
from fulmen.run import MetricsLog, RunDirectory, SnapshotStore, read_metrics
from fulmen.train import Trainer, TrainingDivergedError, TrainRecipe, train
from fulmen.train.recipe import FREE, fixed_keys

SHORT = (
    "schedule.steps=6",
    "schedule.warmup=2",
    "schedule.decay=2",
    "train.snapshot_every=2",
    "train.evaluate_every=3",
)


@pytest.fixture
def short(recipe):
    return lambda *overrides: recipe(*SHORT, *overrides)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(3, function) calls the function just before the third step."""

    def arrange(step, function):
        real = Trainer.train_step

        def train_step(self, **options):
            if self.step + 1 == step:
                function(self)
            return real(self, **options)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return arrange


def kill(number):
    return lambda trainer: os.kill(os.getpid(), number)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_leaves_what_it_says(short, folder):
    lines = []
    result = train(short(), folder / "run", report=lines.append)
    assert (result.step, result.checkpoint, result.stopped_by) == (6, folder / "run" / "checkpoint", None)
    assert lines[0] == "text: 1 documents to train on, 1 held out"
    assert lines[1] == "tokenizer: training 300 tokens"
    assert lines[2].endswith("of them active for a token, 2 layers LS, on cpu in float32")
    found = [file for file in files(folder / "run") if "tfevents" not in file]
    assert found == [
        "checkpoint/config.json",
        "checkpoint/generation_config.json",
        "checkpoint/model.safetensors",
        "checkpoint/tokenizer.json",
        "checkpoint/tokenizer_config.json",
        "lock",
        "metrics.jsonl",
        "plots/loss.png",
        "recipe.toml",
        "snapshots/.lock",
        *(
            f"snapshots/step-{step:08d}/{name}"
            for step in (4, 6)
            for name in ("manifest.json", "state.json", "tensors.safetensors")
        ),
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert load_recipe(folder / "run" / "recipe.toml", TrainRecipe) == short()
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    curve = [(line["step"], line["held_out_bits_per_byte"]) for line in metrics if "held_out_loss" in line]
    assert curve == result.held_out
    assert [step for step, _ in curve] == [0, 3, 6]
    assert curve[-1][1] < curve[0][1]


def test_checkpoint_holds_the_last_weights_and_the_tokenizer(short, folder):
    result = train(short("export.dialect=transformers"), folder / "run")
    assert json.loads((result.checkpoint / "config.json").read_text())["model_type"] == "minimax"
    saved = SnapshotStore(folder / "run" / "snapshots").load(6).tensors()
    for name, tensor in load_model(result.checkpoint).state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"])
    kept, exported = (Tokenizer.load(path) for path in (folder / "run" / "tokenizer", result.checkpoint))
    assert kept.fingerprint == exported.fingerprint
    assert kept.vocab_size == 300


def test_without_held_out_text_nothing_is_evaluated(short, folder):
    assert train(short("data.held_out=0"), folder / "run").held_out == []


def test_evaluates_first_and_last_by_default(short, folder):
    assert [step for step, _ in train(short("train.evaluate_every=0"), folder / "run").held_out] == [0, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_step_and_resume_goes_on(short, folder, at_step, number):
    expected = train(short(), folder / "straight")
    # No multiple of snapshot_every: the signal itself makes it save.
    at_step(5, kill(number))
    result = train(short(), folder / "run")
    assert (result.step, result.checkpoint, result.stopped_by) == (5, None, number)
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [4, 5]
    result = train(short(), folder / "run", resume=True)
    assert result.held_out == expected.held_out
    one, other = (SnapshotStore(folder / name / "snapshots").load(6) for name in ("straight", "run"))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert one.state == other.state


def test_a_signal_in_the_last_step_stops_nothing(short, folder, at_step):
    at_step(6, kill(signal.SIGTERM))
    result = train(short(), folder / "run")
    assert result.checkpoint.exists()
    assert result.stopped_by is None


def test_signal_after_the_snapshot_of_a_step_is_kept_for_the_next(short, folder, monkeypatch):
    """Between the snapshot of step 2 and the end of the loop's turn; it must not end the run without a snapshot."""
    real = SnapshotStore.save

    def save(self, step, *rest):
        path = real(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(SnapshotStore, "save", save)
    result = train(short(), folder / "run")
    assert SnapshotStore(folder / "run" / "snapshots").steps()[-1] == result.step == 3


def test_metrics_are_on_the_disk_before_the_snapshot_that_keeps_them(short, folder, monkeypatch):
    done = []
    for owner, name in ((MetricsLog, "flush"), (SnapshotStore, "save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *rest, name=name, real=real: done.append(name) or real(*rest))
    train(short(), folder / "run")
    assert done == ["flush", "save"] * 3 + ["flush"]


def test_signal_during_the_first_evaluation_is_kept_too(short, folder, monkeypatch):
    real = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, *rest: os.kill(os.getpid(), signal.SIGTERM) or real(self, *rest)
    )
    result = train(short(), folder / "run")
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [result.step] == [1]


def test_signal_in_the_last_step_changes_nothing(short, folder, at_step):
    at_step(6, kill(signal.SIGTERM))
    assert train(short(), folder / "run").checkpoint is not None


def test_resume_of_a_finished_run_exports_again(short, folder):
    train(short(), folder / "run")
    before = (folder / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "run" / "checkpoint")
    shutil.rmtree(folder / "run" / "plots")
    assert train(short(), folder / "run", resume=True).checkpoint.exists()
    assert (folder / "run" / "plots" / "loss.png").exists()
    assert (folder / "run" / "metrics.jsonl").read_text() == before


def test_resume_may_go_further_than_asked_before(short, folder):
    train(short(), folder / "run")
    result = train(short("schedule.steps=8", "train.keep_snapshots=5"), folder / "run", resume=True)
    assert result.step == 8
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [4, 6, 8]
    assert load_recipe(folder / "run" / "recipe.toml", TrainRecipe).schedule.steps == 8


def test_resume_begins_where_there_is_nothing(short, folder):
    assert train(short(), folder / "run", resume=True).step == 6


def test_resume_passes_over_a_damaged_snapshot_and_says_so(short, folder, capsys):
    expected = train(short("train.keep_snapshots=9"), folder / "run")
    (folder / "run" / "snapshots" / "step-00000006" / "tensors.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    result = train(short("train.keep_snapshots=9"), folder / "run", resume=True)
    assert "warning: the snapshot" in capsys.readouterr().out
    assert result.held_out == expected.held_out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.expert_size=64", "model.expert_size = 32, the recipe now says 64"),
        ("data.sequence_length=32", "data.sequence_length = 48, the recipe now says 32"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate = 0.01, the recipe now says 1.0"),
        ("train.seed=1", "train.seed = 0, the recipe now says 1"),
        ("train.balance=1", "train.balance = 0.01, the recipe now says 1.0"),
        ("train.capacity_factor=1", "train.capacity_factor = 2.0, the recipe now says 1.0"),
        ("train.precision=bfloat16", "train.precision = 'float32', the recipe now says 'bfloat16'"),
        ("schedule.steps=5", "is at step 6, beyond schedule.steps = 5: ask for more steps"),
    ],
)
def test_resume_refuses_another_recipe(short, folder, finished, override, message):
    with pytest.raises(UserError) as caught:
        train(short(override), finished, resume=True)
    assert message in str(caught.value)
    assert str(caught.value).endswith("or choose another --dir")
    assert load_recipe(finished / "recipe.toml", TrainRecipe) == short()


@pytest.fixture
def finished(short, folder):
    """A run that has ended, for tests that are refused."""
    train(short(), folder / "run")
    return folder / "run"


def test_every_key_that_a_run_keeps_is_one_of_the_recipe(recipe):
    fixed = fixed_keys(TrainRecipe)
    assert all(hasattr(getattr(recipe(), section), key) for section, keys in fixed.items() for key in keys)
    assert "learning_rate" in fixed["optimizer"]
    assert set(vars(recipe().train)) - set(fixed["train"]) <= set(FREE)


def test_refuses_a_folder_that_is_used(short, folder, finished):
    before = files(finished)
    with pytest.raises(UserError, match="already holds a run: add --resume to go on, or choose another --dir"):
        train(short(), finished)
    with RunDirectory(finished), pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        train(short(), finished, resume=True)
    (finished / "recipe.toml").unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="holds snapshots of a run without its recipe"):
            train(short(), finished, resume=resume)
    assert [file for file in before if file not in files(finished)] == ["lock", "recipe.toml"]


def test_refuses_other_text_under_the_same_name(short, folder, at_step):
    at_step(4, kill(signal.SIGTERM))
    train(short(), folder / "run")
    (folder / "text.txt").write_text((folder / "text.txt").read_text()[::-1])
    with pytest.raises(UserError, match="the data is not that of the snapshot: corpus was"):
        train(short(), folder / "run", resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=['missing.txt']", "no file matches 'missing.txt'"),
        ("data.sources=['empty.txt']", "the corpus is empty: no document with text in empty.txt"),
        ("data.sources=['latin.txt']", "latin.txt is not UTF-8 at byte offset 2 (0xfc)"),
        ("data.sources=['short.txt']", "the corpus is too small for vocab_size = 300"),
        ("data.held_out=1", "held_out = 1.0 is not a share of the documents"),
        ("data.sequence_length=257", "data.sequence_length 257 exceeds model.max_positions 256"),
        ("data.tokenizer=nowhere", "there is no tokenizer at nowhere"),
        ("data.tokenizer=large", "tokenizer large has 310 tokens, more than model.vocab_size 300"),
        ("model.preset=huge", "no model size named 'huge'"),
        ("model.init_from=nowhere", "model.init_from brings its own sizes: leave out the other keys of [model]"),
        ("model.num_heads=0", "num_heads must be at least 1, got 0"),
        ("model.rotary_dim=8", None),
        ("train.device=gpu", "device 'gpu' cannot be used here"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(short, folder, text, override, message):
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "short.txt").write_text("too little")
    Tokenizer.train([text], 310).save("large")
    overrides = [override]
    if message is None:
        overrides.append("export.dialect=transformers")
        message = "the transformers dialect cannot hold rotary_dim 8"
    before = files(folder)
    with pytest.raises(UserError) as caught:
        train(short(*overrides), folder / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before
    assert not (folder / "run").exists()


def test_a_recipe_without_a_model_is_refused(folder):
    (folder / "bare.toml").write_text("[data]\nsources = ['text.txt']\n[schedule]\nsteps = 1\nwarmup = 0\n")
    with pytest.raises(UserError, match=r"needs a preset, or init_from with a checkpoint"):
        train(load_recipe("bare.toml", TrainRecipe), folder / "run")


def test_other_peoples_files_stay(short, folder):
    (folder / "run").mkdir()
    (folder / "run" / "diary.txt").write_text("mine")
    with pytest.raises(UserError):
        train(short("data.sources=['missing.txt']"), folder / "run")
    assert files(folder / "run") == ["diary.txt"]
    assert train(short(), folder / "run").step == 6
    assert (folder / "run" / "diary.txt").read_text() == "mine"


def test_divergence_names_the_last_good_snapshot(short, folder, at_step):
    def poison(trainer):
        with torch.no_grad():
            trainer.model.norm.weight[0] = math.inf

    at_step(4, poison)
    with pytest.raises(TrainingDivergedError) as caught:
        train(short(), folder / "run")
    message = str(caught.value)
    assert message.startswith("training diverged at step 4: loss nan")
    assert f"the last good snapshot is {folder / 'run' / 'snapshots' / 'step-00000002'};" in message
    assert "\n" not in message
    assert [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 3]
    assert SnapshotStore(folder / "run" / "snapshots").steps() == [2]


@pytest.mark.parametrize("damaged", [False, True])
def test_divergence_without_a_good_snapshot(short, folder, at_step, damaged):
    step = 4 if damaged else 2

    def poison(trainer):
        if damaged:
            (folder / "run" / "snapshots" / "step-00000002" / "state.json").write_text("torn")
        trainer.model.norm.weight.data[0] = math.nan

    at_step(step, poison)
    with pytest.raises(
        TrainingDivergedError, match=rf"at step {step}: .* there is no good snapshot; a run with a lower"
    ):
        train(short(), folder / "run")


def test_init_from_goes_on_from_a_checkpoint(short, folder):
    """The weights, sizes and tokenizer of a checkpoint, on other text; and the run needs it at its beginning only."""
    first = train(short(), folder / "first")
    (folder / "more.txt").write_text("keys and values\n" * 200)
    (folder / "second.toml").write_text(
        "[model]\ninit_from = 'first/checkpoint'\n[data]\nsources = ['more.txt']\nsequence_length = 48\n"
        "[schedule]\nsteps = 3\nwarmup = 0\nbatch_tokens = 64\n"
        "[optimizer]\nlearning_rate = 1e-9\n[train]\nprecision = 'float32'\nsnapshot_every = 1\n"
    )
    recipe = load_recipe("second.toml", TrainRecipe)
    second = train(recipe, folder / "second")
    one, other = load_model(first.checkpoint), load_model(second.checkpoint)
    assert one.config == other.config
    for parameter, same in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=0, atol=1e-6)
    assert Tokenizer.load(second.checkpoint).fingerprint == Tokenizer.load(first.checkpoint).fingerprint
    (first.checkpoint / "model.safetensors").unlink()
    assert train(recipe, folder / "second", resume=True).checkpoint is not None


def test_init_from_a_checkpoint_cut_short(short, folder):
    checkpoint = train(short(), folder / "first").checkpoint
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "second.toml").write_text(
        "[model]\ninit_from = 'first/checkpoint'\n[data]\nsources = ['text.txt']\nsequence_length = 48\n"
        "[schedule]\nsteps = 3\nwarmup = 0\n"
    )
    with pytest.raises(UserError, match="cut short or not safetensors"):
        train(load_recipe("second.toml", TrainRecipe), folder / "second")
    assert not (folder / "second").exists()
