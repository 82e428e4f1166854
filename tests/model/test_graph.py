"""A decoding step through the kernels for a GPU: what the modules compute; under Triton's interpreter, or recorded."""

import gc
import itertools

import pytest
import torch

from fulmen.model import LanguageModel, ModelConfig, graph, step
from fulmen.model import cache as cache_module
from fulmen.model.int8 import quantize_
from fulmen.model.pool import CachePool, PoolBatch
from fulmen.ops import cpu, gpu

CONFIG = ModelConfig(
    vocab_size=23,
    hidden_size=40,
    num_layers=4,
    layer_plan="LS",
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    num_experts=5,
    experts_per_token=3,
    expert_size=24,
    lightning_beta=0.7,
    softmax_alpha=1.3,
    mlp_beta=0.9,
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(gpu_device):
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.to(gpu_device)


@pytest.fixture
def steps(monkeypatch, gpu_device):
    """The number of steps so far; from here on they are the kernels'."""
    counter, original = [], graph.GraphedSteps.__call__

    def counted(self, *arguments):
        counter.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(graph.GraphedSteps, "__call__", counted)
    if gpu_device == "cpu":
        monkeypatch.setattr(cpu, "serves", lambda *_, **__: False)
        monkeypatch.setattr(gpu, "serves", lambda *tensors: all(t.dtype in gpu.DTYPES for t in tensors))
    return counter


def decode(model, tokens):
    """Logits of all tokens, one at a time."""
    cache = model.new_cache(len(tokens))
    return torch.cat([model(column, cache=cache) for column in tokens.split(1, dim=1)], dim=1)


def forward(model, tokens):
    """Logits of the modules, all tokens at once."""
    with torch.enable_grad():
        return model(tokens).detach()


@pytest.mark.parametrize("batch", [1, 5])
def test_equals_the_modules(model, batch, steps, gpu_device, poisoned_memory):
    tokens = torch.randint(CONFIG.vocab_size, (batch, 9), device=gpu_device)
    torch.testing.assert_close(decode(model, tokens), forward(model, tokens), rtol=0, atol=5e-5)
    assert len(steps) == 8, "the first token finds an empty cache"


def test_int8(model, steps, gpu_device):
    quantize_(model)
    tokens = torch.randint(CONFIG.vocab_size, (3, 9), device=gpu_device)
    torch.testing.assert_close(decode(model, tokens), forward(model, tokens), rtol=0, atol=5e-5)
    assert len(steps) == 8


def test_keys_and_values_outgrow_their_buffer(model, steps, monkeypatch, gpu_device):
    """Where there are records, one before and one after."""
    monkeypatch.setattr(cache_module, "SMALLEST", 4)
    tokens = torch.randint(CONFIG.vocab_size, (2, 8), device=gpu_device)
    cache, rooms = model.new_cache(2), []
    got = [model(tokens[:, :2], cache=cache)]
    for column in tokens[:, 2:].split(1, dim=1):
        got.append(model(column, cache=cache))
        rooms.append(cache.layers[-1].keys.shape[1])
    torch.testing.assert_close(torch.cat(got, dim=1), forward(model, tokens), rtol=0, atol=5e-5)
    assert len(steps) == 6
    assert rooms == [4, 4, 10, 10, 10, 10]


def test_two_caches_in_turns_and_tokens_in_between(model, steps, gpu_device):
    tokens = torch.randint(CONFIG.vocab_size, (2, 1, 14), device=gpu_device)
    caches, got = [model.new_cache(1) for _ in range(2)], ([], [])
    for part in (
        slice(0, 2),
        *(slice(t, t + 1) for t in range(2, 8)),
        slice(8, 10),
        *(slice(t, t + 1) for t in range(10, 14)),
    ):
        for i in (0, 1):
            got[i].append(model(tokens[i][:, part], cache=caches[i]))
    for i in (0, 1):
        torch.testing.assert_close(torch.cat(got[i], dim=1), forward(model, tokens[i]), rtol=0, atol=5e-5)


def test_what_a_step_gives_outlives_the_next(model, steps, gpu_device):
    cache = model.new_cache(1)
    outputs = [model.hidden(torch.full((1, 1), t, device=gpu_device), cache=cache) for t in range(5)]
    kept = [(hidden.clone(), [r.weights.clone() for r in routings]) for hidden, routings in outputs[-2:-1]]
    model.hidden(torch.full((1, 1), 7, device=gpu_device), cache=cache)
    hidden, routings = outputs[-2]
    assert torch.equal(hidden, kept[0][0])
    assert all(torch.equal(r.weights, w) for r, w in zip(routings, kept[0][1], strict=True))


def test_steps_back_for_a_hook(model, steps, gpu_device):
    cache = model.new_cache(1)
    token = torch.zeros(1, 1, dtype=torch.int64, device=gpu_device)
    for _ in range(2):
        model(token, cache=cache)
    heard = []
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    model(token, cache=cache)
    assert (len(steps), len(heard)) == (1, 1)


def pool_batch(pool, tables, starts, slots=(3, 0, 2), lengths=(1, 1, 1)):
    return PoolBatch(pool, slots=slots, tables=tables, starts=starts, lengths=lengths)


def test_a_pools_step_is_padded_and_outgrows_its_record(model, steps, monkeypatch, gpu_device):
    """Three sequences in a bucket of four, then two in one of two, in pages in any order; nothing else changes."""
    monkeypatch.setattr(graph, "SHORT", 8)
    tokens = torch.randint(CONFIG.vocab_size, (3, 12), device=gpu_device)
    pool = CachePool(CONFIG, slots=5, pages=30, page_size=3, device=gpu_device)
    for memory in pool.memories:
        for tensor in filter(lambda x: x is not None, memory):
            tensor.fill_(float("nan"))
    tables = torch.randperm(30)[:24].view(3, 8).tolist()
    prompts = torch.cat([tokens[0, :5], tokens[1, :1], tokens[2, :6]])[None]
    model.hidden(prompts, cache=pool_batch(pool, tables, [0, 0, 0], lengths=[5, 1, 6]))
    got = []
    for i in range(4):
        column = torch.stack([tokens[0, 5 + i], tokens[1, 1 + i], tokens[2, 6 + i]])[None]
        hidden, routings = model.hidden(column, cache=pool_batch(pool, tables, [5 + i, 1 + i, 6 + i]))
        assert all(r.counts.sum() == 3 * 3 and r.experts.shape == (3, 3) for r in routings)
        got.append(hidden[0])
    column = tokens[[0, 2], [9, 10]][None]
    last, _ = model.hidden(column, cache=pool_batch(pool, tables[::2], [9, 10], slots=[3, 2], lengths=[1, 1]))
    assert len(steps) == 5
    records = plan_of(model).step._records[pool].by_rows
    assert {rows: record.longest for rows, record in records.items()} == {4: 16, 2: 16}
    for b, first in enumerate((5, 1, 6)):
        with torch.enable_grad():
            whole = model.hidden(tokens[b : b + 1])[0][0].detach()
        torch.testing.assert_close(torch.stack(got)[:, b], whole[first : first + 4], rtol=0, atol=5e-5)
        if b != 1:
            torch.testing.assert_close(last[0, b // 2], whole[first + 4], rtol=0, atol=5e-5)
    for memory in pool.memories:
        if memory.state is not None:
            assert memory.state[[1, 4]].isnan().all()
        else:
            unused = sorted(set(range(30)) - set(itertools.chain(*tables)))
            assert memory.keys[unused].isnan().all()
            assert memory.values[unused].isnan().all()


def test_more_sequences_than_a_record_has_rows(model, steps, monkeypatch, gpu_device):
    monkeypatch.setattr(graph, "BUCKETS", (1, 2))
    tokens = torch.randint(CONFIG.vocab_size, (3, 3), device=gpu_device)
    pool = CachePool(CONFIG, slots=4, pages=3, page_size=4, device=gpu_device)
    tables = [[2], [0], [1]]
    model.hidden(tokens[:, :2].reshape(1, 6), cache=pool_batch(pool, tables, [0, 0, 0], lengths=[2, 2, 2]))
    hidden, routings = model.hidden(tokens[:, 2][None], cache=pool_batch(pool, tables, [2, 2, 2]))
    with torch.enable_grad():
        whole, expected = (x for x in model.hidden(tokens))
    torch.testing.assert_close(hidden[0], whole[:, 2].detach(), rtol=0, atol=5e-5)
    for routing, other in zip(routings, expected, strict=True):
        assert torch.equal(routing.experts, other.experts.view(3, 3, 3)[:, 2])
        assert torch.equal(routing.counts, routing.experts.flatten().bincount(minlength=5))
    assert len(steps) == 1


def test_tables_outgrow_their_record(model, steps, gpu_device):
    tokens, rooms = torch.randint(CONFIG.vocab_size, (1, 5), device=gpu_device), []
    pool = CachePool(CONFIG, slots=4, pages=6, page_size=1, device=gpu_device)
    for start, length in ((0, 2), (2, 1), (3, 1), (4, 1)):
        batch = PoolBatch(pool, slots=[1], tables=[[4, 2, 0, 5, 1]], starts=[start], lengths=[length])
        hidden, _ = model.hidden(tokens[:, start : start + length], cache=batch)
        if length == 1:
            rooms.append(len(plan_of(model).step._records[pool].by_rows[1].places.tables))
    with torch.enable_grad():
        whole = model.hidden(tokens)[0].detach()
    torch.testing.assert_close(hidden[0, 0], whole[0, -1], rtol=0, atol=5e-5)
    assert rooms == [4, 4, 8]


def plan_of(model):
    return step._PLANS[model]


def test_a_pool_goes_when_nobody_holds_it(model, steps, gpu_device):
    pool = CachePool(CONFIG, slots=4, pages=3, page_size=4, device=gpu_device)
    for start in (0, 1):
        batch = PoolBatch(pool, slots=[0], tables=[[2]], starts=[start], lengths=[1])
        model.hidden(torch.ones(1, 1, dtype=torch.int64, device=gpu_device), cache=batch)
    assert list(plan_of(model).step._records) == [pool]
    del pool, batch
    gc.collect()
    assert not plan_of(model).step._records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_records_of_a_pool_equal_the_modules(dtype, steps):
    """Batches of changing size, so that records of several buckets take turns on one pool."""
    model = LanguageModel(ModelConfig.preset("tiny")).eval().cuda()
    tokens = torch.randint(4096, (5, 60), device="cuda")
    exact = forward(model, tokens)
    model = model.to(dtype)
    pool, got = CachePool(model.config, slots=7, pages=30, device="cuda", dtype=dtype), [[] for _ in tokens]
    tables = torch.randperm(30).view(5, 6).tolist()
    with torch.inference_mode():
        for t in range(60):
            some = [b for b in range(5) if b < 3 or t < 30]
            batch = pool_batch(pool, [tables[b] for b in some], [t] * len(some), slots=some, lengths=[1] * len(some))
            logits = model(tokens[some, t][None], cache=batch)
            for b, row in zip(some, logits[0], strict=True):
                got[b].append(row)
    for b, rows in enumerate(got):
        truth = exact[b, : len(rows)]
        error = ((torch.stack(rows) - truth).norm() / truth.norm()).item()
        assert error < {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}[dtype]
    assert len(steps) == 59


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_records_equal_the_modules(dtype, steps):
    model = LanguageModel(ModelConfig.preset("tiny")).eval().cuda()
    tokens = torch.randint(4096, (3, 40), device="cuda")
    exact = forward(model, tokens)
    model = model.to(dtype)
    with torch.inference_mode():
        got = decode(model, tokens)
    error = ((got - exact).norm() / exact.norm()).item()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}[dtype]
    assert len(steps) == 39
