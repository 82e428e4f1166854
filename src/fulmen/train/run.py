"""A training run from recipe to checkpoint: what it reads, what it leaves in its folder, how it stops and resumes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fulmen.config import UserError, dump_recipe, load_recipe, recipe_key
from fulmen.model import choose_device
from fulmen.parallel import SharedError, World, joined
from fulmen.parallel.snapshot import ShardedSnapshots, WholeSnapshots
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
from fulmen.train.language import build as build_language
from fulmen.train.objective import Builder, Place
from fulmen.train.recipe import MeshSection, fixed_keys
from fulmen.train.trainer import Trainer, TrainingDivergedError


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: with a checkpoint, or early, because of the signal `stopped_by`; the other one is None."""

    step: int
    checkpoint: Path | None
    held_out: list[tuple[int, float]]  # (step, the objective's headline: bits per byte of text) of each evaluation
    stopped_by: int | None


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What the loop works with."""

    trainer: Trainer
    store: SnapshotStore
    snapshots: WholeSnapshots | ShardedSnapshots  # into `store`
    log: MetricsLog
    progress: Progress
    world: World


def train(
    recipe: Any,
    path: Path,
    *,
    build: Builder = build_language,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Train as the recipe says, in the run folder `path`: metrics, snapshots, plots, and at the end a checkpoint.

    `build` makes the objective of the recipe's task. With `resume` the run goes on from its newest good snapshot, or
    begins if it has none. `report` is told, a line at a time, what is prepared before the first step. A run that cannot
    begin leaves nothing behind.

    Raises:
        UserError: anything the user can mend: the recipe, the data, a folder in use or already used, a full disk.
        TrainingDivergedError: a loss that is not finite; the message names the last good snapshot.
    """
    device = choose_device(recipe.train.device)
    with joined(getattr(recipe, "mesh", MeshSection()), device) as world, _entered(path, world) as directory:
        if not (world.is_alone or hasattr(recipe, "mesh")):
            raise SharedError(f"the task {recipe.task} trains on one rank: start it without torchrun")
        store = SnapshotStore(directory.snapshots, keep=recipe.train.keep_snapshots)
        snapshot = world.from_first(lambda: _choose_snapshot(directory, store, recipe, resume))
        told = report if world.is_first else _Silent().report
        place = Place(folder=directory.path, device=device, fresh=snapshot is None, report=told, world=world)
        trainer = _prepare(recipe, build, place)
        objective, snapshots = trainer.objective, world.snapshots(store)
        if snapshot is not None:
            trainer.restore(snapshot.state, lambda tensors: snapshots.restore(snapshot, tensors))
        with _recorded(directory, trainer, snapshot) as (log, progress), StopRequest() as stop:
            for warning in store.warnings:
                progress.print(f"warning: {warning}")
            session = _Session(
                trainer=trainer, store=store, snapshots=snapshots, log=log, progress=progress, world=world
            )
            with world.naming_lost_ranks(lambda: f"step {trainer.step + 1}"):
                _loop(session, stop)
                snapshots.settle()
        checkpoint = None
        if trainer.step == recipe.schedule.steps:
            checkpoint = directory.path / "checkpoint"
            objective.export(checkpoint)
        if world.is_first:
            plot_run(directory, objective.unit)
        return RunResult(
            step=trainer.step,
            checkpoint=checkpoint,
            held_out=_held_out_curve(directory, objective.headline.metric) if world.is_first else [],
            # A signal in the last step stops nothing.
            stopped_by=stop.requested if checkpoint is None else None,
        )


@contextmanager
def _entered(path: Path, world: World) -> Iterator[RunDirectory]:
    """The run's folder, which the first rank holds for all."""
    directory = RunDirectory(path)
    with ExitStack() as stack:

        def enter() -> None:
            if world.is_first:
                stack.enter_context(directory)
                stack.enter_context(only_if_begun(directory))

        world.together(enter)
        yield directory


@contextmanager
def _recorded(
    directory: RunDirectory, trainer: Trainer, snapshot: Snapshot | None
) -> "Iterator[tuple[MetricsLog | _Silent, Progress | _Silent]]":
    """What the first rank writes and shows of a run, which has begun when the block is entered."""
    if not trainer.world.is_first:
        yield _Silent(), _Silent()
        return
    if snapshot is None:
        trainer.objective.keep(directory.path)
    write_atomic(directory.recipe, dump_recipe(trainer.recipe))
    with (
        MetricsLog(directory, resume_step=None if snapshot is None else snapshot.step) as log,
        Progress("train", trainer.recipe.schedule.steps, done=trainer.step) as progress,
    ):
        yield log, progress


class _Silent:
    """In place of what the first rank alone writes: every call does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **values: None


def plot_run(directory: RunDirectory, unit: str) -> None:
    """Draw the loss of the steps and of what is held out into the run's folder of plots; it is a mean over `unit`s."""
    metrics = read_metrics(directory.metrics)
    series = {}
    for name, key in (("training loss", "loss"), ("held-out loss", "held_out_loss")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            series[name] = tuple(zip(*points, strict=True))
    title = f"{directory.path.name}: loss per {unit}"
    plot_curves(directory.plots / "loss.png", series, title=title, x_label="step", y_label=f"nats per {unit}")


def _choose_snapshot(directory: RunDirectory, store: SnapshotStore, recipe: Any, resume: bool) -> Snapshot | None:
    """The snapshot to go on from, or None to begin."""
    snapshot = choose_snapshot(
        directory, store, resume=resume, check_same=lambda: _check_same_run(directory.recipe, recipe, directory.path)
    )
    if snapshot is not None and snapshot.step > recipe.schedule.steps:
        raise UserError(
            f"{directory.path} is at step {snapshot.step}, beyond schedule.steps = {recipe.schedule.steps}: "
            "ask for more steps, or choose another --dir"
        )
    return snapshot


def _check_same_run(kept: Path, now: Any, path: Path) -> None:
    """What decides which numbers come out may not change in the middle of a run; how long and how often may."""

    def check(name: str, old: Any, new: Any) -> None:
        if old != new:
            raise UserError(
                f"{path} was begun with {name} = {old!r}, the recipe now says {new!r}: "
                "change it back, or choose another --dir"
            )

    check("task", recipe_key(kept, "task", default="language"), now.task)
    before = load_recipe(kept, type(now))
    for section, keys in fixed_keys(type(now)).items():
        for key in keys:
            check(f"{section}.{key}", *(getattr(getattr(recipe, section), key) for recipe in (before, now)))


def _prepare(recipe: Any, build: Builder, place: Place) -> Trainer:
    """A trainer ready for step 0; nothing is written."""
    torch.manual_seed(recipe.train.seed)
    keep_freed_memory()
    objective = place.world.together(lambda: build(recipe, place))
    place.world.check_same("recipe", dump_recipe(recipe))
    place.world.check_same("place in its data", objective.state_dict())
    mesh = getattr(recipe, "mesh", MeshSection())
    how = {name: getattr(mesh, name) for name in ("token_groups", "global_router", "keep_weights")}
    place.world.shard(objective.model, dtype=objective.dtype, **how)
    return Trainer(objective, recipe, place.device, place.world)


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
        last = last or session.world.any(stop.requested is not None)
        if last or trainer.step % settings.snapshot_every == 0:
            session.log.flush()
            session.snapshots.save(trainer.step, trainer.tensors(), trainer.state())


def _train_step(session: _Session) -> None:
    trainer, units = session.trainer, f"{session.trainer.objective.unit}s"
    started = time.perf_counter()
    try:
        metrics = trainer.train_step()
    except TrainingDivergedError as error:
        raise TrainingDivergedError(f"{error}; {_last_good(session.store)}") from None
    rate = metrics[f"batch_{units}"] / (time.perf_counter() - started)
    session.log.log(trainer.step, **metrics, **{f"{units}_per_second": rate})
    session.progress.advance(loss=metrics["loss"], **{f"{units}/s": int(rate)})


def _evaluate(session: _Session) -> None:
    trainer, headline = session.trainer, session.trainer.objective.headline
    if metrics := trainer.evaluate():
        session.log.log(trainer.step, **metrics)
        session.progress.print(f"step {trainer.step}: {headline.text.format(metrics[headline.metric])}")


def _last_good(store: SnapshotStore) -> str:
    try:
        snapshot = store.latest()
    except SnapshotError:
        snapshot = None
    good = "there is no good snapshot" if snapshot is None else f"the last good snapshot is {snapshot.path}"
    return f"{good}; a run with a lower optimizer.learning_rate or a longer schedule.warmup may do better"


def _held_out_curve(directory: RunDirectory, metric: str) -> list[tuple[int, float]]:
    return [(line["step"], line[metric]) for line in read_metrics(directory.metrics) if metric in line]
