"""A training step's time goes to the part that takes it: on a clock that only the parts themselves advance."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulmen.model import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, layer_plan="LS", num_heads=2, num_kv_heads=1, head_dim=8,
    num_experts=2, expert_size=8,
)  # fmt: skip
# Each part's own digit, forward; backward takes a thousand times as long.
LIGHTNING, SOFTMAX, EXPERTS, NORM, HEAD, UPDATE = 1, 2, 3, 4, 5, 6


@pytest.fixture
def train(gpu_device, monkeypatch):
    """The benchmark at tiny size, its clock in `clock`."""
    from fulmen.bench import train

    for name, value in dict(STEP=32, MICRO=16, KEPT=16).items():
        monkeypatch.setattr(train, name, value)
    clock = SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(train, "time", clock)
    return train


class Tick(nn.Module):
    """Lets the clock go on by `ticks` in the forward pass and 1000 * `ticks` in the backward pass."""

    def __init__(self, clock, ticks):
        super().__init__()
        self.arguments = (clock, ticks)

    def forward(self, x):
        return _Tick.apply(x, *self.arguments)


class _Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, ticks):
        ctx.arguments = (clock, ticks)
        # Kept, so that a layer whose input alone is kept has something to compute again.
        ctx.save_for_backward(x)
        clock.now += ticks
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors
        clock, ticks = ctx.arguments
        clock.now += 1000 * ticks
        return gradient, None, None


def ticking(train, monkeypatch):
    """A model all of whose parts advance the clock, and its optimizer."""
    from fulmen.model import moe, vocabulary

    model, clock = LanguageModel(CONFIG), train.time
    lightning, softmax = model.layers
    lightning.self_attn.out_proj = nn.Sequential(lightning.self_attn.out_proj, Tick(clock, LIGHTNING))
    softmax.self_attn.o_proj = nn.Sequential(softmax.self_attn.o_proj, Tick(clock, SOFTMAX))
    for layer in model.layers:
        layer.input_layernorm = nn.Sequential(layer.input_layernorm, Tick(clock, NORM))
    experts, loss, update = moe.experts_mlp, vocabulary.linear_cross_entropy, train.update

    def slow_update(*arguments):
        clock.now += UPDATE
        update(*arguments)

    monkeypatch.setattr(moe, "experts_mlp", lambda x, *rest, **named: Tick(clock, EXPERTS)(experts(x, *rest, **named)))
    monkeypatch.setattr(vocabulary, "linear_cross_entropy", lambda *arguments: Tick(clock, HEAD)(loss(*arguments)))
    monkeypatch.setattr(train, "update", slow_update)
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(("length", "forwards"), [(8, 1), (16, 1), (32, 2)])
def test_every_part_gets_its_own_time(train, monkeypatch, length, forwards):
    model, optimizer = ticking(train, monkeypatch)
    micro_batches = 1 if length == 32 else 2  # beyond KEPT, layers are computed twice
    times = train.time_parts(model, optimizer, length)

    def expected(ticks, forwards=forwards):
        return pytest.approx(1e3 * micro_batches * ticks * (1000 + forwards))

    assert times == {
        train.LIGHTNING: expected(LIGHTNING),
        train.SOFTMAX: expected(SOFTMAX),
        train.EXPERTS: expected(2 * EXPERTS),
        train.REST: expected(2 * NORM),
        train.HEAD: expected(HEAD, forwards=1),
        train.OPTIMIZER: 1e3 * UPDATE,
    }


def test_hooks_are_gone_afterwards_and_the_step_has_learned(train):
    model = LanguageModel(CONFIG)
    before = [p.detach().clone() for p in model.parameters()]
    train.time_parts(model, torch.optim.AdamW(model.parameters(), lr=0.1), 8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_shares_sum_to_one(train, monkeypatch):
    monkeypatch.setattr(train, "seconds", lambda call, **_: 0.5)
    model, optimizer = ticking(train, monkeypatch)
    row = train.parts_row(model, optimizer, 8)
    assert row["milliseconds"] == 500
    assert sum(row[part] for part in train.PARTS) == pytest.approx(1)
    assert row[train.SOFTMAX] == pytest.approx(2 * row[train.LIGHTNING])


def test_a_length_that_does_not_fit_is_halved_and_ours_is_measured_there_too(train, monkeypatch):
    def their_step(length):
        if length > 64:
            raise torch.OutOfMemoryError("too much")
        return length

    monkeypatch.setattr(train, "MEMORY_LENGTH", 256)
    monkeypatch.setattr(train, "SHORTEST", 16)
    monkeypatch.setattr(train, "their_step", their_step)
    monkeypatch.setattr(train, "our_step", lambda length: length)
    monkeypatch.setattr(train, "time_step", lambda step, tokens, repeats: {"tokens a second": float(step)})
    rows = [tuple(row.values()) for row in train.bench_memory()]
    missing = [("transformers", n, "out of memory") for n in (256, 128)]
    assert rows == [*missing, ("transformers", 64, 64.0), ("ours", 256, 256.0), ("ours", 64, 64.0)]
