"""States that cross a border beside sums over tokens in float64; the GPU's kernels under Triton's interpreter too."""

import pytest
import torch

from fulmen.ops import gpu
from fulmen.ops.lightning import chunked, silu_lightning_attention
from fulmen.ops.lightning.parts import Parts, add_reads, backward_pass, forward_pass, sum_states

HEADS, KEYS, VALUES = 3, 32, 96
TOKENS = 240
PARTS = ([(0, 1)], [(7, 12), (0, 0), (40, 190)], [(0, 64), (64, 240)], [(0, 0)])
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
RATES = torch.tensor([3.0, 0.03, 0.0], device=DEVICE)  # of the first, tokens beyond the 35th weigh nothing


def kernels(name):
    crossing = pytest.importorskip("fulmen.ops.lightning.crossing", reason="needs the triton package")
    return getattr(crossing, f"triton_{name}")


def sum_states_by_kernel(b, c, rates, parts, *, reverse=False):
    return kernels("sum_states")(b, c, rates, parts, reverse=reverse)


def add_reads_by_kernel(out, a, states, rates, parts, *, reverse=False):
    kernels("add_reads")(out, a, states, rates, parts, reverse=reverse)


def parts_of(*ranges):
    return Parts.of(ranges, torch.device(DEVICE))


def weights(count, later):
    ages = torch.arange(count, dtype=torch.float64) + 1 if later else torch.arange(count - 1, -1, -1.0).double()
    return torch.exp(-ages[:, None] * RATES.cpu().double())


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(DEVICE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ranges", PARTS)
@pytest.mark.parametrize("function", [sum_states, sum_states_by_kernel])
def test_the_states_that_parts_leave(monkeypatch, function, ranges, reverse):
    if function is sum_states_by_kernel:
        kernels("sum_states")
        monkeypatch.setattr("fulmen.ops.lightning.crossing.SHARE", 40)
    b, c = random(TOKENS, HEADS, KEYS), random(TOKENS, HEADS, VALUES)
    expected = [
        torch.einsum("th,thk,thv->hkv", weights(end - begin, reverse), *(x[begin:end].double().cpu() for x in (b, c)))
        for begin, end in ranges
    ]
    found = function(b, c, RATES, parts_of(*ranges), reverse=reverse)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ranges", PARTS)
@pytest.mark.parametrize("function", [add_reads, add_reads_by_kernel])
def test_what_parts_read_is_added(function, ranges, reverse):
    # Every third of a row of projections, as the queries' gradients lie, and states the other way round.
    row, a = random(TOKENS, HEADS, 3, VALUES), random(TOKENS, HEADS, KEYS)
    states = random(len(ranges), HEADS, VALUES, KEYS).mT
    expected = row.double().cpu()
    for state, (begin, end) in zip(states.double().cpu(), ranges, strict=True):
        scaled = weights(end - begin, not reverse)[..., None] * a[begin:end].double().cpu()
        expected[begin:end, :, 1] += torch.einsum("thk,hkv->thv", scaled, state)
    function(row[:, :, 1], a, states, RATES, parts_of(*ranges), reverse=reverse)
    torch.testing.assert_close(row.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_count_as_long_as_they_weigh_anything(reverse):
    # What is far away is so large that each of the 26 nearest tokens adds one, though the last weighs exp(-78).
    rate, ages = torch.tensor([3.0], device=DEVICE), torch.arange(64.0, device=DEVICE)
    ages = ages + 1 if reverse else ages.flip(0)
    large = torch.where(ages <= 26, (3 * ages).exp(), 0.0)[:, None, None].expand(64, 1, 32)
    ones, near, whole = torch.ones(64, 1, 32, device=DEVICE), int((ages <= 26).sum()), parts_of((0, 64))
    found = kernels("sum_states")(ones, large, rate, whole, reverse=reverse)
    torch.testing.assert_close(found, torch.full_like(found, near), rtol=1e-3, atol=0)
    out = torch.zeros(64, 1, 32, device=DEVICE)
    kernels("add_reads")(out, large, torch.eye(32, device=DEVICE)[None, None], rate, whole, reverse=not reverse)
    torch.testing.assert_close(out, (large > 0).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", [sum_states, sum_states_by_kernel])
def test_small_gradients_in_fp16(function):
    b, c = random(2048, HEADS, KEYS).half(), (1e-5 * random(2048, HEADS, VALUES)).half()
    expected = torch.einsum("th,thk,thv->hkv", weights(2048, True), b.double().cpu(), c.double().cpu())
    found = function(b, c, RATES, parts_of((0, 2048)), reverse=True)[0].double().cpu()
    assert (found - expected).norm() < 5e-4 * expected.norm()


def by_triton():
    return pytest.importorskip("fulmen.ops.lightning.triton", reason="needs the triton package")


@pytest.mark.parametrize("backend", [lambda: chunked, by_triton], ids=["chunked", "triton"])
@pytest.mark.parametrize("borders", [(0, 96), (0, 1, 40, 96)])
def test_two_passes_are_the_attention_and_its_gradients(monkeypatch, backend, borders):
    monkeypatch.setattr("fulmen.ops.lightning.parts._backend", lambda qkv: backend())
    qkv, d_out = random(96, HEADS, 3, KEYS).requires_grad_(), random(96, HEADS, KEYS)
    ends = torch.tensor(borders, dtype=torch.int32)
    expected, _ = silu_lightning_attention(qkv[None], RATES, cu_seqlens=ends)
    expected.backward(d_out[None])
    with torch.no_grad():
        active = torch.nn.functional.silu(qkv)
        out, context, kept = forward_pass(active, RATES, borders)
        d_active = backward_pass(d_out, active, context, kept)
        d_qkv = torch.ops.aten.silu_backward(d_active, qkv)
    torch.testing.assert_close(out, expected[0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_qkv, qkv.grad, rtol=1e-5, atol=1e-5)


def test_a_gpu_takes_its_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(gpu, "serves", lambda x: True)
    taken = []
    for name in ("sum_states", "add_reads"):
        monkeypatch.setattr(f"fulmen.ops.lightning.crossing.triton_{name}", lambda *a, n=name, **k: taken.append(n))
    b, c, states = random(5, HEADS, KEYS), random(5, HEADS, VALUES), random(1, HEADS, KEYS, VALUES)
    sum_states(b, c, RATES, parts_of((0, 5)))
    add_reads(c, b, states, RATES, parts_of((0, 5)))
    assert taken == ["sum_states", "add_reads"]
    add_reads(c[..., :7], b, states[..., :7], RATES, parts_of((0, 5)))  # of a width that they do not take
    assert taken == ["sum_states", "add_reads"]
