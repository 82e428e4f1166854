"""One training step at a time: what it computes, what it leaves alone, what it can go back to."""

import copy
import math
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch

from fulmen.data import Batch
from fulmen.train import TrainingDivergedError
from fulmen.train.precision import choose_dtype
from fulmen.train.schedule import learning_rate_factor


def parameters(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def fill(saved, tensors):
    for name, tensor in saved.items():
        tensors[name].data.copy_(tensor)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def gradients(trainer):
    """Those of the trainer's next batch, without a step."""
    objective = trainer.objective
    objective.backward(objective.next_batches(0), 1)
    return {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def test_step_learns_and_says_what_it_did(trainer):
    make = trainer("optimizer.learning_rate=3e-3", "schedule.batch_tokens=96", "train.routing_every=2")
    metrics = [make.train_step() for step in range(60)]
    assert metrics[0]["loss"] == pytest.approx(math.log(300), rel=0.1)
    assert sum(m["loss"] for m in metrics[-5:]) / 5 < 0.6 * metrics[0]["loss"]
    assert [m["tokens"] for m in metrics] == [96 * (step + 1) for step in range(60)]
    assert all(m["batch_tokens"] == 96 and m["balance"] > 0.9 and m["grad_norm"] > 0 for m in metrics)
    rates = [3e-3 * learning_rate_factor(make.recipe.schedule, step) for step in range(60)]
    assert [m["learning_rate"] for m in metrics] == pytest.approx(rates)
    assert all(group["lr"] == metrics[-1]["learning_rate"] for group in make.optimizer.param_groups)
    assert [("expert_load" in m) for m in metrics] == [step % 2 == 1 for step in range(60)]
    assert metrics[-1]["epoch"] == make.objective.loader.epoch
    assert {m["trained_parameters"] for m in metrics} == {make.model.config.count_parameters().total}


def test_overfits_one_batch(trainer):
    make = trainer("schedule.warmup=0", "optimizer.weight_decay=0")
    batch = make.objective.loader.next_batch()
    make.objective.loader.next_batch = lambda size: batch
    losses = [make.train_step()["loss"] for _ in range(80)]
    assert losses[-1] < 0.1 < 5 < losses[0]


def test_updates_follow_the_scheduled_rate(trainer):
    """Adam's first step moves every weight by about the learning rate, whatever the gradient's size."""
    for warmup in (10, 100):
        make = trainer(f"schedule.warmup={warmup}", "optimizer.weight_decay=0")
        before = parameters(make)
        make.train_step()
        moved = max((p.detach() - before[name]).abs().max() for name, p in make.model.named_parameters())
        assert moved.item() == pytest.approx(1e-2 / warmup, rel=0.01)


def test_micro_batches_are_one_big_batch(trainer):
    """Without balance loss and capacity, which see one micro batch at a time, the gradients are those of the whole."""
    settings = ("train.balance=0", "train.capacity_factor=0", "schedule.batch_tokens=200")
    whole = trainer(*settings)
    for micro in (200, 100, 77):
        parts = trainer(*settings, f"schedule.micro_batch_tokens={micro}")
        batches = parts.objective.next_batches(0)
        sizes = [batch.tokens.numel() for batch in batches]
        assert sizes == [min(micro, 200 - start) for start in range(0, 200, micro)]
        # The end of a micro batch cuts a document, so the whole one is made of the same samples.
        borders = [batch.cu_seqlens[1:] + number * micro for number, batch in enumerate(batches)]
        joined = Batch(
            tokens=torch.cat([batch.tokens for batch in batches], dim=1),
            targets=torch.cat([batch.targets for batch in batches], dim=1),
            cu_seqlens=torch.cat([batches[0].cu_seqlens[:1], *borders]),
        )
        loss = parts.objective.backward(batches, 1)["loss"]
        expected = whole.objective.backward([joined], 1)["loss"]
        assert loss == pytest.approx(expected, rel=1e-6)
        for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
            other.grad = None


def test_balance_loss_counts_with_its_weight(trainer):
    plain, weighed = (gradients(trainer(f"train.balance={balance}")) for balance in (0, 5))
    router = "layers.0.block_sparse_moe.gate.weight"
    assert not torch.allclose(plain[router], weighed[router], rtol=0.1)
    assert torch.equal(plain["lm_head.weight"], weighed["lm_head.weight"])


def test_capacity_factor_drops_choices(trainer):
    """At 1 an uneven router loses some choices, at 4 (as many as there are experts) and at 0 (no limit) none."""
    drops = {
        factor: trainer(f"train.capacity_factor={factor}", "train.routing_every=1").train_step() for factor in (0, 1, 4)
    }
    assert drops[1]["drop_rate"] > 0
    assert drops[0]["drop_rate"] == drops[4]["drop_rate"] == 0
    assert drops[0]["loss"] == drops[4]["loss"] != drops[1]["loss"]


def test_gradients_are_clipped(trainer):
    """`grad_norm` is the norm before clipping; the optimizer sees a gradient of at most `clip`."""
    make = trainer("optimizer.clip=0.01")
    seen = {}
    step = make.optimizer.step

    def spy():
        seen["norm"] = torch.stack([p.grad.norm() for p in make.model.parameters()]).norm().item()
        step()

    make.optimizer.step = spy
    assert make.train_step()["grad_norm"] > 0.1
    assert seen["norm"] == pytest.approx(0.01, rel=1e-3)
    assert all(p.grad is None for p in make.model.parameters())


def test_short_gradients_are_left_alone(trainer):
    one, other = trainer("optimizer.clip=1e3"), trainer("optimizer.clip=1e6")
    one.train_step()
    other.train_step()
    assert_equal(parameters(one), parameters(other))


def test_checkpointed_layers_are_computed_again_and_give_the_same_gradients(trainer):
    plain, checkpointed = trainer(), trainer("train.checkpoint_layers=true")
    calls = Counter()
    for name, make in (("plain", plain), ("checkpointed", checkpointed)):
        make.model.layers[0].register_forward_pre_hook(lambda *arguments, name=name: calls.update([name]))
    assert_equal(gradients(plain), gradients(checkpointed))
    assert calls == {"plain": 1, "checkpointed": 2}


def test_ramp_changes_the_batches(trainer):
    make = trainer("schedule.ramp=[[128, 100], [300, 30]]")
    assert [make.train_step()["batch_tokens"] for _ in range(6)] == [64, 64, 100, 100, 30, 30]


@pytest.mark.parametrize("ramp", ["[]", "[[128, 100], [300, 30]]"])
def test_goes_on_from_what_it_saved(trainer, ramp):
    settings = (f"schedule.ramp={ramp}", "schedule.micro_batch_tokens=50")
    straight, first = trainer(*settings), trainer(*settings)
    expected = [straight.train_step() for _ in range(6)]
    assert [first.train_step() for _ in range(3)] == expected[:3]
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    state = copy.deepcopy(first.state())
    first.train_step()
    second = trainer(*settings)
    second.train_step()
    second.restore(state, partial(fill, saved))
    assert [second.train_step() for _ in range(3)] == expected[3:]
    assert_equal(straight.tensors(), second.tensors())
    assert straight.state() == second.state()


def test_random_generators_are_restored(trainer):
    make = trainer()
    saved, state = make.tensors(), make.state()
    expected = torch.rand(3)
    make.restore(state, partial(fill, saved))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_by_hand(trainer, tokenizer):
    make = trainer()
    batches = [make.objective.loader.next_batch(size) for size in (70, 30)]
    make.objective.held_out = {"held_out": batches}
    nll, num_bytes = 0.0, 0
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for start, end in pairwise(borders):
            log_probs = make.model(batch.tokens[:, start:end])[0].log_softmax(-1)
            for place, target in enumerate(batch.targets[0, start:end].tolist()):
                nll -= log_probs[place, target].item()
                num_bytes += len(tokenizer.token_bytes(target))
    before = parameters(make)
    metrics = make.evaluate()
    assert metrics["held_out_loss"] == pytest.approx(nll / 100, rel=1e-4)
    assert metrics["held_out_bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-4)
    assert_equal(before, parameters(make))
    assert all(p.grad is None for p in make.model.parameters())


def test_evaluation_drops_nothing(trainer):
    tight, free = trainer("train.capacity_factor=0.1"), trainer("train.capacity_factor=0")
    tight.objective.held_out = free.objective.held_out = {"held_out": [free.objective.loader.next_batch(64)]}
    assert tight.evaluate() == free.evaluate()


@pytest.mark.parametrize("poisoned", ["norm.weight", "layers.0.block_sparse_moe.experts.w2"])
def test_a_loss_that_is_not_finite_updates_nothing(trainer, poisoned):
    make = trainer()
    make.train_step()
    with torch.no_grad():
        dict(make.model.named_parameters())[poisoned].view(-1)[0] = math.nan
    before, optimizer = parameters(make), copy.deepcopy(make.optimizer.state_dict()["state"])
    with pytest.raises(TrainingDivergedError, match=r"^training diverged at step 2: loss nan, .*gradient norm nan"):
        make.train_step()
    for name, parameter in make.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), before[name].nan_to_num(7))
    after = make.optimizer.state_dict()["state"]
    assert all(torch.equal(after[key][name], value[name]) for key, value in optimizer.items() for name in value)
    assert (make.step, make.seen) == (1, 64)


def test_a_gradient_that_is_not_finite_is_named(trainer):
    make = trainer()
    make.model.layers[1].self_attn.k_proj.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingDivergedError) as caught:
        make.train_step()
    assert str(caught.value).endswith("; gradients not finite in layers.1.self_attn.k_proj.weight")
    assert "training diverged at step 1: loss 5." in str(caught.value)
    assert make.step == 0


def test_precision(trainer, monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("fulmen.train.precision.multiplies_bf16", lambda device, fast=fast: fast)
        assert choose_dtype("auto", cpu) == dtype


def test_bfloat16_products_keep_float32_weights(trainer):
    make = trainer("train.precision=bfloat16", "schedule.warmup=0")
    losses = [make.train_step()["loss"] for _ in range(30)]
    assert losses[-1] < 0.75 * losses[0]
    assert {p.dtype for p in make.model.parameters()} == {torch.float32}
    assert {t.dtype for s in make.optimizer.state.values() for t in s.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_compute_the_same(trainer):
    """Everything of compilation but the code generator, which takes a minute and a C++ compiler."""
    compiled, plain = trainer("train.compile=true"), trainer()
    assert all(layer._compiled_call_impl for layer in compiled.model.layers)
    assert not any(layer._compiled_call_impl for layer in plain.model.layers)
    calls = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, inputs):
        calls.append(graph)
        return backend(graph, inputs)

    for layer in compiled.model.layers:
        layer.compile(backend=counting)
    got, expected = ([make.train_step() for _ in range(3)] for make in (compiled, plain))
    assert calls
    for one, other in zip(got, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert compiled.tensors().keys() == plain.tensors().keys()
