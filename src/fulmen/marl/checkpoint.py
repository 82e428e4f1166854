"""What a trained team leaves: the weights of all its agents and of its transfer, and how another run begins with them.

checkpoint/team.safetensors   tensors by name: learner..., transfer...
           team.json          agents, sizes, frames, and the state that is not tensors
           recipe.toml        the run's recipe
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.marl.build import build_agents, build_world, choose_device, close_world
from fulmen.marl.learner import TeamLearner
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.spec import Environment, TeamSpec
from fulmen.marl.state import join_state, split_state
from fulmen.marl.team import Team
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.transfer.pat import PAT, PATSettings
from fulmen.run import RunDirectory, Snapshot, SnapshotStore, write_atomic

TENSORS, DESCRIPTION, RECIPE = "team.safetensors", "team.json", "recipe.toml"
NETWORKS = ("actor", "critic", "target_actor", "target_critic")


@dataclass(frozen=True, kw_only=True)
class TrainedTeam:
    """A team as its run left it, in one world of its own, ready to act or to go on; as a context it closes that."""

    recipe: MarlRecipe
    frames: int
    world: Environment
    learner: TeamLearner
    transfer: Transfer

    def close(self) -> None:
        """Let the world free what it holds; a warning if that fails."""
        close_world(self.world, warnings.warn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_checkpoint(team: Team, recipe: MarlRecipe, folder: Path) -> Path:
    """Write all agents' weights and the transfer's into `folder`, each file whole or not at all; gives it back.

    A former checkpoint there is replaced. UserError if the disk refuses; there is then no checkpoint.
    """
    tensors, plain = split_state({"agents": _weights(team.learner), "transfer": team.transfer.state_dict()})
    spec = team.environment.spec
    description = {
        "frames": team.frames,
        "agents": spec.agents,
        "observation_sizes": spec.observation_sizes,
        "action_sizes": spec.action_sizes,
        "discrete": spec.discrete,
        "state": plain,
    }
    # Tensors may share memory, which safetensors does not take.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # First away and last to come, since it is what `load_team` looks for: the former one is not of these tensors.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    write_atomic(folder / TENSORS, save(copies))
    write_atomic(folder / RECIPE, dump_recipe(recipe))
    write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return folder


def load_team(path: str | Path, device: torch.device | str | None = None) -> TrainedTeam:
    """The team of a run's folder, from its checkpoint or a snapshot, whichever is newer; or of a checkpoint's folder.

    device: where it goes; None is where it was trained if that can be used here, else the CPU.

    Raises:
        UserError: there is none, it is damaged or of another version, or the device cannot be used.
    """
    stored = _find_newest(Path(path))
    recipe = load_recipe(stored.recipe, MarlRecipe)
    with ExitStack() as unless_read:
        world = build_world(_on(recipe, device), num_worlds=1)
        unless_read.callback(close_world, world, warnings.warn)
        learner, transfer = build_agents(recipe, world)
        with _reading(stored.place):
            _fill(learner, transfer, stored.state)
        unless_read.pop_all()
    return TrainedTeam(recipe=recipe, frames=stored.frames, world=world, learner=learner, transfer=transfer)


def begin_from(team: Team, recipe: MarlRecipe, report: Callable[[str], None] = warnings.warn) -> None:
    """Give a team at its beginning the weights that the recipe's [run] names; newcomers keep their own.

    PAT's state comes along where its settings are the same, less what it holds of the newcomers; where they are not,
    `report` is told what differs.

    Raises:
        UserError: the run named has no team, or one of other sizes or actions.
    """
    settings, device = recipe.run, team.environment.device
    if settings.from_run is not None:
        path = _of_seed(settings.from_run, settings.seed)
        with load_team(path, device) as trained:
            _take_weights(team, trained, settings.newcomers, path, report)
    if settings.selector_from is not None:
        path = _of_seed(settings.selector_from, settings.seed)
        with load_team(path, device) as trained:
            if not (isinstance(team.transfer, PAT) and isinstance(trained.transfer, PAT)):
                raise UserError(f"selector_from moves a selector from PAT to PAT; {path} or this is not PAT")
            team.transfer.load_selector(trained.transfer.selector_state())


def _take_weights(
    team: Team, trained: TrainedTeam, newcomers: Iterable[int], path: str, report: Callable[[str], None]
) -> None:
    """All weights of the team of `path` but what the newcomers have or are known by."""
    spec = team.environment.spec
    _check_alike(spec, trained.world.spec, path)
    for agent in set(range(spec.num_agents)) - set(newcomers):
        team.learner.load_agent(agent, trained.learner.agent_state(agent))
    if isinstance(team.transfer, PAT) and isinstance(trained.transfer, PAT):
        if differences := _differences(trained.transfer.settings, team.transfer.settings):
            report(f"what the PAT of {path} has learned stays behind, for its settings differ: {differences}")
        else:
            _take_over(team.transfer, trained.transfer, newcomers)


def _take_over(transfer: PAT, trained: PAT, newcomers: Iterable[int]) -> None:
    transfer.load_state_dict(trained.state_dict())
    # Episodes begin, in as many worlds as this team has.
    transfer.begin(explore=True)
    for agent in newcomers:
        transfer.renew_agent(agent)


def _differences(theirs: PATSettings, ours: PATSettings) -> str:
    """Such as `heads was 1, is 2`; nothing where they are the same."""
    before, now = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    return ", ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before[key] != now[key])


def _of_seed(path: str, seed: int) -> str:
    """So that each run of a comparison can begin from a run of its own seed."""
    return path.replace("{seed}", f"{seed}")


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Whatever is not as it should be in a damaged or older file is a UserError with its place."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"cannot read the team in {place}, it is damaged or of another version: {reason}") from error


class _Stored(NamedTuple):
    """A team on the disk."""

    place: Path
    recipe: Path
    frames: int
    state: Mapping[str, Any]


def _find_newest(path: Path) -> _Stored:
    """The checkpoint of a run's folder, or the checkpoint that the folder is; a snapshot if that is newer."""
    checkpoint = next((folder for folder in (path / "checkpoint", path) if (folder / DESCRIPTION).exists()), None)
    frames = -1
    if checkpoint is not None:
        with _reading(checkpoint):
            description = json.loads((checkpoint / DESCRIPTION).read_bytes())
            frames = int(description["frames"])
    directory = RunDirectory(path)
    if snapshot := _find_snapshot(directory, newer_than=frames):
        with _reading(snapshot.path):
            state = join_state(snapshot.tensors(), snapshot.state)
        return _Stored(snapshot.path, directory.recipe, snapshot.step, state)
    if checkpoint is None:
        raise UserError(f"there is no trained team in {path}: name the folder of a run of `fulmen marl train`")
    with _reading(checkpoint):
        state = join_state(load_file(checkpoint / TENSORS), description["state"])
    return _Stored(checkpoint, checkpoint / RECIPE, frames, state)


def _find_snapshot(directory: RunDirectory, newer_than: int) -> Snapshot | None:
    """The run's newest good snapshot, if it is of a later frame."""
    store = SnapshotStore(directory.snapshots)
    # Asked first, since most often there is none and no checksum to compute.
    if not directory.recipe.exists() or max(store.steps(), default=-1) <= newer_than:
        return None
    snapshot = store.latest()
    return snapshot if snapshot is not None and snapshot.step > newer_than else None


def _weights(learner: TeamLearner) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Parts of each agent's networks by their names, which mean the same wherever they lie in a snapshot's tensors."""
    return {
        agent: {name: getattr(learner, name).row(index) for name in NETWORKS}
        for index, agent in enumerate(_rows(learner))
    }


def _rows(learner: TeamLearner) -> tuple[str, ...]:
    """Whose weights each row of the networks holds."""
    return ("shared",) if learner.settings.shared_weights else learner.spec.agents


def _fill(learner: TeamLearner, transfer: Transfer, state: Mapping[str, Any]) -> None:
    """Give them a snapshot's or a checkpoint's state, which holds the learner's or the agents' weights alone."""
    if "learner" in state:
        learner.load_state_dict(state["learner"])
    else:
        for index, agent in enumerate(_rows(learner)):
            for name in NETWORKS:
                getattr(learner, name).load_row(index, state["agents"][agent][name])
    transfer.load_state_dict(state["transfer"])


def _on(recipe: MarlRecipe, device: torch.device | str | None) -> MarlRecipe:
    """The recipe on that device; None: on its own, or where that cannot be used on the CPU."""
    if device is None:
        try:
            device = choose_device(recipe.run.device)
        except UserError:
            device = "cpu"
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, device=str(device)))


def _check_alike(ours: TeamSpec, theirs: TeamSpec, path: str) -> None:
    for name in ("agents", "observation_sizes", "action_sizes", "discrete", "low", "high"):
        here, there = (_as_plain(getattr(spec, name)) for spec in (ours, theirs))
        if here != there:
            raise UserError(
                f"the team of {path} has {name} {there}, this one {here}: "
                "from_run needs a team of the same agents and actions (selector_from does not)"
            )


def _as_plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
