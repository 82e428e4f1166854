"""Rows rounded to int8, and the products with them, against what the rounded numbers say."""

import pytest
import torch

from fulmen.ops import cpu
from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.experts.naive import naive_experts_mlp
from fulmen.ops.int8 import Int8, dense, quantize_rows
from fulmen.ops.linear import linear


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["kernels", "pytorch"])
def form(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "load", lambda: None)
    elif cpu.load() is None:
        pytest.skip("there is no C compiler here")


def randn8(*shape):
    return quantize_rows(torch.randn(shape))


def test_no_number_is_further_off_than_half_a_step():
    weight = torch.randn(3, 7, 50) * torch.logspace(-8, 3, 7)[:, None]
    rounded = quantize_rows(weight)
    assert rounded.numbers.dtype == torch.int8
    assert rounded.numbers.abs().amax(dim=-1).unique().tolist() == [127]
    steps = (rounded.dense(torch.float64) - weight).abs() / rounded.scales[..., None]
    assert steps.max() < 0.5 + 1e-5


def test_rows_of_zeros_and_of_tiny_numbers():
    weight = torch.stack([torch.zeros(4), torch.full((4,), 1e-44), torch.tensor([1e-30, 0, 0, -1e-30])])
    got = quantize_rows(weight).dense(torch.float32)
    assert (got[0] == 0).all()
    torch.testing.assert_close(got[1:], weight[1:], rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number):
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(torch.tensor([[1.0, 2.0], [number, 1.0]]))


def test_a_dense_copy_is_rounded_once():
    rounded = Int8(torch.tensor([[127, -127, 3]], dtype=torch.int8), torch.tensor([0.0123456]))
    exact = rounded.numbers.double() * rounded.scales.double()[:, None]
    assert torch.equal(rounded.dense(torch.bfloat16), exact.float().bfloat16())
    assert dense(torch.ones(2, 2), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1,), (5,), (64,), (2, 40), (0,)])
@pytest.mark.parametrize(("n", "k"), [(3, 15), (4, 16), (50, 131)])
def test_linear(shape, n, k, form, relative_error, poisoned_memory):
    x, weight = torch.randn(*shape, k), randn8(n, k)
    out = linear(x, weight)
    assert out.shape == (*shape, n)
    if x.numel():
        assert relative_error(out, x.double() @ weight.dense(torch.float64).T) < 1e-6


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("alpha", [0.0, 1.7])
def test_experts(tokens, alpha, form, relative_error, poisoned_memory):
    width, size, num_experts = 24, 20, 5
    x, routing = torch.randn(tokens, width), route(torch.randn(tokens, num_experts), 2)
    w13, w2 = randn8(num_experts, 2 * size, width), randn8(num_experts, width, size)
    out = experts_mlp(x, w13, w2, routing, alpha=alpha, beta=0.6)
    truth = naive_experts_mlp(x.double(), w13.dense(torch.float64), w2.dense(torch.float64), routing)
    assert relative_error(out, alpha * x + 0.6 * truth) < 1e-6


def test_bf16_inputs(relative_error):
    x, weight = torch.randn(100, 40).bfloat16(), randn8(30, 40)
    assert linear(x, weight).dtype == torch.bfloat16
    assert relative_error(linear(x, weight), x.double() @ weight.dense(torch.float64).T) < 5e-3
