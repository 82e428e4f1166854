"""Attention by blocks of keys, merged, against attention to all keys at once."""

import itertools

import pytest
import torch

from fulmen.ops.softmax import blocks, fused
from fulmen.ops.softmax.blocks import attend_block, attend_block_backward, merge, row_dots
from fulmen.ops.softmax.naive import naive_softmax_attention


def inputs(tokens, queries, dtype=torch.float32, device="cpu"):
    """The last `queries` tokens as q, all as k and v, and the gradient of the outputs; 4 heads, 2 of keys."""
    shapes = ((queries, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (queries, 4, 16))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def by_blocks(q, k, v, d_out, cuts):
    """Outputs and gradients with the keys cut; the last block holds the queries' own."""
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    seen = None
    for part in parts:
        seen = merge(seen, attend_block(q, k[part], v[part], causal=part is parts[-1]))
    dots, d_q, d_k, d_v = row_dots(seen.out, d_out), 0, [], []
    for part in parts:
        grads = attend_block_backward(d_out, q, k[part], v[part], seen, dots, causal=part is parts[-1])
        d_q = d_q + grads[0]
        d_k.append(grads[1])
        d_v.append(grads[2])
    return seen.out, d_q, torch.cat(d_k), torch.cat(d_v)


def at_once(q, k, v, d_out):
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = naive_softmax_attention(q[None], k[None], v[None])[0]
    return out, *torch.autograd.grad(out, (q, k, v), d_out.double())


@pytest.mark.parametrize(
    ("tokens", "queries", "cuts"), [(9, 9, (0, 9)), (11, 4, (0, 7, 11)), (30, 13, (0, 1, 16, 17, 30))]
)
@pytest.mark.parametrize("scores", [2**24, 60])
def test_blocks_give_what_all_keys_give(monkeypatch, tokens, queries, cuts, scores):
    monkeypatch.setattr(blocks, "SCORES", scores)
    given = inputs(tokens, queries)
    for found, expected in zip(by_blocks(*given, cuts), at_once(*given), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_order_of_blocks_does_not_matter_and_none_overflows():
    q, k, v, _ = inputs(8, 3)
    parts = [attend_block(100 * q, k[part], v[part], causal=False) for part in (slice(0, 2), slice(2, 7), slice(7, 8))]
    one = merge(merge(parts[0], parts[1]), parts[2])
    other = merge(merge(parts[2], parts[0]), parts[1])
    whole = attend_block(100 * q, k, v, causal=False)
    for found in (one, other):
        torch.testing.assert_close(found.out, whole.out)
        torch.testing.assert_close(found.lse, whole.lse)


SIZES = [(300, 300, (0, 300)), (1000, 300, (0, 130, 700, 1000)), (128, 64, (0, 64, 128)), (40, 40, (0, 40))]
"""Some of which are round with rests and some without, from 64 on."""


@pytest.mark.parametrize(("tokens", "queries", "cuts"), SIZES)
def test_round_pieces_and_their_rests_give_the_same(monkeypatch, tokens, queries, cuts):
    monkeypatch.setattr(fused, "SHORTEST", 64)
    monkeypatch.setattr(fused, "WORTH_CUTTING", 0)
    monkeypatch.setattr(fused, "_prefers_cudnn", lambda q, k, causal: True)
    given = inputs(tokens, queries)
    for found, expected in zip(by_blocks(*given, cuts), at_once(*given), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_lengths_that_come_again():
    """At most eight from one power of two to the next, and less than an eighth is lost."""
    lengths = range(fused.SHORTEST, 2**14)
    found = [fused._round(length) for length in lengths]
    assert len(set(found)) == 8 * 4
    assert all(length * 7 / 8 < rounded <= length for rounded, length in zip(found, lengths, strict=True))
    assert fused._round(fused.SHORTEST - 1) == 0
    assert fused._round(22 * fused.STEP - 1) == 21 * fused.STEP
    assert [fused._round(rounded) for rounded in set(found)] == list(set(found))


def test_pieces_cover_a_block_once(monkeypatch):
    monkeypatch.setattr(fused, "SHORTEST", 4)
    monkeypatch.setattr(fused, "LEADING_BITS", 2)
    monkeypatch.setattr(fused, "WORTH_CUTTING", 0)
    monkeypatch.setattr(fused, "_prefers_cudnn", lambda q, k, causal: True)
    for queries, keys, causal in ((10, 10, True), (10, 7, False), (8, 9, False), (8, 8, True), (3, 9, False)):
        seen = torch.zeros(queries, keys, dtype=torch.int32)
        for rows, columns, on_diagonal in fused.cut_block(torch.ones(queries, 1, 8), seen.T, causal=causal):
            part = seen[rows, columns]
            part += torch.ones_like(part).tril() if on_diagonal else 1
            assert on_diagonal or not causal or rows.start >= columns.stop
        assert torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has these kernels on a GPU alone")
@pytest.mark.parametrize("cudnn", [False, True], ids=["flash", "cudnn"])
@pytest.mark.parametrize(("tokens", "queries", "cuts"), SIZES)
def test_a_gpus_kernels_give_the_same(monkeypatch, cudnn, tokens, queries, cuts):
    monkeypatch.setattr(fused, "SHORTEST", 64 if cudnn else 2**30)
    monkeypatch.setattr(fused, "WORTH_CUTTING", 0)
    given = inputs(tokens, queries, torch.bfloat16, "cuda")
    if cudnn and fused.fused_kernel(*inputs(64, 64, torch.bfloat16, "cuda")[:2], causal=True) is not fused.CUDNN:
        pytest.skip("this GPU, or this PyTorch, takes FlashAttention-2 throughout")
    for found, expected in zip(by_blocks(*given, cuts), at_once(*given), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=3e-2, atol=3e-2)
