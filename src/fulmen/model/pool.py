"""Memory for thousands of sequences that come and go: slots for lightning states, pages for softmax keys and values.

    pool = CachePool(config, slots=8, pages=100, page_size=16)
    batch = PoolBatch(pool, slots=[5, 2], tables=[[31, 7], [40]], starts=[0, 9], lengths=[20, 1])
    hidden, _ = model.hidden(tokens, cache=batch)  # [1, 21]: the first 20 tokens of one sequence, the tenth of another

Who has which slot and page is a scheduler's matter; here nothing is handed out. `PoolBatch` says what may not be.
"""

import itertools
from array import array
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.model.cache import NextTokens, check_config, check_positions
from fulmen.model.config import LIGHTNING, SOFTMAX, ModelConfig
from fulmen.ops.cpu.step import LayerMemory, Places
from fulmen.ops.lightning import silu_lightning_attention
from fulmen.ops.softmax import Pages, paged_attention_


class CachePool:
    """The states of `slots` sequences, and keys and values of `pages` times `page_size` tokens.

    `memories` has for each layer the states [S, H, D, D] fp32, or keys and values [P, page_size, H_kv, D] of `dtype`,
    the model's. They begin with what lies there.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        pages: int,
        page_size: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        for name, number in (("slots", slots), ("pages", pages), ("page_size", page_size)):
            if number < 1:
                raise UserError(f"{name} of a pool must be at least 1, got {number}")
        self.config, self.slots, self.pages, self.page_size = config, slots, pages, page_size
        self.dtype, heads, size = dtype, config.num_heads, config.head_dim
        with torch.inference_mode(False):  # for they are written in later steps, in whatever mode those run
            self.memories = [
                LayerMemory(_new(device, torch.float32, slots, heads, size, size), None, None)
                if kind == LIGHTNING
                else LayerMemory(
                    None, *(_new(device, dtype, pages, page_size, config.num_kv_heads, size) for _ in "kv")
                )
                for kind in config.layers
            ]
        self.device = torch.empty(0, device=device).device  # with its index

    @staticmethod
    def slot_bytes(config: ModelConfig) -> int:
        """Bytes of one sequence's states, fp32; nothing is allocated."""
        return config.layers.count(LIGHTNING) * config.num_heads * config.head_dim**2 * torch.float32.itemsize

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page in all softmax layers; nothing is allocated."""
        per_token = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
        return config.layers.count(SOFTMAX) * page_size * per_token

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Slot sources[i] to slot targets[i], in all lightning layers, as if all were read before any is written."""
        self._copy("slot", self.slots, sources, targets, [m.state for m in self.memories if m.state is not None])

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Page sources[i] to page targets[i], in all softmax layers, as if all were read before any is written."""
        tensors = [tensor for m in self.memories if m.keys is not None for tensor in (m.keys, m.values)]
        self._copy("page", self.pages, sources, targets, tensors)

    @torch.no_grad()
    def _copy(
        self, name: str, count: int, sources: Sequence[int], targets: Sequence[int], tensors: list[Tensor]
    ) -> None:
        if len(sources) != len(targets):
            raise UserError(f"a {name} is copied to one other: got {len(sources)} sources, {len(targets)} targets")
        if not sources:
            return
        _check_range(name, [*sources, *targets], count)
        _check_distinct(f"{name} is copied to twice", targets)
        both = torch.tensor([sources, targets], dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)
        for tensor in tensors:
            tensor.index_copy_(0, both[1], tensor.index_select(0, both[0]))


class PoolBatch:
    """One step of N sequences of a pool: `model.hidden(tokens [1, sum(lengths)], cache=batch)`, without gradients.

    Args:
        slots: of each sequence's states, none twice.
        tables: of each sequence the pages of its tokens, token t in row t % page_size of page table[t // page_size];
            they may go on behind its tokens. A page may stand in several tables if none of the sequences writes to it.
        starts: tokens that are in each sequence's slot and pages already. Of 0 the slot's states count as empty.
        lengths: new tokens of each, >= 1.

    Raises:
        UserError: a slot, page or position that does not exist, a table that is too short, a slot or a page that two
            sequences would write to.
    """

    def __init__(
        self,
        pool: CachePool,
        *,
        slots: Sequence[int],
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        lengths: Sequence[int],
    ):
        self.pool, self.slots, self.starts, self.lengths = pool, slots, starts, lengths
        self.tables = tables
        self._check_numbers()
        self._places = self._lay_out()
        self.is_over = False

    def _check_numbers(self) -> None:
        pool = self.pool
        counts = {len(self.slots), len(self.tables), len(self.starts), len(self.lengths)}
        if len(counts) > 1 or 0 in counts:
            raise UserError(
                "slots, tables, starts and lengths must each have one entry for every sequence, of at least one, got "
                f"{len(self.slots)}, {len(self.tables)}, {len(self.starts)}, {len(self.lengths)}"
            )
        if min(self.lengths) < 1 or min(self.starts) < 0:
            raise UserError(
                f"lengths must be >= 1 and starts >= 0; leave sequences without new tokens out, got lengths "
                f"{list(self.lengths)}, starts {list(self.starts)}"
            )
        check_positions(max(map(sum, zip(self.starts, self.lengths, strict=True))), pool.config)
        _check_range("slot", self.slots, pool.slots)
        _check_distinct("slot stands for two sequences", self.slots)

    def _lay_out(self) -> Places:
        """Places with the pages that are used, after looking at them."""
        pool, begins, written = self.pool, array("i"), array("q")
        pages, size = array("i"), self.pool.page_size
        for table, start, length in zip(self.tables, self.starts, self.lengths, strict=True):
            used = (start + length - 1) // size + 1
            if len(table) < used:
                raise UserError(
                    f"a table of {len(table)} pages of {size} tokens is too short for {start} tokens and {length} new "
                    f"ones: it must have {used}"
                )
            begins.append(len(pages))
            written.extend(range(len(pages) + start // size, len(pages) + used))
            try:
                pages.extend(table if len(table) == used else table[:used])
            except OverflowError:
                _check_range("page", table, pool.pages)
        numbers = array("i", self.slots) + array("i", self.starts) + begins + pages
        count, together = len(begins), torch.frombuffer(numbers, dtype=torch.int32)
        places = Places(*together[: 3 * count].view(3, count), together[3 * count :])
        lowest, highest = (int(end) for end in places.tables.aminmax())
        if lowest < 0 or highest >= pool.pages:
            _check_range("page", pages, pool.pages)
        if count > 1:
            self._check_written(places.tables, written)
        return places

    def _check_written(self, pages: Tensor, written: array) -> None:
        """No page that a sequence writes to may stand anywhere else; `written` are such pages' places in `pages`."""
        stands = torch.bincount(pages, minlength=self.pool.pages)
        own = pages[torch.frombuffer(written, dtype=torch.int64)]
        if int(stands[own].max()) > 1:
            shared = own[stands[own] > 1].tolist()
            raise UserError(f"a page that is written to must be its sequence's alone; in several tables: {shared[:10]}")

    def check(self, tokens: Tensor, config: ModelConfig) -> None:
        check_config(self.pool.config, config)
        if self.is_over:
            raise UserError("a PoolBatch is one step, which this one has made; make another for the next")
        if torch.is_grad_enabled():
            raise UserError("a pool keeps no gradients; call the model within torch.inference_mode()")
        if tokens.shape != (1, sum(self.lengths)):
            raise UserError(f"tokens must be [1, sum(lengths)] = [1, {sum(self.lengths)}], got {tuple(tokens.shape)}")
        if tokens.device != self.pool.device:
            raise UserError(f"the pool is on {self.pool.device}, the tokens are on {tokens.device}")

    def positions(self, tokens: Tensor) -> Tensor:
        ranges = (torch.arange(a, a + n, device="cpu") for a, n in zip(self.starts, self.lengths, strict=True))
        return torch.cat(list(ranges))[None].to(tokens.device, non_blocking=True)

    @property
    def layers(self) -> list["_PoolStates | _PoolPages"]:
        """What the attention modules take; a decoding step does without."""
        return [(_PoolPages if memory.state is None else _PoolStates)(self, memory) for memory in self.pool.memories]

    def next_tokens(self, x: Tensor) -> NextTokens | None:
        pool = self.pool
        if max(self.lengths) > 1 or not all(self.starts) or pool.dtype != x.dtype:
            return None
        return NextTokens(pool, pool.memories, self._places)

    def advance(self, count: int) -> None:
        self.is_over = True

    def stepped(self) -> None:
        self.is_over = True

    @cached_property
    def slot_index(self) -> Tensor:
        """[N] int64 on the pool's device."""
        return torch.tensor(self.slots, dtype=torch.int64, device="cpu").to(self.pool.device, non_blocking=True)

    @cached_property
    def begun(self) -> Tensor | None:
        """[N, 1, 1, 1] bool on the pool's device: whose states count; None if all do."""
        if all(self.starts):
            return None
        begun = torch.tensor([start > 0 for start in self.starts], device="cpu")[:, None, None, None]
        return begun.to(self.pool.device, non_blocking=True)

    @cached_property
    def borders(self) -> Tensor:
        """[N+1] int32 on the CPU: where each sequence's new tokens begin."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device="cpu")

    @cached_property
    def pages(self) -> Pages:
        return Pages(self.tables, self.starts, self.lengths, self.pool.page_size, self.pool.device)


class _PoolStates:
    """The states of a batch's sequences, in one lightning layer."""

    def __init__(self, batch: PoolBatch, memory: LayerMemory):
        self.batch, self.states = batch, memory.state

    def attend(self, qkv: Tensor, rates: Tensor) -> Tensor:
        """[1, T, H, D] of projections qkv [1, T, H, 3, D], see `silu_lightning_attention`."""
        batch, lengths = self.batch, self.batch.lengths
        states = None
        if any(batch.starts):
            states = self.states.index_select(0, batch.slot_index)
            if batch.begun is not None:
                states = states.where(batch.begun, 0)  # a product with zero would keep a nan
        # Sequences of one length are rows of a batch, which for a token each is the step of the recurrence.
        are_even = min(lengths) == max(lengths)
        borders = None if are_even else batch.borders
        rows = qkv.reshape(len(lengths), -1, *qkv.shape[2:]) if are_even else qkv
        out, states = silu_lightning_attention(rows, rates, state=states, cu_seqlens=borders, return_state=True)
        self.states.index_copy_(0, batch.slot_index, states)
        return out.reshape(1, -1, *out.shape[2:])


class _PoolPages:
    """The keys and values of a batch's sequences, in one softmax layer."""

    def __init__(self, batch: PoolBatch, memory: LayerMemory):
        self.batch, self.keys, self.values = batch, memory.keys, memory.values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, T, H, D] of q over k, v [1, T, H_kv, D] and those before."""
        return paged_attention_(q[0], k[0], v[0], self.keys, self.values, self.batch.pages)[None]


def _new(device: torch.device | str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _check_range(name: str, numbers: Sequence[int], count: int) -> None:
    if min(numbers) < 0 or max(numbers) >= count:
        wrong = [number for number in numbers if not 0 <= number < count]
        raise UserError(f"the pool has {name}s 0..{count - 1}, got {wrong[:10]}")


def _check_distinct(fault: str, numbers: Sequence[int]) -> None:
    if len(set(numbers)) < len(numbers):
        twice = sorted({number for number in numbers if list(numbers).count(number) > 1})
        raise UserError(f"a {fault}: {twice[:10]}")
