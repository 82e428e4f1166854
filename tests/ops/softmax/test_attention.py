"""Causal grouped-query attention against one token, one head at a time in float64."""

import pytest
import torch

from fulmen.ops.softmax import softmax_attention
from fulmen.ops.softmax.naive import naive_softmax_attention


def oracle(q, k, v, cu_seqlens=None):
    """softmax(q_t . k_s / sqrt(D)) over the s that t may see, times v_s."""
    q, k, v = q.double(), k.double(), v.double()
    _, length, heads, width = q.shape
    earlier, group = k.shape[1] - length, heads // k.shape[2]
    begins = [0] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for t in range(earlier, earlier + length):
        visible = slice(max(b for b in begins if b <= t), t + 1)
        heads_out = []
        for h in range(heads):
            scores = torch.einsum("bd,bsd->bs", q[:, t - earlier, h], k[:, visible, h // group]) / width**0.5
            weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
            weights = weights / weights.sum(dim=1, keepdim=True)
            heads_out.append(torch.einsum("bs,bsd->bd", weights, v[:, visible, h // group]))
        rows.append(torch.stack(heads_out, dim=1))
    return torch.stack(rows, dim=1)


def make(length=13, *, keys=None, heads=4, kv_heads=2, batch=1, dtype=torch.float32):
    keys = keys or length
    q, d_out = (torch.randn(batch, length, heads, 8, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, kv_heads, 8, dtype=dtype) for _ in range(2))
    return q, k, v, d_out


def results(function, q, k, v, d_out, cu_seqlens=None):
    # The oracle's gradients are not rounded to the inputs' dtype.
    dtype = torch.float64 if function is oracle else q.dtype
    leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, cu_seqlens)
    grads = torch.autograd.grad((out * d_out.to(out.dtype)).sum(), leaves)
    return dict(zip(("out", "d_q", "d_k", "d_v"), (out, *grads), strict=True))


FUNCTIONS = pytest.mark.parametrize("function", [softmax_attention, naive_softmax_attention])


@FUNCTIONS
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_one_sequence(function, length, heads, kv_heads, compare):
    case = make(length, heads=heads, kv_heads=kv_heads, batch=2)
    compare(results(function, *case), results(oracle, *case), 1e-6)


@FUNCTIONS
@pytest.mark.parametrize(("length", "keys"), [(1, 20), (2, 20), (7, 20), (19, 20)])
def test_the_last_tokens_against_earlier_keys(function, length, keys, compare):
    case = make(length, keys=keys, batch=2)
    compare(results(function, *case), results(oracle, *case), 1e-6)


@FUNCTIONS
@pytest.mark.parametrize("borders", [[0, 13], [0, 1, 2, 13], [0, 5, 12, 13]])
def test_packed_samples(function, borders, compare):
    case, cu_seqlens = make(13), torch.tensor(borders, dtype=torch.int32)
    compare(results(function, *case, cu_seqlens), results(oracle, *case, cu_seqlens), 1e-6)


@pytest.mark.parametrize("name", ["q", "k", "v", "d_out"])
def test_a_nan_stays_in_its_sample(name):
    case, cu_seqlens = (
        dict(zip(("q", "k", "v", "d_out"), make(13), strict=True)),
        torch.tensor([0, 4, 9, 13], dtype=torch.int32),
    )
    clean = results(softmax_attention, **case, cu_seqlens=cu_seqlens)
    case[name][0, 4] = float("nan")
    bad = results(softmax_attention, **case, cu_seqlens=cu_seqlens)
    assert any(x.isnan().any() for x in bad.values())
    for key, x in bad.items():
        assert torch.equal(x[:, :4], clean[key][:, :4]), key
        assert torch.equal(x[:, 9:], clean[key][:, 9:]), key


def test_dtype_and_shape_are_those_of_q(compare):
    case = make(9, dtype=torch.bfloat16)
    actual = results(softmax_attention, *case)
    assert {x.dtype for x in actual.values()} == {torch.bfloat16}
    assert actual["out"].shape == case[0].shape
    compare(actual, results(oracle, *case), 1e-2)


@pytest.mark.parametrize(
    ("q", "k", "borders", "message"),
    [
        ((1, 5, 3, 8), (1, 5, 2, 8), None, "multiple of key heads, got 3 and 2"),
        ((1, 5, 2, 8), (1, 5, 4, 8), None, "multiple of key heads, got 2 and 4"),
        ((1, 6, 2, 8), (1, 5, 2, 8), None, r"last of the keys' tokens.* got q \(1, 6, 2, 8\), k \(1, 5, 2, 8\)"),
        ((2, 5, 2, 8), (2, 5, 2, 8), [0, 5], "need B == 1, got B == 2"),
        ((1, 5, 2, 8), (1, 6, 2, 8), [0, 5], "with packed samples all of them"),
        # Borders that leave tokens out would give back fewer rows than came in.
        ((1, 5, 2, 8), (1, 5, 2, 8), [0, 4], "borders|cu_seqlens"),
        ((1, 5, 2, 8), (1, 5, 2, 8), [1, 5], "borders|cu_seqlens"),
    ],
)
def test_refused(q, k, borders, message):
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        softmax_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), cu_seqlens)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: a CPU writes the mask out, which is tested above"
)
@pytest.mark.parametrize("heads", [2, 8])
def test_a_prompts_later_pieces_on_a_gpu(heads):
    q = torch.randn(2, 100, heads, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
    truth = naive_softmax_attention(q.double(), k.double(), v.double(), None)
    error = (softmax_attention(q, k, v).double() - truth).norm() / truth.norm()
    assert error < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU takes sample by sample, tested above")
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (8, 2)])
def test_many_samples_on_a_gpu(heads, key_heads):
    borders = torch.tensor([0, 1, 2, 65, 200, 337, 338, 900], dtype=torch.int32)
    leaves = [torch.randn(1, 900, n, 64, device="cuda", dtype=torch.bfloat16) for n in (heads, key_heads, key_heads)]
    d_out, results = torch.randn_like(leaves[0]), []
    for function, dtype in ((softmax_attention, torch.bfloat16), (naive_softmax_attention, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = function(*leaves, borders if dtype == torch.bfloat16 else borders.cuda())
        results.append([out, *torch.autograd.grad(out, leaves, d_out.to(dtype))])
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).norm() / truth.norm() < 1e-2
    with torch.no_grad():
        for x in leaves:
            x[0, 70] = float("nan")
        out = softmax_attention(*(x.bfloat16() for x in leaves), borders)
    others = [*range(65), *range(200, 900)]
    assert out[:, others].isfinite().all()
    assert out[:, 70].isnan().all()
