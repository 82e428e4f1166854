"""The next token of each sequence on a GPU: all layers as one recorded CUDA graph, launched at once.

A step is some two hundred small launches, each of which costs the host more time than the GPU. The first step of a
cache runs them one by one (kernels are compiled where they are new), the second records them, and all further ones
replay the record, until keys and values outgrow their buffers. A pool has a record for each of some numbers of
sequences, the rest of which is padding, and makes a larger one when tables or sequences outgrow it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fulmen.ops import gpu
from fulmen.ops.cpu.step import LayerMemory, Places, StepResult

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of sequences of a pool that have a record; the largest at a time."""

SHORT = 1024
"""Tokens of a sequence up to which one record serves."""


class GraphedSteps:
    """A model's step (`fulmen.ops.gpu.step.Step`) for any number of caches and pools, each with its own records."""

    def __init__(self, step):
        self.step, self.dtype = step, step.dtype
        self._records: WeakKeyDictionary[object, _Records] = WeakKeyDictionary()

    def __call__(self, x: Tensor, memories: Sequence[LayerMemory], places: Places, owner: object) -> StepResult:
        """As `fulmen.ops.cpu.step.Step`, x [B, hidden]; `owner` is the cache or pool, and not held."""
        records = self._records.setdefault(owner, _Records())
        if places.tables is None:
            return _result(records.run(self.step, x, memories, places, rows=len(x)))
        results = []
        for first in range(0, len(x), BUCKETS[-1]):
            part = slice(first, first + BUCKETS[-1])
            rows = BUCKETS[bisect_left(BUCKETS, len(x[part]))]
            some = Places(*(numbers[part] for numbers in places[:3]), places.tables)
            results.append(records.run(self.step, x[part], memories, some, rows=rows))
        return _result(results[0] if len(results) == 1 else _joined(results))


class _Records:
    """Those of one cache or pool, by the number of rows; they share the memory for what lies between launches."""

    def __init__(self):
        self.by_rows: dict[int, _Record] = {}

    def run(self, step, x: Tensor, memories: Sequence[LayerMemory], places: Places, *, rows: int) -> tuple[Tensor, ...]:
        """The output [B, hidden], and experts, weights, probabilities and counts of all layers [L, ...]."""
        record = self.by_rows.get(rows)
        is_new = record is None or not record.fits(memories, places)
        if is_new:
            record = self.by_rows[rows] = _Record(x, memories, places, rows)
        record.put(x, places)
        if is_new or not x.is_cuda:  # Triton's interpreter has no graphs
            return record.cut(record.run(step), len(x))
        if record.graph is None:
            graphs = (each.graph for each in self.by_rows.values() if each.graph is not None)
            record.capture(step, shared=next(graphs, None))
        record.graph.replay()
        # Copied, for the next replay writes to the same places.
        return tuple(tensor.clone() for tensor in record.cut(record.outputs, len(x)))


class _Record:
    """Fixed places for what goes into a step of some rows, and the graph that reads them."""

    def __init__(self, x: Tensor, memories: Sequence[LayerMemory], places: Places, rows: int):
        self.memories, self.rows, self.graph, self.longest = list(memories), rows, None, None
        room = 0
        if places.tables is not None:
            self.longest, room = max(SHORT, _rounded(_longest(places))), _rounded(max(4 * rows, len(places.tables)))
        with torch.inference_mode(False):  # for they are written in later steps, in whatever mode those run
            self.x = torch.zeros(rows, x.shape[1], dtype=x.dtype, device=x.device)
            self.numbers = torch.zeros(3 * rows + room, dtype=torch.int32, device=x.device)
            slots, positions, begins = self.numbers[: 3 * rows].view(3, rows)
            self.places = Places(slots, positions, begins, self.numbers[3 * rows :])
            if places.tables is None:
                self.places = Places(slots, positions, None, None)
                slots.copy_(places.slots)

    def fits(self, memories: Sequence[LayerMemory], places: Places) -> bool:
        """Whether the memories still lie where they did, and there is room for tables and sequences."""
        before, now = ([tensor for memory in each for tensor in memory] for each in (self.memories, memories))
        if not all(old is new for old, new in zip(before, now, strict=True)):
            return False
        if places.tables is None:
            return True
        return len(places.tables) <= len(self.places.tables) and _longest(places) <= self.longest

    def put(self, x: Tensor, places: Places) -> None:
        """Copy what the step reads; the host waits for nothing."""
        self.x[: len(x)].copy_(x)
        if places.tables is None:  # all of one length, and the slots are there
            self.places.positions.fill_(int(places.positions[0]))
            return
        count = 3 * self.rows + len(places.tables)
        numbers = torch.full((count,), -1, dtype=torch.int32, device="cpu", pin_memory=x.is_cuda)
        padded = numbers[: 3 * self.rows].view(3, self.rows)
        for row, each in zip(padded, places[:3], strict=True):
            row[: len(x)] = each
        numbers[3 * self.rows :] = places.tables
        self.numbers[:count].copy_(numbers, non_blocking=True)

    def capture(self, step, shared: torch.cuda.CUDAGraph | None) -> None:
        """Record the launches, without running them, in the memory of another graph, which is never run beside it."""
        graph = torch.cuda.CUDAGraph()
        # A pool of memory goes with the last graph in it. Another thread may allocate meanwhile.
        memory = None if shared is None else shared.pool()
        recording = torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local")
        with torch.inference_mode(False), torch.no_grad(), recording:
            self.outputs = self.run(step)
        self.graph = graph

    def run(self, step) -> tuple[Tensor, ...]:
        """The launches, of all rows."""
        y, choices = step(self.x, self.memories, self.places, longest=self.longest)
        counted = choices.experts
        if self.longest is not None:  # padding has chosen nobody
            counted = counted.masked_fill((self.places.slots < 0)[:, None], -1)
        return y, *choices, gpu.experts.count_choices(counted, choices.probs.shape[2])

    def cut(self, outputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """Of the first `count` rows; the last of the outputs are counts of all."""
        y, *choices, counts = outputs
        return y[:count], *(tensor[:, :count] for tensor in choices), counts


def _longest(places: Places) -> int:
    return int(places.positions.max()) + 1


def _rounded(count: int) -> int:
    """To the next power of two: what grows makes few records."""
    return 1 << (count - 1).bit_length()


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    y, *choices, counts = zip(*parts, strict=True)
    return torch.cat(y), *(torch.cat(each, dim=1) for each in choices), sum(counts)


def _result(outputs: tuple[Tensor, ...]) -> StepResult:
    y, *routing = outputs
    return StepResult(y, list(zip(*routing, strict=True)))
