"""A team at work: its world, its learner, what it remembers, and how its agents teach each other, step by step."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.replay import Replay, check_shared
from fulmen.marl.spec import Environment, check_rewards
from fulmen.marl.transfer.base import Decision, Experience, Transfer

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner


@dataclass(frozen=True, kw_only=True)
class TeamSettings:
    """When a team learns and how much it remembers. A frame is one step of the whole team in one world."""

    warmup: int = 1600  # frames of random actions, before anybody learns
    update_every: int = 1  # steps of all worlds between updates
    updates: int = 1  # batches learned from at each of these times
    capacity: int = 100_000  # frames remembered, over all worlds
    sequence: int | None = None  # steps of a drawn sequence, 0: whole episodes; None: 1, with memory whole episodes

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("update_every", 1), ("updates", 1), ("capacity", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.sequence is not None and self.sequence < 0:
            raise UserError(f"sequence must be at least 1, or 0 for whole episodes, got {self.sequence}")


class Statistics(NamedTuple):
    """What a team did since it was last asked; nan where nothing was counted."""

    episodes: int  # that ended
    returns: Tensor  # [N] mean over these episodes, as acted, with noise and as a student where it was one
    student_share: Tensor  # [N] of all steps
    attention: Tensor | None  # [N, N] mean weight of teacher j for student i over all steps; None: no teachers


class Team:
    """An environment, a learner and a transfer, advanced one step of all worlds at a time.

    `state_dict` holds all that the next step depends on, torch's random generators included: on a CPU a team that took
    it back goes on bit for bit as if it had not stopped. Everything lies on the environment's device.
    """

    def __init__(
        self,
        environment: Environment,
        learner: "TeamLearner",
        transfer: Transfer,
        settings: TeamSettings,
        *,
        seed: int | None = None,
        report: Callable[[str], None] = warnings.warn,
    ):
        """Begin the first episodes, from `seed`. `report` is told what a user should know, once.

        Raises:
            UserError: the settings do not fit each other, the environment or the learner.
        """
        spec = environment.spec
        self.environment, self.learner, self.transfer, self.settings = environment, learner, transfer, settings
        # What moves knowledge is kept, and so are its settings, but nobody asks it.
        self._guide = transfer if spec.num_agents > 1 else Transfer(learner)
        if type(transfer) is not type(self._guide):
            report(f"agent {spec.agents[0]} is alone and has no teacher: it learns without transfer")
        self.replay = _make_replay(environment, learner, settings)
        self.frames, self.steps = 0, 0
        self.observation = environment.reset(seed)
        self.memory = learner.new_state(environment.num_worlds)
        self._counts = _Counts(environment)

    def step(self) -> dict[str, Any]:
        """Advance all worlds by one step and learn if it is time to; gives the metrics of the last update, if any.

        Raises:
            UserError: a reward that is not a number, or an environment that breaks its own rules.
        """
        decision, memory = self._decide()
        transition = self.environment.step(decision.actions)
        check_rewards(self.environment.spec, transition.reward)
        experience = Experience(
            observation=self.observation,
            action=decision.actions,
            reward=transition.reward,
            terminated=transition.terminated,
            ended=transition.ended,
            next_observation=transition.final_observation,
            student=decision.student,
        )
        self.replay.add(experience, self.memory)
        self._guide.observe(experience)
        self._counts.add(experience, decision.attention)
        self.observation, self.memory = transition.observation, reset_memory(memory, transition.ended)
        self.steps += 1
        self.frames += self.environment.num_worlds
        due = self.steps % self.settings.update_every == 0
        return self._update() if due and self.frames >= self.settings.warmup else {}

    def statistics(self) -> Statistics:
        """What happened since the last call; the count begins anew."""
        return self._counts.take()

    def describe(self) -> str:
        """One line for the beginning of a run."""
        weights = sum(parameter.numel() for parameter in self.learner.parameters())
        return (
            f"{self.environment.spec.num_agents} agents in {self.environment.num_worlds} worlds on "
            f"{self.environment.device}, {weights:,} weights with their targets, "
            f"{self.replay.capacity * self.environment.num_worlds:,} frames of replay"
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists in dicts; tensors may be views of what the team goes on with."""
        state = {"frames": self.frames, "steps": self.steps, "observation": self.observation, "memory": self.memory}
        for name in ("environment", "learner", "transfer", "replay"):
            state[name] = getattr(self, name).state_dict()
        state |= {"counts": self._counts.state_dict(), "generator": torch.get_rng_state()}
        if self.environment.device.type == "cuda":
            state["cuda_generator"] = torch.cuda.get_rng_state(self.environment.device)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the team is built as the other one was."""
        device = self.environment.device
        self.frames, self.steps = state["frames"], state["steps"]
        self.observation = state["observation"].to(device, copy=True)
        self.memory = {name: value.to(device, copy=True) for name, value in state["memory"].items()}
        for name in ("environment", "learner", "transfer", "replay"):
            getattr(self, name).load_state_dict(state[name])
        self._counts.load_state_dict(state["counts"])
        torch.set_rng_state(state["generator"].cpu())
        if "cuda_generator" in state and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), device)

    @torch.no_grad()
    def _decide(self) -> tuple[Decision, dict[str, Tensor]]:
        """What everybody does, with exploration, and the memory after it."""
        own, _, memory = self.learner.act(self.observation, self.memory)
        if self.frames < self.settings.warmup:
            actions = self.learner.random_actions(self.environment.num_worlds)
            nobody = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
            return Decision(actions, nobody, None), memory
        decision = self._guide.decide(self.observation, own, explore=True)
        return decision._replace(actions=self.learner.explore(decision.actions)), memory

    def _update(self) -> dict[str, Any]:
        settings, metrics = self.learner.settings, {}
        for _ in range(self.settings.updates):
            batch = self.replay.sample(settings.batch, shared=settings.shared_replay, joint=settings.central_critic)
            metrics = self.learner.update(batch, self._guide.actor_loss)
            metrics |= self._guide.update(batch)
        return metrics


class _Counts:
    """Running sums of what the statistics are made of."""

    def __init__(self, environment: Environment):
        count, device = environment.spec.num_agents, environment.device
        self._running = torch.zeros(environment.num_worlds, count, device=device)
        self._agents, self._device = count, device
        self._clear()

    def add(self, experience: Experience, attention: Tensor | None) -> None:
        self._running = self._running + experience.reward
        self._steps += len(experience.ended)
        self._student += experience.student.sum(0)
        if attention is not None:
            self._looks += len(attention)
            self._attention += attention.sum(0)
        if experience.ended.any():
            ended = experience.ended[:, None]
            self._episodes += int(ended.sum())
            self._returns += (self._running * ended).sum(0)
            self._running = self._running * ~ended

    def take(self) -> Statistics:
        statistics = Statistics(
            episodes=self._episodes,
            returns=_mean(self._returns, self._episodes),
            student_share=_mean(self._student, self._steps),
            attention=_mean(self._attention, self._looks) if self._looks else None,
        )
        self._clear()
        return statistics

    def state_dict(self) -> dict[str, Any]:
        return {name.removeprefix("_"): getattr(self, name) for name in _SUMS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _SUMS:
            value = state[name.removeprefix("_")]
            setattr(self, name, value.to(self._device, copy=True) if isinstance(value, Tensor) else value)

    def _clear(self) -> None:
        self._episodes, self._steps, self._looks = 0, 0, 0
        self._returns = torch.zeros(self._agents, device=self._device)
        self._student = torch.zeros(self._agents, device=self._device)
        self._attention = torch.zeros(self._agents, self._agents, device=self._device)


_SUMS = ("_running", "_episodes", "_steps", "_looks", "_returns", "_student", "_attention")


def _mean(total: Tensor, count: int) -> Tensor:
    return total / count if count else torch.full_like(total, torch.nan)


def reset_memory(memory: Mapping[str, Tensor], ended: Tensor) -> dict[str, Tensor]:
    """Memory states [W, ...] with zeros where an episode ended [W]."""
    if not memory or not ended.any():
        return dict(memory)
    return {n: value.masked_fill(ended.view(-1, *[1] * (value.dim() - 1)), 0) for n, value in memory.items()}


def _make_replay(environment: Environment, learner: "TeamLearner", settings: TeamSettings) -> Replay:
    remembers = learner.settings.memory.kind != "none"
    sequence = settings.sequence
    if sequence is None:
        sequence = 0 if remembers else 1
    if remembers and sequence == 1:
        raise UserError("a memory learns nothing from single steps: set sequence above 1, or to 0 for whole episodes")
    if learner.settings.shared_replay:
        check_shared(environment.spec, joint=learner.settings.central_critic)
    worlds = environment.num_worlds
    return Replay(
        environment.spec,
        capacity=-(-settings.capacity // worlds),
        num_worlds=worlds,
        sequence=sequence,
        device=environment.device,
    )
