"""Kernels for the next token of each sequence, against the definitions in float64."""

import itertools

import pytest
import torch

from fulmen.ops import gpu
from fulmen.ops.int8 import quantize_rows
from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.naive import naive_lightning_attention
from fulmen.ops.rotary import apply_rotary, rotary_frequencies, rotary_tables
from fulmen.ops.softmax.naive import naive_softmax_attention

SLOTS = [4, -1, 0, 2]


@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(1, 8, 8), (3, 32, 32), (2, 96, 40), (2, 128, 128)])
@pytest.mark.parametrize("silu", [False, True])
def test_lightning_step(heads, key_dim, value_dim, silu, gpu_device, compare, poisoned_memory):
    packed = torch.randn(len(SLOTS), heads, 2 * key_dim + value_dim, device=gpu_device)
    q, k, v = packed.split((key_dim, key_dim, value_dim), dim=-1)
    pool = torch.randn(6, heads, key_dim, value_dim, device=gpu_device)
    rates, before = decay_rates(heads, 1, 4).to(gpu_device), pool.clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=gpu_device)
    out = gpu.decoding.lightning_step_(q, k, v, rates, pool, slots, silu=silu)
    used = [0, 2, 3]
    activation = torch.nn.functional.silu if silu else torch.nn.Identity()
    inputs = (activation(x[used].double())[:, None] for x in (q, k, v))
    truth, states = naive_lightning_attention(*inputs, rates, before[[4, 0, 2]].double(), None)
    compare(
        {"out": out[used].cpu(), "state": pool[[4, 0, 2]].cpu()},
        {"out": truth[:, 0].cpu(), "state": states.cpu()},
        1e-5,
    )
    assert torch.equal(pool[[1, 3, 5]], before[[1, 3, 5]])
    assert (out[1] == 0).all()


@pytest.mark.parametrize(("heads", "key_heads", "size", "rotary_dim"), [(4, 2, 16, 8), (3, 1, 40, 40), (20, 1, 16, 6)])
@pytest.mark.parametrize("room", [8, 700])
def test_attention_step(heads, key_heads, size, rotary_dim, room, gpu_device, compare, poisoned_memory):
    q, k, v = (torch.randn(4, n, size, device=gpu_device) for n in (heads, key_heads, key_heads))
    keys, values = torch.full((2, 6, room, key_heads, size), float("nan"), device=gpu_device)
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=gpu_device)
    positions = torch.tensor([0, 0, room - 1, room // 2], dtype=torch.int32, device=gpu_device)
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        if slot >= 0:
            keys[slot, :position], values[slot, :position] = torch.randn(2, position, key_heads, size)
    frequencies = rotary_frequencies(rotary_dim, 1e4, gpu_device)
    gpu.decoding.append_keys_(k, v, frequencies, keys, values, slots, positions)
    out = gpu.decoding.attention_step(q, frequencies, keys, values, slots, positions)
    assert (out[1] == 0).all()
    for b in (0, 2, 3):
        slot, position = SLOTS[b], int(positions[b])
        tables = rotary_tables(positions[b : b + 1, None].cpu(), rotary_dim, 1e4)
        turned_q, turned_k = (apply_rotary(x[None, None, b].cpu(), *tables) for x in (q, k))
        assert keys[slot, position + 1 :].isnan().all()
        torch.testing.assert_close(keys[slot, position].cpu(), turned_k[0, 0], rtol=1e-5, atol=1e-5)
        assert torch.equal(values[slot, position], v[b])
        seen = (x[slot, : position + 1][None].double().cpu() for x in (keys, values))
        truth = naive_softmax_attention(turned_q.double(), *seen, None)
        compare({"out": out[b].cpu()}, {"out": truth[0, 0]}, 1e-5)


@pytest.mark.parametrize(("page_size", "longest"), [(1, 150), (3, 150), (16, 4096), (64, 150)])
def test_attention_step_in_pages(page_size, longest, gpu_device, compare, poisoned_memory):
    """A first page that two sequences share, pages in any order, and nan wherever nobody has written."""
    heads, key_heads, size, rotary_dim, positions = 4, 2, 16, 8, [70, 0, 149, 71]
    q, k, v = (torch.randn(4, n, size, device=gpu_device) for n in (heads, key_heads, key_heads))
    counts = [position // page_size + 1 for position in positions]
    tables = [part.tolist() for part in torch.randperm(sum(counts) + 3)[3:].split(counts)]
    tables[3][0] = tables[0][0]
    shape = (sum(counts) + 3, page_size, key_heads, size)
    keys, values = torch.full((2, *shape), float("nan"), device=gpu_device)
    written = torch.randn(2, 4, max(positions), key_heads, size, device=gpu_device)
    for b in (2, 0, 3):
        for t in range(positions[b]):
            if b == 3 and t < page_size:
                written[:, b, t] = written[:, 0, t]
            place = tables[b][t // page_size], t % page_size
            keys[place], values[place] = written[:, b, t]
    before, numbers = (
        torch.stack((keys, values)),
        (SLOTS, positions, [0, *torch.tensor(counts).cumsum(0)[:-1].tolist()]),
    )
    slots, position, begins = (torch.tensor(n, dtype=torch.int32, device=gpu_device) for n in numbers)
    pages = gpu.decoding.Tables(begins, torch.tensor([*itertools.chain(*tables)], dtype=torch.int32, device=gpu_device))
    frequencies = rotary_frequencies(rotary_dim, 1e4, gpu_device)
    place = (frequencies, keys, values, slots, position, pages)
    gpu.decoding.append_keys_(k, v, *place)
    out = gpu.decoding.attention_step(q, *place, longest=longest)
    assert (out[1] == 0).all()
    for b in (0, 2, 3):
        turn = rotary_tables(position[b : b + 1, None].cpu(), rotary_dim, 1e4)
        turned_q, turned_k = (apply_rotary(x[None, None, b].cpu(), *turn) for x in (q, k))
        row = tables[b][positions[b] // page_size], positions[b] % page_size
        torch.testing.assert_close(keys[row].cpu(), turned_k[0, 0], rtol=1e-5, atol=1e-5)
        assert torch.equal(values[row], v[b])
        before[0][row], before[1][row] = keys[row], values[row]
        seen = (
            torch.cat((w[b, : positions[b]], x[row][None]))[None] for w, x in zip(written, (keys, values), strict=True)
        )
        truth = naive_softmax_attention(turned_q.double(), *(x.double().cpu() for x in seen), None)
        compare({"out": out[b].cpu()}, {"out": truth[0, 0]}, 1e-5)
    torch.testing.assert_close(torch.stack((keys, values)), before, rtol=0, atol=0, equal_nan=True)


def test_untouched_slots_keep_their_keys(gpu_device):
    keys, values = torch.randn(2, 6, 8, 1, 8, device=gpu_device)
    before = keys.clone()
    slots = torch.tensor([-1, 3], dtype=torch.int32, device=gpu_device)
    positions = torch.tensor([2, 5], dtype=torch.int32, device=gpu_device)
    k, v = torch.randn(2, 2, 1, 8, device=gpu_device)
    gpu.decoding.append_keys_(k, v, rotary_frequencies(8, 1e4, gpu_device), keys, values, slots, positions)
    changed = (keys != before).flatten(2).any(dim=2).nonzero().tolist()
    assert changed == [[3, 5]]


@pytest.mark.parametrize("size", [24, 1040])
@pytest.mark.parametrize("mixed", [False, True])
def test_add_norm(size, mixed, gpu_device, compare):
    normed, weight = torch.randn(5, size, device=gpu_device), torch.rand(size, device=gpu_device)
    branch, mix = torch.randn(5, 3, size, device=gpu_device), torch.randn(5, 3, device=gpu_device)
    if not mixed:
        branch, mix = branch[:, 0].contiguous(), None
    out = gpu.decoding.add_norm(normed, branch, 1.7, 0.6, weight, 1e-3, mix=mix)
    added = branch.double() if mix is None else (branch.double() * mix.double()[..., None]).sum(dim=1)
    x = 1.7 * normed.double() + 0.6 * added
    truth = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    compare({"out": out.cpu()}, {"out": truth.cpu()}, 1e-5)


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 3), (16, 2), (40, 1)])
@pytest.mark.parametrize("size", [24, 1040])
def test_add_norm_and_route(num_experts, k, size, gpu_device, compare, poisoned_memory):
    from fulmen.ops.experts import route

    normed, branch = torch.randn(2, 5, size, device=gpu_device)
    weight, matrix = torch.rand(size, device=gpu_device), torch.randn(num_experts, size, device=gpu_device)
    choices = (
        torch.empty(5, k, dtype=torch.int64, device=gpu_device),
        torch.empty(5, k, device=gpu_device),
        torch.empty(5, num_experts, device=gpu_device),
    )
    router = gpu.decoding.Router(matrix, *choices)
    out = gpu.decoding.add_norm(normed, branch, 1.7, 0.6, weight, 1e-3, router=router)
    unrouted = gpu.decoding.add_norm(normed, branch, 1.7, 0.6, weight, 1e-3)
    compare({"out": out.cpu()}, {"out": unrouted.cpu()}, 1e-6)
    truth = route(out.cpu().double() @ matrix.cpu().double().T, k)
    assert torch.equal(router.experts.cpu(), truth.experts)
    ours, theirs = ({"weights": r.weights.cpu(), "probs": r.probs.cpu()} for r in (router, truth))
    compare(ours, theirs, 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize(("n", "size"), [(5, 8), (40, 70), (64, 256)])
def test_linear_int8(rows, n, size, gpu_device, relative_error, poisoned_memory):
    x, weight = torch.randn(rows, size, device=gpu_device), quantize_rows(torch.randn(n, size, device=gpu_device))
    out = gpu.decoding.linear_int8(x, *weight)
    assert relative_error(out, x.double() @ weight.dense(torch.float64).T) < 1e-6
