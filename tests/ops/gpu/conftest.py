"""Kernels for a GPU where there is none: Triton's interpreter runs them on the CPU's tensors."""

import pytest
import torch


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch, gpu_device):
    """The operations take the kernels for tensors on the test's device, under the interpreter too."""
    from fulmen.ops import gpu

    if gpu_device == "cpu":
        monkeypatch.setattr(gpu, "serves", lambda *tensors: all(t.dtype in gpu.DTYPES for t in tensors))


@pytest.fixture
def both(gpu_device, compare):
    """both(function, formula, tensors, tolerance): outputs and all gradients of both, the formula in float64."""

    def check(function, formula, tensors, tolerance):
        results = []
        for call, dtype in ((function, None), (formula, torch.float64)):
            leaves = [x.to(gpu_device, dtype).detach().clone().requires_grad_() for x in tensors]
            out = call(*leaves)
            torch.manual_seed(1)
            d_out = torch.randn(out.shape).to(out)
            grads = torch.autograd.grad(out, leaves, d_out)
            results.append({"out": out.detach().cpu(), **{f"d_{i}": g.cpu() for i, g in enumerate(grads)}})
        compare(*results, tolerance)

    return check
