"""Attention over pages against each sequence alone, by the definition."""

import itertools

import pytest
import torch

from fulmen.ops.softmax import Pages, paged, paged_attention_
from fulmen.ops.softmax.naive import naive_softmax_attention


def run(starts, lengths, page_size, dtype=torch.float64, share=False, device="cpu"):
    """Outputs and, of each sequence alone, what they should be; nan in the pages wherever nobody has written."""
    heads, key_heads, size, ends = 6, 2, 8, [s + n for s, n in zip(starts, lengths, strict=True)]
    whole = [(torch.randn(1, e, heads, size), *torch.randn(2, 1, e, key_heads, size)) for e in ends]
    whole = [[x.to(device, dtype) for x in each] for each in whole]
    counts = [-(-end // page_size) for end in ends]
    total = sum(counts) + 2
    tables = [part.tolist() for part in torch.randperm(total)[2:].split(counts)]
    if share:
        tables[1][0] = tables[0][0]
        for own, other in zip(whole[1][1:], whole[0][1:], strict=True):
            own[:, :page_size] = other[:, :page_size]
    pages = torch.full((2, total, page_size, key_heads, size), float("nan"), dtype=dtype, device=device)
    for table, (_, *each), start in zip(tables, whole, starts, strict=True):
        for t in range(start):
            for held, new in zip(pages, each, strict=True):
                held[table[t // page_size], t % page_size] = new[0, t]
    new = [torch.cat([each[i][0, s:] for each, s in zip(whole, starts, strict=True)]) for i in range(3)]
    behind = [[*table, 0] for table in tables]  # a table may go on
    out = paged_attention_(*new, *pages, Pages(behind, starts, lengths, page_size, device))
    for table, (_, *each), end in zip(tables, whole, ends, strict=True):
        for held, tokens in zip(pages, each, strict=True):
            assert torch.equal(held[table].flatten(0, 1)[:end], tokens[0])
            assert held[table].flatten(0, 1)[end:].isnan().all()
    unused = sorted(set(range(total)) - set(itertools.chain(*tables)))
    assert pages[:, unused].isnan().all()
    truth = [naive_softmax_attention(*(x.double() for x in each))[0, s:] for each, s in zip(whole, starts, strict=True)]
    return out, torch.cat(truth)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0], [1]), ([5], [1]), ([5], [7]), ([0, 0, 0], [4, 1, 17]), ([20, 0, 3, 16], [1, 5, 14, 16])],
)
def test_each_sequence_is_as_it_is_alone(starts, lengths, page_size):
    out, truth = run(starts, lengths, page_size)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)


def packed_attention(q, k, v, queries, keys):
    """Of `fulmen.ops.softmax.attention`, sample by sample."""
    spans = zip(*(itertools.pairwise(each.borders.tolist()) for each in (queries, keys)), strict=True)
    outputs = []
    for (a, b), (c, d) in spans:
        assert b - a <= queries.longest
        assert d - c <= keys.longest
        outputs.append(naive_softmax_attention(*(x[None] for x in (q[a:b], k[c:d], v[c:d])))[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("together", [1, 25, 8192])
@pytest.mark.parametrize(("starts", "lengths"), [([5], [7]), ([0, 0], [4, 1]), ([20, 0, 3, 16], [1, 5, 14, 16])])
def test_sequences_that_go_together(starts, lengths, together, monkeypatch):
    """As on a GPU, but for the launch itself."""
    monkeypatch.setattr(paged, "TOGETHER", together)
    monkeypatch.setattr(paged, "can_pack", lambda q: True)
    monkeypatch.setattr(paged, "packed_attention", packed_attention)
    out, truth = run(starts, lengths, 3)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's kernel for many samples needs a GPU")
@pytest.mark.parametrize("together", [1, 25, 8192])
@pytest.mark.parametrize(("starts", "lengths"), [([0], [70]), ([5], [70]), ([200, 0, 3, 16], [1, 5, 140, 16])])
def test_sequences_that_go_together_on_a_gpu(starts, lengths, together, monkeypatch):
    monkeypatch.setattr(paged, "TOGETHER", together)
    out, truth = run(starts, lengths, 16, torch.bfloat16, device="cuda")
    assert (out.double() - truth).norm() / truth.norm() < 5e-3


@pytest.mark.parametrize("page_size", [1, 3])
def test_two_sequences_share_a_page(page_size):
    out, truth = run([4, 3], [2, 5], page_size, share=True)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)


def test_pages_of_another_dtype():
    """Keys are rounded to what the pages hold; the outputs are like q."""
    q, (k, v) = torch.randn(3, 2, 4), torch.randn(2, 3, 2, 4)
    pages = torch.zeros(2, 2, 2, 2, 4, dtype=torch.bfloat16)
    first = Pages([[1, 0]], [0], [2], 2, "cpu")
    then = Pages([[1, 0]], [2], [1], 2, "cpu")
    paged_attention_(q[:2], k[:2], v[:2], *pages, first)
    out = paged_attention_(q[2:], k[2:], v[2:], *pages, then)
    truth = naive_softmax_attention(q[None, 2:], *(x.bfloat16().float()[None] for x in (k, v)))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, truth[0], rtol=1e-5, atol=1e-5)
