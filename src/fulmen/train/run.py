"""A training run from recipe to checkpoint: what it reads, what it leaves in its folder, how it stops and resumes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fulmen.checkpoint import load_config, load_model, save_model
from fulmen.checkpoint.config import config_keys
from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.data import Batch, Document, PackedLoader, Tokenizer, held_out_batches, read_documents, sample_texts, split
from fulmen.model import LanguageModel, ModelConfig, choose_device
from fulmen.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    Snapshot,
    SnapshotError,
    SnapshotStore,
    StopRequest,
    choose_snapshot,
    keep_freed_memory,
    only_if_begun,
    plot_curves,
    read_metrics,
    write_atomic,
)
from fulmen.train.recipe import DataSection, ModelSection, OptimizerSection, TrainRecipe
from fulmen.train.trainer import Trainer, TrainingDivergedError

TOKENIZER = "tokenizer"
"""The folder, within a run's, of the tokenizer that it trains with."""

FIXED = {
    **{
        name: tuple(field.name for field in dataclasses.fields(section))
        for name, section in (("model", ModelSection), ("data", DataSection), ("optimizer", OptimizerSection))
    },
    "train": ("seed", "precision", "capacity_factor", "balance"),
}
"""Keys that a run keeps from its beginning to its end, by section."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: with a checkpoint, or early, because of the signal `stopped_by`; the other one is None."""

    step: int
    checkpoint: Path | None
    held_out: list[tuple[int, float]]  # (step, bits per byte) of each evaluation
    stopped_by: int | None


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What the loop works with."""

    trainer: Trainer
    held_out: list[Batch]
    tokenizer: Tokenizer
    store: SnapshotStore
    log: MetricsLog
    progress: Progress


def train(
    recipe: TrainRecipe, path: Path, *, resume: bool = False, report: Callable[[str], None] = lambda line: None
) -> RunResult:
    """Train as the recipe says, in the run folder `path`: metrics, snapshots, plots, and at the end a checkpoint.

    With `resume` the run goes on from its newest good snapshot, or begins if it has none. `report` is told, a line at a
    time, what is prepared before the first step. A run that cannot begin leaves nothing behind.

    Raises:
        UserError: anything the user can mend: the recipe, the data, a folder in use or already used, a full disk.
        TrainingDivergedError: a loss that is not finite; the message names the last good snapshot.
    """
    with RunDirectory(path) as directory, only_if_begun(directory):
        store = SnapshotStore(directory.snapshots, keep=recipe.train.keep_snapshots)
        snapshot = _choose_snapshot(directory, store, recipe, resume)
        trainer, held_out, tokenizer = _prepare(recipe, directory, fresh=snapshot is None, report=report)
        if snapshot is None:
            tokenizer.save(directory.path / TOKENIZER)
        else:
            trainer.restore(snapshot.tensors(), snapshot.state)
        # From here on the run has begun.
        write_atomic(directory.recipe, dump_recipe(recipe))
        with (
            MetricsLog(directory, resume_step=None if snapshot is None else snapshot.step) as log,
            Progress("train", recipe.schedule.steps, done=trainer.step) as progress,
            StopRequest() as stop,
        ):
            session = _Session(
                trainer=trainer, held_out=held_out, tokenizer=tokenizer, store=store, log=log, progress=progress
            )
            for warning in store.warnings:
                progress.print(f"warning: {warning}")
            _loop(session, stop)
        plot_run(directory)
        checkpoint = None
        if trainer.step == recipe.schedule.steps:
            checkpoint = directory.path / "checkpoint"
            save_model(trainer.model, checkpoint, dialect=recipe.export.dialect, tokenizer=tokenizer)
        return RunResult(
            step=trainer.step,
            checkpoint=checkpoint,
            held_out=_held_out_curve(directory),
            # A signal in the last step stops nothing.
            stopped_by=stop.requested if checkpoint is None else None,
        )


def plot_run(directory: RunDirectory) -> None:
    """Draw the loss of the steps and of the held-out text into the run's folder of plots."""
    metrics = read_metrics(directory.metrics)
    series = {}
    for name, key in (("training loss", "loss"), ("held-out loss", "held_out_loss")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            series[name] = tuple(zip(*points, strict=True))
    title = f"{directory.path.name}: loss per token"
    plot_curves(directory.plots / "loss.png", series, title=title, x_label="step", y_label="nats per token")


def _choose_snapshot(
    directory: RunDirectory, store: SnapshotStore, recipe: TrainRecipe, resume: bool
) -> Snapshot | None:
    """The snapshot to go on from, or None to begin."""

    def check_same() -> None:
        _check_same_run(load_recipe(directory.recipe, TrainRecipe), recipe, directory.path)

    snapshot = choose_snapshot(directory, store, resume=resume, check_same=check_same)
    if snapshot is not None and snapshot.step > recipe.schedule.steps:
        raise UserError(
            f"{directory.path} is at step {snapshot.step}, beyond schedule.steps = {recipe.schedule.steps}: "
            "ask for more steps, or choose another --dir"
        )
    return snapshot


def _check_same_run(before: TrainRecipe, now: TrainRecipe, path: Path) -> None:
    """What decides which numbers come out may not change in the middle of a run; how long and how often may."""
    for section, keys in FIXED.items():
        for key in keys:
            old, new = (getattr(getattr(recipe, section), key) for recipe in (before, now))
            if old != new:
                raise UserError(
                    f"{path} was begun with {section}.{key} = {old!r}, the recipe now says {new!r}: "
                    "change it back, or choose another --dir"
                )


def _prepare(
    recipe: TrainRecipe, directory: RunDirectory, *, fresh: bool, report: Callable[[str], None]
) -> tuple[Trainer, list[Batch], Tokenizer]:
    """Trainer, held-out batches and tokenizer, ready for step 0; nothing is written."""
    torch.manual_seed(recipe.train.seed)
    device = choose_device(recipe.train.device)
    keep_freed_memory()
    config = _model_config(recipe)
    documents = read_documents(recipe.data.sources, text_field=recipe.data.text_field)
    training, held_out = split(documents, recipe.data.held_out)
    report(f"text: {len(training)} documents to train on, {len(held_out)} held out")
    tokenizer = _tokenizer(recipe, config, directory, training, fresh, report)
    shape = {"sequence_length": recipe.data.sequence_length, "batch_tokens": recipe.schedule.batch_tokens}
    loader = PackedLoader(training, tokenizer, seed=recipe.train.seed, **shape)
    shape["batch_tokens"] = min(shape["batch_tokens"], 8192)
    evaluation = []
    if len(held_out):
        evaluation = held_out_batches(held_out, tokenizer, max_tokens=recipe.data.held_out_tokens, **shape)
    # A run that goes on takes its weights from the snapshot, wherever they once came from.
    if fresh and recipe.model.init_from is not None:
        model = load_model(recipe.model.init_from, device=device)
    else:
        model = LanguageModel(config).to(device)
    trainer = Trainer(model, loader, recipe, device)
    count = config.count_parameters()
    dtype = str(trainer.dtype).removeprefix("torch.")
    report(
        f"model: {count.total:,} parameters, {count.active:,} of them active for a token, "
        f"{config.num_layers} layers {config.layer_plan}, on {device.type} in {dtype}"
    )
    return trainer, evaluation, tokenizer


def _model_config(recipe: TrainRecipe) -> ModelConfig:
    section = recipe.model
    changes = {f.name: getattr(section, f.name) for f in dataclasses.fields(ModelConfig)}
    changes = {name: value for name, value in changes.items() if value is not None}
    if section.init_from is not None:
        if section.preset is not None or changes:
            raise UserError("model.init_from brings its own sizes: leave out the other keys of [model]")
        config = load_config(section.init_from)
    elif section.preset is None:
        raise UserError("the recipe's [model] needs a preset, or init_from with a checkpoint")
    else:
        config = ModelConfig.preset(section.preset, **changes)
    if recipe.data.sequence_length > config.max_positions:
        raise UserError(
            f"data.sequence_length {recipe.data.sequence_length} exceeds model.max_positions {config.max_positions}"
        )
    # What the export's dialect cannot say is better known before the training than after it.
    config_keys(config, recipe.export.dialect, dtype=torch.float32, eos_id=None, bos_id=None)
    return config


def _tokenizer(
    recipe: TrainRecipe,
    config: ModelConfig,
    directory: RunDirectory,
    training: Sequence[Document],
    fresh: bool,
    report: Callable[[str], None],
) -> Tokenizer:
    """The run's own tokenizer, the one that the recipe or the checkpoint brings, or one trained on the text."""
    if not fresh:
        return Tokenizer.load(directory.path / TOKENIZER)
    source = recipe.data.tokenizer or recipe.model.init_from
    if source is None:
        report(f"tokenizer: training {config.vocab_size} tokens")
        return Tokenizer.train(sample_texts(training, recipe.data.tokenizer_sample_bytes), config.vocab_size)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {source} has {tokenizer.vocab_size} tokens, more than model.vocab_size {config.vocab_size}"
        )
    return tokenizer


def _loop(session: _Session, stop: StopRequest) -> None:
    """Steps until the schedule ends or a signal asks to stop; the last thing done is always a snapshot."""
    trainer, settings = session.trainer, session.trainer.recipe.train
    steps = trainer.recipe.schedule.steps
    if trainer.step == 0:
        _evaluate(session)
    last = trainer.step == steps
    while not last:
        _train_step(session)
        last = trainer.step == steps
        if last or (settings.evaluate_every and trainer.step % settings.evaluate_every == 0):
            _evaluate(session)
        # Asked once, so that a signal cannot come between the snapshot and the end.
        last = last or stop.requested is not None
        if last or trainer.step % settings.snapshot_every == 0:
            session.log.flush()
            session.store.save(trainer.step, trainer.tensors(), trainer.state())


def _train_step(session: _Session) -> None:
    trainer = session.trainer
    started = time.perf_counter()
    try:
        metrics = trainer.train_step(detailed=(trainer.step + 1) % trainer.recipe.train.routing_every == 0)
    except TrainingDivergedError as error:
        raise TrainingDivergedError(f"{error}; {_last_good(session.store)}") from None
    rate = metrics["batch_tokens"] / (time.perf_counter() - started)
    session.log.log(trainer.step, **metrics, tokens_per_second=rate)
    session.progress.advance(loss=metrics["loss"], **{"tokens/s": int(rate)})


def _evaluate(session: _Session) -> None:
    if session.held_out:
        metrics = session.trainer.evaluate(session.held_out, session.tokenizer.byte_lengths())
        session.log.log(session.trainer.step, **metrics)
        bits = metrics["held_out_bits_per_byte"]
        session.progress.print(f"step {session.trainer.step}: held-out {bits:.3f} bits per byte")


def _last_good(store: SnapshotStore) -> str:
    try:
        snapshot = store.latest()
    except SnapshotError:
        snapshot = None
    good = "there is no good snapshot" if snapshot is None else f"the last good snapshot is {snapshot.path}"
    return f"{good}; a run with a lower optimizer.learning_rate or a longer schedule.warmup may do better"


def _held_out_curve(directory: RunDirectory) -> list[tuple[int, float]]:
    key = "held_out_bits_per_byte"
    return [(line["step"], line[key]) for line in read_metrics(directory.metrics) if key in line]
