"""Rotary positions against a rotation of complex numbers in float64."""

import pytest
import torch

from fulmen.ops.rotary import apply_rotary, rotary_tables


def rotate(x, positions, rotary_dim, base):
    """Dims i and i + rotary_dim / 2 are the real and imaginary part of a number that turns with the position."""
    half = rotary_dim // 2
    x = x.double()
    angles = positions.double()[:, None] * base ** (-2 * torch.arange(half, dtype=torch.float64) / rotary_dim)
    turned = (
        torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), dim=-1)


@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(8, 8), (8, 20), (2, 3), (64, 128)])
@pytest.mark.parametrize("base", [10_000.0, 10_000_000.0])
def test_values_and_gradients(rotary_dim, head_dim, base, compare):
    x, d_out, positions = torch.randn(2, 50, 3, head_dim), torch.randn(2, 50, 3, head_dim), torch.arange(7, 57)
    tables = rotary_tables(positions[None], rotary_dim, base)
    results = []
    for function in (lambda x: apply_rotary(x, *tables), lambda x: rotate(x, positions, rotary_dim, base)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append({"out": out, "d_x": torch.autograd.grad((out * d_out.to(out.dtype)).sum(), leaf)[0]})
    compare(*results, 1e-6)


def test_the_other_dims_pass_through_untouched():
    x = torch.randn(1, 9, 2, 16).bfloat16()
    out = apply_rotary(x, *rotary_tables(torch.arange(9)[None], 6, 10_000.0))
    assert torch.equal(out[..., 6:], x[..., 6:])
    assert not torch.equal(out[:, 1:, :, :6], x[:, 1:, :, :6])


def test_position_zero_is_no_rotation():
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(apply_rotary(x, *rotary_tables(torch.zeros(1, 1), 8, 10_000.0)), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at, key_at):
        at = [rotary_tables(torch.tensor([[place]]), 8, 10_000.0) for place in (query_at, key_at)]
        return (apply_rotary(q, *at[0]) * apply_rotary(k, *at[1])).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-5)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_tables():
    cos, sin = rotary_tables(torch.tensor([[0, 3]]), 4, 100.0)
    assert cos.shape == sin.shape == (1, 2, 2)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0, 1], torch.tensor([3.0, 0.3]).cos())
    torch.testing.assert_close(sin[0, 1], torch.tensor([3.0, 0.3]).sin())


def test_bf16_is_rotated_in_fp32():
    x, positions = torch.randn(1, 300, 2, 16).bfloat16(), torch.arange(300)
    out = apply_rotary(x, *rotary_tables(positions[None], 16, 10_000.0))
    assert out.dtype == torch.bfloat16
    expected = rotate(x, positions, 16, 10_000.0)
    assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-5).all()
