"""Actors and critics of a whole team, learning by DDPG or TD3: every agent by itself, all in the same few products.

Letters: W worlds, N agents, O, A widest observation and action, B sequences, T steps of a sequence (1 without memory),
C a context, F features (an actor's last hidden layer).
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fulmen.config import UserError, check_numbers
from fulmen.marl.memory import MemorySettings, State, make_memory
from fulmen.marl.nets import ActionSpace, Network, RowAdam
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec

ROLES = ("actor", "critic")
# TD3 (Fujimoto et al. 2018, section 6.1): noise of the target's actions and its limit, in units of half the action
# range, and critic updates for one of the actor.
SMOOTHING, SMOOTHING_LIMIT, DELAY = 0.2, 0.5, 2

ExtraLoss = Callable[[Batch, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """How the agents of a team learn."""

    hidden: tuple[int, ...] = (64, 64)  # widths of the ReLU layers, of actors and critics
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    discount: float = 0.95
    target_rate: float = 0.01  # share of the way that targets move in an update
    batch: int = 256  # sequences of each agent in an update
    noise: float = 0.1  # of exploration: standard deviation in units of half the range; discrete: probability
    twin: bool = False  # TD3: two critics, smoothed targets, an actor step every second update
    action_penalty: float = 1e-3  # weight of the mean squared actor output, before tanh
    reward_scale: float = 1.0
    shared_weights: bool = False  # one set of weights for all agents, told apart by a one-hot
    equal_start: bool = False  # all agents begin with the same weights
    shared_replay: bool = False  # everybody learns from everybody's steps
    central_critic: bool = False  # MADDPG: each critic sees all observations and actions
    clip: float = 0.5  # longest gradient of one agent's network
    temperature: float = 1.0  # of the Gumbel-softmax of discrete actions
    memory: MemorySettings = field(default_factory=MemorySettings)

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise UserError(f"hidden must be one or more widths of at least 1, got {self.hidden}")
        check_numbers(self, "above 0", lambda x: x > 0, "actor_lr", "critic_lr", "clip", "temperature", "reward_scale")
        check_numbers(self, "at least 0", lambda x: x >= 0, "noise", "action_penalty")
        check_numbers(self, "at least 0 and at most 1", lambda x: 0 <= x <= 1, "discount")
        check_numbers(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "target_rate")
        check_numbers(self, "at least 1", lambda x: x >= 1, "batch")
        if self.central_critic and self.shared_replay:
            raise UserError(
                "central_critic learns from steps that all agents lived together, shared_replay mixes them: choose one"
            )


class TeamLearner(nn.Module):
    """All agents' actors, critics, targets and optimizers. `state_dict` has everything that the next update needs.

    Agent i learns as if it were alone: nothing of agent j's weights or batch enters its update, unless `shared_weights`
    or `central_critic` ask for it. A central critic i sees all agents' observations and actions (Lowe et al. 2017), so
    its batches must be joint draws: sequence b of every agent from the same world and the same steps.

    A memory's state is a dict of tensors [W, N, ...], all zero at an episode's start; it holds the actors' memory and,
    apart from it, the critics', which advances beside it so that a sequence can start from both.
    """

    def __init__(self, spec: TeamSpec, settings: LearnerSettings, device: torch.device | str = "cpu"):
        super().__init__()
        if spec.discrete and settings.noise > 1:
            raise UserError(f"noise is the probability of a random choice here: at most 1, got {settings.noise}")
        self.spec, self.settings = spec, settings
        self.num_agents, self.feature_size = spec.num_agents, settings.hidden[-1]
        self.space = ActionSpace(spec, settings.noise, settings.temperature, device)
        widths = torch.tensor(spec.observation_sizes)[:, None]
        seen = (torch.arange(spec.observation_size) < widths).to(device)
        self.seen = None if seen.all() else nn.Buffer(seen, persistent=False)
        together = self.num_agents if settings.central_critic else 1
        self.actor = self._network(device, spec.observation_size, outputs=spec.action_size)
        sizes = together * spec.observation_size, together * spec.action_size
        self.critic = self._network(device, *sizes, outputs=1, heads=2 if settings.twin else 1)
        self.context_size = self.actor.context_size
        self.target_actor, self.target_critic = (
            copy.deepcopy(network).requires_grad_(False) for network in (self.actor, self.critic)
        )
        self.actor_adam = RowAdam(self.actor, settings.actor_lr, settings.clip)
        self.critic_adam = RowAdam(self.critic, settings.critic_lr, settings.clip)
        self.updates = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.heads = range(len(self.critic.heads))
        self.learning = list(range(self.actor.sets))

    def _network(self, device, observation_size: int, action_size: int = 0, *, outputs: int, heads: int = 1) -> Network:
        settings = self.settings
        return Network(
            make_memory(settings.memory, observation_size, device),
            agents=self.num_agents,
            observation_size=observation_size,
            action_size=action_size,
            hidden=settings.hidden,
            outputs=outputs,
            heads=heads,
            shared=settings.shared_weights,
            equal=settings.equal_start,
            device=device,
        )

    def new_state(self, num_worlds: int, teachers: bool = False) -> State:
        """Memory at an episode's start: zeros [W, N, ...] by name, {} without memory.

        teachers: the memory of each teacher j over each student i's observations, [W, N_student, N_teacher, ...].
        """
        if teachers:
            return _named("actor", self.actor.new_state(num_worlds, self.num_agents))
        states = (_named(role, getattr(self, role).new_state(num_worlds)) for role in ROLES)
        return {name: tensor for state in states for name, tensor in state.items()}

    @torch.no_grad()
    def act(self, observation: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Own policies, without noise: observation [W, N, O] to actions [W, N, A], features [W, N, F], next state.

        The critics' memory advances too where `state` has it; an evaluation may leave it out.
        """
        observation = observation[:, None]
        context, following = self._context("actor", observation, state)
        if any(name.startswith("critic_") for name in state):
            following |= self._context("critic", observation, state)[1]
        outputs, features = self.actor.layers(context[:, 0])
        return self.space.clamp(self.space.scale(outputs)), features, following

    @torch.no_grad()
    def teach(self, observation: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """What each teacher j would do for each student i, whose observation it is given.

        observation [W, N, O] to actions [W, N, N, A], features [W, N, N, F] (student before teacher), next state.
        Teachers read as much of the observation as their own has columns; what they say is brought into the student's
        bounds. On the diagonal stands what the agent itself does.
        """
        actions, features, following = self._cross(observation[:, :, None], state)
        return actions[:, 0], features[:, 0], following

    def explore(self, actions: Tensor) -> Tensor:
        """Actions [..., N, A] with exploration noise, within the bounds."""
        return self.space.explore(actions)

    def clamp(self, actions: Tensor) -> Tensor:
        """Actions [..., N, A] brought into each agent's bounds, or to the nearest one-hot."""
        return self.space.clamp(actions)

    def random_actions(self, num_worlds: int) -> Tensor:
        """Uniform actions [W, N, A], to begin with."""
        return self.space.random(num_worlds)

    def contexts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The actors' contexts at each step and after it, [B, T, N, C] both, from the stored memory on."""
        return self._around("actor", batch)

    def policy(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Own policies while learning: contexts [..., N, C] to actions [..., N, A] and features [..., N, F].

        Gradients reach the actors. Discrete actions are drawn, by a straight-through Gumbel-softmax.
        """
        outputs, features = self.actor.layers(context)
        return self.space.sample(outputs), features

    @torch.no_grad()
    def cross_policy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What each teacher would have done in each student's place: [B, T, N, N, A] and features [B, T, N, N, F].

        A teacher's memory runs over the student's observations. It begins empty, because nobody stored it: exact where
        sequences are whole episodes; in shorter ones a teacher knows what it has seen since their start.
        """
        observation = batch.observation[:, :-1].transpose(1, 2)
        actions, features, _ = self._cross(observation, self.new_state(len(observation), teachers=True))
        return actions, features

    def value(self, batch: Batch, actions: Tensor) -> Tensor:
        """Q_i(h_i, a_i) of actions [B, T, N, A] in the batch's steps: [B, T, N].

        Gradients reach the actions, not the critics. Of twin critics it is the first. A central critic takes the other
        agents' actions from the batch.
        """
        context = self._current("critic", batch, frozen=True)[0]
        return self._q(self.critic, 0, context, actions, batch.action, frozen=True)

    def update(self, batch: Batch, extra_actor_loss: ExtraLoss | None = None) -> dict[str, Tensor]:
        """One step of the critics, one of the actors, targets moved; metrics [N] by name.

        extra_actor_loss: given the batch and the own policies' actions on it [B, T, N, A], with graph, it returns what
        to add to each actor's loss, [N], or None. With `twin`, every second update leaves actors and targets alone and
        has no metrics of them. Raises UserError that names the agent whose loss is not a finite number.
        """
        batch, weight = _tidy(batch), _weight(batch.valid)
        metrics = self._update_critics(batch, weight)
        self.updates += 1
        if not self.settings.twin or self.updates % DELAY == 0:
            metrics |= self._update_actors(batch, weight, extra_actor_loss)
            self._move_targets()
        return metrics

    def _update_critics(self, batch: Batch, weight: Tensor) -> dict[str, Tensor]:
        goal = self._goal(batch)
        context = self._current("critic", batch)[0]
        values = (self._q(self.critic, head, context, batch.action, batch.action) for head in self.heads)
        losses = sum(_mean((value - goal).square(), weight) for value in values)
        self._descend("critic", losses)
        return {"critic_loss": losses.detach()}

    @torch.no_grad()
    def _goal(self, batch: Batch) -> Tensor:
        """r + discount (1 - terminated) Q'(h', mu'(h')), [B, T, N]: a time limit is no end, a termination is."""
        _, context = self._around("target_actor", batch)
        outputs, _ = self.target_actor.layers(context)
        actions = self.space.clamp(self.space.scale(outputs))
        if self.settings.twin:
            actions = self.space.smooth(actions, SMOOTHING, SMOOTHING_LIMIT)
        _, context = self._around("target_critic", batch)
        values = (self._q(self.target_critic, head, context, actions, actions) for head in self.heads)
        future = functools.reduce(torch.minimum, values)
        return self.settings.reward_scale * batch.reward + self.settings.discount * future * ~batch.terminated

    def _update_actors(self, batch: Batch, weight: Tensor, extra: ExtraLoss | None) -> dict[str, Tensor]:
        context = self._current("actor", batch)[0]
        outputs, _ = self.actor.layers(context)
        actions = self.space.sample(outputs)
        value = _mean(self.value(batch, actions), weight)
        losses = self.settings.action_penalty * _mean(self.space.penalty(outputs), weight) - value
        more = None if extra is None else extra(batch, actions)
        losses = losses if more is None else losses + more
        self._descend("actor", losses)
        return {"actor_loss": losses.detach(), "value": value.detach()}

    def _descend(self, role: str, losses: Tensor) -> None:
        """One step of Adam on the agents' losses [N]."""
        network: Network = getattr(self, role)
        # Shared weights take the mean over the agents, weights of their own each its own loss.
        loss = losses.mean() if self.settings.shared_weights else losses.sum()
        if not math.isfinite(loss.item()):
            self._name_culprit(role, losses)
        (gradient,) = torch.autograd.grad(loss, network.flat)
        getattr(self, f"{role}_adam").step(network, gradient, self.learning)

    def _name_culprit(self, role: str, losses: Tensor) -> None:
        agent = (~losses.isfinite()).nonzero()[0].item()
        raise UserError(
            f"agent {self.spec.agents[agent]}: {role} loss is {losses[agent].item()} after {self.updates.item()} "
            f"updates; look at the size of its observations and rewards, or lower {role}_lr"
        )

    @torch.no_grad()
    def _move_targets(self) -> None:
        for target, network in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
            target.flat.lerp_(network.flat, self.settings.target_rate)

    def freeze(self, agents: Iterable[int]) -> None:
        """These agents learn no more, by no update; not part of `state_dict`. Raises UserError for shared weights.

        `learning` lists the others: a transfer moves the weights of its own that belong to them, and no more.
        """
        frozen = set(agents)
        self._own_weights("be frozen")
        self.learning = [agent for agent in range(self.num_agents) if agent not in frozen]

    def agent_state(self, index: int) -> dict[str, dict[str, Tensor]]:
        """One agent's weights, by network and part: a copy. Raises UserError for shared weights."""
        self._own_weights("be taken out")
        return {role: getattr(self, role).row(index) for role in _networks(ROLES)}

    def load_agent(self, index: int, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give an agent these weights, from any team; networks that `state` lacks stay. Its optimizers begin anew.

        Raises UserError for shared weights and for parts that do not fit.
        """
        self._own_weights("be replaced")
        for name in _networks(ROLES):
            if name in state:
                getattr(self, name).load_row(index, state[name])
        for role in ROLES:
            getattr(self, f"{role}_adam").reset(index)

    def _own_weights(self, what: str) -> None:
        if self.settings.shared_weights:
            raise UserError(f"with shared_weights no agent has weights of its own that could {what}; switch it off")

    def _current(self, name: str, batch: Batch, *, frozen: bool = False) -> tuple[Tensor, State]:
        """A network's contexts [B, T, N, C] at the batch's steps, and its memory after them.

        Targets begin with the state that the networks had which they follow.
        """
        network, role = getattr(self, name), name.removeprefix("target_")
        state = {} if batch.state is None else _of(role, batch.state)
        if len(state) < len(network.memory.state_shapes):
            state = network.new_state(len(batch.observation))
        return network.context(self._view(role, batch.observation[:, :-1]), state, frozen=frozen)

    def _around(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Contexts at the steps and after each of them, [B, T, N, C] both."""
        current, state = self._current(name, batch)
        last, _ = getattr(self, name).context(
            self._view(name.removeprefix("target_"), batch.observation[:, -1:]), state
        )
        return current, last if current.shape[1] == 1 else torch.cat((current[:, 1:], last), dim=1)

    def _context(self, role: str, observation: Tensor, state: State) -> tuple[Tensor, State]:
        """Contexts [..., T, N, C] while acting, and the next state under the role's names."""
        context, following = getattr(self, role).context(self._view(role, observation), _of(role, state))
        return context, _named(role, following)

    def _view(self, role: str, observation: Tensor) -> Tensor:
        """What actor or critic sees of [..., N, O]: the columns of the own observation; a central critic sees all."""
        if self.seen is not None:
            observation = torch.where(self.seen, observation, 0)
        if role == "critic" and self.settings.central_critic:
            joint = observation.flatten(-2).unsqueeze(-2)
            return joint.expand(*joint.shape[:-2], self.num_agents, -1)
        return observation

    def _q(
        self, network: Network, head: int, context: Tensor, actions: Tensor, others: Tensor, *, frozen: bool = False
    ) -> Tensor:
        """A head's values [B, T, N] of each agent's action of `actions` [B, T, N, A], beside others' of `others`."""
        actions, others = self.space.own(actions), self.space.own(others)
        if self.settings.central_critic:
            own = torch.eye(self.num_agents, dtype=torch.bool, device=actions.device)[..., None]
            actions = torch.where(own, actions.unsqueeze(-2), others.unsqueeze(-3)).flatten(-2)
        return network.layers(context, actions, head=head, frozen=frozen)[0].squeeze(-1)

    def _cross(self, observation: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Students' observations [B, N, T, O] to every teacher's actions [B, T, N, N, A], features, next state."""
        observation = observation.unsqueeze(-2).expand(-1, -1, -1, self.num_agents, -1)
        context, following = self._context("actor", observation, state)
        outputs, features = self.actor.layers(context)
        # Students stand where the bounds are looked for: behind the teachers, for as long as that takes.
        actions = self.space.clamp(self.space.scale(outputs).movedim(1, -2)).transpose(-2, -3)
        return actions, features.transpose(1, 2), following


def _networks(roles: Iterable[str]) -> list[str]:
    return [name for role in roles for name in (role, f"target_{role}")]


def _named(role: str, state: State) -> State:
    return {f"{role}_{name}": tensor for name, tensor in state.items()}


def _of(role: str, state: State) -> State:
    """The inverse of `_named`, for the names of this role."""
    prefix = f"{role}_"
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _tidy(batch: Batch) -> Batch:
    """Zeros in place of whatever stands behind an episode's end, so that not even a nan there reaches a gradient.

    Each agent's numbers then lie together, as the products want them.
    """
    valid, zero = batch.valid, batch.reward.new_zeros(())
    led_to = torch.cat((valid[:, :1], valid), dim=1)
    observation, action = (x.movedim(2, 0).contiguous().movedim(0, 2) for x in (batch.observation, batch.action))
    return batch._replace(
        observation=torch.where(led_to[..., None], observation, zero),
        action=torch.where(valid[..., None], action, zero),
        reward=torch.where(valid, batch.reward, zero),
    )


def _weight(valid: Tensor) -> Tensor:
    """What each step counts in the mean over an agent's valid steps, [B, T, N]."""
    counts = valid.float()
    return counts / counts.sum(dim=(0, 1)).clamp(min=1)


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, N] to [N]."""
    return (x * weight).sum(dim=(0, 1))
