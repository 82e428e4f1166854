"""Batches of sequences with one token and with more over a pool of states, each sequence against the definition."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu as silu_of

from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.naive import naive_lightning_attention

HEADS, KEYS, VALUES = 2, 32, 64
SINGLES, LONGER, MIXED = (1, 1, 1), (2, 17, 50), (1, 1, 1, 2, 17, 50)
SLOTS = (5, 0, 7, 3, 8, 1)  # of ten


def make_batch(lengths, device, *, dtype=torch.float32, heads=HEADS, keys=KEYS, values=VALUES) -> SimpleNamespace:
    """Inputs out of one packed projection, a pool of ten states and each sequence's slot in it."""
    packed = torch.randn(sum(lengths), heads, 2 * keys + values, device=device).to(dtype)
    q, k, v = packed.split((keys, keys, values), dim=-1)
    pool = torch.randn(10, heads, keys, values, device=device)
    slots = torch.tensor(SLOTS[: len(lengths)], dtype=torch.int32, device=device)
    rates = decay_rates(heads, 1, 4).to(device)
    return SimpleNamespace(q=q, k=k, v=v, rates=rates, pool=pool, slots=slots, lengths=lengths)


def run(batch, **options):
    from fulmen.ops.lightning.batch import lightning_batch_

    return lightning_batch_(**vars(batch) | options)


def truth_of(batch, silu=False):
    """Outputs and the pool afterwards: one sequence after the other, in float64."""
    pool, outs = batch.pool.double(), []
    activation = silu_of if silu else torch.nn.Identity()
    for (a, b), slot in zip(itertools.pairwise(itertools.accumulate((0, *batch.lengths))), batch.slots, strict=True):
        q, k, v = (activation(x[None, a:b].double()) for x in (batch.q, batch.k, batch.v))
        if slot >= 0:
            out, state = naive_lightning_attention(q, k, v, batch.rates, pool[slot][None].clone(), None)
            pool[slot] = state[0]
        outs.append(out[0] if slot >= 0 else torch.zeros_like(v[0]))
    return {"out": torch.cat(outs).cpu(), "pool": pool.cpu()}


@pytest.mark.parametrize("lengths", [SINGLES, (1,), LONGER, (50,), MIXED, (1, 2), (1, 1, 17, 17, 2)])
@pytest.mark.parametrize("silu", [False, True])
def test_each_sequence_alone(gpu_device, compare, poisoned_memory, lengths, silu):
    batch = make_batch(lengths, gpu_device)
    truth, before = truth_of(batch, silu), batch.pool.clone()
    out = run(batch, silu=silu)
    assert out.dtype == batch.v.dtype
    assert out.is_contiguous()
    used = batch.slots.tolist()
    results = {"out": out.cpu(), **{f"state {slot}": batch.pool[slot].cpu() for slot in used}}
    compare(results, {"out": truth["out"], **{f"state {slot}": truth["pool"][slot] for slot in used}}, 1e-5)
    others = [slot for slot in range(10) if slot not in used]
    assert torch.equal(batch.pool[others], before[others])


@pytest.mark.parametrize("lengths", [SINGLES, MIXED])
@pytest.mark.parametrize("padded", [0, 2])
def test_a_padded_slot(gpu_device, compare, poisoned_memory, lengths, padded):
    batch = make_batch(lengths, gpu_device)
    batch.slots[padded] = -1
    truth, before = truth_of(batch), batch.pool.clone()
    out = run(batch)
    assert (out[padded] == 0).all()
    compare({"out": out.cpu(), "pool": batch.pool.cpu()}, truth, 1e-5)
    used = {slot for slot in batch.slots.tolist() if slot >= 0}
    others = [slot for slot in range(10) if slot not in used]
    assert torch.equal(batch.pool[others], before[others])


def test_half_precision(gpu_device, compare):
    # The interpreter multiplies bf16 wrongly; fp16 stands in for it there.
    dtype = torch.float16 if gpu_device == "cpu" else torch.bfloat16
    batch = make_batch(MIXED, gpu_device, dtype=dtype)
    truth = truth_of(batch, silu=True)
    out = run(batch, silu=True)
    assert out.dtype == dtype
    compare({"out": out.cpu(), "pool": batch.pool.cpu()}, truth, 5e-3)


def test_a_pool_within_another(gpu_device, compare):
    """As where the states of all layers are one tensor."""
    batch = make_batch(MIXED, gpu_device)
    layers = torch.randn(10, 3, *batch.pool.shape[1:], device=gpu_device)
    batch.pool, before = layers[:, 1], layers.clone()
    truth = truth_of(batch)
    out = run(batch)
    compare({"out": out.cpu(), "pool": layers[:, 1].cpu()}, truth, 1e-5)
    assert torch.equal(layers[:, [0, 2]], before[:, [0, 2]])


def test_no_gradients(gpu_device):
    batch = make_batch(MIXED, gpu_device)
    batch.q, batch.k = batch.q.clone().requires_grad_(), batch.k.clone().requires_grad_()
    assert not run(batch).requires_grad
    assert not batch.pool.requires_grad


@pytest.mark.parametrize(
    ("lengths", "rule"),
    [
        ((1, 2, 17, 50, 1, 1), "of one token must come first; sort them by length, got lengths .1, 2"),
        ((1, 1, 1, 2, 17, 49), "add up to the T == 72 tokens of q, got 71"),
        ((1, 1, 1, 2, 67), "one of each sequence, got 6 slots and 5 lengths"),
        ((1, 1, 1, 0, 19, 50), "be >= 1; leave empty ones out"),
        ((), "at least one sequence"),
    ],
)
def test_lengths_that_do_not_fit(gpu_device, lengths, rule):
    check_refusal(make_batch(MIXED, gpu_device), rule, lengths=lengths)


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("k", lambda x: x[:, :, :16], "its sequences laid end to end, got"),
        ("v", lambda x: x[1:], "its sequences laid end to end, got"),
        ("q", lambda x: x[None], "its sequences laid end to end, got"),
        ("v", lambda x: x.half(), "share one dtype; convert them, got torch.float32"),
        ("k", lambda x: x.mT.contiguous().mT, "call .contiguous.., got strides"),
        ("pool", lambda x: x[:, :1], "behind S, fp32, each state contiguous, got"),
        ("pool", lambda x: x.double(), "got .* torch.float64"),
        ("pool", lambda x: x.mT.contiguous().mT, "each state contiguous"),
        ("slots", lambda x: x.long(), "int32; convert them, got .6,. torch.int64"),
        ("slots", lambda x: x[None], "must be .N. int32"),
    ],
)
def test_tensors_that_do_not_fit(gpu_device, name, change, rule):
    batch = make_batch(MIXED, gpu_device)
    check_refusal(batch, rule, **{name: change(getattr(batch, name))})


def test_what_the_longer_kernel_does_not_take(gpu_device):
    batch = make_batch(MIXED, gpu_device, keys=40)
    check_refusal(batch, "need the GPU kernel, which takes K of .* got 40")
    check_refusal(make_batch(MIXED, gpu_device), "stream must be one of q's device", stream=Stream("meta", []))


def check_refusal(batch, rule, **options):
    """It is refused before anything of the pool has changed."""
    before = batch.pool.clone()
    with pytest.raises(ValueError, match=rule):
        run(batch, **options)
    assert torch.equal(batch.pool, before)


class Stream:
    """Writes down who waits for whom."""

    def __init__(self, name: str, log: list, device: str = "meta"):
        self.name, self.log, self.device = name, log, torch.device(device)

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("lengths", [SINGLES, LONGER, MIXED])
def test_who_waits_for_whom(gpu_device, monkeypatch, lengths):
    """The order on two streams, seen without a GPU: kernels that only write down where they run."""
    from fulmen.ops.lightning import batch as module

    log, where, crossing = [], ["current"], []

    @contextlib.contextmanager
    def on(stream):
        where.append("current" if stream is None else stream.name)
        yield
        where.pop()

    def kernel(name):
        def call(q, *arguments, **options):
            log.append(f"{name} on {where[-1]}")
            return torch.zeros_like(batch.v[: len(q)])

        return call

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: crossing.append((x, stream.name)))
    monkeypatch.setattr(module.decoding, "lightning_step_", kernel("step"))
    monkeypatch.setattr(module, "_longer_", kernel("longer"))
    monkeypatch.setattr(module, "why_not", lambda q, v: None)
    batch = make_batch(lengths, "cpu")
    out = run(batch, stream=Stream("side", log, "cpu"))
    if lengths != MIXED:
        assert log == ["step on current" if lengths == SINGLES else "longer on current"]
        return
    assert log == ["side waits for current", "step on current", "longer on side", "current waits for side"]
    tensors = (batch.q, batch.k, batch.v, batch.rates, batch.pool, batch.slots, out)
    assert [(id(x), name) for x, name in crossing] == [(id(x), "side") for x in tensors]


@pytest.fixture
def large(gpu_device):
    """A batch in bf16 that keeps a GPU busy, what is right for it, and its pool before."""
    batch = make_batch(MIXED, gpu_device, dtype=torch.bfloat16, heads=64, keys=128, values=128)
    before = batch.pool.clone()
    return batch, (run(batch), batch.pool), before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams")
def test_two_streams(large):
    """Whatever else the streams do, bit for bit what one stream gives: inputs come late, results are used at once."""
    batch, (truth, pool), before = large
    inputs = {name: getattr(batch, name) for name in ("q", "k", "v")} | {"pool": before}
    stream, x, y = torch.cuda.Stream(), *torch.randn(2, 2048, 2048, device="cuda")
    for _ in range(20):
        late = {name: torch.full_like(tensor, float("nan")) for name, tensor in inputs.items()}
        torch.cuda.synchronize()
        keep_busy(x)
        for name, tensor in inputs.items():
            late[name].copy_(tensor)
        with torch.cuda.stream(stream):
            keep_busy(y)
        late = SimpleNamespace(**vars(batch) | late)
        results = run(late, stream=stream).clone(), late.pool.clone()
        late = None
        keep_busy(x)
        assert torch.equal(results[0], truth)
        assert torch.equal(results[1], pool)


def keep_busy(x: torch.Tensor) -> None:
    """Some milliseconds, with memory that is given back and taken anew."""
    for _ in range(20):
        x @ x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_two_streams_in_a_graph(large):
    batch, (truth, pool), before = large
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    batch.pool = before.clone()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run(batch, stream=stream)
    for _ in range(3):
        batch.pool.copy_(before)
        graph.replay()
        assert torch.equal(out, truth)
        assert torch.equal(batch.pool, pool)
