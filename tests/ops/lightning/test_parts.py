"""States that cross a border beside sums over tokens in float64; the GPU's kernels under Triton's interpreter too."""

import pytest
import torch

from fulmen.ops import gpu
from fulmen.ops.lightning import chunked, silu_lightning_attention
from fulmen.ops.lightning.parts import add_read, backward_pass, forward_pass, sum_state

HEADS, KEYS, VALUES = 3, 32, 96
LENGTHS = (1, 5, 64, 150)
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
RATES = torch.tensor([3.0, 0.03, 0.0], device=DEVICE)  # of the first, tokens beyond the 35th weigh nothing


def kernels(name):
    crossing = pytest.importorskip("fulmen.ops.lightning.crossing", reason="needs the triton package")
    return getattr(crossing, f"triton_{name}")


def sum_state_by_kernel(b, c, rates, *, reverse=False):
    return kernels("sum_state")(b, c, rates, reverse=reverse)


def add_read_by_kernel(out, a, state, rates, *, reverse=False):
    kernels("add_read")(out, a, state, rates, reverse=reverse)


def weights(count, later):
    ages = torch.arange(count, dtype=torch.float64) + 1 if later else torch.arange(count - 1, -1, -1.0).double()
    return torch.exp(-ages[:, None] * RATES.cpu().double())


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(DEVICE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("function", [sum_state, sum_state_by_kernel])
def test_the_state_that_tokens_leave(monkeypatch, function, length, reverse):
    if function is sum_state_by_kernel:
        kernels("sum_state")
        monkeypatch.setattr("fulmen.ops.lightning.crossing.SHARE", 40)
    b, c = random(length, HEADS, KEYS), random(length, HEADS, VALUES)
    expected = torch.einsum("th,thk,thv->hkv", weights(length, reverse), b.double().cpu(), c.double().cpu())
    found = function(b, c, RATES, reverse=reverse)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("function", [add_read, add_read_by_kernel])
def test_what_tokens_read_is_added(function, length, reverse):
    # Every third of a row of projections, as the queries' gradients lie, and a state the other way round.
    row, a = random(length, HEADS, 3, VALUES), random(length, HEADS, KEYS)
    state = random(HEADS, VALUES, KEYS).mT
    read = torch.einsum("th,thk,hkv->thv", weights(length, not reverse), a.double().cpu(), state.double().cpu())
    expected = row.double().cpu()
    expected[:, :, 1] += read
    function(row[:, :, 1], a, state, RATES, reverse=reverse)
    torch.testing.assert_close(row.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_count_as_long_as_they_weigh_anything(reverse):
    # What is far away is so large that each of the 26 nearest tokens adds one, though the last weighs exp(-78).
    rate, ages = torch.tensor([3.0], device=DEVICE), torch.arange(64.0, device=DEVICE)
    ages = ages + 1 if reverse else ages.flip(0)
    large = torch.where(ages <= 26, (3 * ages).exp(), 0.0)[:, None, None].expand(64, 1, 32)
    ones, near = torch.ones(64, 1, 32, device=DEVICE), int((ages <= 26).sum())
    found = kernels("sum_state")(ones, large, rate, reverse=reverse)
    torch.testing.assert_close(found, torch.full_like(found, near), rtol=1e-3, atol=0)
    out = torch.zeros(64, 1, 32, device=DEVICE)
    kernels("add_read")(out, large, torch.eye(32, device=DEVICE)[None], rate, reverse=not reverse)
    torch.testing.assert_close(out, (large > 0).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", [sum_state, sum_state_by_kernel])
def test_small_gradients_in_fp16(function):
    b, c = random(2048, HEADS, KEYS).half(), (1e-5 * random(2048, HEADS, VALUES)).half()
    expected = torch.einsum("th,thk,thv->hkv", weights(2048, True), b.double().cpu(), c.double().cpu())
    found = function(b, c, RATES, reverse=True).double().cpu()
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
    for name in ("sum_state", "add_read"):
        monkeypatch.setattr(f"fulmen.ops.lightning.crossing.triton_{name}", lambda *a, n=name, **k: taken.append(n))
    b, c, state = random(5, HEADS, KEYS), random(5, HEADS, VALUES), random(HEADS, KEYS, VALUES)
    sum_state(b, c, RATES)
    add_read(c, b, state, RATES)
    assert taken == ["sum_state", "add_read"]
    add_read(c[..., :7], b, state[..., :7], RATES)  # of a width that they do not take
    assert taken == ["sum_state", "add_read"]
