"""Parallel Attentional Transfer: agents that teach each other while they all learn.

Source: Liang & Li, 'Parallel Knowledge Transfer in Multi-Agent Reinforcement Learning' (arXiv:2003.13085), of which no
code and no figures are public. The two modes, the student actor-critic and the shared attention over the other agents'
knowledge are the paper's; every setting below is our choice where the paper leaves it open.

Letters: W worlds, N agents, i the student, j the teacher, B sequences, T steps, A action.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

from fulmen.config import UserError, check_numbers
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer.base import Decision, Experience, Transfer
from fulmen.marl.transfer.gate import Bandit, Held, Returns, StudentActorCritic, agent_means
from fulmen.marl.transfer.selector import Advice, TeacherSelector, Teaching, mix_actions, mix_parameters, teacher_mask

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner

# Share of the way that the running mean of values moves in an update.
VALUE_RATE = 0.01
# Tensors [N] that begin anew with an agent.
MEASURED = ("frames", "value_mean", "value_weight")


@dataclass(frozen=True, kw_only=True)
class PATSettings:
    """The default of the method, and every alternative with when to use it.

    value_space
        "behaviour": the teachers' actions are mixed. Always sound.
        "parameters": the teachers' weights are mixed. Only for a learner with equal_start, and to show that it gains
        nothing; without memory.
    keys, what tells the selector one teacher from another
        "features": the last hidden layer of its actor, and its action. Knows agents again: finds those of the own task.
        "advice": how its action stands to what the others advise. Means the same in every team: for a selector that is
        to move, which selector_entropy = 0 lets keep what it learned.
    gate, who is a student when
        "actor_critic": the paper's student actor-critic. The default.
        "bandit": an episode at a time, whoever has earned this agent the highest return. For newcomers among agents of
        several tasks, whose own critic cannot judge teachers yet; best with returns = "pair".
        "always": an agent follows whenever epsilon_self lets it. To see what the attention alone is worth.
        "never": nobody acts as a student; knowledge moves by internalising alone.
        "random": one step in two, in evaluations too. The gate's own baseline.
    follow, what a student does while it learns (an evaluation always mixes)
        "mixture": the teachers' actions weighed by the attention, as the paper has it.
        "drawn": the action of one teacher, drawn by the attention for `mode_steps` steps. Explores as far as single
        teachers do, where a mixture of policies that know nothing hardly moves, and measures them apart.
    student_reward, what the actor-critic gate learns from
        "return": the environment's reward. The default, and the only one that the critic cannot mislead.
        "critic_gain": how much higher the own critic values the teachers' action. Denser, where rewards are sparse and
        the critic is good.
        "value_gain": LeCTR's value estimation gain, 1 where the own critic values the action taken above its running
        mean. Robust to the scale of rewards.
    internalise, the weight with which an own policy imitates what it is taught
        "gap": by how many standard deviations the teachers' measured return exceeds the own, between 0 and 1. The
        default: only a proven gap makes a policy imitate.
        "q_filter": 1 where the own critic prefers the teachers' action. For agents that must not wait for returns.
        "constant": always 1. Homogenises policies that are still bad: only for a newcomer among trained agents.
        "none": own policies learn from student steps through the replay alone.
    returns, which measured returns speak for teacher j (`gate.Returns`)
        "own": what j earns itself. Known soon; for teams whose agents earn by the same rule.
        "pair": what i earned while it followed j. For agents with rewards or tasks that cannot be compared.
    return_bias, whether these returns are added to the attention's logits
        "fixed": times bias_scale. "learned": the scale is learned with the selector, from bias_scale on. "none": the
        critic alone teaches the attention, for teams in which returns are no hint.
    """

    value_space: Literal["behaviour", "parameters"] = "behaviour"
    keys: Literal["features", "advice"] = "features"
    gate: Literal["actor_critic", "bandit", "always", "never", "random"] = "actor_critic"
    follow: Literal["mixture", "drawn"] = "mixture"
    student_reward: Literal["return", "critic_gain", "value_gain"] = "return"
    internalise: Literal["gap", "q_filter", "constant", "none"] = "gap"
    internalise_weight: float = 1.0  # times the imitation loss; lower it if own policies all become alike
    epsilon_self: float = 0.25  # share of training by the own policy whatever the gate says; less lets it diverge
    self_for: Literal["episode", "step"] = "episode"  # whole episodes measure own returns; "step" where they hardly end
    mode_steps: int = 1  # steps for which a mode holds; more explores deeper and tells modes apart by their returns
    novelty: float = 1.0  # early bonus on the student's logit; 0 for teams in which early teachers mislead
    novelty_frames: int = 10_000  # after which the bonus has fallen to 1 / e
    gate_return_bias: float = 0.0  # times the teachers' z-score on the student's logit; above 0 where teachers may harm
    returns: Literal["own", "pair"] = "own"
    return_bias: Literal["fixed", "learned", "none"] = "fixed"
    bias_scale: float = 1.0  # logits for each standard deviation of return
    return_window: int = 100  # episodes that a measured return remembers; fewer follow fast learners
    selector_size: int = 32  # size of the attention's queries and keys
    heads: int = 1  # of the attention; more for contexts that matter in several ways
    selector_lr: float = 3e-3
    selector_entropy: float = 0.1  # weight of the attention's entropy, in units of return: even until critics are sure
    gate_hidden: int = 64
    gate_lr: float = 1e-3
    gate_entropy: float = 0.01  # weight of the gate's entropy
    shared_gate: bool = False  # one gate for all agents: learns faster where all are alike

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_numbers(self, "a share from 0 to 1", lambda x: 0 <= x <= 1, "epsilon_self")
        whole = ("mode_steps", "novelty_frames", "return_window", "selector_size", "heads", "gate_hidden")
        check_numbers(self, "at least 1", lambda x: x >= 1, *whole)
        weights = (
            "internalise_weight",
            "gate_return_bias",
            "selector_lr",
            "selector_entropy",
            "gate_lr",
            "gate_entropy",
        )
        check_numbers(self, "at least 0", lambda x: x >= 0, *weights)
        check_numbers(self, "a number", lambda x: True, "novelty", "bias_scale")
        if self.gate == "bandit" and (self.mode_steps != 1 or self.follow != "mixture"):
            raise UserError("the bandit chooses one teacher for an episode: leave mode_steps at 1, follow at 'mixture'")


class PAT(Transfer):
    """The algorithm: who is a student, whom it attends to, and what its own policy takes over.

    A student acts by the sum over j of alpha_ij mu_j(o_i). The selector ascends Q_i(o_i, that sum), the gate learns
    from the student reward, and actors imitate the sum with weight beta. A team in which nobody can teach says so once
    and learns alone.
    """

    def __init__(self, learner: "TeamLearner", settings: PATSettings | None = None):
        super().__init__(learner)
        self.settings = s = settings or PATSettings()
        count, device = learner.num_agents, next(learner.parameters()).device
        self.teachers = teacher_mask(learner.spec).to(device)
        self.teaching = Teaching(learner, s.keys)
        self.selector = TeacherSelector(
            learner.context_size,
            self.teaching.policy_size,
            size=s.selector_size,
            heads=s.heads,
            bias_scale=s.bias_scale,
            learn_bias_scale=s.return_bias == "learned",
        ).to(device)
        self.selector_optimizer = self._selector_adam()
        self.returns = Returns(count, window=s.return_window, device=device)
        self.bandit = Bandit(self.returns, self.teachers)
        self.gate = StudentActorCritic(
            count, learner.context_size, hidden=s.gate_hidden, shared=s.shared_gate, lr=s.gate_lr, device=device
        )
        self.frames = torch.zeros(count, device=device)
        # A running mean of each agent's values, and the weight of what is in it.
        self.value_mean, self.value_weight = torch.zeros(2, count, device=device)
        self._dimensions = distance_weights(learner.spec).to(device)
        self.held = Held()
        self.has_teachers = bool(self.teachers.any())
        self._attention: Tensor | None = None
        self._looked: _Look | None = None
        self._told_alone = False
        check_value_space(learner, s)

    @torch.no_grad()
    def decide(self, observation: Tensor, own: Tensor, *, explore: bool) -> Decision:
        """As `Transfer.decide`. In an evaluation the likeliest mode is taken, and epsilon_self is 0."""
        if not self.has_teachers:
            self._tell_alone()
            return super().decide(observation, own, explore=explore)
        advice = self.teaching.while_acting(observation, explore=explore)
        attention = self.attend(advice)
        if self.settings.gate == "bandit":
            student, attention = self._follow_arms(attention, explore)
        else:
            student = self._choose_modes(advice.context, attention, explore)
            if explore and self.settings.follow == "drawn":
                attention = self._draw_teachers(attention)
        student = student & self.teachers.any(-1)
        actions = torch.where(student[..., None], self.learner.clamp(self.taught(advice, attention)), own)
        if explore:
            self._attention = attention
        return Decision(actions, student, attention)

    def attend(self, advice: Advice) -> Tensor:
        """[..., N, N] attention of students on teachers; rows sum to 1 and the diagonal is 0."""
        bias = None
        if self.settings.return_bias != "none":
            # Three deviations are proof enough, and leave every teacher a chance.
            bias = self.returns.gap(self.settings.returns).clamp(-3, 3)
        return self.selector(advice.context, advice.policies, self.teachers, bias)

    def taught(self, advice: Advice, attention: Tensor) -> Tensor:
        """[..., N, A] the student action a^S, with the gradient of attention [..., N, N] only."""
        if self.settings.value_space == "behaviour":
            return mix_actions(attention, advice.actions)
        return mix_parameters(self.learner, advice.context, attention)

    def begin(self, worlds: Tensor | None = None, *, explore: bool) -> None:
        """Episodes begin in these worlds [W] bool, None: in all.

        Call it before an evaluation, and where training begins in new worlds. `observe` knows of all other episodes.
        """
        self.teaching.begin(worlds, explore=explore)
        if explore and worlds is None:
            self.returns.begin()
            self.held.begin()
            self._attention = None

    def student_logit(self, context: Tensor, attention: Tensor) -> Tensor:
        """[..., N] log-odds of being a student: what the gate learned, the novelty prior and the return bias."""
        s = self.settings
        if s.gate != "actor_critic":
            odds = {"always": torch.inf, "never": -torch.inf, "random": 0.0}
            return torch.full_like(context[..., 0], odds[s.gate])
        prior = s.novelty * (-self.frames / s.novelty_frames).exp()
        return self.gate.logit(context) + prior + s.gate_return_bias * self._gap(attention)

    def _choose_modes(self, context: Tensor, attention: Tensor, explore: bool) -> Tensor:
        chance = self.student_logit(context, attention).sigmoid()
        if not explore:
            # The likeliest mode; a gate that knows nothing leaves an agent to itself.
            return torch.rand_like(chance) < chance if self.settings.gate == "random" else chance > 0.5
        student = self.held.hold("student", torch.rand_like(chance) < chance, self.settings.mode_steps)
        return student & ~self._alone(student)

    def _draw_teachers(self, attention: Tensor) -> Tensor:
        """Attention [W, N, N] on one teacher each, drawn by it; rows of zeros stay."""
        worlds, count = attention.shape[:2]
        some = (attention + torch.finfo(attention.dtype).tiny).flatten(0, 1)
        drawn = self.held.hold("teachers", some.multinomial(1).view(worlds, count), self.settings.mode_steps)
        return functional.one_hot(drawn, count) * (attention.sum(-1, keepdim=True) > 0).to(attention.dtype)

    def _follow_arms(self, attention: Tensor, explore: bool) -> tuple[Tensor, Tensor]:
        """The bandit's modes [W, N], and attention [W, N, N] on the one teacher that a student follows."""
        worlds, count = attention.shape[:2]
        own = torch.arange(count, device=attention.device)
        if explore:
            arms = self.held.hold("arms", self.bandit.draw(worlds))
            arms = torch.where(self._alone(arms), own, arms)
        else:
            arms = self.bandit.best().expand(worlds, count)
        student = arms != own
        followed = functional.one_hot(arms, count).to(attention.dtype)
        return student, torch.where(student[..., None], followed, attention)

    def _best_arms(self) -> Tensor:
        """[N, N] attention on whom each agent follows in an evaluation; a row of zeros for who follows itself."""
        best = self.bandit.best()
        return functional.one_hot(best, len(best)) * self.teachers.float()

    def _tell_alone(self) -> None:
        if not self._told_alone:
            warnings.warn("nobody in this team can teach another: it learns without transfer", stacklevel=3)
        self._told_alone = True

    def _alone(self, like: Tensor) -> Tensor:
        steps = None if self.settings.self_for == "episode" else 1
        return self.held.hold_alone(like.shape, self.settings.epsilon_self, like.device, steps)

    def observe(self, experience: Experience) -> None:
        if not self.has_teachers:
            return
        self.frames = self.frames + len(experience.reward)
        self.returns.observe(experience, self._attention)
        self._attention = None
        self.teaching.begin(experience.ended, explore=True)
        self.held.observe(experience.ended)

    def actor_loss(self, batch: Batch, actions: Tensor) -> Tensor | None:
        """[N] beta times the mean squared distance to the taught action, in units of half the action range."""
        s = self.settings
        if s.internalise == "none" or not self.has_teachers:
            return None
        look = self._look(batch)
        attention, taught = look.attention, look.taught.detach()
        with torch.no_grad():
            if s.gate == "bandit":
                # It imitates whom it follows; the critic that taught the selector may not know the teachers yet.
                attention = self._best_arms().expand_as(attention)
                taught = self.taught(look.advice, attention)
            beta = self.beta(batch, look.advice, attention, taught)
        error = ((actions - taught).square() * self._dimensions).sum(-1)
        return s.internalise_weight * agent_means(beta * error, batch.valid)

    def beta(self, batch: Batch, advice: Advice, attention: Tensor, taught: Tensor) -> Tensor:
        """[B, T, N] between 0 and 1: how much a step's own action is drawn to the taught one. 0 without a teacher."""
        kind = self.settings.internalise
        if kind == "gap":
            return self._gap(attention).clamp(0, 1)
        taught_by = (attention.sum(-1) > 0).float()
        if kind == "constant":
            return taught_by
        return (self._gain(batch, advice, taught) > 0) * taught_by

    def update(self, batch: Batch) -> dict[str, float]:
        if not self.has_teachers:
            return {}
        look = self._look(batch)
        self._looked = None
        metrics = self._update_selector(batch, look)
        if self.settings.gate == "actor_critic":
            metrics |= self._update_gate(batch, look)
        attention = look.attention.detach()
        metrics["gap"] = agent_means(self._gap(attention).expand_as(batch.reward), batch.valid).mean()
        # One transfer from the device for all.
        return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))

    def _update_selector(self, batch: Batch, look: "_Look") -> dict[str, Tensor]:
        """Ascend Q_i(h_i, a^S) and the attention's entropy: the gradient reaches the selector alone."""
        students = self.teachers.any(-1)
        value = agent_means(self.learner.value(batch, look.taught), batch.valid)
        entropy = agent_means(attention_entropy(look.attention), batch.valid)
        gain = value + self.settings.selector_entropy * entropy
        loss = -(gain * students).sum() / students.sum()
        parameters = [p for p in self.selector.parameters() if p.requires_grad]
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            # A product's gradient may lie transposed: fused Adam refuses it on a GPU and reads it wrongly on a CPU.
            parameter.grad = grad.contiguous()
        self.selector_optimizer.step()
        taught_value = (value.detach() * students).sum() / students.sum()
        return {"taught_value": taught_value, "attention_entropy": entropy.detach().mean()}

    def _update_gate(self, batch: Batch, look: "_Look") -> dict[str, Tensor]:
        with torch.no_grad():
            target = self._student_reward(batch, look.advice, look.taught)
            if self.settings.student_reward == "return":
                target = target + self.learner.settings.discount * ~batch.terminated * self.gate.value(look.following)
        policy_loss, value_loss, entropy = self.gate.losses(
            look.advice.context, batch.student, target, batch.valid, self.settings.gate_entropy
        )
        self.gate.update(policy_loss, value_loss, self.learner.learning)
        return {
            "gate_policy_loss": policy_loss.detach().mean(),
            "gate_value_loss": value_loss.detach().mean(),
            "gate_entropy": entropy.detach().mean(),
        }

    def _student_reward(self, batch: Batch, advice: Advice, taught: Tensor) -> Tensor:
        """[B, T, N] what a step's mode earned. The critic's kinds hold the future already: nothing is added to them."""
        kind = self.settings.student_reward
        if kind == "return":
            return batch.reward
        if kind == "critic_gain":
            return batch.student * self._gain(batch, advice, taught)
        value = self.learner.value(batch, batch.action)
        mean = agent_means(value, batch.valid)
        self.value_weight = self.value_weight + VALUE_RATE * (1 - self.value_weight)
        self.value_mean = torch.lerp(self.value_mean, mean, VALUE_RATE / self.value_weight)
        return (value > self.value_mean).float()

    def _gain(self, batch: Batch, advice: Advice, taught: Tensor) -> Tensor:
        """[B, T, N] how much higher the own critic values the taught action than the own."""
        own = advice.actions.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
        return self.learner.value(batch, self.learner.clamp(taught)) - self.learner.value(batch, own)

    def _gap(self, attention: Tensor) -> Tensor:
        """[..., N] z-score of (teachers' return - own return), teachers weighed by attention [..., N, N]."""
        return (attention * self.returns.gap(self.settings.returns)).sum(-1)

    def _look(self, batch: Batch) -> "_Look":
        """What the selector makes of a batch; the same for actor_loss and for update."""
        # The learner may have replaced other tensors in between, but not this one.
        if self._looked is None or self._looked.student is not batch.student:
            advice, following = self.teaching.on_batch(batch)
            attention = self.attend(advice)
            self._looked = _Look(batch.student, advice, following, attention, self.taught(advice, attention))
        return self._looked

    def _selector_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.selector.parameters(), lr=self.settings.selector_lr, fused=True)

    def selector_state(self) -> dict[str, Tensor]:
        """The shared selector's weights, to be moved to any team by `load_selector`; `save_selector` writes a file."""
        return {name: tensor.detach().clone() for name, tensor in self.selector.state_dict().items()}

    def load_selector(self, state: Mapping[str, Tensor]) -> None:
        """Begin with another team's selector. Raises UserError if its contexts or policies are of other sizes."""
        self.selector.load_state(state)
        self.selector_optimizer = self._selector_adam()

    def renew_agent(self, index: int) -> None:
        """A newcomer takes this agent's place: its gate, its novelty and all that was measured of it begin anew."""
        for name in MEASURED:
            setattr(self, name, getattr(self, name).index_fill(0, torch.tensor([index], device=self.frames.device), 0))
        self.gate.renew_agent(index)
        self.returns.renew_agent(index)

    def state_dict(self) -> dict[str, Any]:
        modules = ("selector", "selector_optimizer", "gate", "returns", "teaching")
        state = {name: getattr(self, name).state_dict() for name in modules}
        return state | {name: getattr(self, name) for name in MEASURED} | {"held": self.held.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("selector", "selector_optimizer", "gate", "returns", "teaching"):
            getattr(self, name).load_state_dict(state[name])
        device = self.value_mean.device
        for name in MEASURED:
            setattr(self, name, state[name].to(device, copy=True))
        self.held.load_state_dict(state["held"], device)
        self._attention = self._looked = None


class _Look(NamedTuple):
    """What the selector makes of a batch, with its graph."""

    student: Tensor  # [B, T, N] of the batch
    advice: Advice
    following: Tensor  # [B, T, N, C] the contexts after the steps
    attention: Tensor  # [B, T, N, N]
    taught: Tensor  # [B, T, N, A]


def attention_entropy(attention: Tensor) -> Tensor:
    """[..., N] nats, of attention [..., N, N]; 0 for a row of zeros."""
    return -(attention * attention.clamp(min=1e-9).log()).sum(-1)


def distance_weights(spec: TeamSpec) -> Tensor:
    """[N, A] that make a sum of squares the mean over an agent's own columns, in units of half the action range."""
    mask = spec.action_mask
    half = torch.ones(mask.shape) if spec.discrete else (spec.high - spec.low) / 2
    return mask / mask.sum(-1, keepdim=True) / torch.where(mask, half, 1).square()


def check_value_space(learner: "TeamLearner", settings: PATSettings) -> None:
    """Raise UserError where weights cannot be mixed, and warn where they should not."""
    if settings.value_space == "behaviour":
        return
    way_out = "set value_space to 'behaviour'"
    if learner.settings.shared_weights:
        raise UserError(f"shared_weights leaves one set of weights, and nothing to mix: {way_out}")
    if learner.settings.memory.kind != "none":
        raise UserError(f"the weights of a memory ({learner.settings.memory.kind}) cannot be mixed: {way_out}")
    if not learner.settings.equal_start:
        warnings.warn(
            f"weights that began apart have no meaningful mean: set equal_start for the learner, or {way_out}",
            stacklevel=3,
        )
