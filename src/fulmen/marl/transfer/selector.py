"""The Attention Teacher Selector, one for the whole team: whose policy fits the student's present state.

Letters: N agents, i the student, j the teacher, C context, F features, A action, P what tells policies apart, H heads,
D their size. Leading axes `...` are worlds [W] while acting, sequences and steps [B, T] while learning.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fulmen.config import UserError
from fulmen.marl.nets import linear
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.run import write_atomic

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner

NOBODY = -1e9
# Of actions in units of half their range: closer together they are the same.
SMALLEST_SPREAD = 1e-3


def teacher_mask(spec: TeamSpec) -> Tensor:
    """[N, N] bool: may j teach i? Nobody itself, and no agent whose observation or action is of another size."""
    observation, action = torch.tensor(spec.observation_sizes), torch.tensor(spec.action_sizes)
    alike = (observation[:, None] == observation) & (action[:, None] == action)
    return alike & ~torch.eye(spec.num_agents, dtype=torch.bool)


def mix_actions(attention: Tensor, actions: Tensor) -> Tensor:
    """[..., N, A] what the teachers would do [..., N, N, A], weighed by attention [..., N, N] (behaviour space)."""
    return torch.einsum("...ij,...ija->...ia", attention, actions)


def mix_parameters(learner: "TeamLearner", context: Tensor, attention: Tensor) -> Tensor:
    """[..., N, A] what an actor with the weights sum_j alpha_ij theta_j does in context [..., N, C] (parameter space).

    Gradients reach attention [..., N, N] only. Of discrete actions: the probabilities.
    """
    actor = learner.actor
    mixed = attention.flatten(0, -2) @ actor.flat.detach()
    pieces = zip(actor.parts.items(), mixed.split(actor.sizes, dim=1), strict=True)
    weights = {name: piece.unflatten(1, part.shape) for (name, part), piece in pieces}
    x = context.detach().flatten(0, -2)[:, None]
    *hidden, last = (name.removesuffix(".weight") for name in actor.parts if name.endswith(".weight"))
    for layer in hidden:
        x = linear(weights, layer, x).relu()
    outputs = linear(weights, last, x).reshape(*attention.shape[:-1], -1)
    actions = learner.space.scale(outputs)
    return actions.softmax(-1) if learner.spec.discrete else actions


def relative_advice(actions: Tensor, asked: Tensor) -> Tensor:
    """[..., N, N, A] how far each of actions [..., N, N, A] stands from the mean of those whom i asks, asked [N, N].

    In units of their distance (root mean square) from it, so that it means the same among novices, whose actions are
    small, and among experts, who nearly agree.
    """
    share = (asked / asked.sum(-1, keepdim=True))[..., None]
    away = actions - (share * actions).sum(-2, keepdim=True)
    spread = (share * away.square()).sum((-2, -1), keepdim=True).sqrt()
    return away / spread.clamp(min=SMALLEST_SPREAD)


class Advice(NamedTuple):
    """What the selector looks at, and what it weighs: the policies of all on the observations of all, no gradients."""

    context: Tensor  # [..., N, C] the student's
    actions: Tensor  # [..., N, N, A] what j's policy would do for i; for i = j its own action
    policies: Tensor  # [..., N, N, P] what tells j's policy there from others', as `Teaching.keys` has it


class Teaching:
    """Asks every policy about every observation, with the memory that each would have of the student's history.

    Training and evaluation have memories of their own. A world's is forgotten by `begin` when an episode begins.
    keys, what tells policies apart: "features", those of the actor, and its action in units of half the range (P is
    F + A); "advice", `relative_advice` of these actions alone (P is A).
    """

    def __init__(self, learner: "TeamLearner", keys: Literal["features", "advice"] = "features"):
        self.learner, self.keys = learner, keys
        self.policy_size = learner.spec.action_size + (learner.feature_size if keys == "features" else 0)
        asked = teacher_mask(learner.spec) | torch.eye(learner.num_agents, dtype=torch.bool)
        self._asked = asked.to(next(learner.parameters()).device)
        self._states: dict[bool, dict[str, Tensor] | None] = {True: None, False: None}

    @torch.no_grad()
    def while_acting(self, observation: Tensor, *, explore: bool) -> Advice:
        """On observation [W, N, O], once a step; explore: whether it is training."""
        state = self._states[explore]
        if state is None or any(len(memory) != len(observation) for memory in state.values()):
            state = self.learner.new_state(len(observation), teachers=True)
        actions, features, self._states[explore] = self.learner.teach(observation, state)
        own = {name: memory.diagonal(dim1=1, dim2=2).movedim(-1, 1) for name, memory in state.items()}
        batch = step_batch(observation, actions.diagonal(dim1=1, dim2=2).movedim(-1, 1), own)
        context, _ = self.learner.contexts(batch)
        return Advice(context[:, 0], actions, self._policies(actions, features))

    @torch.no_grad()
    def on_batch(self, batch: Batch) -> tuple[Advice, Tensor]:
        """On replayed steps, leading axes [B, T]; and the contexts [B, T, N, C] that followed."""
        context, following = self.learner.contexts(batch)
        actions, features = self.learner.cross_policy(batch)
        return Advice(context, actions, self._policies(actions, features)), following

    def _policies(self, actions: Tensor, features: Tensor) -> Tensor:
        # Students stand where the bounds are looked for.
        unit = self.learner.space.unit(actions.transpose(-2, -3)).transpose(-2, -3)
        return relative_advice(unit, self._asked) if self.keys == "advice" else torch.cat((features, unit), dim=-1)

    def begin(self, worlds: Tensor | None = None, *, explore: bool) -> None:
        """Episodes begin in these worlds [W] bool; None: in all."""
        state = self._states[explore]
        if worlds is None or state is None:
            self._states[explore] = None
            return
        self._states[explore] = {
            name: memory.masked_fill(worlds.view(-1, *[1] * (memory.dim() - 1)), 0) for name, memory in state.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The memory of training."""
        return {"state": self._states[True]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        memory, device = state["state"], next(self.learner.parameters()).device
        if memory is not None:
            memory = {name: tensor.to(device, copy=True) for name, tensor in memory.items()}
        self._states = {True: memory, False: None}


def step_batch(observation: Tensor, actions: Tensor, state: Mapping[str, Tensor]) -> Batch:
    """A single step [W, N, ...] as the batch of W sequences of one step that the learner's functions take."""
    never = torch.zeros_like(actions[:, None, :, 0], dtype=torch.bool)
    both = torch.stack((observation, observation), dim=1)
    return Batch(both, actions[:, None], never.float(), never, never, ~never, dict(state) or None)


class TeacherSelector(nn.Module):
    """alpha_ij = softmax_j(W_q [h_i, z_i] . W_k z_j / sqrt(D) + scale bias_ij), averaged over heads.

    Item 3 of docs/marl.md. h_i is the student's context; z_j tells of j's policy on the student's observation, by the
    features of its actor and what it would do, or by the latter alone (`Teaching.keys`; our choice, the paper says only
    'learning information'). The student's own z_i in the query is our choice too: an observation alone does not say
    which of two tasks an agent has, its policy does. No weight depends on the number of agents, so the selector can
    move to another team.
    """

    def __init__(
        self,
        context_size: int,
        policy_size: int,
        *,
        size: int = 32,
        heads: int = 1,
        bias_scale: float = 1.0,
        learn_bias_scale: bool = False,
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, context_size + policy_size, size))
        self.key = nn.Parameter(torch.empty(heads, policy_size, size))
        for weight in (self.query, self.key):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        self.bias_scale = nn.Parameter(torch.tensor(float(bias_scale)), requires_grad=learn_bias_scale)

    def forward(self, context: Tensor, policies: Tensor, teachers: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention [..., N, N] of students with context [..., N, C] on teachers with policies [..., N, N, P].

        teachers [N, N] bool says who may teach whom; a student without any gets a row of zeros. bias: [N, N].
        """
        lead, heads = context.shape[:-1], len(self.query)
        own = policies.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
        # The query meets W_k first: no key of every pair is ever stored.
        both = (self.query @ self.key.mT).movedim(0, 1).flatten(1) * self.key.shape[-1] ** -0.5
        query = (torch.cat((context, own), dim=-1).flatten(0, -2) @ both).unflatten(1, (heads, -1))
        scores = torch.bmm(query, policies.flatten(0, -3).mT).view(*lead, heads, -1).transpose(-2, -3)
        if bias is not None:
            scores = scores + self.bias_scale * bias
        # A finite number, since a row of infinities has no softmax and no gradient.
        attention = scores.masked_fill(~teachers, NOBODY).softmax(-1) * teachers
        return attention.mean(-3)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take another selector's `state_dict`, of a team of any number of agents.

        Raises UserError, which names both, if contexts or policies are of another size, or the heads.
        """
        if missing := {"query", "key", "bias_scale"} - state.keys():
            raise UserError(f"this is no teacher selector: {', '.join(sorted(missing))} is missing")
        theirs, ours = _sizes(state), _sizes(self.state_dict())
        for name, way_out in (
            ("context", "it fits only observations (and memory) of the same size"),
            ("policies", "it fits only the same keys, and actions and features of the same size"),
            ("heads", "set heads to it"),
            ("head size", "set selector_size to it"),
        ):
            if theirs[name] != ours[name]:
                raise UserError(f"the selector was trained with {name} {theirs[name]}, here is {ours[name]}: {way_out}")
        self.load_state_dict(dict(state))


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    (heads, query, size), policies = state["query"].shape, state["key"].shape[1]
    return {"context": query - policies, "policies": policies, "heads": heads, "head size": size}


def save_selector(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write `PAT.selector_state()` as a safetensors file, whole or not at all."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def load_selector(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_selector` wrote. Raises UserError for a file that is missing or is not safetensors."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the selector {path}: {' '.join(str(error).split())}") from None
