"""What a trained team leaves: the weights of all its agents and of its transfer, and how another run begins with them.

checkpoint/team.safetensors   tensors by name: learner..., transfer...
           team.json          agents, sizes, frames, and the state that is not tensors
           recipe.toml        the run's recipe
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.marl.build import build_agents, build_world
from fulmen.marl.learner import TeamLearner
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.spec import Environment, TeamSpec
from fulmen.marl.state import join_state, split_state
from fulmen.marl.team import Team
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.transfer.pat import PAT
from fulmen.run import RunDirectory, SnapshotStore, write_atomic

TENSORS, DESCRIPTION, RECIPE = "team.safetensors", "team.json", "recipe.toml"
NETWORKS = ("actor", "critic", "target_actor", "target_critic")


@dataclass(frozen=True, kw_only=True)
class TrainedTeam:
    """A team as its run left it, in one world of its own, ready to act or to go on."""

    recipe: MarlRecipe
    frames: int
    world: Environment
    learner: TeamLearner
    transfer: Transfer


def save_checkpoint(team: Team, recipe: MarlRecipe, folder: Path) -> Path:
    """Write all agents' weights and the transfer's into `folder`, each file whole or not at all; gives it back."""
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
    write_atomic(folder / TENSORS, save(copies))
    write_atomic(folder / RECIPE, dump_recipe(recipe))
    # Last, since it is what `load_team` looks for.
    write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return folder


def load_team(path: str | Path) -> TrainedTeam:
    """The team of a run's folder, from its checkpoint or else its newest snapshot; or of a checkpoint's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    for folder in (path / "checkpoint", path):
        if (folder / DESCRIPTION).exists():
            return _restore(load_recipe(folder / RECIPE, MarlRecipe), *_read_checkpoint(folder))
    directory = RunDirectory(path)
    snapshot = SnapshotStore(directory.snapshots).latest() if directory.recipe.exists() else None
    if snapshot is None:
        raise UserError(f"there is no trained team in {path}: name the folder of a run of `fulmen marl train`")
    state = join_state(snapshot.tensors(), snapshot.state)
    return _restore(load_recipe(directory.recipe, MarlRecipe), state, snapshot.step)


def begin_from(team: Team, recipe: MarlRecipe) -> None:
    """Give a team at its beginning the weights that the recipe's [run] names; newcomers keep their own.

    PAT's state comes along where its settings are the same, less what it holds of the newcomers.

    Raises:
        UserError: the run named has no team, or one of other sizes.
    """
    settings, spec = recipe.run, team.environment.spec
    if settings.from_run is not None:
        path = _of_seed(settings.from_run, settings.seed)
        trained = load_team(path)
        _check_alike(spec, trained.world.spec, path)
        for agent in set(range(spec.num_agents)) - set(settings.newcomers):
            team.learner.load_agent(agent, trained.learner.agent_state(agent))
        if isinstance(team.transfer, PAT) and trained.recipe.transfer == recipe.transfer:
            team.transfer.load_state_dict(trained.transfer.state_dict())
            # Episodes begin, in as many worlds as this team has.
            team.transfer.begin(explore=True)
            for agent in settings.newcomers:
                team.transfer.renew_agent(agent)
    if settings.selector_from is not None:
        path = _of_seed(settings.selector_from, settings.seed)
        trained = load_team(path)
        if not (isinstance(team.transfer, PAT) and isinstance(trained.transfer, PAT)):
            raise UserError(f"selector_from moves a selector from PAT to PAT; {path} or this is not PAT")
        team.transfer.load_selector(trained.transfer.selector_state())


def _of_seed(path: str, seed: int) -> str:
    """So that each run of a comparison can begin from a run of its own seed."""
    return path.replace("{seed}", f"{seed}")


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], int]:
    try:
        description = json.loads((folder / DESCRIPTION).read_bytes())
        return join_state(load_file(folder / TENSORS), description["state"]), description["frames"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read the team in {folder}: {' '.join(str(error).split())}") from None


def _weights(learner: TeamLearner) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Parts of each agent's networks by their names, which mean the same wherever they lie in a snapshot's tensors."""
    names = ("shared",) if learner.settings.shared_weights else learner.spec.agents
    return {agent: {name: getattr(learner, name).row(index) for name in NETWORKS} for index, agent in enumerate(names)}


def _restore(recipe: MarlRecipe, state: dict[str, Any], frames: int) -> TrainedTeam:
    world = build_world(recipe, num_worlds=1)
    learner, transfer = build_agents(recipe, world)
    if "learner" in state:
        learner.load_state_dict(state["learner"])
    else:
        for index, weights in enumerate(state["agents"].values()):
            for name in NETWORKS:
                getattr(learner, name).load_row(index, weights[name])
    transfer.load_state_dict(state["transfer"])
    return TrainedTeam(recipe=recipe, frames=frames, world=world, learner=learner, transfer=transfer)


def _check_alike(ours: TeamSpec, theirs: TeamSpec, path: str) -> None:
    for name in ("agents", "observation_sizes", "action_sizes"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"the team of {path} has {name} {getattr(theirs, name)}, this one {getattr(ours, name)}: "
                "from_run needs a team of the same agents (selector_from does not)"
            )
