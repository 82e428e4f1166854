"""Ad hoc advising: ask where I have seldom been, advise where I have often been.

Source: da Silva, Glatt & Costa 2017, 'Simultaneously Learning and Advising in Multiagent Reinforcement Learning'
(AAMAS): its two confidence functions, their parameters, the budgets and the majority among several advisors.

Ours, since the paper has tables of states and few actions, and we have neither: visits are counted by hashed
observations (SimHash, as Tang et al. 2017 count, '#Exploration'), the range of Q is taken over sampled actions, and of
continuous advice the medoid is followed. We leave out that a state is asked about once in an episode at the most.

Letters: W worlds, N agents, O and A the widest observation and action, i a student, j a teacher, K sampled actions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.config import UserError, check_numbers
from fulmen.marl.spec import TeamSpec
from fulmen.marl.transfer.base import Decision, Experience, Transfer
from fulmen.marl.transfer.selector import step_batch, teacher_mask

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner
    from fulmen.marl.replay import Batch


@dataclass(frozen=True, kw_only=True)
class AdHocSettings:
    """What the paper sets, and how we count and sample. Budgets count pieces of advice over a run, of each agent."""

    ask_budget: int | None = None  # absent: no limit, as PAT has none; the authors' code has 1000
    give_budget: int | None = None
    ask_rate: float = 0.5  # the paper's v_a: larger, and asking ends sooner
    give_rate: float | None = None  # the paper's v_g; absent: its values, 0.4 for visits and 1.5 for values
    bits: int = 16  # of a hash: 2**bits kinds of observations are told apart
    samples: int = 16  # actions over which AdHocTD looks for the range of Q; all choices where actions are discrete

    def __post_init__(self) -> None:
        check_numbers(self, "at least 0, or left out for no limit", lambda x: x >= 0, "ask_budget", "give_budget")
        check_numbers(self, "above 0", lambda x: x > 0, "ask_rate", "give_rate")
        if not 1 <= self.bits <= 24:
            raise UserError(f"bits of the hash must be between 1 and 24, got {self.bits}")
        if self.samples < 2:
            raise UserError(f"a range of values needs at least 2 samples, got {self.samples}")


def ask_probability(visits: Tensor, rate: float) -> Tensor:
    """P_ask = (1 + v_a)^(-sqrt n), n the student's own visits: 1 in a new state (both variants)."""
    return (1 + rate) ** -visits.sqrt()


def give_probability_by_visits(visits: Tensor, rate: float) -> Tensor:
    """P_give = 1 - (1 + v_g)^(-log2 n), n the teacher's visits of the student's state: 0 up to n = 1 (AdHocVisit)."""
    return 1 - (1 + rate) ** -visits.clamp(min=1).log2()


def give_probability_by_values(visits: Tensor, value_range: Tensor, rate: float) -> Tensor:
    """P_give = 1 - (1 + v_g)^(-sqrt(n) |max Q - min Q|), both the teacher's, in the student's state (AdHocTD)."""
    return 1 - (1 + rate) ** -(visits.sqrt() * value_range)


class VisitCounts:
    """How often each agent saw observations like this one.

    SimHash: the signs of `bits` random projections. A constant 1 beside the observation moves their planes off the
    origin, so that near and far in one direction differ. An agent's counts are one row of a table [N, 2**bits].
    """

    def __init__(self, spec: TeamSpec, bits: int, device: torch.device):
        self.projection = torch.randn(spec.observation_size + 1, bits, device=device)
        self.table = torch.zeros(spec.num_agents, 2**bits, dtype=torch.int32, device=device)

    def code(self, observation: Tensor) -> Tensor:
        """The number of the kind of observations [..., O]."""
        side = observation @ self.projection[:-1] + self.projection[-1] > 0
        return (side << torch.arange(side.shape[-1], device=side.device)).sum(-1)

    def own(self, code: Tensor) -> Tensor:
        """[W, N] fp32: visits of each agent to the kind that it sees now, `code` [W, N]."""
        return self.table[torch.arange(len(self.table), device=code.device), code].float()

    def teachers(self, code: Tensor) -> Tensor:
        """[W, N, N] fp32: visits of teacher j to the kind that student i sees now."""
        return self.table[:, code].permute(1, 2, 0).float()

    def add(self, code: Tensor) -> None:
        """Everybody visits what it sees, [W, N]."""
        agent = torch.arange(len(self.table), device=code.device).expand_as(code)
        self.table.index_put_((agent, code), torch.ones_like(code, dtype=torch.int32), accumulate=True)


class AdHocVisit(Transfer):
    """Teachers are confident where they have often been."""

    name, give_rate = "adhoc_visit", 0.4

    def __init__(self, learner: "TeamLearner", settings: AdHocSettings | None = None):
        super().__init__(learner)
        check_memoryless(learner, self.name)
        self.settings = settings or AdHocSettings()
        device = next(learner.parameters()).device
        self.visits = VisitCounts(learner.spec, self.settings.bits, device)
        self.teachers = teacher_mask(learner.spec).to(device)
        # [N] pieces of advice that each agent followed, and that each gave.
        self.taken = torch.zeros(learner.num_agents, dtype=torch.int64, device=device)
        self.given = torch.zeros_like(self.taken)

    @torch.no_grad()
    def decide(self, observation: Tensor, own: Tensor, *, explore: bool) -> Decision:
        """An evaluation takes every chance above one half, and nothing from the budgets."""
        alone = super().decide(observation, own, explore=explore)
        if self.learner.num_agents == 1:
            return alone
        code = self.visits.code(observation)
        chance = ask_probability(self.visits.own(code), self.settings.ask_rate)
        asks = within_budget(
            take_chance(chance, explore) & self.teachers.any(dim=1), self.taken, self.settings.ask_budget
        )
        attention = own.new_zeros(*own.shape[:2], self.learner.num_agents)
        # No teacher looks at a world in which nobody asks.
        worlds = asks.any(dim=1).nonzero().squeeze(1)
        if not len(worlds):
            return alone._replace(attention=attention)

        seen, asks = observation[worlds], asks[worlds]
        gives = take_chance(self.confidence(seen, code[worlds]), explore) & asks[..., None] & self.teachers
        left = within_budget(gives.flatten(0, 1), self.given, self.settings.give_budget)
        gives = left.view_as(gives)
        advised = gives.any(dim=-1)
        if explore:
            self.taken += advised.sum(dim=0)
            self.given += gives.sum(dim=(0, 1))

        advice, _, _ = self.learner.teach(seen, {})
        actions, weights = follow_medoid(advice, gives, explore)
        actions = torch.where(advised[..., None], actions, own[worlds])
        attention[worlds] = weights
        return Decision(own.index_copy(0, worlds, actions), alone.student.index_copy(0, worlds, advised), attention)

    def confidence(self, observation: Tensor, code: Tensor) -> Tensor:
        """[W, N, N]: the chance that teacher j advises student i, if asked."""
        return give_probability_by_visits(self.visits.teachers(code), self.settings.give_rate or self.give_rate)

    def observe(self, experience: Experience) -> None:
        self.visits.add(self.visits.code(experience.observation))

    def update(self, batch: "Batch") -> dict[str, float]:
        """Nothing to learn; the advice so far, over all agents."""
        return {"advice_taken": float(self.taken.sum()), "advice_given": float(self.given.sum())}

    def renew_agent(self, index: int) -> None:
        """A newcomer in an agent's place has seen nothing yet, and owes nothing."""
        for counts in (self.visits.table, self.taken, self.given):
            counts[index] = 0

    def state_dict(self) -> dict[str, Any]:
        tensors = {"taken": self.taken, "given": self.given}
        return tensors | {"projection": self.visits.projection, "visits": self.visits.table}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError for counts of another team or hash."""
        for name, tensor in self.state_dict().items():
            if state[name].shape != tensor.shape:
                raise UserError(
                    f"the {name} of {self.name} are {tuple(state[name].shape)}, this team with this hash has "
                    f"{tuple(tensor.shape)}: resume with the same team and bits"
                )
            tensor.copy_(state[name])


class AdHocTD(AdHocVisit):
    """Teachers are confident where they have often been and where it matters, by their critics, what one does."""

    name, give_rate = "adhoc_td", 1.5

    def __init__(self, learner: "TeamLearner", settings: AdHocSettings | None = None):
        check_own_critics(learner, self.name)
        super().__init__(learner, settings)

    def confidence(self, observation: Tensor, code: Tensor) -> Tensor:
        actions = sample_actions(self.learner.spec, len(observation), self.settings.samples, observation.device)
        actions = actions[:, :, None].expand(-1, -1, self.learner.num_agents, -1, -1)
        values = teacher_values(self.learner, observation, actions)
        value_range = values.amax(dim=-1) - values.amin(dim=-1)
        rate = self.settings.give_rate or self.give_rate
        return give_probability_by_values(self.visits.teachers(code), value_range, rate)


def take_chance(chance: Tensor, explore: bool) -> Tensor:
    """Bool of the same shape: drawn, or in an evaluation what is likelier than not."""
    return (torch.rand_like(chance) if explore else 0.5) < chance


def within_budget(wanted: Tensor, spent: Tensor, budget: int | None) -> Tensor:
    """Of the wishes [M, N] bool, the first of each agent that its budget still pays for; spent: [N]."""
    return wanted if budget is None else wanted & (wanted.cumsum(dim=0) <= budget - spent)


def follow_medoid(advice: Tensor, gives: Tensor, explore: bool) -> tuple[Tensor, Tensor]:
    """The piece of advice [W, N, N, A] that is nearest to all others given [W, N, N], and its teacher's weight 1.

    For one-hot actions this is the majority, as in the paper. Chance decides a draw, in an evaluation the order. Gives
    actions [W, N, A], whose rows mean nothing where no advice was given, and weights [W, N, N], which are all 0 there.
    """
    distance = (torch.cdist(advice, advice) * gives[..., None, :]).sum(dim=-1).masked_fill(~gives, torch.inf)
    nearest = distance <= distance.amin(dim=-1, keepdim=True) + 1e-6
    lots = torch.rand_like(distance) if explore else torch.ones_like(distance)
    chosen = (nearest * lots).argmax(dim=-1, keepdim=True)
    actions = advice.gather(2, chosen[..., None].expand(-1, -1, 1, advice.shape[-1])).squeeze(2)
    weights = torch.zeros_like(distance).scatter_(-1, chosen, 1.0)
    return actions, weights * gives.any(dim=-1, keepdim=True)


def sample_actions(spec: TeamSpec, worlds: int, count: int, device: torch.device) -> Tensor:
    """[W, N, K, A] of each agent's allowed actions: uniform between its bounds, or each of its choices once."""
    if not spec.discrete:
        low, high = spec.low.to(device)[:, None], spec.high.to(device)[:, None]
        return low + (high - low) * torch.rand(worlds, spec.num_agents, count, spec.action_size, device=device)
    choice = torch.arange(spec.action_size)
    # An agent with fewer choices than the widest has its first one several times, which changes no range.
    choice = torch.where(choice < torch.tensor(spec.action_sizes)[:, None], choice, 0)
    actions = torch.nn.functional.one_hot(choice, spec.action_size).float().to(device)
    return actions.expand(worlds, -1, -1, -1)


@torch.no_grad()
def own_values(learner: "TeamLearner", observation: Tensor, actions: Tensor) -> Tensor:
    """[B, N]: each agent's Q of its own action [B, N, A] at its own observation [B, N, O]."""
    return learner.value(step_batch(observation, actions, {}), actions[:, None]).squeeze(1)


def teacher_values(learner: "TeamLearner", observation: Tensor, actions: Tensor) -> Tensor:
    """[W, N, N, K]: teacher j's Q at student i's observation [W, N, O], of actions [W, N, N, K, A].

    The learner evaluates every critic at its own agent's column. So each of N shifts puts before critic j what student
    j - shift sees, all shifts in one batch.
    """
    worlds, agents, _, count, size = actions.shape
    teacher = torch.arange(agents, device=observation.device)
    # [shift, teacher] -> student, and [student, teacher] -> shift: the same table.
    other = (teacher - teacher[:, None]) % agents
    seen = observation[:, other][:, :, None].expand(-1, -1, count, -1, -1)
    asked = actions[:, other, teacher].transpose(2, 3)
    values = own_values(learner, seen.reshape(-1, agents, seen.shape[-1]), asked.reshape(-1, agents, size))
    return values.view(worlds, agents, count, agents).transpose(2, 3)[:, other, teacher]


def check_memoryless(learner: "TeamLearner", name: str) -> None:
    """Raise UserError for agents with memory: advice is for the observation of a moment."""
    kind = learner.settings.memory.kind
    if kind != "none":
        raise UserError(f"{name} advises by single observations, and cannot by a memory {kind}: set memory.kind='none'")


def check_own_critics(learner: "TeamLearner", name: str) -> None:
    """Raise UserError for a central critic, which does not judge one agent's observation alone."""
    if learner.settings.central_critic:
        raise UserError(f"{name} asks each teacher's own critic: set central_critic=false, or take adhoc_visit")
