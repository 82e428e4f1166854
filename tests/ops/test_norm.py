"""RMSNorm against the formula in float64."""

import pytest
import torch

from fulmen.ops.norm import add_rms_norm, rms_norm


def formula(x, weight, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_values_and_gradients(shape, compare):
    x, weight, d_out = torch.randn(shape), torch.rand(24) + 0.5, torch.randn(shape)
    results = []
    for function, dtype in ((rms_norm, torch.float32), (formula, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        out = function(*leaves, 1e-5)
        d_x, d_weight = torch.autograd.grad((out * d_out.to(dtype)).sum(), leaves)
        results.append({"out": out, "d_x": d_x, "d_weight": d_weight})
    compare(*results, 1e-6)


def test_views_of_other_tensors(compare):
    packed, d_out = torch.randn(5, 3, 2, 24), torch.randn(3, 5, 24)
    results = []
    for function, dtype in ((rms_norm, torch.float32), (formula, torch.float64)):
        leaf, weight = packed.to(dtype).requires_grad_(), torch.ones(24, dtype=dtype, requires_grad=True)
        x = leaf.select(2, 1).transpose(0, 1)
        assert not x.is_contiguous()
        out = function(x, weight, 1e-5)
        # The gradient that arrives is a view too.
        loss = (out.transpose(0, 1) * d_out.to(dtype).transpose(0, 1)).sum()
        d_packed, d_weight = torch.autograd.grad(loss, (leaf, weight))
        results.append({"out": out, "d_packed": d_packed, "d_weight": d_weight})
    compare(*results, 1e-6)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1.0])
def test_eps_is_inside_the_root(eps):
    x = torch.full((4,), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), eps), formula(x, torch.ones(4), eps))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_normed_in_fp32(dtype, grad):
    # The squares overflow fp16, and their sum would lose most of its digits in bf16.
    x, weight = (torch.randn(7, 512) * 1000).to(dtype), (torch.rand(512) + 0.5).to(dtype)
    with torch.set_grad_enabled(grad):
        out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    expected = formula(x.double(), weight.double(), 1e-5)
    # One rounding at the end: half a unit in the last place.
    assert ((out.double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps * 0.51).all()


def test_a_fp32_weight_does_not_widen_the_output():
    assert rms_norm(torch.randn(3, 8).bfloat16(), torch.ones(8), 1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_of_a_residual_sum(beta, compare):
    tensors = [torch.randn(5, 24), torch.randn(5, 24), torch.rand(24) + 0.5]
    d_out, results = torch.randn(5, 24), []
    for dtype in (torch.float32, torch.float64):
        x, branch, weight = leaves = [t.to(dtype).requires_grad_() for t in tensors]
        if dtype == torch.float32:
            out = add_rms_norm(x, branch, 1.7, beta, weight, 1e-5)
        else:
            out = formula(1.7 * x + beta * branch, weight, 1e-5)
        grads = torch.autograd.grad(out, leaves, d_out.to(dtype))
        results.append({"out": out.detach(), **dict(zip(("d_x", "d_branch", "d_weight"), grads, strict=True))})
    compare(*results, 1e-6)
