"""Networks of all agents at once: their weights are rows of one tensor, and a layer is one batched product.

Letters: N agents, S sets of weights (N, or 1 that all agents share), P numbers in a set, M rows of input to each set, O
and A the widest observation and action. Public tensors are [..., N, size]: the agent's dimension is the last but one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adam import adam

from fulmen.config import UserError
from fulmen.marl.spec import TeamSpec


class Part(NamedTuple):
    """A tensor of a network: its shape, and the bound b of its first values, uniform in [-b, b]; None: ones."""

    shape: tuple[int, ...]
    bound: float | None


def linear_parts(name: str, inputs: int, outputs: int) -> dict[str, Part]:
    """Weight and bias of one layer, drawn as `nn.Linear` draws them."""
    bound = inputs**-0.5
    return {f"{name}.weight": Part((outputs, inputs), bound), f"{name}.bias": Part((1, outputs), bound)}


def perceptron_parts(prefix: str, widths: Sequence[int]) -> dict[str, Part]:
    """The layers prefix0, prefix1, ... of a network of these widths, from its inputs to its outputs."""
    parts = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        parts |= linear_parts(f"{prefix}{layer}", inputs, outputs)
    return parts


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """One layer of all sets: x [S, M, in] to [S, M, out]."""
    return torch.baddbmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"].mT)


class Stack(nn.Module):
    """S networks of the same parts: row s of `flat` [S, P] is network s, all of it."""

    def __init__(
        self, parts: Mapping[str, Part], sets: int, *, equal: bool = False, device: torch.device | str = "cpu"
    ):
        super().__init__()
        self.parts = dict(parts)
        self.sizes = [math.prod(part.shape) for part in self.parts.values()]
        self.flat = nn.Parameter(torch.empty(sets, sum(self.sizes), device=device))
        self._draw(1 if equal else sets)

    @torch.no_grad()
    def _draw(self, sets: int) -> None:
        """First values: so many sets of their own. They are drawn on the CPU: a seed gives the same on every device."""
        for values, part in zip(self.flat.split(self.sizes, dim=1), self.parts.values(), strict=True):
            first = torch.rand(sets, values.shape[1]) * 2 - 1
            values.copy_(torch.ones_like(first) if part.bound is None else first * part.bound)

    def places(self, prefix: str, widths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Where the layers prefix0, prefix1, ... of `perceptron_parts` lie, as `run_layers` wants to know it."""
        starts = dict(zip(self.parts, itertools.accumulate(self.sizes, initial=0), strict=False))
        return tuple(
            (starts[f"{prefix}{layer}.weight"], *sizes) for layer, sizes in enumerate(itertools.pairwise(widths))
        )

    def unpack(self, *, frozen: bool = False) -> dict[str, Tensor]:
        """The parts by name, [S, *shape] each, as views; `frozen`: gradients pass through them and not into them."""
        flat = self.flat.detach() if frozen else self.flat
        pieces = zip(self.parts.items(), flat.split(self.sizes, dim=1), strict=True)
        return {name: piece.unflatten(1, part.shape) for (name, part), piece in pieces}

    def row(self, index: int) -> dict[str, Tensor]:
        """A copy of one network, part by part."""
        return {name: part[index].clone() for name, part in self.unpack(frozen=True).items()}

    @torch.no_grad()
    def load_row(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite one network. Raises UserError where the parts differ in name or shape."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        wanted = {name: part.shape for name, part in self.parts.items()}
        if shapes != wanted:
            name = next(name for name in wanted | shapes if shapes.get(name) != wanted.get(name))
            raise UserError(
                f"an agent's weights must fit: {name} is {shapes.get(name, 'missing')}, needed is "
                f"{wanted.get(name, 'none')}; use equal networks and observations"
            )
        for name, part in self.unpack(frozen=True).items():
            part[index].copy_(state[name])


def _views(flat_SP: Tensor, layers: tuple[tuple[int, int, int], ...]) -> list[tuple[Tensor, Tensor]]:
    """Weight [S, out, in] and bias [S, 1, out] of each layer, out of contiguous rows."""
    sets, numbers = flat_SP.shape
    views = []
    for start, inputs, outputs in layers:
        first = flat_SP.storage_offset() + start
        weight = flat_SP.as_strided((sets, outputs, inputs), (numbers, inputs, 1), first)
        bias = flat_SP.as_strided((sets, 1, outputs), (numbers, outputs, 1), first + inputs * outputs)
        views.append((weight, bias))
    return views


class _Layers(torch.autograd.Function):
    """Linear layers with ReLU between them, of all sets: the outputs, and the last hidden layer.

    Networks of this size spend more time in calls than in products. Hence one node of the graph for all layers, whose
    gradients are written straight into their places. `layers` has, for each, the column of `flat` where its weights
    begin, which its bias follows, and its inputs and outputs.
    """

    @staticmethod
    def forward(ctx, x_SMI: Tensor, flat_SP: Tensor, layers: tuple[tuple[int, int, int], ...]):
        ctx.set_materialize_grads(False)
        *hidden, last = views = _views(flat_SP, layers)
        entering = [x_SMI]
        for weight, bias in hidden:
            entering.append(torch.baddbmm(bias, entering[-1], weight.mT).relu_())
        outputs = torch.baddbmm(last[1], entering[-1], last[0].mT)
        ctx.layers, ctx.weights, ctx.shape = layers, [weight for weight, _ in views], flat_SP.shape
        ctx.save_for_backward(*entering)
        return outputs, entering[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs: Tensor | None, d_hidden: Tensor | None):
        weights, entering = ctx.weights, ctx.saved_tensors
        for_x, for_flat, _ = ctx.needs_input_grad
        d_flat = entering[0].new_zeros(ctx.shape) if for_flat else None
        d_views = _views(d_flat, ctx.layers) if for_flat else None
        # Nobody may have asked for outputs, or for the hidden layer.
        d = entering[-1].new_zeros(*entering[-1].shape[:2], weights[-1].shape[1]) if d_outputs is None else d_outputs
        for layer in reversed(range(len(weights))):
            if for_flat:
                d_weight, d_bias = d_views[layer]
                d_weight.copy_(torch.bmm(d.mT, entering[layer]))
                torch.sum(d, dim=1, keepdim=True, out=d_bias)
            if layer == 0 and not for_x:
                return None, d_flat, None
            d = torch.bmm(d, weights[layer])
            if layer == len(weights) - 1 and d_hidden is not None:
                d += d_hidden
            if layer > 0:
                # ReLU's own: 0 where nothing came through.
                d = torch.ops.aten.threshold_backward(d, entering[layer], 0)
        return d, d_flat, None


def run_layers(x_SMI: Tensor, flat_SP: Tensor, layers: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, Tensor]:
    """Linear layers with ReLU between them: the outputs [S, M, out] and the last hidden layer [S, M, F].

    layers: `Stack.places`, of the stack whose `flat` it is.
    """
    return _Layers.apply(x_SMI, flat_SP, layers)


class Network(Stack):
    """A memory, and ReLU layers on its context: what it says, the observation and, in a shared set, who the agent is.

    `memory` is one of `fulmen.marl.memory`. There may be several `heads`, layers of their own on the same context. With
    `shared`, one set of weights serves all agents, and the context ends with the agent's one-hot.
    """

    def __init__(
        self,
        memory: nn.Module,
        *,
        agents: int,
        observation_size: int,
        action_size: int = 0,
        hidden: tuple[int, ...],
        outputs: int,
        heads: int = 1,
        shared: bool = False,
        equal: bool = False,
        device: torch.device | str = "cpu",
    ):
        context_size = memory.size + observation_size + (agents if shared else 0)
        widths = (context_size + action_size, *hidden, outputs)
        parts = dict(memory.parts)
        for head in range(heads):
            parts |= perceptron_parts(f"head{head}.layer", widths)
        super().__init__(parts, 1 if shared else agents, equal=equal, device=device)
        self.memory, self.context_size = memory, context_size
        self.agents, self.sets = agents, len(self.flat)
        self.one_hot = nn.Buffer(torch.eye(agents, device=device), persistent=False) if shared else None
        self.heads = [self.places(f"head{head}.layer", widths) for head in range(heads)]

    def new_state(self, *lead: int) -> dict[str, Tensor]:
        """The memory at an episode's start: zeros [*lead, N, ...] by name."""
        device = self.flat.device
        return {
            name: torch.zeros(*lead, self.agents, *shape, device=device)
            for name, shape in self.memory.state_shapes.items()
        }

    def context(
        self, observation: Tensor, state: dict[str, Tensor], *, frozen: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """observation [..., T, N, O] and the state before [..., N, ...], to contexts [..., T, N, C] and the next state.

        frozen: no gradient reaches the weights.
        """
        pieces = [observation]
        if self.memory.size:
            said, state = self._remember(self.unpack(frozen=frozen), observation, state)
            pieces.insert(0, said)
        if self.one_hot is not None:
            pieces.append(self.one_hot.expand(*observation.shape[:-1], -1))
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else observation, state

    def _remember(
        self, weights: Mapping[str, Tensor], observation: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        *lead, steps, agents, size = observation.shape
        x_SMTO = observation.movedim(-2, 0).reshape(self.sets, -1, steps, size)
        tails = self.memory.state_shapes
        before = {name: state[name].movedim(len(lead), 0).reshape(self.sets, -1, *tail) for name, tail in tails.items()}
        said, after = self.memory.run(weights, x_SMTO, before)
        following = {
            name: after[name].reshape(agents, *lead, *tail).movedim(0, len(lead)) for name, tail in tails.items()
        }
        return said.reshape(agents, *lead, steps, -1).movedim(0, -2), following

    def layers(self, *inputs: Tensor, head: int = 0, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs [..., N, size], side by side, to outputs [..., N, out] and the last hidden layer [..., N, F]."""
        stacked = [x.movedim(-2, 0).reshape(self.sets, -1, x.shape[-1]) for x in inputs]
        x_SMI = stacked[0] if len(stacked) == 1 else torch.cat(stacked, dim=-1)
        flat = self.flat.detach() if frozen else self.flat
        lead = (self.agents, *inputs[0].shape[:-2])
        outputs, hidden = run_layers(x_SMI, flat, self.heads[head])
        return tuple(y.reshape(*lead, y.shape[-1]).movedim(0, -2) for y in (outputs, hidden))


class RowAdam(nn.Module):
    """Adam (Kingma & Ba 2015) of each row by itself: own clipping, own count of steps. Its state is its buffers.

    A row that begins anew takes an Adam's first steps, however old the team is.
    """

    def __init__(self, stack: Stack, lr: float, clip: float):
        super().__init__()
        self.lr, self.clip = lr, clip
        self.mean = nn.Buffer(torch.zeros_like(stack.flat, requires_grad=False))
        self.square = nn.Buffer(torch.zeros_like(self.mean))
        self.steps = nn.Buffer(torch.zeros(len(self.mean), device=self.mean.device))

    @torch.no_grad()
    def step(self, stack: Stack, grad: Tensor, rows: Sequence[int]) -> Tensor:
        """Move these rows along grad [S, P], whose rows are no longer than `clip`; the lengths before that, [S]."""
        norm = torch.linalg.vector_norm(grad, dim=1)
        # The fused step reads memory in order, whatever the strides say.
        grad = (grad * (self.clip / (norm + 1e-6)).clamp(max=1)[:, None]).contiguous()
        tensors = (tensor.unbind() for tensor in (stack.flat.detach(), grad, self.mean, self.square, self.steps))
        groups = [[pieces[row] for row in rows] for pieces in tensors]
        adam(
            *groups[:4],
            [],
            groups[4],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        return norm

    def reset(self, index: int) -> None:
        """Forget all that was measured of a row's gradients."""
        for buffer in (self.mean, self.square, self.steps):
            buffer[index] = 0


class ActionSpace(nn.Module):
    """How the networks' outputs [..., N, A] become actions within each agent's bounds, or choices among its own.

    Columns behind an agent's size give 0.
    """

    def __init__(self, spec: TeamSpec, noise: float, temperature: float, device: torch.device | str):
        super().__init__()
        self.discrete, self.noise, self.temperature = spec.discrete, noise, temperature
        self.mask = nn.Buffer(spec.action_mask.to(device), persistent=False)
        self.same_size = bool(self.mask.all())
        self.sizes = nn.Buffer(self.mask.sum(dim=-1), persistent=False)
        zero = torch.zeros(self.mask.shape)
        low, high = (zero if bound is None else bound.float() * spec.action_mask for bound in (spec.low, spec.high))
        self.low, self.high = (nn.Buffer(bound.to(device), persistent=False) for bound in (low, high))
        self.centre = nn.Buffer((self.low + self.high) / 2, persistent=False)
        self.reach = nn.Buffer((self.high - self.low) / 2, persistent=False)

    def scale(self, outputs: Tensor) -> Tensor:
        """Continuous: tanh onto the bounds. Discrete: the logits, minus infinity for choices that are not there."""
        if self.discrete:
            return outputs.masked_fill(~self.mask, -torch.inf)
        return torch.addcmul(self.centre, outputs.tanh(), self.reach)

    def sample(self, outputs: Tensor) -> Tensor:
        """Actions that gradients pass through: `scale`, and a straight-through Gumbel-softmax of discrete choices.

        Jang et al. 2017, section 2.2: the choice is drawn, and is one-hot; the gradient is that of the soft sample.
        """
        scaled = self.scale(outputs)
        return F.gumbel_softmax(scaled, self.temperature, hard=True) if self.discrete else scaled

    def clamp(self, actions: Tensor) -> Tensor:
        """Into the bounds, or the one-hot of the largest number among the agent's own columns."""
        if not self.discrete:
            return actions.clamp(self.low, self.high)
        best = actions.masked_fill(~self.mask, -torch.inf).argmax(dim=-1)
        return F.one_hot(best, self.mask.shape[1]).to(actions.dtype)

    def unit(self, actions: Tensor) -> Tensor:
        """Continuous: in units of half the range, from its centre; 0 where there is no range. Discrete: as they are."""
        if self.discrete:
            return actions
        return torch.where(self.reach > 0, (actions - self.centre) / self.reach, 0)

    def explore(self, actions: Tensor) -> Tensor:
        """With noise: Gaussian, in units of half the range; discrete choices are drawn anew with that probability."""
        if not self.discrete:
            return self.clamp(torch.addcmul(actions, torch.randn_like(actions), self.reach, value=self.noise))
        again = torch.rand(actions.shape[:-1], device=actions.device) < self.noise
        return torch.where(again[..., None], self.clamp(torch.rand_like(actions)), actions)

    def smooth(self, actions: Tensor, noise: float, limit: float) -> Tensor:
        """TD3's target smoothing (Fujimoto et al. 2018, section 5.3): clipped Gaussian noise; discrete: unchanged."""
        if self.discrete:
            return actions
        shift = (torch.randn_like(actions) * noise).clamp(-limit, limit)
        return self.clamp(torch.addcmul(actions, shift, self.reach))

    def random(self, num_worlds: int) -> Tensor:
        """Uniform actions [num_worlds, N, A]."""
        uniform = torch.rand(num_worlds, *self.mask.shape, device=self.mask.device)
        return self.clamp(uniform if self.discrete else torch.lerp(self.low, self.high, uniform))

    def own(self, actions: Tensor) -> Tensor:
        """Zeros in the columns behind an agent's size, whatever stood there."""
        return actions if self.same_size else torch.where(self.mask, actions, 0)

    def penalty(self, outputs: Tensor) -> Tensor:
        """Mean square of an agent's own outputs: [..., N, A] to [..., N]."""
        return self.own(outputs).square().sum(dim=-1) / self.sizes
