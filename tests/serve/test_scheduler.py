"""The scheduler and the prefix cache, driven against a machine that checks whatever it is told to do."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.serve.scheduler import Scheduler, Sequence

NOTHING = object()


class Machine:
    """Pages of token ids and slots of token histories: what a runner has as tensors, but legible.

    The next token of a sequence follows from all before it, and may only be had with states and pages of just those.
    """

    def __init__(self, scheduler, snapshots):
        self.scheduler, self.size = scheduler, scheduler.pages.page_size
        self.pages = [[NOTHING] * self.size for _ in range(scheduler.pages.count)]
        self.slots = [NOTHING] * scheduler.slots.count
        self.snapshots = [NOTHING] * snapshots
        self.computed = 0
        self.limits = {}

    def add(self, prompt, count):
        sequence = Sequence(tokens=list(prompt), prompt_length=len(prompt))
        self.limits[sequence] = len(prompt) + count
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        """One step; gives back the sequences that ended in it."""
        step = self.scheduler.schedule()
        for snapshot, slot in step.saved.items():
            self.snapshots[snapshot] = self.slots[slot]
        for slot, snapshot in step.restored.items():
            self.slots[slot] = self.snapshots[snapshot]
        for page, source in step.copied.items():
            self.pages[page] = list(self.pages[source])
        chunks = [(chunk.sequence, chunk.length, chunk.is_last, chunk.snapshot) for chunk in step.prompts]
        assert sum(length for _, length, _, _ in chunks) <= self.scheduler.chunk_tokens
        chunks += [(sequence, 1, True, None) for sequence in step.decoding]
        assert len({sequence.slot for sequence, *_ in chunks}) == len(chunks)
        drawn = []
        for sequence, length, is_last, _ in chunks:
            self._compute(sequence, length)
            assert is_last == (sequence.computed + length == len(sequence.tokens))
            if is_last:
                drawn.append(sequence)
        for sequence, _, _, snapshot in chunks:
            if snapshot is not None:
                self.snapshots[snapshot] = self.slots[sequence.slot]
        self.scheduler.finish_step(step)
        ended = []
        for sequence in drawn:
            sequence.tokens.append(following(sequence.tokens))
            if len(sequence.tokens) == self.limits[sequence]:
                self.scheduler.finish(sequence)
                ended.append(sequence)
        self.check()
        return ended

    def _compute(self, sequence, length):
        start = sequence.computed
        assert 1 <= length <= len(sequence.tokens) - start
        if start:  # whatever a slot held, a sequence begins with no state
            assert self.slots[sequence.slot] == sequence.tokens[:start]
        self.slots[sequence.slot] = sequence.tokens[: start + length]
        for place in range(start, start + length):
            self.pages[sequence.pages[place // self.size]][place % self.size] = sequence.tokens[place]
        seen = [self.pages[sequence.pages[i // self.size]][i % self.size] for i in range(start + length)]
        assert seen == sequence.tokens[: start + length]
        self.computed += length

    def check(self):
        """Every page and slot is accounted for."""
        pages, prefix = self.scheduler.pages, self.scheduler.prefix
        held = {page for sequence in self.scheduler.running for page in sequence.pages}
        kept = {node.page for node in prefix.nodes()} if prefix else set()
        assert pages.in_use == len(held)
        assert pages.idle == len(kept - held)
        assert pages.free == pages.count - len(held | kept)
        assert self.scheduler.slots.free == self.scheduler.slots.count - len(self.scheduler.running)
        for sequence in self.scheduler.waiting:
            assert not sequence.pages
            assert sequence.slot is None
        if prefix:
            assert len(prefix) == sum(1 for _ in prefix.nodes())
            snapshots = [node.snapshot for node in prefix.nodes() if node.snapshot is not None]
            assert len(set(snapshots)) == len(snapshots) == prefix.snapshots.count - prefix.snapshots.free
            for node in prefix.nodes():
                tokens = [token for part in node.path() for token in part.key]
                assert self.pages[node.page][: len(node.key)] == list(node.key)
                if node.snapshot is not None and node.snapshot not in self.scheduler._saved:
                    assert self.snapshots[node.snapshot] == tokens
        serials = [sequence.serial for sequence in self.scheduler.running]
        assert serials == sorted(serials)

    def run(self, steps=10_000):
        ended = []
        while self.scheduler.waiting or self.scheduler.running:
            ended += self.step()
            steps -= 1
            assert steps, "it does not come to an end"
        return ended


def following(tokens):
    return random.Random(repr(tokens)).randrange(3)


def alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens


def new(slots=3, pages=20, page_size=4, chunk_tokens=7, snapshots=4, snapshot_interval=8):
    scheduler = Scheduler(
        slots=slots,
        pages=pages,
        page_size=page_size,
        chunk_tokens=chunk_tokens,
        snapshots=snapshots,
        snapshot_interval=snapshot_interval,
    )
    return Machine(scheduler, snapshots)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_course_of_events_computes_what_each_sequence_alone_would(data):
    draw = data.draw
    page_size, pages = draw(st.integers(1, 5)), draw(st.integers(4, 24))
    machine = new(
        slots=draw(st.integers(1, 4)),
        pages=pages,
        page_size=page_size,
        chunk_tokens=draw(st.sampled_from([1, 3, 7, 100])),
        snapshots=draw(st.integers(0, 6)),
        snapshot_interval=draw(st.sampled_from([1, 4, 9, 1000])),
    )
    longest, sequences, aborted = machine.scheduler.longest, [], set()
    for _ in range(draw(st.integers(1, 40))):
        action = draw(st.sampled_from(["add", "again", "step", "step", "step", "abort"]))
        if action == "add" or (action == "again" and not sequences):
            prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=longest - 1))
        elif action == "again":  # the next turn of somebody's conversation
            prompt = [*draw(st.sampled_from(sequences)).tokens, 1][: longest - 1]
        if action in ("add", "again"):
            count = draw(st.integers(1, longest - len(prompt)))
            sequences.append(machine.add(prompt, count))
        elif action == "step":
            machine.step()
        elif sequences:
            sequence = draw(st.sampled_from(sequences))
            if len(sequence.tokens) < machine.limits[sequence]:
                aborted.add(sequence)
                machine.scheduler.abort(sequence)
                machine.check()
    machine.run()
    for sequence in sequences:
        if sequence not in aborted:
            count = machine.limits[sequence] - sequence.prompt_length
            assert sequence.tokens == alone(sequence.tokens[: sequence.prompt_length], count)
    assert machine.scheduler.pages.in_use == 0
    assert machine.scheduler.slots.free == machine.scheduler.slots.count


def test_first_come_first_served():
    machine = new(slots=1, snapshots=0)
    sequences = [machine.add([n % 2] * 5, 3) for n in range(4)]
    assert machine.run() == sequences


def test_prompts_go_in_pieces_between_decoding():
    machine = new(chunk_tokens=7, snapshots=0)
    talking = machine.add([1], 12)
    machine.step()
    machine.add([0] * 21, 1)
    for drawn in (2, 3, 4):
        assert len(talking.tokens) == drawn
        machine.step()
    assert not machine.scheduler.waiting


def test_who_came_last_gives_its_pages_back_and_resumes_where_it_was():
    machine = new(slots=2, pages=7, snapshots=3)
    first, second = machine.add([0] * 8, 12), machine.add([1] * 8, 12)
    machine.run()
    assert first.preemptions == 0
    assert second.preemptions >= 1
    assert machine.scheduler.counts.preemptions == second.preemptions
    assert [s.tokens for s in (first, second)] == [alone([0] * 8, 12), alone([1] * 8, 12)]


def test_a_shared_beginning_is_computed_once():
    machine = new(slots=8, pages=200, snapshots=16, chunk_tokens=64)
    system = [random.Random(1).randrange(3) for _ in range(81)]
    sequences = [machine.add([*system, 5 + n, 9, 9], 2) for n in range(8)]
    machine.run()
    assert all(s.tokens == alone(s.tokens[: s.prompt_length], 2) for s in sequences)
    # The second one finds the first one's snapshots, and leaves one where the two part.
    assert [s.cached for s in sequences] == [0, 80, *[80] * 6]
    assert machine.computed == 84 + 1 + 7 * (4 + 1)
    assert machine.scheduler.counts.hit_rate == pytest.approx(7 * 80 / (8 * 84))


def test_a_snapshot_is_taken_where_two_prompts_part():
    machine = new(slots=1, pages=200, snapshots=16, chunk_tokens=64, snapshot_interval=1000)
    system = [random.Random(1).randrange(3) for _ in range(41)]
    first, second, third = (machine.add([*system, *[5 + n] * 60], 1) for n in range(3))
    machine.run()
    assert (first.cached, second.cached, third.cached) == (0, 0, 40)
    assert machine.scheduler.counts.without_state == 40  # what the second one found pages of, but no state


def test_the_next_turn_goes_on_behind_the_last_token():
    machine = new(pages=40)
    first = machine.add([1, 2, 3, 4, 5], 8)  # 12 of 13 tokens computed: whole pages
    machine.run()
    second = machine.add([*first.tokens, 7, 7], 5)
    machine.run()
    assert second.cached == 12
    third = machine.add([*second.tokens, 7], 2)  # 19 of 20: a tail of three
    machine.run()
    assert third.cached == 19
    assert third.tokens == alone([*second.tokens, 7], 2)


def test_a_page_without_its_snapshot_is_no_hit():
    machine = new(pages=40, snapshots=1)
    first = machine.add([1] * 9, 1)
    machine.run()
    machine.add([2] * 9, 1)  # takes the only snapshot; the pages of the first stay
    machine.run()
    again = machine.add([1] * 9, 3)
    machine.run()
    assert again.cached == 0
    assert machine.scheduler.counts.without_state == 8
    assert again.tokens == alone([1] * 9, 3)
    assert first.tokens == alone([1] * 9, 1)


def test_a_snapshot_of_other_tokens_is_refused():
    machine = new(pages=40)
    machine.add([1] * 9, 4)
    machine.run()
    prefix = machine.scheduler.prefix
    (node,) = (node for node in prefix.nodes() if node.snapshot is not None and node.length == 12)
    prefix._digests[node.snapshot] = b"another"
    machine.add([*alone([1] * 9, 4), 2], 1)
    with pytest.raises(RuntimeError, match="is not of the 12 tokens"):
        machine.step()


def test_the_queue_of_leaves_does_not_grow_with_what_is_gone():
    machine = new(pages=40, snapshots=2)
    for n in range(300):
        machine.add([n % 7, n % 3, n], 2)
        machine.run()
    prefix = machine.scheduler.prefix
    assert len(prefix._leaves) <= 2 * len(prefix) + 64
    prefix.clear()
    assert machine.scheduler.pages.free == 40
    assert prefix.snapshots.free == 2
