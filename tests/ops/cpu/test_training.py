"""The C passes of training against float64, and PyTorch's forms of the same, at sizes that fill no vector."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fulmen.ops.cpu import training
from fulmen.ops.loss import IGNORE, _nll_and_gradient
from fulmen.ops.norm import rms_norm
from fulmen.ops.swiglu import swiglu, swiglu_backward

SIZES = [(1, 1), (3, 7), (5, 16), (33, 100)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
# The kernels, and what runs where they cannot be built.
KERNELS = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "fallback"])


@pytest.fixture(autouse=True)
def _choose(request, monkeypatch):
    if "kernels" not in request.fixturenames or request.getfixturevalue("kernels"):
        assert training.load() is not None, "the kernels should build on a machine that runs the tests"
    else:
        monkeypatch.setattr(training, "load", lambda: None)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= TOLERANCE[dtype] * expected.double().norm() + 1e-12)


@KERNELS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_swiglu_and_its_gradients(rows, width, dtype, kernels):
    gate_up, d_y, weights = (torch.randn(rows, n).to(dtype) for n in (2 * width, width, 1))
    exact = [x.double().requires_grad_() for x in (gate_up, weights)]
    gate, up = exact[0].chunk(2, dim=-1)
    act = F.silu(gate) * up
    d_gate_up, d_weights = torch.autograd.grad((exact[1] * act * d_y.double()).sum(), exact)

    assert training.fuses(gate_up) == kernels
    assert close(swiglu(gate_up), act, dtype)
    actual = swiglu_backward(d_y.clone(), gate_up, weights)
    for name, expected in zip(range(3), (d_gate_up, weights.double() * act, d_weights[:, 0]), strict=True):
        assert close(actual[name], expected, dtype)


@KERNELS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norm_and_its_gradients(rows, width, dtype, kernels):
    x, d_y, weight = torch.randn(2, rows, width).to(dtype), torch.randn(2, rows, width).to(dtype), torch.rand(width)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], (width,), exact[1], 1e-5)
    grads = torch.autograd.grad((expected * d_y.double()).sum(), exact)

    x.requires_grad_()
    weight.requires_grad_()
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert close(y, expected, dtype)
    for actual, exact_grad in zip(torch.autograd.grad(y, (x, weight), d_y), grads, strict=True):
        # Of a row of one number the norm is its sign, and the gradient by x cancels but for eps.
        assert close(actual, exact_grad, dtype) or width == 1


@KERNELS
@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 17), (9, 1000)])
def test_cross_entropy_and_its_gradient(rows, vocabulary, dtype, kernels):
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[1::3] = IGNORE
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, exact)

    nll, d_logits = _nll_and_gradient(logits.clone(), targets)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)
    assert d_logits.dtype == dtype
    assert close(d_logits, gradient, dtype)


@DTYPES
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("starts", [[0, 1], [0, 3, 4, 9]])
@pytest.mark.parametrize(("heads", "shape"), [(1, (1, 1)), (3, (5, 7)), (2, (40, 60))])
def test_scan_of_states(starts, heads, shape, backwards, dtype, poisoned_memory):
    blocks, pieces = starts[-1], len(starts) - 1
    inflows, entering = torch.randn(blocks, heads, *shape).to(dtype), torch.randn(pieces, heads, *shape)
    decays, before = torch.rand(blocks, heads), entering.clone()
    out, ending = training.scan_states(inflows, entering, decays, torch.tensor(starts), backwards=backwards)
    assert torch.equal(entering, before)
    for piece, (first, stop) in enumerate(itertools.pairwise(starts)):
        state = entering[piece].double()
        for block in reversed(range(first, stop)) if backwards else range(first, stop):
            assert close(out[block], state, dtype)
            state = decays[block, :, None, None].double() * state + inflows[block].double()
        assert close(ending[piece], state, torch.float32)


@pytest.mark.parametrize("extreme", [1e4, -1e4, 88.5, -88.5])
def test_far_from_zero(extreme):
    gate_up = torch.tensor([[extreme, 2.0]])
    assert close(swiglu(gate_up), (F.silu(gate_up[:, :1].double()) * 2), torch.float32)
    logits = torch.tensor([[extreme, 0.0, -extreme]])
    nll, _ = _nll_and_gradient(logits.clone(), torch.tensor([0]))
    assert nll.item() == pytest.approx(F.cross_entropy(logits.double(), torch.tensor([0])).item(), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(bad):
    gate_up, logits = torch.randn(3, 40), torch.randn(3, 40)
    gate_up[1, 3] = logits[1, 3] = bad
    act = swiglu(gate_up)
    assert not act[1].isfinite().all()
    assert act[[0, 2]].isfinite().all()
    nll = training.cross_entropy_(logits, torch.tensor([0, 1, 2]), IGNORE)
    assert not nll[1].isfinite()
    assert nll[[0, 2]].isfinite().all()
    assert logits[[0, 2]].isfinite().all()


def test_bf16_is_rounded_as_pytorch_rounds():
    # SiLU(63) is 63 in fp32; of 63 * up about one in a hundred lies halfway between two numbers of bf16.
    up = torch.randn(1000, 1).bfloat16()
    gate = torch.full_like(up, 63)
    assert torch.equal(swiglu(torch.cat((gate, up), dim=1)), (63 * up.float()).bfloat16())


def test_one_thread_and_two_agree():
    x, weight = torch.randn(64, 96), torch.rand(96)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, inverse = training.rms_norm_forward(x, weight, 1e-5)
            results.append((y, *training.rms_norm_backward(y, x, inverse, weight)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [torch.randn(4, 8).T, torch.randn(4, 8).double(), torch.randn(4, 8).half()])
def test_other_tensors_are_for_pytorch(x):
    assert not training.fuses(x)
