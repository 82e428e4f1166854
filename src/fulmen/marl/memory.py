"""What an agent keeps of its history: nothing, an LSTM, or lightning attention; the weights of all agents stacked.

One function serves acting and learning: `run` takes the next T steps and the state before them. Acting is T = 1 with
the state handed on; learning runs a whole sequence, in parallel where the memory allows it.

Letters: S sets of weights, M sequences for each set, T steps, I numbers a step, L layers, H heads, D = size / H.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.config import UserError
from fulmen.marl.nets import Part, linear, linear_parts
from fulmen.ops.lightning import decay_rates, lightning_attention
from fulmen.ops.lightning.chunked import chunked_lightning_attention
from fulmen.ops.norm import rms_norm

State = dict[str, Tensor]
"""Tensors by name, all zero at an episode's start."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Which memory actors and critics have, each its own."""

    kind: Literal["none", "lstm", "lightning"] = "none"
    size: int = 64  # numbers that come out of a step
    heads: int = 4  # of lightning attention; they forget at different paces
    layers: int = 1

    def __post_init__(self) -> None:
        if self.kind not in MEMORIES:
            raise UserError(f"memory kind must be one of {', '.join(MEMORIES)}, got {self.kind!r}")
        for name in ("size", "heads", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"memory {name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "lightning" and self.size % self.heads:
            raise UserError(f"memory size must be a multiple of its heads, got size {self.size}, heads {self.heads}")


class NoMemory(nn.Module):
    """Nothing is kept, nothing comes out."""

    def __init__(self, settings: MemorySettings, inputs: int, device: torch.device | str):
        super().__init__()
        self.size = 0
        self.parts: dict[str, Part] = {}
        self.state_shapes: dict[str, tuple[int, ...]] = {}

    def run(self, weights: Mapping[str, Tensor], x: Tensor, state: State) -> tuple[Tensor, State]:
        """Weights by name [S, ...], x [S, M, T, I], state [S, M, ...] each, to [S, M, T, size] and the next state."""
        return x[..., :0], state


class LSTMMemory(nn.Module):
    """Layers of LSTM (Hochreiter & Schmidhuber 1997), step after step; the forget gates begin open (bias + 1)."""

    def __init__(self, settings: MemorySettings, inputs: int, device: torch.device | str):
        super().__init__()
        self.size, self.layers = settings.size, settings.layers
        self.state_shapes = {"hidden": (self.layers, self.size), "cell": (self.layers, self.size)}
        self.parts = {}
        for layer in range(self.layers):
            self.parts |= linear_parts(f"lstm{layer}.in", self.size if layer else inputs, 4 * self.size)
            self.parts[f"lstm{layer}.hidden"] = Part((4 * self.size, self.size), self.size**-0.5)
        # The gates are in, forget, out, new.
        open_gates = torch.zeros(4, self.size, device=device)
        open_gates[1] = 1
        self.open_gates = nn.Buffer(open_gates.flatten(), persistent=False)

    def run(self, weights: Mapping[str, Tensor], x: Tensor, state: State) -> tuple[Tensor, State]:
        """As `NoMemory.run`."""
        hiddens, cells = [], []
        for layer in range(self.layers):
            first = state["hidden"][:, :, layer], state["cell"][:, :, layer]
            x, hidden, cell = self._layer(weights, f"lstm{layer}", x, *first)
            hiddens.append(hidden)
            cells.append(cell)
        return x, {"hidden": torch.stack(hiddens, dim=2), "cell": torch.stack(cells, dim=2)}

    def _layer(
        self, weights: Mapping[str, Tensor], name: str, x: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates_SMTG = linear(weights, f"{name}.in", x.flatten(1, 2)).add(self.open_gates).unflatten(1, x.shape[1:3])
        recurrent, outs = weights[f"{name}.hidden"].mT, []
        for gates in gates_SMTG.unbind(dim=2):
            gates = torch.baddbmm(gates, hidden, recurrent)
            enter, keep, leave = gates[..., : 3 * self.size].sigmoid().chunk(3, dim=-1)
            cell = torch.addcmul(keep * cell, enter, gates[..., 3 * self.size :].tanh())
            hidden = leave * cell.tanh()
            outs.append(hidden)
        return torch.stack(outs, dim=2), hidden, cell


class LightningMemory(nn.Module):
    """y = RMSNorm(u + W_out (RMSNorm(attention(SiLU(W_qkv u))) * sigmoid(W_gate u))) in a layer, first of u = W_in x.

    The lightning attention layer of MiniMax-01 (section 2.2) with its post-norm, which keeps what comes out as bounded
    as an LSTM's: agents far off, whose observations are large, do not lead critics astray. Its heads forget at
    `decay_rates`, from a few steps to hundreds. All agents and sequences are one batch of it.
    """

    EPS = 1e-6

    def __init__(self, settings: MemorySettings, inputs: int, device: torch.device | str):
        super().__init__()
        self.size, self.heads, self.layers = settings.size, settings.heads, settings.layers
        dim = self.size // self.heads
        self.state_shapes = {"attention": (self.layers, self.heads, dim, dim)}
        self.parts = linear_parts("lightning.in", inputs, self.size)
        for layer in range(self.layers):
            self.parts |= linear_parts(f"lightning{layer}.qkv", self.size, 3 * self.size)
            self.parts |= linear_parts(f"lightning{layer}.gate", self.size, self.size)
            self.parts[f"lightning{layer}.norm"] = Part((1, self.size), None)
            self.parts |= linear_parts(f"lightning{layer}.out", self.size, self.size)
            self.parts[f"lightning{layer}.post_norm"] = Part((1, self.size), None)
        rates = [decay_rates(self.heads, layer, self.layers + 1) for layer in range(self.layers)]
        self.rates = nn.Buffer(torch.stack(rates).to(device), persistent=False)
        self.ones = nn.Buffer(torch.ones(self.size, device=device), persistent=False)

    def run(self, weights: Mapping[str, Tensor], x: Tensor, state: State) -> tuple[Tensor, State]:
        """As `NoMemory.run`."""
        places = x.shape[1:3]
        x, finals = linear(weights, "lightning.in", x.flatten(1, 2)), []
        for layer, before in enumerate(state["attention"].unbind(dim=2)):
            branch, final = self._branch(weights, layer, x, before, places)
            x = self._norm(x + branch, weights[f"lightning{layer}.post_norm"])
            finals.append(final)
        return x.unflatten(1, places), {"attention": torch.stack(finals, dim=2)}

    def _branch(
        self, weights: Mapping[str, Tensor], layer: int, x: Tensor, state: Tensor, places: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """x [S, M T, size] and the state before [S, M, H, D, D], to the same."""
        name, (sequences, steps) = f"lightning{layer}", places
        heads = (len(x) * sequences, steps, 3, self.heads, self.size // self.heads)
        q, k, v = F.silu(linear(weights, f"{name}.qkv", x)).view(heads).unbind(dim=2)
        out, final = _attend(q, k, v, self.rates[layer], state.flatten(0, 1).contiguous())
        gated = self._norm(out.reshape_as(x), weights[f"{name}.norm"]) * linear(weights, f"{name}.gate", x).sigmoid()
        return linear(weights, f"{name}.out", gated), final.view_as(state)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # Agents have norm weights of their own, which the function does not know.
        return rms_norm(x, self.ones, self.EPS) * weight


def _attend(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`lightning_attention` and its final state; on a CPU in blocks that suit narrow heads.

    Blocks that are one to two times as long as a head is wide take less than half the time of the usual ones, and those
    that end where the sequences end need no copies.
    """
    steps, width = q.shape[1], max(16, q.shape[-1])
    if steps == 1 or not q.is_cpu:
        return lightning_attention(q, k, v, rates, state=state, return_state=True)
    block = next((size for size in range(width, 2 * width + 1) if steps % size == 0), min(steps, 2 * width))
    return chunked_lightning_attention(q, k, v, rates, state, None, block=block)


MEMORIES = {"none": NoMemory, "lstm": LSTMMemory, "lightning": LightningMemory}


def make_memory(settings: MemorySettings, inputs: int, device: torch.device | str) -> nn.Module:
    """The memory that the settings name, for steps of `inputs` numbers."""
    return MEMORIES[settings.kind](settings, inputs, device)
