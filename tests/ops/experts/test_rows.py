"""Rows of choices there and back: by hand, and each the other's gradient."""

import pytest
import torch

from fulmen.ops.experts.rows import Places, RowsOfTokens, SumsOfRows

# Token 0's choices lie in rows 3 and 0, token 1's first was dropped, token 2 has none left.
PLACES = Places(torch.tensor([[3, 0], [-1, 1], [-1, -1], [2, 4]]), torch.tensor([0, 1, 3, 0, 3]))


def test_rows_by_hand():
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    rows = RowsOfTokens.apply(x, PLACES)
    assert rows.tolist() == [[1, 2], [3, 4], [7, 8], [1, 2], [7, 8]]
    assert SumsOfRows.apply(rows, PLACES).tolist() == [[2, 4], [3, 4], [0, 0], [14, 16]]


@pytest.mark.parametrize(("function", "size"), [(RowsOfTokens, 4), (SumsOfRows, 5)])
def test_gradients(function, size):
    x = torch.randn(size, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function.apply(x, PLACES), x)


def test_a_gradient_that_is_spread_out_by_expansion():
    x = torch.randn(4, 3, requires_grad=True)
    RowsOfTokens.apply(x, PLACES).sum().backward()
    assert x.grad.tolist() == [[2.0] * 3, [1.0] * 3, [0.0] * 3, [2.0] * 3]


def test_no_rows_at_all():
    places = Places(torch.full((2, 2), -1), torch.zeros(0, dtype=torch.int64))
    x = torch.randn(2, 3, requires_grad=True)
    rows = RowsOfTokens.apply(x, places)
    out = SumsOfRows.apply(rows, places)
    assert rows.shape == (0, 3)
    assert torch.equal(out, torch.zeros(2, 3))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(2, 3))


def test_nothing_counts_as_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        x = torch.randn(4, 3, requires_grad=True)
        SumsOfRows.apply(RowsOfTokens.apply(x, PLACES), PLACES)
    assert saved == []
