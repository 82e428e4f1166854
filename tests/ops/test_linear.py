"""The product in fp32 by narrow ones, which GPUs take, against float64; on a CPU the narrow products are exact too."""

import pytest
import torch

from fulmen.ops.linear import _ExactProduct, _is_exact, linear_f32


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_narrow_products_lose_nothing(weight_dtype, compare):
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(7, 64).to(weight_dtype)
    d_y = torch.randn(50, 7)
    results = []
    for function, dtype in ((_ExactProduct.apply, None), (lambda x, w: x @ w.T, torch.float64)):
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
        out = function(*leaves)
        d_x, d_weight = torch.autograd.grad(out, leaves, d_y.to(out.dtype))
        results.append({"out": out.detach(), "d_x": d_x, "d_weight": d_weight})
    ours, truth = results
    assert (ours["out"].dtype, ours["d_x"].dtype) == (torch.float32, torch.bfloat16)
    compare({"out": ours["out"]}, {"out": truth["out"]}, 1e-6)
    compare({"d_x": ours["d_x"]}, {"d_x": truth["d_x"]}, 5e-3)
    narrow = weight_dtype == torch.bfloat16
    compare({"d_weight": ours["d_weight"]}, {"d_weight": truth["d_weight"]}, 3e-3 if narrow else 2e-5)


def test_who_may_take_them():
    def tensor(rows, dtype):
        return torch.empty(rows, 8, dtype=dtype)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert _is_exact(tensor(3, bf16), tensor(5000, bf16))
    assert _is_exact(tensor(3, bf16), tensor(64, fp32))
    assert not _is_exact(tensor(3, bf16), tensor(5000, fp32))
    assert not _is_exact(tensor(3, fp32), tensor(64, fp32))
    assert not _is_exact(tensor(3, fp16), tensor(64, fp16)), "while gradients are wanted"
    with torch.no_grad():
        assert _is_exact(tensor(3, fp16), tensor(64, fp16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPUs multiply in fp32 as it is")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_on_a_gpu(dtype, grad, compare):
    x, weight = torch.randn(3, 40, 64).to("cuda", dtype), torch.randn(7, 64, device="cuda")
    with torch.set_grad_enabled(grad), torch.autocast("cuda", dtype):
        out = linear_f32(x, weight)
    compare({"out": out.cpu()}, {"out": (x.double() @ weight.double().T).cpu()}, 1e-6)
