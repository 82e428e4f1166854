"""The loss against a direct computation: sample by sample, without packing, with all logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from fulmen.align.dpo import answer_log_probs, dpo_loss
from fulmen.align.pairs import PairEncoder
from fulmen.data import ImageProcessor
from fulmen.data.chat import encode_chat, expand_images
from fulmen.data.images import PlacedImage

PROCESSOR = ImageProcessor(crop_size=28, patch_size=14)


def direct_log_prob(model, tokenizer, pair, answer):
    """The probability of an answer and its end after the conversation, one softmax at a time."""
    prompt = encode_chat(tokenizer, pair.messages, generate=True)
    images = [PROCESSOR.read(part["image"]) for part in pair.messages[0]["content"] if part["type"] == "image"]
    prompt, starts = expand_images(prompt, tokenizer.image_id, [image.positions for image in images])
    answer_ids = [*tokenizer.encode(answer), tokenizer.eos_id]
    placed = [PlacedImage(image, start, 0, image.positions) for image, start in zip(images, starts, strict=True)]
    arguments = {"images": placed} if images else {}
    logits = model(torch.tensor([[*prompt, *answer_ids[:-1]]]), **arguments)[0]
    return sum(logits[len(prompt) - 1 + place].log_softmax(-1)[token] for place, token in enumerate(answer_ids))


def direct_loss(policy, reference, tokenizer, pairs, beta):
    """Equation 7 of arXiv:2305.18290, as it is written."""
    total = 0
    for pair in pairs:
        with torch.no_grad():
            kept = [direct_log_prob(reference, tokenizer, pair, answer) for answer in (pair.chosen, pair.rejected)]
        better, worse = (direct_log_prob(policy, tokenizer, pair, answer) for answer in (pair.chosen, pair.rejected))
        total = total - torch.log(torch.sigmoid(beta * (better - kept[0]) - beta * (worse - kept[1])))
    return total / len(pairs)


def packed_log_probs(model, batch):
    arguments = {"images": batch.images} if batch.images else {}
    hidden, _ = model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens, **arguments)
    return answer_log_probs(model, hidden, batch.targets, batch.cu_seqlens)


def packed_loss(policy, reference, batch, beta):
    ours = packed_log_probs(policy, batch)
    with torch.no_grad():
        theirs = packed_log_probs(reference, batch)
    return dpo_loss(ours[0::2], ours[1::2], theirs[0::2], theirs[1::2], beta)


def perturbed(model, make):
    other = make(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return other


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_and_gradients_are_those_of_the_definition(request, tokenizer, monkeypatch, kind, beta):
    # A few logits at a time, so that borders of chunks fall within answers.
    monkeypatch.setattr("fulmen.align.dpo.TOKENS_AT_ONCE", 5)
    pairs = request.getfixturevalue("pairs" if kind == "text" else "shown")[:4]
    reference = request.getfixturevalue("model" if kind == "text" else "seeing")
    policy, twin = (perturbed(reference, type(reference)) for _ in range(2))
    twin.load_state_dict(policy.state_dict())
    encoder = PairEncoder(tokenizer=tokenizer, sequence_length=200, images=PROCESSOR)
    found = packed_loss(policy, reference, encoder.batch(pairs), beta)
    expected = direct_loss(twin, reference, tokenizer, pairs, beta)
    assert found.losses.shape == (4,)
    assert found.losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(found.losses.mean().item() - math.log(2)) > 1e-4
    found.losses.mean().backward()
    expected.backward()
    for (name, one), other in zip(policy.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            # Tiny gradients lose digits where samples cancel.
            assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7, name


def test_gradients_of_the_loss_itself():
    values = [torch.randn(5, dtype=torch.float64, requires_grad=index < 2) for index in range(4)]
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, *values[2:], 0.3).losses, values[:2])


def test_where_nothing_has_been_learned():
    log_probs = torch.randn(6), torch.randn(6)
    loss = dpo_loss(*log_probs, *log_probs, 0.1)
    torch.testing.assert_close(loss.losses, torch.full((6,), math.log(2)))
    assert loss.metrics() == {"reward_accuracy": 0.5, "reward_margin": 0, "reward_chosen": 0, "reward_rejected": 0}


def test_metrics_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    loss = dpo_loss(chosen, rejected, torch.zeros(4), torch.zeros(4), 0.5)
    assert loss.metrics() == pytest.approx(
        {"reward_accuracy": 2.5 / 4, "reward_margin": 0.5, "reward_chosen": 1.0, "reward_rejected": 0.5}
    )
    torch.testing.assert_close(loss.losses, F.softplus(-0.5 * (chosen - rejected)))
    assert not loss.chosen.requires_grad


def test_far_from_the_reference_the_loss_stays_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)
    loss.losses.sum().backward()
    assert loss.losses.tolist() == [0, 1e4]
    assert far.grad.tolist() == [0, -1]


def test_every_position_belongs_to_its_sample(model):
    hidden, targets = torch.randn(1, 7, 32), torch.randint(290, (1, 7))
    each = model.logits(hidden)[0].log_softmax(-1)[torch.arange(7), targets[0]]
    found = answer_log_probs(model, hidden, targets, torch.tensor([0, 1, 4, 7], dtype=torch.int32))
    torch.testing.assert_close(found, torch.stack([each[:1].sum(), each[1:4].sum(), each[4:].sum()]))


def test_a_row_without_answers(model):
    hidden = torch.randn(1, 4, 32)
    found = answer_log_probs(model, hidden, torch.full((1, 4), -100), torch.tensor([0, 2, 4], dtype=torch.int32))
    assert found.tolist() == [0, 0]
