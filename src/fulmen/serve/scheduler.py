"""Who computes what in the next step: policy in plain Python, no tensors.

A step decodes one token of every sequence whose prompt is done, and processes the prompts of others in pieces of at
most `chunk_tokens` in all, first come, first served. A sequence begins when a slot for its states and pages for its
whole prompt are there. Where pages run out while decoding, the sequence that came last gives its own back and waits;
what it had computed stays in the prefix cache as long as there is room, so that it resumes there.
"""

import bisect
import itertools
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from fulmen.serve.pages import Pages, Slots
from fulmen.serve.prefix import Node, PrefixCache

SHORT = 8
"""Pages; a prompt of fewer has no snapshot of its own, which would cost a step."""


@dataclass(eq=False)
class Sequence:
    """One answer in the making."""

    tokens: list[int]  # the prompt, then what was drawn
    prompt_length: int
    serial: int = 0  # of its arrival
    computed: int = 0  # tokens whose keys, values and states are in pages and slot
    cached: int = 0  # tokens that it first found in the prefix cache
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    node: Node | None = None  # the last of its pages that the prefix cache keeps
    branch: int = 0  # where it leaves the prefix cache's tree
    preemptions: int = 0

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last token is computed, one at least."""
        return 0 < self.computed == len(self.tokens) - 1


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence to be computed."""

    sequence: Sequence
    length: int
    is_last: bool  # no token is left behind them, so the logits after them are wanted
    snapshot: int | None = None  # where its states go afterwards


@dataclass
class Step:
    """What to do, in the order of its fields, and at last what each `Chunk.snapshot` says."""

    saved: dict[int, int] = field(default_factory=dict)  # snapshot: the slot whose states it takes
    restored: dict[int, int] = field(default_factory=dict)  # slot: the snapshot whose states it takes
    copied: dict[int, int] = field(default_factory=dict)  # page: the page whose keys and values it takes
    prompts: list[Chunk] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.prompts or self.decoding)


@dataclass
class Counts:
    """What happened so far, in tokens but for the last two."""

    queried: int = 0  # of prompts that looked into the prefix cache
    hit: int = 0  # of those, reused
    without_state: int = 0  # of those, in kept pages behind the deepest snapshot
    preemptions: int = 0
    finished: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hit / self.queried if self.queried else 0.0


class Scheduler:
    """Sequences, and the pages and slots that they hold."""

    def __init__(
        self,
        *,
        slots: int,
        pages: int,
        page_size: int,
        chunk_tokens: int,
        snapshots: int = 0,
        snapshot_interval: int = 1024,
    ):
        """`snapshots` 0: no prefix cache. `snapshot_interval`, tokens, is rounded up to whole pages."""
        self.slots, self.pages = Slots(slots), Pages(pages, page_size)
        self.prefix = PrefixCache(self.pages, snapshots) if snapshots else None
        self.chunk_tokens = chunk_tokens
        self.snapshot_interval = self.pages.needed(snapshot_interval) * page_size
        self.waiting: list[Sequence] = []  # both by arrival
        self.running: list[Sequence] = []
        self.counts = Counts()
        self._saved: dict[int, int] = {}  # of the next step
        self._serials = itertools.count(1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits when it is alone."""
        return self.pages.count * self.pages.page_size

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        assert len(sequence.tokens) <= self.longest, "a sequence that never fits must be refused before"
        sequence.serial = next(self._serials)
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step; `finish_step` tells when it was done."""
        decoding = []
        for sequence in list(self.running):
            # Whoever gives up its place for another came later, and so is not among these yet.
            if sequence.slot is not None and sequence.is_decoding and self._has_page(sequence):
                decoding.append(sequence)
        step, budget = Step(saved=self._saved, decoding=decoding), self.chunk_tokens
        self._saved = {}
        for sequence in self.running:
            if budget and not sequence.is_decoding:
                budget -= self._add_chunk(step, sequence, budget)
        while budget and self.waiting and self._begin(step):
            budget -= self._add_chunk(step, self.running[-1], budget)
        return step

    def finish_step(self, step: Step) -> None:
        """All of it has been computed and copied; tokens that were drawn are not among the sequences' yet."""
        self.pages.release(step.copied.values())
        for chunk in step.prompts:
            sequence = chunk.sequence
            sequence.computed += chunk.length
            self._remember(sequence)
            if chunk.snapshot is not None:
                self.prefix.attach(sequence.node, chunk.snapshot, sequence.tokens[: sequence.computed])
        for sequence in step.decoding:
            sequence.computed += 1
            if sequence.computed % self.pages.page_size == 0:
                self._remember(sequence)

    def finish(self, sequence: Sequence) -> None:
        """It has ended; its last token need not be computed.

        Its pages and a snapshot stay in the prefix cache, where the next turn of its conversation goes on.
        """
        self.counts.finished += 1
        self._leave(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Nobody wants more of it; pages and slot are free at once. Nothing happens if it has ended."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)

    def _has_page(self, sequence: Sequence) -> bool:
        """Whether there is a place for its next token; who came last makes room, at worst itself."""
        while self.pages.needed(sequence.computed + 1) > len(sequence.pages):
            if self._make_room(1):
                sequence.pages.append(self.pages.take())
            else:
                self._preempt(self.running[-1])
                if sequence.slot is None:
                    return False
        return True

    def _make_room(self, count: int) -> bool:
        if self.pages.free < count and self.prefix is not None:
            self.prefix.free_pages(count)
        return self.pages.free >= count

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.preemptions += 1
        self.counts.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda other: other.serial)

    def _begin(self, step: Step) -> bool:
        """Give the first that waits a slot and pages; False if there are none for it, or if it had better wait."""
        sequence, size = self.waiting[0], self.pages.page_size
        if not self.slots.free:
            return False
        path, deepest = self.prefix.match(sequence.tokens) if self.prefix is not None else ([], None)
        if self._is_being_computed(sequence.tokens, len(path) * size):
            return False
        reused = [] if deepest is None else deepest.path()
        if not self._hold(reused, sequence):
            if self.running or not reused:
                return False
            reused = []  # the page of a tail, held until it is copied, may be the one too many
            assert self._hold(reused, sequence), "a sequence that never fits must be refused before"
        self.waiting.pop(0)
        sequence.slot, sequence.branch = self.slots.take(), len(path) * size
        self._reuse(step, sequence, reused)
        sequence.pages += [self.pages.take() for _ in range(self._needed(reused, sequence))]
        for tail in reused:
            if len(tail.key) < size:  # it is held until it has been copied to the page after the whole ones
                step.copied[sequence.pages[len(reused) - 1]] = tail.page
        self.running.append(sequence)
        return True

    def _needed(self, reused: list[Node], sequence: Sequence) -> int:
        """Pages for its tokens beside the whole ones that it shares."""
        shared = sum(len(node.key) == self.pages.page_size for node in reused)
        return self.pages.needed(len(sequence.tokens)) - shared

    def _hold(self, reused: list[Node], sequence: Sequence) -> bool:
        """Hold the pages of `reused` and make room for the others; False, and nothing held, if there is none."""
        needed = self._needed(reused, sequence)
        # Those that run need another page sooner or later; if there were none, somebody would have to stop at once.
        reserve = len(self.running) + 1 if self.running else 0
        for node in reused:  # first, so that making room leaves them
            self.pages.share(node.page)
        if self.pages.available >= needed + reserve and self._make_room(needed):
            return True
        self.pages.release(node.page for node in reused)
        return False

    def _reuse(self, step: Step, sequence: Sequence, reused: list[Node]) -> None:
        """Enter what the prefix cache has of the sequence: nodes from the first page on, the last with a snapshot."""
        whole = [node for node in reused if len(node.key) == self.pages.page_size]
        sequence.pages = [node.page for node in whole]
        sequence.node = whole[-1] if whole else None
        sequence.computed = reused[-1].length if reused else 0
        if reused:
            self.prefix.check(reused[-1].snapshot, sequence.tokens[: sequence.computed])
            step.restored[sequence.slot] = reused[-1].snapshot
        if self.prefix is not None and not sequence.preemptions:
            sequence.cached = sequence.computed
            self.counts.queried += sequence.prompt_length
            self.counts.hit += sequence.computed
            self.counts.without_state += max(0, sequence.branch - sequence.computed)

    def _is_being_computed(self, tokens: Tokens, known: int) -> bool:
        """Whether a prompt in the making begins with more of these tokens than are `known`: then waiting pays."""
        if self.prefix is None:
            return False
        end = known + self.pages.page_size
        if end > len(tokens) - 1:
            return False
        begun = (other for other in self.running if other.computed < other.prompt_length)
        return any(other.tokens[:end] == tokens[:end] for other in begun)

    def _add_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        """As much of its prompt as the budget allows, or less where a snapshot is due; gives back its length."""
        left = len(sequence.tokens) - sequence.computed
        length = min(budget, left)
        cut = self._next_snapshot(sequence)
        snapshot = None
        if cut is not None and cut - sequence.computed <= length:
            snapshot = self.prefix.new_snapshot()
            length = cut - sequence.computed if snapshot is not None else length
        step.prompts.append(Chunk(sequence, length, length == left, snapshot))
        return length

    def _next_snapshot(self, sequence: Sequence) -> int | None:
        """Tokens before the next snapshot of a prompt: where it left the tree, at intervals, at its last whole page."""
        if self.prefix is None:
            return None
        size, start = self.pages.page_size, sequence.computed
        last = (len(sequence.tokens) - 1) // size * size
        places = [sequence.branch, (start // self.snapshot_interval + 1) * self.snapshot_interval]
        if last >= SHORT * size:
            places.append(last)
        return min((place for place in places if start < place <= last), default=None)

    def _remember(self, sequence: Sequence) -> None:
        """Keep its whole pages."""
        if self.prefix is not None:
            tokens = sequence.tokens[: sequence.computed]
            sequence.node = self.prefix.insert(tokens, sequence.pages, sequence.node)

    def _leave(self, sequence: Sequence) -> None:
        """Give everything back; the prefix cache keeps the pages and the states behind the last token."""
        if self.prefix is not None and sequence.computed:
            self._remember(sequence)
            self._save(sequence)
        self._remove(sequence)

    def _save(self, sequence: Sequence) -> None:
        tokens, node = sequence.tokens[: sequence.computed], sequence.node
        snapshot = self.prefix.new_snapshot()
        if snapshot is None:
            return
        if sequence.computed % self.pages.page_size:
            node = self.prefix.insert_tail(tokens, sequence.pages[sequence.computed // self.pages.page_size], node)
        if node is None or node.snapshot is not None:  # it has been there before
            self.prefix.discard(snapshot)
            return
        self.prefix.attach(node, snapshot, tokens)
        self._saved[snapshot] = sequence.slot

    def _remove(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self.slots.release(sequence.slot)
        sequence.pages, sequence.slot, sequence.node, sequence.computed = [], None, None, 0
