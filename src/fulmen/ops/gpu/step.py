"""All layers of a text model for one token of each of a few sequences, as launches that a CUDA graph can hold.

What `fulmen.ops.cpu.step` is to a CPU: this module knows tensors, `fulmen.model.step` which modules they belong to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops import gpu
from fulmen.ops.cpu.step import LayerMemory, Places, StepLayer, StepShape
from fulmen.ops.int8 import Int8


class Choices(NamedTuple):
    """What `fulmen.ops.experts.route` gives, of all L layers."""

    experts: Tensor  # [L, B, k] int64
    weights: Tensor  # [L, B, k] fp32
    probs: Tensor  # [L, B, E] fp32


class Step:
    """The layers and the last norm, prepared once. It holds the tensors; whoever replaces one makes another Step."""

    def __init__(self, layers: Sequence[StepLayer], norm: Tensor, eps: float, frequencies: Tensor, shape: StepShape):
        self.layers, self.norm, self.eps, self.frequencies, self.shape = list(layers), norm, eps, frequencies, shape
        self.dtype = norm.dtype
        self._side = torch.cuda.Stream(norm.device) if norm.is_cuda else None

    def __call__(
        self, x: Tensor, memories: Sequence[LayerMemory], places: Places, *, longest: int | None = None
    ) -> tuple[Tensor, Choices]:
        """Layers and norm of x [B, hidden], the next token of the sequence at each of `places`, on the GPU.

        Memories are changed in place; slots of -1 pad. Nothing here depends on a number that only the GPU knows:
        `longest` is for how many tokens in a sequence's pages it shall be fast; None: a page.
        """
        first, choices = self.layers[0], self._new_choices(x)
        normed = gpu.norm.rms_norm(x, first.tensors["w_before"], first.constants["eps_before"])
        for index, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            w, c = layer.tensors, layer.constants
            router = gpu.decoding.Router(w["w_router"], *(each[index] for each in choices))
            if memory.state is not None:
                branch = self._lightning(normed, layer, memory, places)
            else:
                branch = self._softmax(normed, layer, memory, places, longest)
            normed = gpu.decoding.add_norm(
                normed, branch, c["mixer_alpha"], c["mixer_beta"], w["w_after"], c["eps_after"], router=router
            )
            answers = gpu.decoding.experts_mlp(normed, _matrix(w, "13"), _matrix(w, "2"), router.experts)
            is_last = index == len(self.layers) - 1
            after = self.norm if is_last else self.layers[index + 1].tensors["w_before"]
            eps = self.eps if is_last else self.layers[index + 1].constants["eps_before"]
            normed = gpu.decoding.add_norm(
                normed, answers, c["mlp_alpha"], c["mlp_beta"], after, eps, mix=router.weights
            )
        return normed, choices

    def _new_choices(self, x: Tensor) -> Choices:
        layers, batch, k, num_experts = len(self.layers), len(x), self.shape.k, self.shape.num_experts
        experts = torch.empty(layers, batch, k, dtype=torch.int64, device=x.device)
        weights = torch.empty(layers, batch, k, dtype=torch.float32, device=x.device)
        return Choices(experts, weights, weights.new_empty(layers, batch, num_experts))

    def _lightning(self, x: Tensor, layer: StepLayer, memory: LayerMemory, places: Places) -> Tensor:
        w, heads, size = layer.tensors, self.shape.heads, self.shape.dim
        with self._beside():
            gate = _product(x, w, "_gate")
        q, k, v = _product(x, w, "_q").view(-1, heads, 3, size).unbind(2)
        out = gpu.decoding.lightning_step_(q, k, v, w["rates"], memory.state, places.slots, silu=True)
        self._join()
        return _product(gpu.norm.rms_norm(out.flatten(1), w["w_norm"], layer.constants["eps_norm"], gate), w, "_out")

    def _softmax(self, x: Tensor, layer: StepLayer, memory: LayerMemory, places: Places, longest: int | None) -> Tensor:
        w, size = layer.tensors, self.shape.dim
        q, k, v = (_product(x, w, name).view(len(x), -1, size) for name in ("_q", "_k", "_v"))
        pages = None if places.tables is None else gpu.decoding.Tables(places.begins, places.tables)
        place = (memory.keys, memory.values, places.slots, places.positions, pages)
        gpu.decoding.append_keys_(k, v, self.frequencies, *place)
        out = gpu.decoding.attention_step(q, self.frequencies, *place, longest=longest)
        return _product(out.flatten(1), w, "_out")

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What is launched within may run at the same time as what follows, until `_join`.

        A step's products are too small to fill a GPU alone. What is launched in here must not be freed before the join.
        """
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)


def _matrix(tensors: dict[str, Tensor], name: str) -> Tensor | Int8:
    """The matrix w<name> of a layer, with its scales s<name> if it has them."""
    weight, scales = tensors["w" + name], tensors.get("s" + name)
    return weight if scales is None else Int8(weight, scales)


def _product(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    matrix = _matrix(tensors, name)
    return gpu.decoding.linear_int8(x, *matrix) if isinstance(matrix, Int8) else x @ matrix.T
