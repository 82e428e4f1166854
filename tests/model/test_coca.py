"""CoCa: its losses against direct computation, who sees whom, sizes of image, and that it learns."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fulmen.config import UserError
from fulmen.model import VisionConfig
from fulmen.model.coca import LARGEST_SCALE, CoCa, CoCaConfig
from fulmen.model.vision import resize_encoder, resize_positions
from fulmen.ops.contrastive import recalls

TINY = CoCaConfig(
    vision=VisionConfig(image_size=16, patch_size=4, hidden_size=24, num_layers=2, num_heads=2, mlp_size=40),
    vocab_size=23,
    hidden_size=32,
    num_heads=4,
    mlp_size=48,
    unimodal_layers=2,
    multimodal_layers=2,
    caption_queries=5,
    max_caption=12,
)
LENGTHS = torch.tensor([3, 8, 5])


@pytest.fixture
def coca():
    """All weights are random, so that one left out shows."""
    model = CoCa(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
    return model


@pytest.fixture
def batch():
    """(pixels, tokens, targets) of three captions, padded to the longest."""
    ids = torch.randint(TINY.vocab_size, (3, 9))
    behind = torch.arange(8) >= LENGTHS[:, None]
    return torch.randn(3, 3, 16, 16), ids[:, :-1].clone(), ids[:, 1:].masked_fill(behind, -100)


def test_losses_are_those_of_the_pairs_one_by_one(coca, batch):
    """Without padding, without a batch, and with the softmaxes written out."""
    pixels, tokens, targets = batch
    loss = coca.loss(*batch)
    images, texts, nll = [], [], 0.0
    for row, length in enumerate(LENGTHS.tolist()):
        picture, caption = pixels[row, None], tokens[row, None, :length]
        images.append(coca.embed_images(picture)[0])
        texts.append(coca.embed_texts(caption, torch.tensor([length]))[0])
        probs = coca.caption_logits(picture, caption)[0].softmax(dim=-1)
        nll -= sum(probs[at, targets[row, at]].log() for at in range(length))
    torch.testing.assert_close(loss.images, torch.stack(images))
    torch.testing.assert_close(loss.texts, torch.stack(texts))
    torch.testing.assert_close(loss.nll, nll)
    assert loss.targets == LENGTHS.sum()
    similar = (torch.stack(images) @ torch.stack(texts).T / 0.07).exp()
    own = similar.diagonal()
    expected = -(own / similar.sum(dim=0)).log().mean() - (own / similar.sum(dim=1)).log().mean()
    torch.testing.assert_close(loss.contrastive, expected)
    torch.testing.assert_close(loss.images.norm(dim=-1), torch.ones(3))


def test_padding_does_not_matter(coca, batch):
    pixels, tokens, targets = batch
    other = torch.where(targets == -100, (tokens + 1) % TINY.vocab_size, tokens)
    wider = [F.pad(other, (0, 3)), F.pad(targets, (0, 3), value=-100)]
    for expected, found in zip(coca.loss(*batch), coca.loss(pixels, *wider), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_token_changes_only_what_comes_after_it(coca, batch):
    pixels, tokens, _ = batch
    before = coca.caption_logits(pixels, tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % TINY.vocab_size
    after = coca.caption_logits(pixels, changed)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert ((after[:, 4:] - before[:, 4:]).abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("place", range(8))
def test_the_class_token_sees_every_token(coca, batch, place):
    _, tokens, _ = batch
    lengths = torch.full((3,), 8)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % TINY.vocab_size
    moved = coca.embed_texts(changed, lengths) - coca.embed_texts(tokens, lengths)
    assert (moved.norm(dim=-1) > 1e-3).all()


def test_only_the_multimodal_decoder_sees_the_picture(coca, batch):
    pixels, tokens, targets = batch
    one, two = coca.loss(pixels, tokens, targets), coca.loss(pixels.flip(0), tokens, targets)
    assert torch.equal(one.texts, two.texts)
    assert not torch.allclose(one.images, two.images, atol=1e-3)
    assert not torch.allclose(one.nll, two.nll, atol=1e-3)


@torch.no_grad()
def test_evaluation_computes_the_same(coca, batch):
    """torch takes other kernels there."""
    for expected, found in zip(coca.train().loss(*batch), coca.eval().loss(*batch), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_weight_learns(coca, batch):
    loss = coca.loss(*batch)
    (loss.contrastive + 2 * loss.nll / loss.targets).backward()
    # The keys' bias moves all scores of a softmax alike.
    still = [name for name, p in coca.named_parameters() if not p.grad.abs().sum() > 0 and "k_proj.bias" not in name]
    assert still == []


def test_captions_need_not_be_told_from_pictures_by_a_wild_temperature(coca):
    with torch.no_grad():
        coca.log_temperature.fill_(-20)
    assert coca.scale == LARGEST_SCALE


def test_initial_weights():
    coca = CoCa(dataclasses.replace(TINY, hidden_size=256, vocab_size=500))
    first = coca.multimodal[0]
    widths = {
        first.self_attn.in_proj_weight: 256**-0.5,
        first.multihead_attn.out_proj.weight: 256**-0.5 / 2,
        first.linear1.weight: 256**-0.5,
        first.linear2.weight: 48**-0.5 / 2,
        coca.contrastive_pooler.attention.k_proj_weight: 24**-0.5,
        coca.contrastive_pooler.attention.out_proj.weight: 256**-0.5,
        coca.embed_tokens.weight: 0.02,
        coca.caption_pooler.query: 0.02,
    }
    for weight, width in widths.items():
        assert weight.std().item() == pytest.approx(width, rel=0.1)
    assert coca.encoder.embeddings.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert coca.encoder.encoder.layers[0].mlp.fc1.weight.std().item() == pytest.approx(48**-0.5, rel=0.1)
    with torch.no_grad():
        for parameter in coca.parameters():
            parameter.fill_(torch.nan)
    coca.init_weights()
    assert all(parameter.isfinite().all() for parameter in coca.parameters())


def test_learns_eight_pairs():
    torch.manual_seed(1)
    coca = CoCa(TINY)
    pixels, ids = torch.randn(8, 3, 16, 16), torch.randint(TINY.vocab_size, (8, 7))
    lengths = torch.full((8,), 6)
    optimizer = torch.optim.AdamW(coca.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = coca.loss(pixels, ids[:, :-1], ids[:, 1:])
        total = loss.contrastive + 2 * loss.nll / loss.targets
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    with torch.no_grad():
        found = recalls(coca.embed_images(pixels), coca.embed_texts(ids[:, :-1], lengths), torch.arange(8))
    assert losses[-1] < losses[0] / 3
    assert set(found.values()) == {1.0}


def test_positions_of_another_size():
    """The class token's stays; the others are what a picture of their grid becomes under bicubic interpolation."""
    positions = torch.randn(1 + 16, 6)
    resized = resize_positions(positions, 6)
    assert torch.equal(resized[0], positions[0])
    picture = positions[1:].reshape(4, 4, 6).permute(2, 0, 1)
    expected = torch.stack([F.interpolate(p[None, None], (6, 6), mode="bicubic")[0, 0] for p in picture], dim=-1)
    torch.testing.assert_close(resized[1:].reshape(6, 6, 6), expected)
    assert resize_positions(positions, 4) is positions
    flat = torch.ones(1 + 16, 6)
    torch.testing.assert_close(resize_positions(flat, 6), torch.ones(1 + 36, 6))


def test_a_larger_image_reads_interpolated_positions(coca):
    pixels = torch.randn(2, 3, 24, 24)
    features = coca.features(pixels)
    assert features.shape == (2, 36, 24)
    features.sum().backward()
    assert coca.encoder.embeddings.position_embedding.weight.grad.abs().sum() > 0
    resize_encoder(coca.encoder, 24)
    assert coca.encoder.config.image_size == 24
    torch.testing.assert_close(coca.encoder(pixels), features)
    assert torch.equal(coca.features(pixels), coca.encoder(pixels))
    with pytest.raises(UserError, match="multiple of patch_size 4"):
        resize_encoder(coca.encoder, 26)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"caption_queries": 0}, "caption_queries of CoCa must be at least 1"), ({"num_heads": 5}, "multiple of num_h")],
)
def test_sizes_that_cannot_be(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **change)


def test_captions_too_long_are_refused(coca):
    with pytest.raises(AssertionError, match="13 tokens"):
        coca.embed_texts(torch.zeros(1, 13, dtype=torch.int64), torch.tensor([13]))
