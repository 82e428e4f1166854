"""Routing and sorting on a GPU, and the experts through them, against the dense float64 oracle."""

import pytest
import torch

from fulmen.ops import gpu
from fulmen.ops.experts import balance_loss, experts_mlp, route
from fulmen.ops.int8 import Int8, quantize_rows


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 2, 1), (70, 6, 2), (33, 5, 5), (40, 1, 1), (300, 32, 3)])
def test_routing(tokens, num_experts, k, both, gpu_device, poisoned_memory):
    logits = torch.randn(tokens, num_experts).to(gpu_device)
    routing = route(logits, k)
    probs = logits.double().softmax(dim=-1)
    top, experts = probs.topk(k, dim=-1)
    assert torch.equal(routing.experts, experts)
    assert torch.equal(routing.counts, torch.bincount(experts.flatten(), minlength=num_experts))
    torch.testing.assert_close(routing.probs, probs.float())
    torch.testing.assert_close(routing.weights, (top / top.sum(dim=-1, keepdim=True)).float())

    def formula(x):
        probs = x.softmax(dim=-1)
        top = probs.gather(1, experts)
        return torch.cat((top / top.sum(dim=-1, keepdim=True), probs), dim=-1)

    both(lambda x: torch.cat(route(x, k)[1:3], dim=-1), formula, [logits], 1e-5)


def test_counts_of_several_layers(gpu_device):
    experts = torch.randint(5, (3, 400, 2), device=gpu_device)
    counts = gpu.experts.count_choices(experts, 5)
    assert torch.equal(counts, torch.stack([torch.bincount(layer.flatten(), minlength=5) for layer in experts]))


def test_equal_logits_go_to_the_first_experts_and_nan_stays_in_its_token(gpu_device):
    logits = torch.zeros(3, 6, device=gpu_device)
    logits[1, 4] = float("nan")
    routing = route(logits, 2)
    assert routing.experts[[0, 2]].tolist() == [[0, 1], [0, 1]]
    assert routing.weights.isnan().all(dim=1).tolist() == [False, True, False]
    assert int(routing.counts.sum()) == 6


@pytest.mark.parametrize("capacity", [None, 0, 3, 17])
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(200, 6, 2), (40, 1, 1), (3, 6, 2), (90, 3, 3)])
def test_sorting(tokens, num_experts, k, capacity, gpu_device, poisoned_memory):
    routing = route(torch.randn(tokens, num_experts).to(gpu_device), k, capacity)
    experts = routing.experts if capacity is None else routing.experts.masked_fill(~routing.kept, -1)
    row_of, row_tokens, row_weights, ends = gpu.experts.sort_choices(
        experts, routing.weights, num_experts, torch.float32
    )
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        chosen = (experts == expert).nonzero()  # in the choices' order
        rows = slice(begin, begin + len(chosen))
        assert (end - begin) % gpu.experts.ALIGN == 0
        assert 0 <= end - begin - len(chosen) < gpu.experts.ALIGN
        assert row_tokens[rows].tolist() == chosen[:, 0].tolist()
        assert row_of[*chosen.T].tolist() == list(range(rows.start, rows.stop))
        assert torch.equal(row_weights[rows, 0], routing.weights[*chosen.T])
        assert (row_tokens[rows.stop : end] == -1).all()
        assert (row_weights[rows.stop : end] == 0).all()
        begin = end
    assert (row_of[experts < 0] == -1).all()
    assert begin <= len(row_tokens)


@pytest.mark.parametrize("capacity", [None, 3, 17])
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(40, 6, 2), (140, 3, 3), (40, 1, 1), (1, 6, 2)])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.7, 0.6)])
def test_outputs_and_gradients(tokens, num_experts, k, capacity, alpha, beta, both, oracle):
    width, expert = 16, 24
    shapes = ((tokens, width), (num_experts, 2 * expert, width), (num_experts, width, expert), (tokens, num_experts))
    x, w13, w2, logits = (torch.randn(shape) for shape in shapes)

    def function(x, w13, w2, logits):
        routing = route(logits, k, capacity)
        return experts_mlp(x, w13, w2, routing, alpha=alpha, beta=beta) + balance_loss(routing)

    def formula(x, w13, w2, logits):
        probs = logits.softmax(dim=-1)
        chosen = torch.bincount(probs.topk(k, dim=-1).indices.flatten(), minlength=num_experts)
        balance = (chosen.double() * num_experts / (k * tokens) * probs.mean(dim=0)).sum()
        answers = oracle(x.cpu(), w13.cpu(), w2.cpu(), logits.cpu(), k, capacity).to(x.device)
        return alpha * x + beta * answers + balance

    both(function, formula, [x, w13 / width**0.5, w2 / expert**0.5, logits], 1e-5)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 6, 2), (5, 6, 2), (64, 2, 2), (40, 5, 1), (3, 40, 3)])
@pytest.mark.parametrize(("width", "expert"), [(16, 24), (136, 40)])
def test_few_tokens(tokens, num_experts, k, width, expert, oracle, gpu_device, compare, poisoned_memory):
    shapes = ((tokens, width), (num_experts, 2 * expert, width), (num_experts, width, expert), (tokens, num_experts))
    x, w13, w2, logits = (torch.randn(shape) for shape in shapes)
    truth = oracle(*(t.double() for t in (x, w13, w2, logits)), k)
    x, w13, w2, logits = (t.to(gpu_device) for t in (x, w13, w2, logits))
    routing = route(logits, k)
    answers = gpu.decoding.experts_mlp(x, w13, w2, routing.experts)
    compare({"out": (answers * routing.weights[..., None]).sum(dim=1).cpu()}, {"out": truth}, 1e-5)


@pytest.mark.parametrize(("tokens", "k"), [(1, 2), (40, 2), (64, 1)])
def test_few_tokens_with_int8(tokens, k, oracle, gpu_device, compare, poisoned_memory):
    """The scales of each expert's w1, w3 and w2 go with their rows."""
    x, logits = torch.randn(tokens, 136), torch.randn(tokens, 6)
    w13, w2 = quantize_rows(torch.randn(6, 80, 136)), quantize_rows(torch.randn(6, 136, 40))
    truth = oracle(x.double(), w13.dense(torch.float64), w2.dense(torch.float64), logits.double(), k)
    w13, w2 = (Int8(*(t.to(gpu_device) for t in matrix)) for matrix in (w13, w2))
    routing = route(logits.to(gpu_device), k)
    answers = gpu.decoding.experts_mlp(x.to(gpu_device), w13, w2, routing.experts)
    compare({"out": (answers * routing.weights[..., None]).sum(dim=1).cpu()}, {"out": truth}, 1e-5)
    with torch.no_grad():
        compare({"out": experts_mlp(x.to(gpu_device), w13, w2, routing).cpu()}, {"out": truth}, 1e-5)
