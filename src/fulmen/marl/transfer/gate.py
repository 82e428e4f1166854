"""When an agent is a student: the student actor-critic of the paper, and a bandit on measured episode returns.

Letters: W worlds, N agents, i the student, j the teacher, C context, B sequences, T steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fulmen.marl.nets import Part, RowAdam, Stack, perceptron_parts, run_layers
from fulmen.marl.transfer.base import Experience


def agent_means(x: Tensor, valid: Tensor) -> Tensor:
    """[N] means of x [B, T, N] over the steps that `valid` counts; 0 for an agent without any."""
    return torch.where(valid, x, 0).sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)


class StackedPerceptron(Stack):
    """ReLU layers for every agent its own, or one network for all (sets=1). Their first output is 0."""

    def __init__(self, sets: int, sizes: tuple[int, ...], device: torch.device | str = "cpu"):
        parts, last = perceptron_parts("layer", sizes), f"layer{len(sizes) - 2}"
        parts |= {name: Part(parts[name].shape, 0.0) for name in (f"{last}.weight", f"{last}.bias")}
        super().__init__(parts, sets, device=device)
        self.layers = self.places("layer", sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N, in] -> [..., N, out]."""
        lead, own = x.shape[:-1], len(self.flat) > 1
        x = x.movedim(-2, 0).flatten(1, -2) if own else x.reshape(1, -1, x.shape[-1])
        x, _ = run_layers(x, self.flat, self.layers)
        return x.unflatten(1, lead[:-1]).movedim(0, -2) if own else x.view(*lead, -1)

    def renew(self, index: int) -> None:
        """Draw the weights of one network again."""
        self.load_row(index, Stack(self.parts, 1, device=self.flat.device).row(0))


class StudentActorCritic(nn.Module):
    """pi_i(student | h_i) and V_i(h_i): learns from each step's reward whether to be a student in a state.

    A network of one hidden layer each, every agent its own, or one for all (`shared`). All of them are rows of `net`,
    policies before critics.
    """

    CLIP, LIMIT = 0.5, 0.02

    def __init__(
        self, num_agents: int, context_size: int, *, hidden: int, shared: bool, lr: float, device: torch.device
    ):
        super().__init__()
        self.sets = 1 if shared else num_agents
        self.net = StackedPerceptron(2 * self.sets, (context_size, hidden, 1), device)
        self.optimizer = RowAdam(self.net, lr, self.CLIP)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of being a student in context [..., N, C], and its value: [..., N] both."""
        return self._run(context, slice(None)).unbind()

    def logit(self, context: Tensor) -> Tensor:
        """[..., N] log-odds of being a student in context [..., N, C]."""
        return self._run(context, slice(self.sets))[0]

    def value(self, context: Tensor) -> Tensor:
        """[..., N]."""
        return self._run(context, slice(self.sets, None))[0]

    def _run(self, context: Tensor, rows: slice) -> Tensor:
        """[K, ..., N] outputs of these K x `sets` rows."""
        flat = self.net.flat[rows]
        x = context.movedim(-2, 0).reshape(self.sets, -1, context.shape[-1])
        x = x.repeat(len(flat) // self.sets, 1, 1) if len(flat) > self.sets else x
        outputs, _ = run_layers(x, flat, self.net.layers)
        return outputs.view(-1, context.shape[-2], *context.shape[:-2]).movedim(1, -1)

    def update(self, policy_loss: Tensor, value_loss: Tensor, learning: Sequence[int]) -> None:
        """One step on the losses [N]: of the agents in `learning`, each by its own; of a shared gate, by their mean."""
        loss = policy_loss + value_loss
        (grad,) = torch.autograd.grad(loss.mean() if self.sets == 1 else loss.sum(), self.net.flat)
        agents = [0] if self.sets == 1 else learning
        self.optimizer.step(self.net, grad, [*agents, *(self.sets + agent for agent in agents)])

    def renew_agent(self, index: int) -> None:
        """Begin from scratch for one agent; a shared gate stays as it is."""
        if self.sets == 1:
            return
        for row in (index, self.sets + index):
            self.net.renew(row)
            self.optimizer.reset(row)

    def losses(
        self,
        context: Tensor,
        student: Tensor,
        target: Tensor,
        valid: Tensor,
        entropy_weight: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Policy loss, value loss and entropy, each [N], from context [B, T, N, C] and the rest [B, T, N].

        target: the student reward, plus the discounted value of what followed where it was not terminated. The
        advantage target - V is normalised for each agent. The steps are replayed: with two modes and the value of the
        mixture that lived them as baseline, the gradient's sign is right without importance weights; but it does not
        vanish where the mode is nearly certain, so no step pushes a mode's probability beyond `LIMIT` (our choice).
        """
        logit, value = self(context)
        advantage = (target - value).detach()
        advantage = advantage - agent_means(advantage, valid)
        advantage = advantage / (agent_means(advantage.square(), valid).sqrt() + 1e-6)
        log_student, log_self = functional.logsigmoid(logit), functional.logsigmoid(-logit)
        chosen = torch.where(student, log_student, log_self)
        entropy = agent_means(-(logit.sigmoid() * log_student + (-logit).sigmoid() * log_self), valid)
        chance = chosen.detach().exp()
        counts = torch.where(advantage > 0, chance < 1 - self.LIMIT, chance > self.LIMIT)
        policy_loss = -agent_means(counts * advantage * chosen, valid) - entropy_weight * entropy
        return policy_loss, agent_means((value - target).square(), valid), entropy


class Held:
    """Choices [W, N] of training that hold for some steps, or for an episode."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all choices: episodes begin everywhere."""
        self._choices: dict[str, Tensor] = {}
        self._age: Tensor | None = None

    def hold(self, name: str, fresh: Tensor, steps: int | None = None) -> Tensor:
        """The choice of that name: `fresh` where one is due, every `steps` of an episode (None: at its beginning)."""
        if self._age is None or len(self._age) != len(fresh):
            self._choices, self._age = {}, torch.zeros(len(fresh), dtype=torch.int64, device=fresh.device)
        due = self._age == 0 if steps is None else self._age % steps == 0
        self._choices[name] = torch.where(due[:, None], fresh, self._choices.get(name, fresh))
        return self._choices[name]

    def hold_alone(self, shape: torch.Size, epsilon: float, device: torch.device, steps: int | None = None) -> Tensor:
        """[W, N] bool of that shape: who acts by its own policy whatever else is chosen, with probability epsilon."""
        return self.hold("alone", torch.rand(shape, device=device) < epsilon, steps)

    def observe(self, ended: Tensor) -> None:
        """A step of all worlds went by, after which the episode was over in some [W]."""
        if self._age is not None:
            self._age = (self._age + 1) * ~ended

    def state_dict(self) -> dict[str, Any]:
        return {"choices": dict(self._choices), "age": self._age}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._choices = {name: choice.to(device, copy=True) for name, choice in state["choices"].items()}
        self._age = None if state["age"] is None else state["age"].to(device, copy=True)


class Returns:
    """Measured episode returns: entry [i, j] is agent i's while it followed j, [i, i] while it followed itself.

    Modes change within an episode, so an episode of agent i counts for [i, i] by the squared share of the steps in
    which its own policy acted, and for [i, j] by the square of j's share, attention alpha_ij on student steps (our
    choice: the square, so that episodes of one mode outweigh mixed ones, which say little). Steps that nobody decided
    (random warm-up) count for nobody. `window` is the number of whole episodes that a mean remembers; unused entries
    stay.
    """

    def __init__(self, num_agents: int, *, window: int = 100, device: torch.device | str = "cpu"):
        self.window = window
        self.weight, self.mean, self.variance = torch.zeros(3, num_agents, num_agents, device=device)
        self._measured: tuple | None = None
        self.begin()

    def begin(self) -> None:
        """Forget the unfinished episodes."""
        self._reward = self._share = self._steps = None

    def observe(self, experience: Experience, attention: Tensor | None) -> None:
        """One step of all worlds; attention [W, N, N] with which it was decided, None for steps that nobody decided."""
        reward, ended = experience.reward, experience.ended
        if self._reward is None or self._reward.shape != reward.shape:
            self._reward, self._steps = torch.zeros_like(reward), torch.zeros_like(reward[:, :1])
            self._share = reward.new_zeros(*reward.shape, reward.shape[1])
        self._reward, self._steps = self._reward + reward, self._steps + 1
        if attention is not None:
            student = experience.student[..., None]
            own = torch.eye(reward.shape[1], device=reward.device)
            self._share = self._share + torch.where(student, attention, own)
        if ended.any():
            self._count_episodes(ended)
            keep = ~ended[:, None]
            self._reward, self._steps = self._reward * keep, self._steps * keep
            self._share = self._share * keep[..., None]

    def _count_episodes(self, ended: Tensor) -> None:
        """Merge the means and variances of the episodes that ended [W] into the running ones."""
        share = (self._share / self._steps[..., None]).square() * ended[:, None, None]
        returns = self._reward[..., None]
        added = share.sum(0)
        safe = added.clamp(min=1e-12)
        mean = (share * returns).sum(0) / safe
        variance = (share * (returns - mean).square()).sum(0) / safe
        kept = self.weight * (1 - 1 / self.window) ** added
        total = kept + added
        fraction = added / total.clamp(min=1e-12)
        step = mean - self.mean
        self.variance = (1 - fraction) * (self.variance + fraction * step.square()) + fraction * variance
        self.mean = self.mean + fraction * step
        self.weight = total

    def gap(self, source: str = "own", evidence: float = 5.0) -> Tensor:
        """[N, N] by how many standard deviations of single episodes teacher j's return exceeds agent i's own.

        source "own": what j earns by itself, which assumes that all earn by the same rule. "pair": what i earned while
        it followed j. The deviation is the root of the mean of both variances (Cohen's d). Shrunk by n / (n + evidence)
        for n measured episodes; 0 where nothing is measured.
        """
        # Asked for several times a step, and the same until an episode ends, when all three tensors are replaced.
        asked = (self.weight, self.mean, self.variance, source, evidence)
        if self._measured is None or any(a is not b for a, b in zip(asked, self._measured[0], strict=True)):
            self._measured = asked, self._measure_gap(source, evidence)
        return self._measured[1]

    def _measure_gap(self, source: str, evidence: float) -> Tensor:
        mean, variance, weight = self.mean, self.variance, self.weight
        own_mean, own_variance, own_weight = (x.diagonal() for x in (mean, variance, weight))
        if source == "own":
            mean, variance, weight = (x.expand_as(mean) for x in (own_mean, own_variance, own_weight))
        # The floor keeps rounding errors of equal returns from counting as a gap.
        floor = 1e-4 * (1 + own_mean.abs())
        spread = ((variance + own_variance[:, None]) / 2).sqrt().maximum(floor[:, None])
        count = torch.minimum(weight, own_weight[:, None])
        return count / (count + evidence) * (mean - own_mean[:, None]) / spread

    def spread(self) -> Tensor:
        """[N] standard deviation of each agent's episode returns, whomever it followed."""
        total = self.weight.sum(1, keepdim=True).clamp(min=1e-12)
        mean = (self.weight * self.mean).sum(1, keepdim=True) / total
        return ((self.weight * (self.variance + (self.mean - mean).square())).sum(1, keepdim=True) / total).sqrt()[:, 0]

    def renew_agent(self, index: int) -> None:
        """Forget what was measured of an agent that has been replaced."""
        for x in (self.weight, self.mean, self.variance):
            x[index], x[:, index] = 0, 0
        self._measured = None

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_measured"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.mean.device
        vars(self).update({n: x.to(device, copy=True) if isinstance(x, Tensor) else x for n, x in state.items()})


class Bandit:
    """Each agent draws whom to follow for an episode, itself or a teacher, by Thompson sampling of measured returns.

    A novice's critic cannot judge teachers, returns can: this is the gate that mends negative transfer of a newcomer
    among agents of several tasks.
    """

    def __init__(self, returns: Returns, teachers: Tensor):
        self.returns = returns
        self.arms = teachers | torch.eye(len(teachers), dtype=torch.bool, device=teachers.device)

    def draw(self, num_worlds: int) -> Tensor:
        """[W, N] whom each agent follows for a training episode. Arms with less than one episode come first."""
        returns, shape = self.returns, (num_worlds, *self.arms.shape)
        noise = torch.randn(shape, device=self.arms.device)
        score = returns.mean + noise * returns.spread()[:, None] / (returns.weight + 1).sqrt()
        untried = torch.finfo(score.dtype).max * torch.rand_like(score)
        score = torch.where(returns.weight < 1, untried, score)
        return score.masked_fill(~self.arms, -torch.inf).argmax(-1)

    def best(self) -> Tensor:
        """[N] whom each agent follows in an evaluation: the best measured, itself where nobody is measured."""
        known = self.arms & (self.returns.weight >= 1)
        own = torch.arange(len(known), device=known.device)
        best = self.returns.mean.masked_fill(~known, -torch.inf).argmax(-1)
        return torch.where(known.any(-1), best, own)
