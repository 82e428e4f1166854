"""What a team can do: episodes without noise, acting with its transfer and by own policies only, apart."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.spec import Environment, Transition, check_rewards
from fulmen.marl.transfer.base import Decision, Transfer

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner


class Evaluation(NamedTuple):
    """Returns of E episodes, the same ones for both ways of acting: they begin alike, and nobody explores."""

    team_returns: Tensor  # [E, N] acting with transfer
    own_returns: Tensor  # [E, N] by own policies only
    student_share: Tensor  # [N] of the steps with transfer
    attention: Tensor | None  # [N, N] mean weight of teacher j for student i over these steps; None: no teachers


class Frame(NamedTuple):
    """A moment of an episode, and how everybody decides in it."""

    scene: Any  # what the environment's `scene` gives
    student: Tensor  # [N] bool: who acts by what others know
    attention: Tensor | None  # [N, N] weight of teacher j for student i; None: no teachers


def evaluate(
    environment: Environment,
    learner: "TeamLearner",
    transfer: Transfer,
    *,
    episodes: int,
    seed: int,
    max_steps: int | None = None,
) -> Evaluation:
    """Play `episodes` episodes twice, from the same seeds: with transfer, and by own policies only.

    environment: one of the evaluation's own, since all its worlds begin anew; as many episodes at a time as it has
    worlds. max_steps: where an episode is cut if the environment has no limit of its own. Torch's random generators and
    what the transfer knows of its training are as before.

    Raises:
        UserError: no episodes, no time limit, or a reward that is not a number.
    """
    if episodes < 1:
        raise UserError(f"an evaluation needs at least 1 episode, got {episodes}")
    limit = time_limit(environment, max_steps)
    with torch.no_grad(), own_generator(environment.device):
        own = _play(environment, learner, Transfer(learner), episodes, seed, limit)
        team = own
        # Without a teacher both are the same.
        if type(transfer) is not Transfer and learner.num_agents > 1:
            team = _play(environment, learner, transfer, episodes, seed, limit)
    return Evaluation(
        torch.cat(team.returns),
        torch.cat(own.returns),
        team.student / team.steps,
        team.attention / team.steps if team.attends else None,
    )


def rollout(
    environment: Environment, learner: "TeamLearner", transfer: Transfer, seed: int, *, max_steps: int | None = None
) -> list[Frame]:
    """One episode of world 0, moment by moment, to be drawn; `Transfer(learner)` shows own policies only.

    Raises:
        UserError: an environment that cannot be drawn, or without a time limit.
    """
    if not hasattr(environment, "scene"):
        raise UserError(f"{type(environment).__name__} has no scene(world) that could be drawn")
    limit = time_limit(environment, max_steps)
    transfer = transfer if learner.num_agents > 1 else Transfer(learner)
    frames: list[Frame] = []
    with torch.no_grad(), own_generator(environment.device):
        torch.manual_seed(seed)
        actors = _Actors(environment, learner, transfer, seed)
        for _ in range(limit):
            # A scene may be a view of a world that moves on.
            scene, decision = copy.deepcopy(environment.scene(0)), actors.decide()
            attention = None if decision.attention is None else decision.attention[0]
            frames.append(Frame(scene, decision.student[0], attention))
            if actors.step(decision).ended[0]:
                break
    return frames


def time_limit(environment: Environment, max_steps: int | None = None) -> int:
    """Steps after which an episode is over: the environment's own limit or `max_steps`, whichever is less.

    Raises:
        UserError: neither is given, or `max_steps` is below 1.
    """
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps must be at least 1, got {max_steps}")
    limits = [limit for limit in (environment.spec.max_steps, max_steps) if limit is not None]
    if not limits:
        raise UserError("an episode must end, and this world has no limit of steps: set world.options.max_steps")
    return min(limits)


class _Actors:
    """A team that acts without exploring, from the beginning of an episode in every world on."""

    def __init__(self, environment: Environment, learner: "TeamLearner", transfer: Transfer, seed: int):
        self.environment, self.learner, self.transfer = environment, learner, transfer
        self.observation = environment.reset(seed)
        self.memory = learner.new_state(environment.num_worlds)
        transfer.begin(explore=False)

    def decide(self) -> Decision:
        own, _, self.memory = self.learner.act(self.observation, self.memory)
        return self.transfer.decide(self.observation, own, explore=False)

    def step(self, decision: Decision) -> Transition:
        transition = self.environment.step(decision.actions)
        check_rewards(self.environment.spec, transition.reward)
        self.observation = transition.observation
        return transition


class _Tally:
    """What an evaluation adds up, over episodes that are still going on."""

    def __init__(self, environment: Environment):
        count, device = environment.spec.num_agents, environment.device
        self.returns: list[Tensor] = []
        self.steps, self.attends = 0, False
        self.student = torch.zeros(count, device=device)
        self.attention = torch.zeros(count, count, device=device)

    def add(self, decision: Decision, playing: Tensor) -> None:
        self.steps += int(playing.sum())
        self.student += decision.student[playing].sum(0)
        if decision.attention is not None:
            self.attends = True
            self.attention += decision.attention[playing].sum(0)


def _play(
    environment: Environment, learner: "TeamLearner", transfer: Transfer, episodes: int, seed: int, limit: int
) -> _Tally:
    """Play so many episodes, one in each world at a time; a world whose episode is over waits for the others."""
    tally, worlds = _Tally(environment), environment.num_worlds
    torch.manual_seed(seed)
    for first in range(0, episodes, worlds):
        # World w may begin from seed + w: each round counts on where the last one ended.
        actors = _Actors(environment, learner, transfer, seed + first)
        count = min(worlds, episodes - first)
        playing = torch.arange(worlds, device=environment.device) < count
        returns = torch.zeros(worlds, environment.spec.num_agents, device=environment.device)
        for _ in range(limit):
            decision = actors.decide()
            transition = actors.step(decision)
            tally.add(decision, playing)
            returns += transition.reward * playing[:, None]
            playing = playing & ~transition.ended
            if not playing.any():
                break
        tally.returns.append(returns[:count])
    return tally


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves torch's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
