"""A team's training run from recipe to checkpoint: what it leaves in its folder, how it stops and resumes."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.marl.build import build_team, build_world, close_world
from fulmen.marl.checkpoint import begin_from, save_checkpoint
from fulmen.marl.evaluate import evaluate, own_generator, time_limit
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.render import draw_curves, render_episode
from fulmen.marl.spec import Environment
from fulmen.marl.state import join_state, split_state
from fulmen.marl.team import Team
from fulmen.run import (
    MetricsLog,
    Progress,
    RunDirectory,
    Snapshot,
    SnapshotStore,
    StopRequest,
    choose_snapshot,
    keep_freed_memory,
    only_if_begun,
    read_metrics,
    write_atomic,
)

FIXED_SECTIONS = ("world", "learner", "transfer", "team")
"""Sections that a run keeps from its beginning to its end."""

FIXED_KEYS = ("seed", "from_run", "newcomers", "freeze", "selector_from")
"""Keys of [run] that it keeps too."""

EVALUATION_SEED = 1_000_000_000
"""Of the first episodes of every evaluation; no run is likely to train from it."""

MOST_WORLDS = 256
"""Episodes of an evaluation that are played at a time."""

TRIAL_STEPS = 3
"""Before the run begins, so many steps are taken to see whether a world can be saved."""


@dataclass(frozen=True, kw_only=True)
class MarlResult:
    """How a run ended: with a checkpoint, or early, because of the signal `stopped_by`; the other one is None."""

    frames: int
    checkpoint: Path | None
    pictures: tuple[Path, ...]
    evaluations: list[dict[str, Any]]  # the metrics of each
    stopped_by: int | None


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What the loop works with."""

    recipe: MarlRecipe
    team: Team
    stage: Environment  # where it is evaluated
    store: SnapshotStore
    log: MetricsLog
    progress: Progress


def train(
    recipe: MarlRecipe, path: Path, *, resume: bool = False, report: Callable[[str], None] = lambda line: None
) -> MarlResult:
    """Train a team as the recipe says, in the run folder `path`: metrics, snapshots, and at the end its checkpoint,
    curves, the attention between the agents and an episode as pictures.

    With `resume` the run goes on from its newest good snapshot, or begins if it has none. `report` is told, a line at a
    time, what is prepared before the first step. A run that cannot begin leaves nothing behind.

    Raises:
        UserError: anything the user can mend: the recipe, the world, a folder in use or already used, a full disk.
    """
    keep_freed_memory()
    with RunDirectory(path) as directory, only_if_begun(directory), _threads(recipe.run.threads), ExitStack() as worlds:
        store = SnapshotStore(directory.snapshots, keep=recipe.run.keep_snapshots)
        snapshot = _choose_snapshot(directory, store, recipe, resume)
        team = build_team(recipe, report)
        worlds.callback(close_world, team.environment, report)
        stage = build_world(recipe, num_worlds=min(recipe.run.episodes, MOST_WORLDS))
        worlds.callback(close_world, stage, report)
        _try_world(stage, team, saving=recipe.run.snapshot_every > 0)
        report(f"team: {team.describe()}")
        if snapshot is None:
            begin_from(team, recipe, report)
        else:
            team.load_state_dict(join_state(snapshot.tensors(), snapshot.state))
        # From here on the run has begun.
        write_atomic(directory.recipe, dump_recipe(recipe))
        with (
            MetricsLog(directory, resume_step=None if snapshot is None else snapshot.step) as log,
            Progress("team", recipe.run.frames, done=min(team.frames, recipe.run.frames)) as progress,
            StopRequest() as stop,
        ):
            for warning in store.warnings:
                progress.print(f"warning: {warning}")
            _loop(_Session(recipe=recipe, team=team, stage=stage, store=store, log=log, progress=progress), stop)
        pictures = draw_curves(directory, team.environment.spec.agents)
        checkpoint = None
        if team.frames >= recipe.run.frames:
            checkpoint = save_checkpoint(team, recipe, directory.path / "checkpoint")
            if hasattr(team.environment, "scene"):
                pictures += (render_episode(directory.path),)
        return MarlResult(
            frames=team.frames,
            checkpoint=checkpoint,
            pictures=pictures,
            evaluations=[line for line in read_metrics(directory.metrics) if "own_return" in line],
            # A signal in the last step stops nothing.
            stopped_by=stop.requested if checkpoint is None else None,
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _try_world(stage: Environment, team: Team, *, saving: bool) -> None:
    """Raise UserError for what would end the run later: episodes without an end, or worlds that cannot be saved."""
    time_limit(stage)
    if not saving:
        return
    with own_generator(stage.device):
        stage.reset(EVALUATION_SEED)
        for _ in range(TRIAL_STEPS):
            stage.step(team.learner.random_actions(stage.num_worlds))
            # After every step, since an episode may last no longer than one.
            stage.state_dict()


def _choose_snapshot(
    directory: RunDirectory, store: SnapshotStore, recipe: MarlRecipe, resume: bool
) -> Snapshot | None:
    """The snapshot to go on from, or None to begin."""

    def check_same() -> None:
        _check_same_run(load_recipe(directory.recipe, MarlRecipe), recipe, directory.path)

    snapshot = choose_snapshot(directory, store, resume=resume, check_same=check_same)
    # The last step of all worlds may lead a little beyond.
    if snapshot is not None and snapshot.step >= recipe.run.frames + recipe.world.num_worlds:
        raise UserError(
            f"{directory.path} is at frame {snapshot.step}, beyond run.frames = {recipe.run.frames}: "
            "ask for more frames, or choose another --dir"
        )
    return snapshot


def _check_same_run(before: MarlRecipe, now: MarlRecipe, path: Path) -> None:
    """What decides which numbers come out may not change in the middle of a run; how long and how often may."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(now)
    keys = [(section, key) for section in FIXED_SECTIONS for key in old[section]]
    for section, key in [*keys, *(("run", key) for key in FIXED_KEYS)]:
        if old[section][key] != new[section][key]:
            raise UserError(
                f"{path} was begun with {section}.{key} = {old[section][key]!r}, the recipe now says "
                f"{new[section][key]!r}: change it back, or choose another --dir"
            )


def _loop(session: _Session, stop: StopRequest) -> None:
    """Steps until the frames are lived or a signal asks to stop; the last thing done is a snapshot."""
    team, settings, clock = session.team, session.recipe.run, _Clock(session.team)
    if team.frames == 0:
        _evaluate(session)
    last = team.frames >= settings.frames
    while not last:
        update = team.step()
        session.progress.advance(team.environment.num_worlds)
        last = team.frames >= settings.frames
        if last or _due(team, settings.report_every):
            _report(session, update, clock.rate(team))
        if last or _due(team, settings.evaluate_every):
            _evaluate(session)
        # Asked once, so that a signal cannot come between the snapshot and the end.
        last = last or stop.requested is not None
        if settings.snapshot_every and (last or _due(team, settings.snapshot_every)):
            session.log.flush()
            session.store.save(team.frames, *split_state(team.state_dict()))


class _Clock:
    """Frames a second since it was last asked."""

    def __init__(self, team: Team):
        self._at, self._frames = time.perf_counter(), team.frames

    def rate(self, team: Team) -> float:
        now = time.perf_counter()
        rate = (team.frames - self._frames) / (now - self._at)
        self._at, self._frames = now, team.frames
        return rate


def _due(team: Team, every: int) -> bool:
    """Whether the last step of all worlds reached or passed a multiple of `every` frames."""
    return team.frames // every > (team.frames - team.environment.num_worlds) // every


def _report(session: _Session, update: dict[str, Any], rate: float) -> None:
    """Log what the team did since the last report, and the metrics of its last update."""
    team = session.team
    happened = team.statistics()
    metrics = {
        "frames": team.frames,
        "episodes": happened.episodes,
        "returns": happened.returns,
        "student_share": happened.student_share,
        "frames_per_second": rate,
    }
    if happened.attention is not None:
        metrics["attention"] = happened.attention
    session.log.log(team.frames, **update | metrics)
    share = float(happened.student_share.mean())
    session.progress.advance(0, student=f"{share:.0%}", **{"frames/s": int(rate)})


def _evaluate(session: _Session) -> None:
    """Measure the team acting by its own policies and with transfer, in episodes that are the same for every run."""
    team, settings = session.team, session.recipe.run
    result = evaluate(session.stage, team.learner, team.transfer, episodes=settings.episodes, seed=EVALUATION_SEED)
    own, pat = result.own_returns.mean(0), result.team_returns.mean(0)
    metrics = {"own_return": own.mean(), "pat_return": pat.mean(), "own_returns": own, "pat_returns": pat}
    metrics |= {"pat_student_share": result.student_share}
    if result.attention is not None:
        metrics["pat_attention"] = result.attention
    session.log.log(team.frames, frames=team.frames, **metrics)
    session.progress.advance(0, **{"own return": float(own.mean()), "PAT return": float(pat.mean())})
