"""Sequences that come and go in a pool, against each sequence alone through the model without a cache."""

import copy
import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig, step
from fulmen.model.pool import CachePool, PoolBatch
from fulmen.ops import cpu

CONFIG = ModelConfig(
    vocab_size=23,
    hidden_size=40,
    num_layers=5,
    layer_plan="LS",
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    rotary_dim=4,
    rope_theta=100.0,
    num_experts=5,
    experts_per_token=3,
    expert_size=24,
    max_positions=120,
    lightning_beta=0.7,
    softmax_alpha=1.3,
    mlp_beta=0.9,
)


def new_model():
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def modules_alone():
    """One whose modules are listened to, so that no step passes them over."""
    model = new_model()
    model.layers[0].register_forward_hook(lambda *_: None)
    return model


MODELS = {"step": new_model(), "modules": modules_alone()}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return MODELS["step"]


def new_pool(*, slots=4, pages=40, page_size=3, dtype=torch.float32, config=CONFIG):
    """Full of nan: what nobody has written must not be read."""
    pool = CachePool(config, slots=slots, pages=pages, page_size=page_size, dtype=dtype)
    for memory in pool.memories:
        for tensor in memory:
            if tensor is not None:
                tensor.fill_(float("nan"))
    return pool


@pytest.fixture
def pool():
    return new_pool()


@pytest.fixture
def calls(monkeypatch):
    """The number of steps in one call so far."""
    counter, original = [], step.Step.__call__

    def counted(self, *arguments):
        counter.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(step.Step, "__call__", counted)
    return counter


class Sequence:
    def __init__(self, tokens, slot, table, computed=0):
        self.tokens, self.slot, self.table, self.computed = tokens, slot, table, computed
        self.hidden = []


def advance(model, pool, sequences, lengths):
    """One step of these sequences by so many tokens each; gives back hidden [T, hidden]."""
    tokens = [t for s, n in zip(sequences, lengths, strict=True) for t in s.tokens[s.computed : s.computed + n]]
    batch = PoolBatch(
        pool,
        slots=[s.slot for s in sequences],
        tables=[s.table for s in sequences],
        starts=[s.computed for s in sequences],
        lengths=lengths,
    )
    hidden, routings = model.hidden(torch.tensor([tokens]), cache=batch)
    assert hidden.shape == (1, len(tokens), CONFIG.hidden_size)
    assert all(r.experts.shape[0] == len(tokens) and r.counts.sum() == r.experts.numel() for r in routings)
    for sequence, part in zip(sequences, hidden[0].split(list(lengths)), strict=True):
        sequence.computed += len(part)
        sequence.hidden.append(part)
    return hidden[0]


def check(model, sequence, tolerance):
    """What the pool gave of its last tokens equals the whole sequence without a cache."""
    got = torch.cat(sequence.hidden)
    with torch.inference_mode(False), torch.enable_grad():  # the modules, by PyTorch's operations
        whole = model.hidden(torch.tensor([sequence.tokens[: sequence.computed]]))[0][0].detach()
    torch.testing.assert_close(got, whole[len(whole) - len(got) :], rtol=0, atol=tolerance)


class Traffic:
    """A scheduler that draws by lot: who comes, goes, shares a prefix, and takes how many tokens."""

    def __init__(self, model, pool, rng):
        self.model, self.pool, self.rng = model, pool, rng
        self.pages = rng.sample(range(pool.pages), pool.pages)
        self.slots = rng.sample(range(pool.slots), pool.slots)
        self.running, self.left = [], []

    def come(self):
        length = self.rng.randint(1, 30)
        tokens = [self.rng.randrange(CONFIG.vocab_size) for _ in range(length)]
        slot, table, computed = self.slots.pop(), [], 0
        full = [s for s in self.running if s.computed and s.computed % self.pool.page_size == 0]
        if full and self.rng.random() < 0.7:
            # Goes on from where another is now: its pages are shared, its state is copied.
            other = self.rng.choice(full)
            computed = other.computed
            table = other.table[: computed // self.pool.page_size]
            tokens = other.tokens[:computed] + tokens
            self.pool.copy_states([other.slot], [slot])
        while len(table) * self.pool.page_size < len(tokens):
            table.append(self.pages.pop())
        self.running.append(Sequence(tokens, slot, table, computed))

    def go(self, sequence):
        self.running.remove(sequence)
        self.left.append(sequence)
        self.slots.append(sequence.slot)
        shared = {page for other in self.running for page in other.table}
        self.pages = [p for p in set(self.pages) | set(sequence.table) if p not in shared]
        self.rng.shuffle(self.pages)

    def turn(self):
        while self.slots and len(self.pages) * self.pool.page_size > 130 and self.rng.random() < 0.7:
            self.come()
        chosen = [s for s in self.running if self.rng.random() < 0.8]
        self.rng.shuffle(chosen)
        decodes = self.rng.random() < 0.5
        lengths = [1 if decodes else self.rng.randint(1, len(s.tokens) - s.computed) for s in chosen]
        if chosen:
            advance(self.model, self.pool, chosen, lengths)
        for sequence in list(self.running):
            if sequence.computed == len(sequence.tokens):
                self.go(sequence)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), page_size=st.sampled_from([1, 3, 16]))
@pytest.mark.parametrize("kind", MODELS)
def test_any_traffic_equals_each_sequence_alone(kind, seed, page_size):
    model = MODELS[kind]
    traffic = Traffic(model, new_pool(pages=-(-240 // page_size), page_size=page_size), random.Random(seed))
    with torch.inference_mode():
        for _ in range(25):
            traffic.turn()
        assert len(traffic.left) > 3
        for sequence in traffic.left:
            check(model, sequence, 5e-5)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_is_one_call(model, page_size, threads, calls):
    torch.set_num_threads(threads)
    pool = new_pool(slots=9, pages=900 // page_size, page_size=page_size)
    order = torch.randperm(pool.pages).tolist()
    sequences = []
    for slot, length in ((7, 1), (2, 40), (8, 90)):
        table = [order.pop() for _ in range(-(-(length + 20) // page_size))]
        sequences.append(Sequence(torch.randint(23, (length + 20,)).tolist(), slot, table))
    advance(model, pool, sequences, [1, 40, 90])
    assert not calls
    for _ in range(20):
        advance(model, pool, sequences, [1, 1, 1])
    assert len(calls) == (20 if cpu.load() else 0)
    for sequence in sequences:
        check(model, sequence, 5e-5)


def test_the_first_token_of_a_sequence_is_not_decoded(model, pool, calls):
    """A new sequence may begin with one token, in a slot that another has left."""
    old = Sequence([1, 2, 3, 4], 1, [5, 6])
    advance(model, pool, [old], [3])
    new = Sequence([7, 8], 1, [9])
    other = Sequence([3, 5, 5], 0, [2])
    advance(model, pool, [other], [2])
    advance(model, pool, [new, other], [1, 1])
    assert not calls
    check(model, new, 2e-5)
    check(model, other, 2e-5)


@pytest.mark.skipif(cpu.load() is None, reason="there is no C compiler here")
@pytest.mark.parametrize("count", [65, 130])
def test_many_sequences_decode_in_pieces_and_do_not_depend_on_each_other(model, count, calls):
    pool = new_pool(slots=count, pages=3 * count)
    sequences = [Sequence(torch.randint(23, (6,)).tolist(), i, [3 * i, 3 * i + 1]) for i in range(count)]
    advance(model, pool, sequences, [3] * count)
    alone = copy.deepcopy(pool)
    together = advance(model, pool, sequences, [1] * count)
    some = sorted({0, 63, 64, count - 1})
    for i in some:
        sequences[i].computed -= 1
        assert torch.equal(advance(model, alone, [sequences[i]], [1])[0], together[i])
    assert len(calls) == 1 + len(some)


@pytest.mark.skipif(cpu.load() is None, reason="there is no C compiler here")
def test_numbers_do_not_depend_on_pages(model):
    tokens, results = torch.randint(23, (100,)).tolist(), []
    for page_size in (1, 3, 16, 120):
        pool = new_pool(pages=-(-120 // page_size), page_size=page_size)
        sequence = Sequence(tokens, 0, torch.randperm(pool.pages).tolist())
        advance(model, pool, [sequence], [97])
        results.append(torch.stack([advance(model, pool, [sequence], [1]) for _ in range(3)]))
    cache = model.new_cache(1)
    model.hidden(torch.tensor([tokens[:97]]), cache=cache)
    plain = torch.stack([model.hidden(torch.tensor([[t]]), cache=cache)[0][0] for t in tokens[97:]])
    for result in results:
        assert torch.equal(result, plain)


def test_nothing_else_of_the_pool_changes(model, pool):
    for memory in pool.memories:
        for tensor in filter(lambda x: x is not None, memory):
            tensor.normal_()
    before = [[None if x is None else x.clone() for x in memory] for memory in pool.memories]
    one, two = Sequence(torch.randint(23, (9,)).tolist(), 2, [8, 3, 30]), Sequence([4, 4, 4], 1, [17])
    advance(model, pool, [one, two], [7, 2])
    advance(model, pool, [two, one], [1, 1])
    written = {(8, 0), (8, 1), (8, 2), (3, 0), (3, 1), (3, 2), (30, 0), (30, 1), (17, 0), (17, 1), (17, 2)}
    for memory, old in zip(pool.memories, before, strict=True):
        if memory.state is not None:
            assert [s for s in range(4) if not torch.equal(memory.state[s], old[0][s])] == [1, 2]
            continue
        for tensor, earlier in ((memory.keys, old[1]), (memory.values, old[2])):
            changed = (tensor != earlier).flatten(2).any(dim=2).nonzero().tolist()
            assert {tuple(place) for place in changed} == written


def test_nan_stays_in_its_sequence(model):
    broken = new_model()
    broken.embed_tokens.weight[0] = float("nan")
    results = []
    for third in (0, 5):
        pool = new_pool()
        sequences = [Sequence([1, 2, 3, 4], 0, [0, 1]), Sequence([1, 2, third, 4], 1, [2, 3])]
        for lengths in ([2, 2], [1, 1], [1, 1]):
            hidden = advance(broken, pool, sequences, lengths)
        results.append(hidden)
    assert results[0][1].isnan().all()
    assert torch.equal(results[0][0], results[1][0])


def test_copies_of_states_and_pages(pool):
    for memory in pool.memories:
        for tensor in filter(lambda x: x is not None, memory):
            tensor.normal_()
    before = [[None if x is None else x.clone() for x in memory] for memory in pool.memories]
    pool.copy_states([0, 1, 0], [1, 0, 3])
    pool.copy_pages([4, 5], [5, 39])
    pool.copy_states([], [])
    for memory, old in zip(pool.memories, before, strict=True):
        if memory.state is not None:
            assert torch.equal(memory.state, old[0][[1, 0, 2, 0]])
            continue
        order = list(range(40))
        order[5], order[39] = 4, 5
        assert torch.equal(memory.keys, old[1][order])
        assert torch.equal(memory.values, old[2][order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype):
    pool = new_pool(slots=4, pages=6, page_size=5, dtype=dtype)
    states = sum(m.state.nbytes for m in pool.memories if m.state is not None)
    pages = sum(m.keys.nbytes + m.values.nbytes for m in pool.memories if m.keys is not None)
    assert states == 4 * CachePool.slot_bytes(CONFIG)
    assert pages == 6 * CachePool.page_bytes(CONFIG, 5, dtype)
    # 70 * 64 * 128 * 128 * 4, and 10 * 2 * 8 * 128 * 2 for each token
    large = ModelConfig.preset("minimax-text-01")
    assert CachePool.slot_bytes(large) == 293_601_280
    assert CachePool.page_bytes(large, 16, torch.bfloat16) == 16 * 40_960


def test_bf16(calls):
    """States stay in fp32; prompt by the modules, then the call, whose numbers are fp32 between the layers."""
    exact, model, pool = new_model(), new_model().bfloat16(), new_pool(dtype=torch.bfloat16)
    assert pool.memories[0].state.dtype == torch.float32
    sequence = Sequence(torch.randint(23, (20,)).tolist(), 0, list(range(7)))
    for length in (9, 1, 5, 1, 1, 1, 1, 1):
        advance(model, pool, [sequence], [length])
    assert len(calls) == (6 if cpu.load() else 0)
    got = torch.cat(sequence.hidden).float()
    whole = exact.hidden(torch.tensor([sequence.tokens]))[0][0]
    assert (got - whole).norm() / whole.norm() < 0.03


FITS = dict(slots=[0, 1], tables=[[3, 1], [4]], starts=[4, 0], lengths=[1, 3])
"""What stands in a `PoolBatch` of a pool of 4 slots and 40 pages of 3 tokens."""

REFUSED = [
    (dict(slots=[0, 0]), r"a slot stands for two sequences: \[0\]"),
    (dict(slots=[0, 4]), r"the pool has slots 0..3, got \[4\]"),
    (dict(slots=[-1, 1]), r"the pool has slots 0..3, got \[-1\]"),
    (dict(tables=[[3], [4]]), r"a table of 1 pages of 3 tokens is too short for 4 tokens and 1 new ones: .* have 2"),
    (dict(tables=[[3, 40], [4]]), r"the pool has pages 0..39, got \[40\]"),
    (dict(tables=[[-2, 1], [4]]), r"the pool has pages 0..39, got \[-2\]"),
    (dict(tables=[[3, 2**40], [4]]), r"the pool has pages 0..39, got \[1099511627776\]"),
    (dict(tables=[[3, 4], [4]]), r"a page that is written to must be its sequence's alone; .*: \[4, 4\]"),
    (dict(tables=[[4, 1], [4]]), r"a page that is written to must be its sequence's alone; .*: \[4\]"),
    (dict(lengths=[0, 3]), r"lengths must be >= 1 .*, got lengths \[0, 3\]"),
    (dict(starts=[-1, 0]), r"starts >= 0; .* starts \[-1, 0\]"),
    (dict(starts=[119, 0], lengths=[2, 3]), "121 positions exceed the model's max_positions 120"),
    (dict(lengths=[1]), "one entry for every sequence, of at least one, got 2, 2, 2, 1"),
    (dict(slots=[], tables=[], starts=[], lengths=[]), "of at least one, got 0, 0, 0, 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_refused(pool, changes, message):
    PoolBatch(pool, **FITS)
    with pytest.raises(UserError, match=message):
        PoolBatch(pool, **FITS | changes)


def test_a_shared_page_may_be_read_by_all(pool):
    PoolBatch(pool, slots=[0, 1], tables=[[3, 1, 7], [3, 2]], starts=[3, 4], lengths=[3, 1])


def test_a_batch_is_for_its_model_tokens_and_step(model, pool):
    def tokens(count):
        return torch.ones(1, count, dtype=torch.int64)

    fresh = FITS | dict(starts=[0, 0], lengths=[4, 3])
    batch = PoolBatch(pool, **fresh)
    with pytest.raises(UserError, match=r"tokens must be \[1, sum\(lengths\)\] = \[1, 7\], got \(1, 6\)"):
        model.hidden(tokens(6), cache=batch)
    with pytest.raises(UserError, match="keeps no gradients"), torch.inference_mode(False), torch.enable_grad():
        model.hidden(tokens(7), cache=batch)
    with pytest.raises(UserError, match="packed samples"):
        model.hidden(tokens(7), cache=batch, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    other = new_pool(config=ModelConfig.preset("tiny"))
    with pytest.raises(UserError, match="a model of another configuration"):
        model.hidden(tokens(7), cache=PoolBatch(other, **fresh))
    model.hidden(tokens(7), cache=batch)
    with pytest.raises(UserError, match="a PoolBatch is one step"):
        model.hidden(tokens(7), cache=batch)


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([0], [1, 2], "got 1 sources, 2 targets"),
        ([0, 1], [2, 2], r"a slot is copied to twice: \[2\]"),
        ([0], [4], r"the pool has slots 0..3, got \[4\]"),
        ([-1], [0], r"the pool has slots 0..3, got \[-1\]"),
    ],
)
def test_copies_that_cannot_be(pool, sources, targets, message):
    with pytest.raises(UserError, match=message):
        pool.copy_states(sources, targets)


@pytest.mark.parametrize("name", ["slots", "pages", "page_size"])
def test_a_pool_of_nothing(name):
    with pytest.raises(UserError, match=f"{name} of a pool must be at least 1, got 0"):
        CachePool(CONFIG, **dict(slots=1, pages=1, page_size=1) | {name: 0})


@pytest.mark.parametrize("plan", ["L", "S"])
def test_models_of_one_kind_of_layer(plan):
    config = dataclasses.replace(CONFIG, layer_plan=plan, num_layers=2)
    model, pool = LanguageModel(config).eval(), new_pool(config=config)
    pool.copy_states([0], [1])
    pool.copy_pages([0], [1])
    sequence = Sequence([1, 2, 3, 4, 5], 0, [1, 2])
    for length in (3, 1, 1):
        advance(model, pool, [sequence], [length])
    check(model, sequence, 2e-5)
