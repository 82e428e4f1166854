"""The contrastive loss against sums written out, and ranks against sorting."""

import math

import pytest
import torch
import torch.nn.functional as F

from fulmen.ops.contrastive import contrastive_loss, ranks, recalls


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_loss_is_that_of_the_paper():
    images, texts, temperature = unit(5, 7), unit(5, 7), 0.3
    total = 0.0
    for i in range(5):
        to_texts = [math.exp(float(images[i] @ texts[j]) / temperature) for j in range(5)]
        to_images = [math.exp(float(texts[i] @ images[j]) / temperature) for j in range(5)]
        total -= math.log(to_texts[i] / sum(to_texts)) + math.log(to_images[i] / sum(to_images))
    assert contrastive_loss(images, texts, 1 / temperature).item() == pytest.approx(total / 5, rel=1e-5)


def test_loss_of_a_guess():
    same = unit(1, 7).expand(6, 7)
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(2 * math.log(6), rel=1e-6)


def test_equal_texts_pull_nothing_apart():
    """The gradient is that of the loss that takes any text equal to the own one as right, and the loss is higher."""
    images = unit(4, 7).float().requires_grad_()
    texts = unit(3, 7).float().requires_grad_()
    rows = torch.tensor([0, 1, 1, 2])
    logits = 5 * images @ texts[rows].T
    share = (rows[:, None] == rows).float()
    share /= share.sum(dim=1, keepdim=True)
    joint = F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share.T)
    plain = contrastive_loss(images, texts[rows], 5.0)
    for expected, found in zip(
        torch.autograd.grad(joint, [images, texts]), torch.autograd.grad(plain, [images, texts]), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_ranks_are_places_in_a_sorted_list():
    scores = torch.randn(20, 9)
    right = torch.rand(20, 9) < 0.3
    right[torch.arange(20), torch.randint(9, (20,))] = True
    for row, rank in enumerate(ranks(scores, right).tolist()):
        order = scores[row].argsort(descending=True)
        best = next(place for place, column in enumerate(order) if right[row, column])
        assert rank == best


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_one_score_for_all_finds_nothing(value):
    right = torch.eye(3, dtype=torch.bool)
    assert ranks(torch.full((3, 3), value), right).tolist() == [2, 2, 2]


def test_recalls():
    """Pictures 0 and 1 share text 0; picture 2, whose text is 1, lies nearer to text 0."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = recalls(images, texts, torch.tensor([0, 0, 1]), depths=(1, 2))
    assert found == {
        "image_to_text_recall_at_1": pytest.approx(1 / 3),
        "image_to_text_recall_at_2": 1.0,
        "text_to_image_recall_at_1": 0.5,
        "text_to_image_recall_at_2": 1.0,
    }
