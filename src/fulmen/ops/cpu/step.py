"""All layers of a text model for one token of each of a few sequences in one call (`step.c`), fp32 or bf16 weights.

Operation by operation, a decoding step of a small model is mostly Python. This module knows tensors and their places;
`fulmen.model.step` knows which modules they belong to.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.cpu.compiled import load, new_empty

KERNELS = {torch.float32: "step_fp32", torch.bfloat16: "step_bf16"}


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class StepShape(ctypes.Structure):
    """Sizes that all layers share; `rotary` dims of each head turn. `batch` and `threads` are those of a call."""

    _fields_ = _fields(c_int64, "batch hidden heads kv_heads dim rotary num_experts k expert_size threads")


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(c_void_p, "w_before w_q w_k w_v w_gate w_norm w_out w_after w_router w13 w2 rates"),
        *_fields(c_void_p, "state next keys values"),
        *_fields(c_int64, "room"),
        *_fields(c_void_p, "experts weights probs counts"),
        *_fields(c_float, "eps_before eps_norm eps_after mixer_alpha mixer_beta mlp_alpha mlp_beta"),
    )


class StepLayer(NamedTuple):
    """One layer: tensors and numbers by the names that `struct layer` of step.c has; rates for lightning attention."""

    tensors: dict[str, Tensor]
    constants: dict[str, float]


class LayerMemory(NamedTuple):
    """What the sequences left behind in one layer: a state [B, H, D, D], or keys and values [B, room, H_kv, D]."""

    state: Tensor | None
    keys: Tensor | None
    values: Tensor | None


class StepResult(NamedTuple):
    """y [B, 1, hidden], the next state of each lightning layer, and what `route` gives for each layer."""

    y: Tensor
    states: list[Tensor]
    routings: list[tuple[Tensor, Tensor, Tensor, Tensor]]


class Step:
    """The layers and the last norm, prepared once. It holds the tensors; whoever replaces one makes another Step."""

    def __init__(self, layers: Sequence[StepLayer], norm: Tensor, eps: float, frequencies: Tensor, shape: StepShape):
        self.shape, self.norm, self.eps, self.frequencies = shape, norm, eps, frequencies
        self.dtype = norm.dtype
        self.lightning = [i for i, layer in enumerate(layers) if "rates" in layer.tensors]
        self._layers = (_Layer * len(layers))()
        for entry, layer in zip(self._layers, layers, strict=True):
            for name, tensor in layer.tensors.items():
                setattr(entry, name, tensor.data_ptr())
            for name, number in layer.constants.items():
                setattr(entry, name, number)
        self._held = layers

    def __call__(self, x: Tensor, memories: Sequence[LayerMemory], position: int) -> StepResult:
        """Layers and norm of x [B, 1, hidden], each sequence's token at `position` (int, from 0).

        Keys and values of the token are written into the buffers; states are not changed, the next are new.
        """
        # A copy each time: two threads may decode with one model.
        layers = type(self._layers).from_buffer_copy(self._layers)
        shape = StepShape.from_buffer_copy(self.shape)
        shape.batch, shape.threads = len(x), torch.get_num_threads()
        states, routings = self._outputs(layers, shape)
        for layer, memory in zip(layers, memories, strict=True):
            if memory.state is not None:
                layer.state = memory.state.data_ptr()
            else:
                layer.keys, layer.values = memory.keys.data_ptr(), memory.values.data_ptr()
                layer.room = memory.keys.shape[1]
        x, y = x.contiguous(), new_empty(*x.shape, dtype=self.dtype)
        scratch = new_empty(load().step_scratch(ctypes.byref(shape), position))
        last = (self.norm.data_ptr(), self.eps, self.frequencies.data_ptr(), position, scratch.data_ptr())
        kernel = getattr(load(), KERNELS[self.dtype])
        kernel(y.data_ptr(), x.data_ptr(), ctypes.byref(shape), layers, len(layers), *last)
        return StepResult(y, states, routings)

    def _outputs(self, layers: ctypes.Array, shape: StepShape) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Room for the next states and the routings, its places entered in the layers."""
        batch, experts, k = shape.batch, shape.num_experts, shape.k
        states = new_empty(len(self.lightning), batch, shape.heads, shape.dim, shape.dim).unbind()
        for index, state in zip(self.lightning, states, strict=True):
            layers[index].next = state.data_ptr()
        fields = (
            new_empty(len(layers), batch, k, dtype=torch.int64).unbind(),
            new_empty(len(layers), batch, k).unbind(),
            new_empty(len(layers), batch, experts).unbind(),
            new_empty(len(layers), experts, dtype=torch.int64).unbind(),
        )
        routings = list(zip(*fields, strict=True))
        for layer, routing in zip(layers, routings, strict=True):
            layer.experts, layer.weights, layer.probs, layer.counts = (t.data_ptr() for t in routing)
        return list(states), routings
