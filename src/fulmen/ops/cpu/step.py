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

from fulmen.ops.cpu import FEW
from fulmen.ops.cpu.compiled import load, new_empty

KERNELS = {torch.float32: "step_fp32", torch.bfloat16: "step_bf16"}
INT8_KERNELS = {torch.float32: "step_int8"}
"""By the dtype of what is not in int8, if anything is."""


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class StepShape(ctypes.Structure):
    """Sizes that all layers share; `rotary` dims of each head turn. `batch` and `threads` are those of a call."""

    _fields_ = _fields(c_int64, "batch hidden heads kv_heads dim rotary num_experts k expert_size threads")


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(c_void_p, "w_before w_q w_k w_v w_gate w_norm w_out w_after w_router w13 w2"),
        *_fields(c_void_p, "s_q s_k s_v s_gate s_out s13 s2 rates"),
        *_fields(c_void_p, "state keys values"),
        *_fields(c_int64, "page_size"),
        *_fields(c_void_p, "experts weights probs counts"),
        *_fields(c_float, "eps_before eps_norm eps_after mixer_alpha mixer_beta mlp_alpha mlp_beta"),
    )


class _Places(ctypes.Structure):
    _fields_ = _fields(c_void_p, "slots positions begins tables")


class StepLayer(NamedTuple):
    """One layer: tensors and numbers by the names that `struct layer` of step.c has.

    It has rates for lightning attention, and scales (s_q for w_q and so on) where its matrices are int8.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, float]


class LayerMemory(NamedTuple):
    """What sequences left behind in one layer: states [S, H, D, D] fp32, or keys and values in P pages of R tokens."""

    state: Tensor | None
    keys: Tensor | None  # [P, R, H_kv, D]
    values: Tensor | None


class Places(NamedTuple):
    """Where in the memories of all layers each of B sequences is, [B] int32 each, slots and pages all different.

    Token t of sequence b lies in row t % R of page tables[begins[b] + t // R]. A plain cache has no tables: its slot is
    a sequence's only page.
    """

    slots: Tensor  # of the states
    positions: Tensor  # of the next token, which is written there: so many tokens are in the memory already
    begins: Tensor | None  # of each table in `tables`
    tables: Tensor | None  # int32, one table after the other

    @classmethod
    def plain(cls, batch: int, position: int) -> "Places":
        """Of a batch that is all of its memory, each sequence as long as the others."""
        slots = torch.arange(batch, dtype=torch.int32, device="cpu")
        return cls(slots, torch.full_like(slots, position), None, None)


class StepResult(NamedTuple):
    """y [B, hidden], and what `route` gives for each layer."""

    y: Tensor
    routings: list[tuple[Tensor, Tensor, Tensor, Tensor]]


class Step:
    """The layers and the last norm, prepared once. It holds the tensors; whoever replaces one makes another Step."""

    def __init__(self, layers: Sequence[StepLayer], norm: Tensor, eps: float, frequencies: Tensor, shape: StepShape):
        self.shape, self.norm, self.eps, self.frequencies = shape, norm, eps, frequencies
        self.dtype = norm.dtype
        self._kernel = (INT8_KERNELS if "s13" in layers[0].tensors else KERNELS)[self.dtype]
        self._layers = (_Layer * len(layers))()
        for entry, layer in zip(self._layers, layers, strict=True):
            for name, tensor in layer.tensors.items():
                setattr(entry, name, tensor.data_ptr())
            for name, number in layer.constants.items():
                setattr(entry, name, number)
        self._held = layers

    def __call__(self, x: Tensor, memories: Sequence[LayerMemory], places: Places) -> StepResult:
        """Layers and norm of x [B, hidden], the next token of the sequence at each of `places`, on the CPU.

        The memories are changed in place. The kernel takes FEW sequences at a time.
        """
        # A copy each time: two threads may decode with one model.
        layers = type(self._layers).from_buffer_copy(self._layers)
        shape = StepShape.from_buffer_copy(self.shape)
        shape.threads = torch.get_num_threads()
        for layer, memory in zip(layers, memories, strict=True):
            if memory.state is not None:
                layer.state = memory.state.data_ptr()
            else:
                layer.keys, layer.values = memory.keys.data_ptr(), memory.values.data_ptr()
                layer.page_size = memory.keys.shape[1]
        x, y = x.contiguous(), new_empty(*x.shape, dtype=self.dtype)
        routing = self._new_routing(len(x))
        shape.batch = min(len(x), FEW)
        scratch = new_empty(load().step_scratch(ctypes.byref(shape)))
        if len(x) <= FEW:
            counts = self._run(y, x, shape, layers, places, routing, scratch)
            return StepResult(y, list(zip(*routing, counts, strict=True)))
        counts = 0
        for first in range(0, len(x), FEW):
            part = slice(first, first + FEW)
            shape.batch = len(x[part])
            some = Places(places.slots[part], places.positions[part], _cut(places.begins, part), places.tables)
            chosen = [[tensor[part] for tensor in each] for each in routing]
            counts = counts + self._run(y[part], x[part], shape, layers, some, chosen, scratch)
        return StepResult(y, list(zip(*routing, counts, strict=True)))

    def _run(
        self,
        y: Tensor,
        x: Tensor,
        shape: StepShape,
        layers: ctypes.Array,
        places: Places,
        routing: Sequence[Sequence[Tensor]],
        scratch: Tensor,
    ) -> Tensor:
        """One call of the kernel, which fills y and the routing; gives back the counts [L, E]."""
        counts = new_empty(len(layers), shape.num_experts, dtype=torch.int64)
        for layer, *tensors in zip(layers, *routing, counts, strict=True):
            layer.experts, layer.weights, layer.probs, layer.counts = (t.data_ptr() for t in tensors)
        where = _Places(*(None if t is None else t.data_ptr() for t in places))
        kernel = getattr(load(), self._kernel)
        last = (self.norm.data_ptr(), self.eps, self.frequencies.data_ptr(), ctypes.byref(where), scratch.data_ptr())
        kernel(y.data_ptr(), x.data_ptr(), ctypes.byref(shape), layers, len(layers), *last)
        return counts

    def _new_routing(self, batch: int) -> list[tuple[Tensor, ...]]:
        """Room for experts and weights [B, k] and probabilities [B, E] of each layer."""
        layers, experts, k = len(self._layers), self.shape.num_experts, self.shape.k
        fields = (
            new_empty(layers, batch, k, dtype=torch.int64),
            new_empty(layers, batch, k),
            new_empty(layers, batch, experts),
        )
        return [field.unbind() for field in fields]


def _cut(numbers: Tensor | None, part: slice) -> Tensor | None:
    return None if numbers is None else numbers[part]
