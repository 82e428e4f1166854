"""The next token of each sequence on a GPU: all layers as one recorded CUDA graph, launched at once.

A step is some two hundred small launches, each of which costs the host more time than the GPU. The first step of a
cache runs them one by one (kernels are compiled where they are new), the second records them, and all further ones
replay the record, until keys and values outgrow their buffers.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fulmen.model.cache import Cache
from fulmen.ops import gpu
from fulmen.ops.cpu.step import LayerMemory
from fulmen.ops.experts import Routing


class GraphedSteps:
    """A model's step (`fulmen.ops.gpu.step.Step`) for any number of caches, each with its own record."""

    def __init__(self, step):
        self.step, self.dtype = step, step.dtype
        self._records: WeakKeyDictionary[Cache, _Record] = WeakKeyDictionary()

    def __call__(self, x: Tensor, memories: Sequence[LayerMemory], cache: Cache) -> tuple[Tensor, list[Routing]]:
        """Normed output [B, 1, hidden] and routings for x [B, 1, hidden]; the memories are advanced in place."""
        record = self._records.get(cache)
        if record is None or not record.fits(memories):
            record = self._records[cache] = _Record(x, memories)
            y, *routings = record.run(self.step, x, cache.length)
        elif not x.is_cuda:  # Triton's interpreter
            y, *routings = record.run(self.step, x, cache.length)
        else:
            if record.graph is None:
                record.capture(self.step)
            y, *routings = record.replay(x, cache.length)
        return y[:, None], [Routing(*layer, kept=None) for layer in zip(*routings, strict=True)]


class _Record:
    """Fixed places for what goes into a step, and the graph that reads them."""

    def __init__(self, x: Tensor, memories: Sequence[LayerMemory]):
        self.memories, self.graph = list(memories), None
        with torch.inference_mode(False):  # for they are written in later steps, in whatever mode those run
            self.x = torch.empty(len(x), x.shape[2], dtype=x.dtype, device=x.device)
            self.slots = torch.arange(len(x), dtype=torch.int32, device=x.device)
            self.positions = torch.zeros(len(x), dtype=torch.int32, device=x.device)

    def fits(self, memories: Sequence[LayerMemory]) -> bool:
        """Whether the memories still lie where they did."""
        before, now = ([tensor for memory in each for tensor in memory] for each in (self.memories, memories))
        return all(old is new for old, new in zip(before, now, strict=True))

    def run(self, step, x: Tensor, position: int) -> list[Tensor]:
        """One by one: the output [B, hidden], and experts, weights, probabilities and counts of all layers [L, ...]."""
        self._put(x, position)
        return self._step(step)

    def capture(self, step) -> None:
        """Record the launches, without running them."""
        self.graph = torch.cuda.CUDAGraph()
        # Another thread may allocate meanwhile.
        recording = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with torch.inference_mode(False), torch.no_grad(), recording:
            self.outputs = self._step(step)

    def replay(self, x: Tensor, position: int) -> list[Tensor]:
        """Launch the record; what it gives is copied, for the next replay writes to the same places."""
        self._put(x, position)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]

    def _put(self, x: Tensor, position: int) -> None:
        self.x.copy_(x[:, 0])
        self.positions.fill_(position)

    def _step(self, step) -> list[Tensor]:
        y, choices = step(self.x, self.memories, self.slots, self.positions)
        return [y, *choices, gpu.experts.count_choices(choices.experts, choices.probs.shape[2])]
