"""The passes between matrix products against their formulas in float64, through the operations that take them."""

import pytest
import torch
import torch.nn.functional as F

from fulmen.ops import gpu
from fulmen.ops.loss import IGNORE, linear_cross_entropy
from fulmen.ops.norm import add_rms_norm, rms_norm
from fulmen.ops.rotary import apply_rotary, rotary_tables
from fulmen.ops.swiglu import swiglu, swiglu_backward


@pytest.mark.parametrize("shape", [(24,), (600, 24), (2, 3, 1040)])
@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm(shape, gated, both, poisoned_memory):
    def formula(x, weight, gate=None):
        y = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight
        return y if gate is None else y * gate.sigmoid()

    def function(x, weight, gate=None):
        return rms_norm(x, weight, 1e-3, gate)

    tensors = [torch.randn(shape), torch.rand(shape[-1]) + 0.5, *([torch.randn(shape)] if gated else [])]
    both(function, formula, tensors, 1e-5)


@pytest.mark.parametrize("shape", [(24,), (600, 24), (2, 3, 1040)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.7, 1.0), (1.7, 0.6)])
def test_rms_norm_of_a_residual_sum(shape, alpha, beta, both, poisoned_memory):
    def formula(x, branch, weight):
        total = alpha * x + beta * branch
        return total / (total.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight

    def function(x, branch, weight):
        return add_rms_norm(x, branch, alpha, beta, weight, 1e-3)

    both(function, formula, [torch.randn(shape), torch.randn(shape), torch.rand(shape[-1]) + 0.5], 1e-5)


def test_rms_norm_of_views(both):
    def view(function):
        return lambda x, weight: function(x.select(2, 1).transpose(0, 1), weight).transpose(0, 1)

    def formula(x, weight):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight

    both(view(lambda x, w: rms_norm(x, w, 1e-5)), view(formula), [torch.randn(5, 3, 2, 24), torch.ones(24)], 1e-5)


# The interpreter cuts fp32 off where it should round it to bf16.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])])
def test_rms_norm_of_narrow_inputs_is_rounded_once(dtype, gpu_device):
    x, weight = (torch.randn(7, 512) * 1000).to(gpu_device, dtype), torch.rand(512).to(gpu_device)
    out, truth = rms_norm(x, weight, 1e-5).double(), F.rms_norm(x.double(), (512,), weight.double(), 1e-5)
    assert ((out - truth).abs() <= truth.abs() * torch.finfo(dtype).eps * 0.51).all()


@pytest.mark.parametrize("size", [8, 24, 1100])
def test_swiglu(size, gpu_device, compare, poisoned_memory):
    x, d_act, weights = (torch.randn(5, n).to(gpu_device) for n in (2 * size, size, 1))
    leaf, scale = x.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    act = F.silu(gate) * up
    d_x, d_scale = torch.autograd.grad(act * scale, (leaf, scale), d_act.double())
    names = ("act", "d_x", "weighted", "d_weights")
    d_gate_up, weighted, d_weights = swiglu_backward(d_act, x, weights)
    ours = dict(zip(names, (swiglu(x), d_gate_up, weighted, d_weights[:, None]), strict=True))
    truth = dict(zip(names, (act.detach(), d_x, (act * scale).detach(), d_scale), strict=True))
    compare({n: t.cpu() for n, t in ours.items()}, {n: t.cpu() for n, t in truth.items()}, 1e-5)


@pytest.mark.parametrize(("heads", "size", "rotary_dim"), [(3, 16, 16), (1, 16, 6), (4, 24, 12)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary(heads, size, rotary_dim, rows, both, monkeypatch, poisoned_memory, gpu_device):
    positions = torch.randint(5000, (rows, 7), device=gpu_device)
    tables = rotary_tables(positions, rotary_dim, 1e4)

    def formula(x):
        first, second, rest = x.split((rotary_dim // 2, rotary_dim // 2, size - rotary_dim), dim=-1)
        cos, sin = (t.double()[:, :, None] for t in tables)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    both(lambda x: apply_rotary(x, *tables), formula, [torch.randn(2, 7, heads, size)], 1e-5)


@pytest.mark.parametrize("vocab", [5, 64, 5000])
def test_cross_entropy(vocab, both, poisoned_memory, gpu_device):
    targets = torch.randint(vocab, (11,), device=gpu_device)
    targets[[0, 7]] = IGNORE

    def formula(hidden, weight):
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)

    def function(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, chunk=4)

    both(function, formula, [torch.randn(11, 8), torch.randn(vocab, 8)], 1e-5)


def test_cross_entropy_shows_what_is_wrong(gpu_device):
    logits = torch.randn(6, 70, device=gpu_device)
    logits[1, 3], logits[2, 69], logits[4] = float("nan"), float("-inf"), float("-inf")
    targets = torch.tensor([69, 5, 5, 70, 5, IGNORE], device=gpu_device)
    nll = gpu.loss.cross_entropy_(logits, targets, IGNORE)
    assert nll.isfinite().tolist() == [True, False, True, False, False, True]
    assert nll[5] == 0
    assert (logits[5] == 0).all()
