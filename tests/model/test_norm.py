"""The norm as a module."""

import torch

from fulmen.model.norm import RMSNorm


def test_it_holds_its_weight_and_its_eps():
    norm, x = RMSNorm(6, 0.5), torch.randn(3, 6)
    assert torch.equal(norm.weight, torch.ones(6))
    norm.weight.data.uniform_()
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_with_a_branch_it_norms_the_residual_sum():
    norm, x, branch = RMSNorm(6, 0.5), torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(norm(x, branch=branch, alpha=3.5, beta=0.5), norm(3.5 * x + 0.5 * branch))
