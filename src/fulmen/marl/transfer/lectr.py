"""LeCTR, online variant: agents learn when to ask and what to advise, rewarded by the student's learning progress.

Source: Omidshafiei et al. 2019, 'Learning to Teach in Cooperative Multiagent Reinforcement Learning' (AAAI; arXiv:
1805.07830). From there: a student policy and a teacher policy for each agent, what they observe, the advising rewards,
and one centralised critic of all advising observations and actions.

Online: the paper alternates two phases, and task policies begin from scratch in every round, so that many whole
learning curves teach the advising policies. Here both levels learn at once, in the one life that all methods are
compared on: no task policy is ever reset.

Ours besides: any number of agents (of several pieces of advice the medoid, as in `adhoc`); continuous actions, for
which a teacher advises what its own policy would do, or one of a few fixed actions; values as inputs are compressed;
the advantage is normalised over a rollout; an entropy bonus; the reward's threshold is by default a running mean.

Letters: W worlds, N agents, O and A the widest observation and action, i a student, j a teacher, K fixed actions that
anybody can advise, H steps of a rollout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fulmen.config import UserError, check_numbers
from fulmen.marl.nets import RowAdam
from fulmen.marl.transfer.adhoc import (
    check_memoryless,
    check_own_critics,
    follow_medoid,
    own_values,
    sample_actions,
    take_chance,
    teacher_values,
)
from fulmen.marl.transfer.base import Decision, Experience, Transfer
from fulmen.marl.transfer.gate import StackedPerceptron
from fulmen.marl.transfer.selector import teacher_mask

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner
    from fulmen.marl.replay import Batch

Reward = Literal["value_estimation_gain", "joint_value_gain", "loss_gain", "td_gain", "q_teaching"]
ERROR_REWARDS = ("loss_gain", "td_gain")
NETS = ("student", "teacher", "critic")
MODULES = (*NETS, *(f"{name}_adam" for name in NETS))


@dataclass(frozen=True, kw_only=True)
class LeCTRSettings:
    """The advising level. Its learning rates, discount and gradient clipping are those of the learner."""

    reward: Reward = "value_estimation_gain"  # of the paper's, all but the loss gradient gain
    threshold: float | None = None  # tau of the value estimation gain; absent: each agent's running mean estimate
    cost: float = 0.0  # taken from the gain wherever advice was followed; above 0 where asking must not become a habit
    anchors: int = 0  # fixed continuous actions that can be advised too; discrete: always all choices
    hidden: int = 64
    horizon: int = 8  # steps of all worlds that the advising level learns from at once
    entropy: float = 0.01

    def __post_init__(self) -> None:
        if self.reward not in get_args(Reward):
            raise UserError(f"reward must be one of {', '.join(get_args(Reward))}, got {self.reward!r}")
        if self.threshold is not None and self.reward != "value_estimation_gain":
            raise UserError(f"threshold belongs to the value estimation gain, {self.reward} has none: leave it out")
        check_numbers(self, "a number", lambda x: True, "threshold")
        for name, least in (("cost", 0), ("anchors", 0), ("hidden", 1), ("horizon", 2), ("entropy", 0)):
            check_numbers(self, f"at least {least}", lambda x, least=least: x >= least, name)


class Advice(NamedTuple):
    """One step of all worlds on the advising level, as it was decided."""

    student_view: Tensor  # [W, N, O + 1 + K] what a student sees: its observation, and its Q there
    teacher_view: Tensor  # [W, N, N, O + 2 (2 + K)] what teacher j sees of student i; zeros where i did not ask
    asked: Tensor  # [W, N] bool
    said: Tensor  # [W, N, N] 0: nothing, 1: what j's policy would do, from 2: a fixed action
    advised: Tensor  # [W, N] bool: who acted by advice
    value: Tensor  # [W, N] the student's value estimate then
    teaching: Tensor  # [W, N] by how much its advisors' critics preferred their best action to its own
    td_error: Tensor  # [W, N] the student's error on this step then; zeros where no reward asks for it


class LeCTR(Transfer):
    """Every agent is a student and a teacher: two small policies each, and one critic that sees all of them."""

    name = "lectr"

    def __init__(self, learner: "TeamLearner", settings: LeCTRSettings | None = None):
        super().__init__(learner)
        check_memoryless(learner, self.name)
        check_own_critics(learner, self.name)
        self.settings = settings = settings or LeCTRSettings()
        spec, device = learner.spec, next(learner.parameters()).device
        self.teachers = teacher_mask(spec).to(device)
        # [N, K, A] what can be advised besides a teacher's own action.
        self.fixed = sample_actions(spec, 1, settings.anchors, device)[0]
        agents, choices, view = learner.num_agents, 2 + self.fixed.shape[1], spec.observation_size
        joint = agents * (view + choices) + agents**2 * 3 * choices
        hidden, rates = (settings.hidden, settings.hidden), learner.settings
        self.student = StackedPerceptron(agents, (view + choices - 1, *hidden, 1), device)
        self.teacher = StackedPerceptron(agents, (view + 2 * choices, *hidden, choices), device)
        self.critic = StackedPerceptron(1, (joint, *hidden, 1), device)
        self.student_adam = RowAdam(self.student, rates.actor_lr, rates.clip)
        self.teacher_adam = RowAdam(self.teacher, rates.actor_lr, rates.clip)
        self.critic_adam = RowAdam(self.critic, rates.critic_lr, rates.clip)
        self.rollout: list[tuple[Advice, Experience]] = []
        self.pending: Advice | None = None
        self.usual = torch.zeros(agents, device=device)
        self.lessons = 0
        self.metrics: dict[str, float] = {}

    @torch.no_grad()
    def decide(self, observation: Tensor, own: Tensor, *, explore: bool) -> Decision:
        """Students ask, teachers answer, whoever got advice follows it."""
        alone = super().decide(observation, own, explore=explore)
        if self.learner.num_agents == 1:
            return alone
        values = self._own_values(observation, own)
        student_view = torch.cat((observation, symlog(values)), dim=-1)
        asked = take_chance(self.student(student_view).squeeze(-1).sigmoid(), explore)

        shape = (*own.shape[:2], self.learner.num_agents)
        said, attention = torch.zeros(shape, dtype=torch.int64, device=own.device), own.new_zeros(shape)
        teacher_view = own.new_zeros(*shape, observation.shape[-1] + 2 * (2 + self.fixed.shape[1]))
        teaching, actions, advised = own.new_zeros(shape[:2]), own, alone.student
        # No teacher looks at a world in which nobody asks whom somebody could answer.
        worlds = (asked & self.teachers.any(dim=1)).any(dim=1).nonzero().squeeze(1)
        if len(worlds):
            seen, does = observation[worlds], own[worlds]
            view, menu, preferred = self._look(seen, does)
            view = view * asked[worlds][..., None, None]
            choice = self._say(view, explore) * (asked[worlds][..., None] & self.teachers)
            followed, weights = self._follow(menu, choice, does, explore)
            gives = choice > 0
            gain = (preferred * gives).sum(dim=-1) / gives.sum(dim=-1).clamp(min=1)
            teacher_view[worlds], said[worlds], teaching[worlds], attention[worlds] = view, choice, gain, weights
            actions = own.index_copy(0, worlds, followed)
            advised = advised.index_copy(0, worlds, gives.any(dim=-1))
        if explore:
            error = torch.zeros_like(teaching)
            estimate = values.amax(dim=-1)
            self.pending = Advice(student_view, teacher_view, asked, said, advised, estimate, teaching, error)
        return Decision(actions, advised, attention)

    def observe(self, experience: Experience) -> None:
        """Steps that nobody decided here, such as a random warm-up's, are no lesson."""
        if self.pending is not None:
            advice, self.pending = self.pending, None
            if self.settings.reward in ERROR_REWARDS:
                advice = advice._replace(td_error=self._td_error(experience))
            self.rollout.append((advice, experience))

    def update(self, batch: "Batch") -> dict[str, float]:
        """Learn from a rollout once it is full: the learner's updates since are what the advice has led to.

        The metrics are those of the last full one.
        """
        if len(self.rollout) >= self.settings.horizon:
            self.metrics = self._learn()
        return dict(self.metrics)

    def _learn(self) -> dict[str, float]:
        advice = Advice(*(torch.stack(parts) for parts in zip(*(a for a, _ in self.rollout), strict=True)))
        lived = Experience(*(torch.stack(parts) for parts in zip(*(e for _, e in self.rollout), strict=True)))
        # The last step has no successor yet; it is the first of the next rollout.
        self.rollout = self.rollout[-1:]

        gain = (self._gain(advice, lived) - self.settings.cost) * advice.advised
        reward = gain.mean(dim=-1)
        value = self._critic(advice)
        following = value[1:].detach() * ~lived.ended[:-1]
        target = reward[:-1] + self.learner.settings.discount * following
        critic_loss = functional.mse_loss(value[:-1], target)

        advantage = value[:-1].detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        log_prob, entropy = self._log_prob(Advice(*(part[:-1] for part in advice)))
        policy_loss = -(advantage * log_prob).mean() - self.settings.entropy * entropy.mean()

        nets = [getattr(self, name) for name in NETS]
        gradients = torch.autograd.grad(critic_loss + policy_loss, [net.flat for net in nets])
        # Who is frozen neither learns to ask nor to advise; the critic belongs to all.
        for name, net, gradient in zip(NETS, nets, gradients, strict=True):
            getattr(self, f"{name}_adam").step(net, gradient, [0] if name == "critic" else self.learner.learning)
        return {
            "advising_reward": float(reward.mean()),
            "advising_critic_loss": float(critic_loss.detach()),
            "asked": float(advice.asked.float().mean()),
            "advised": float(advice.advised.float().mean()),
        }

    def _own_values(self, observation: Tensor, own: Tensor) -> Tensor:
        """[M, N, 1 + K] Q of each agent, of its own policy's action [M, N, A] and of the fixed ones."""
        count, fixed = len(own), self.fixed.transpose(0, 1)
        actions = torch.cat((own[:, None], fixed.expand(count, -1, -1, -1)), dim=1)
        seen = observation[:, None].expand(-1, actions.shape[1], -1, -1)
        values = own_values(self.learner, seen.flatten(0, 1), actions.flatten(0, 1))
        return values.view(count, -1, values.shape[-1]).transpose(1, 2)

    def _look(self, observation: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What teachers see, [W, N, N, O + 2 (2 + K)], can advise, [W, N, N, 1 + K, A], and how they prefer it.

        Teacher j sees student i's observation and, of the student's action, its own and the fixed ones, both critics' Q
        there. The preference [W, N, N] is j's best of them over the student's action, by j's critic.
        """
        worlds, agents = own.shape[:2]
        wide = (worlds, agents, agents)
        advice, _, _ = self.learner.teach(observation, {})
        menu = torch.cat((advice[:, :, :, None], self.fixed[:, None].expand(*wide, -1, -1)), dim=3)
        points = torch.cat((own[:, :, None, None].expand(*wide, 1, -1), menu), dim=3)
        theirs = teacher_values(self.learner, observation, points)
        # The student's critic judges each teacher's points: teachers and points become worlds.
        asked = points.permute(0, 2, 3, 1, 4)
        seen = observation[:, None, None].expand(*asked.shape[:3], -1, -1)
        students = own_values(self.learner, seen.flatten(0, 2), asked.flatten(0, 2))
        students = students.view(asked.shape[:4]).permute(0, 3, 1, 2)
        view = torch.cat((observation[:, :, None].expand(*wide, -1), symlog(students), symlog(theirs)), dim=-1)
        return view, menu, theirs.amax(dim=-1) - theirs[..., 0]

    def _say(self, view: Tensor, explore: bool) -> Tensor:
        """[W, N, N] what the teacher policies choose; drawn by the Gumbel trick."""
        logits = self.teacher(view)
        noise = -torch.empty_like(logits).exponential_().log() if explore else 0
        return (logits + noise).argmax(dim=-1)

    def _follow(self, menu: Tensor, choice: Tensor, own: Tensor, explore: bool) -> tuple[Tensor, Tensor]:
        """Actions [W, N, A] of those who heard a choice [W, N, N] from the menu, `own` of the others; its weights."""
        picked = (choice - 1).clamp(min=0)[..., None, None].expand(-1, -1, -1, 1, menu.shape[-1])
        followed, weights = follow_medoid(menu.gather(3, picked).squeeze(3), choice > 0, explore)
        return torch.where((choice > 0).any(dim=-1)[..., None], followed, own), weights

    def _critic(self, advice: Advice) -> Tensor:
        """[H, W]: the centralised Q of everybody's advising observations and actions."""
        choices = 2 + self.fixed.shape[1]
        # The student's observation is there once, not again for each of its teachers.
        values = advice.teacher_view[..., -2 * choices :]
        said = functional.one_hot(advice.said, choices)
        parts = (advice.student_view, advice.asked[..., None].float(), values, said.float())
        joint = torch.cat([part.flatten(2) for part in parts], dim=-1)
        return self.critic(joint[:, :, None]).flatten(2).squeeze(2)

    def _log_prob(self, advice: Advice) -> tuple[Tensor, Tensor]:
        """[H, W] log-probability of all advising actions taken, and the mean entropy of the policies that took them."""
        logit = self.student(advice.student_view).squeeze(-1)
        asking = -functional.binary_cross_entropy_with_logits(logit, advice.asked.float(), reduction="none")
        asking_entropy = functional.binary_cross_entropy_with_logits(logit, logit.sigmoid(), reduction="none")
        log_probs = self.teacher(advice.teacher_view).log_softmax(dim=-1)
        took_part = advice.asked[..., None] & self.teachers
        saying = log_probs.gather(-1, advice.said[..., None]).squeeze(-1) * took_part
        saying_entropy = -(log_probs.exp() * log_probs).sum(dim=-1) * took_part
        count = logit.shape[-1] + took_part.sum(dim=(2, 3))
        entropy = (asking_entropy.sum(dim=2) + saying_entropy.sum(dim=(2, 3))) / count
        return asking.sum(dim=2) + saying.sum(dim=(2, 3)), entropy

    @torch.no_grad()
    def _gain(self, advice: Advice, lived: Experience) -> Tensor:
        """[H, W, N] the student's learning progress since each step (the paper's table of advising rewards)."""
        if self.settings.reward == "q_teaching":
            # QTR: max_a Q_T(o, a) - Q_T(o, a_student).
            return advice.teaching
        if self.settings.reward in ERROR_REWARDS:
            flat = Experience(*(part.flatten(0, 1) for part in lived))
            before, after = advice.td_error, self._td_error(flat).view_as(advice.td_error)
            # LG: L(theta_t) - L(theta_t+1); TDG: |delta_t| - |delta_t+1|.
            return before**2 - after**2 if self.settings.reward == "loss_gain" else before.abs() - after.abs()
        seen = lived.observation.flatten(0, 1)
        own, _, _ = self.learner.act(seen, {})
        value = self._own_values(seen, own).amax(dim=-1).view_as(advice.value)
        if self.settings.reward == "joint_value_gain":
            # JVG: V(s; theta_t+1) - V(s; theta_t), V the mean of the agents' estimates.
            return (value - advice.value).mean(dim=-1, keepdim=True).expand_as(value)
        # VEG: 1[V(theta) > tau].
        return (value > self._threshold(advice.value)).float()

    def _threshold(self, value: Tensor) -> Tensor:
        """[N] or [] the threshold; the running mean of the estimates [H, W, N] weighs this rollout by 0.05."""
        if self.settings.threshold is not None:
            return torch.tensor(self.settings.threshold, device=value.device)
        self.lessons += 1
        self.usual = self.usual.lerp(value.mean(dim=(0, 1)), max(0.05, 1 / self.lessons))
        return self.usual

    @torch.no_grad()
    def _td_error(self, step: Experience) -> Tensor:
        """[W, N] r + discount Q(o', mu(o')) - Q(o, a) of each student, by its present actor and critic."""
        following, _, _ = self.learner.act(step.next_observation, {})
        future = own_values(self.learner, step.next_observation, following) * ~step.terminated
        settings = self.learner.settings
        target = settings.reward_scale * step.reward + settings.discount * future
        return target - own_values(self.learner, step.observation, step.action)

    def renew_agent(self, index: int) -> None:
        """A newcomer in an agent's place begins to ask and to advise from scratch; the critic of all goes on."""
        for name in ("student", "teacher"):
            getattr(self, name).renew(index)
            getattr(self, f"{name}_adam").reset(index)
        self.rollout, self.usual[index] = [], 0

    def state_dict(self) -> dict[str, Any]:
        nets = {name: getattr(self, name).state_dict() for name in MODULES}
        return nets | {
            "fixed": self.fixed,
            "usual": self.usual,
            "lessons": self.lessons,
            "metrics": dict(self.metrics),
            "rollout": [[list(advice), list(lived)] for advice, lived in self.rollout],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in MODULES:
            getattr(self, name).load_state_dict(state[name])
        device = next(self.learner.parameters()).device
        self.fixed, self.usual = (state[name].to(device, copy=True) for name in ("fixed", "usual"))
        self.lessons, self.metrics = state["lessons"], dict(state["metrics"])
        self.rollout = [
            (Advice(*(part.to(device) for part in advice)), Experience(*(part.to(device) for part in lived)))
            for advice, lived in state["rollout"]
        ]
        self.pending = None


def symlog(x: Tensor) -> Tensor:
    """Sign and magnitude of values of any scale, gently: sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()
