"""Zero-shot classes and retrieval of a CoCa that has learnt eight coloured squares, and of one that has not."""

import pytest
import torch
from PIL import Image

from fulmen.data import Tokenizer
from fulmen.data.captions import encode_captions
from fulmen.evals.vision import embed_pictures, embed_texts, retrieval, zero_shot
from fulmen.model.coca import CoCa, CoCaConfig

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (240, 230, 40),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
    "pink": (250, 120, 220),
}
CONFIG = CoCaConfig.preset(
    "tiny",
    vision=dict(image_size=8, patch_size=4, hidden_size=24, num_layers=2, num_heads=2, mlp_size=40),
    vocab_size=280,
    hidden_size=32,
    num_heads=2,
    mlp_size=40,
    unimodal_layers=1,
    multimodal_layers=1,
    caption_queries=3,
)


def picture(colour, size=(12, 9)):
    return Image.new("RGB", size, colour)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"a {name} square, {name}" for name in COLOURS] * 3, 270)


@pytest.fixture(scope="module")
def coca(tokenizer):
    torch.manual_seed(0)
    model = CoCa(CONFIG)
    # Its own pixels, by way of the module that is tested elsewhere.
    from fulmen.data.images import ImageProcessor

    processor = ImageProcessor(crop_size=8, patch_size=4, dynamic=False)
    pixels = torch.cat([processor.process(picture(colour)).pixels for colour in COLOURS.values()])
    captions = [f"a {name} square" for name in COLOURS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(pixels, *encode_captions(tokenizer, captions, 76))
        (loss.contrastive + 2 * loss.nll / loss.targets).backward()
        optimizer.step()
    return model.eval()


def pairs(copies=1):
    return [
        (picture(colour, (9 + n, 7)), f"a {name} square") for name, colour in COLOURS.items() for n in range(copies)
    ]


def test_zero_shot(coca, tokenizer):
    prompts = {name: [f"a {name} square", f"a {name} square"] for name in COLOURS}
    pictures = [(picture(colour), name) for name, colour in COLOURS.items()]
    assert zero_shot(coca, tokenizer, pictures, prompts) == 1.0
    names = list(COLOURS)
    wrong = [(picture(COLOURS[a]), b) for a, b in zip(names, names[1:] + names[:1], strict=True)]
    assert zero_shot(coca, tokenizer, wrong, prompts) == 0.0
    assert zero_shot(coca, tokenizer, pictures[:4] + wrong[:4], prompts) == 0.5
    same = {name: ["a square"] for name in COLOURS}
    assert zero_shot(coca, tokenizer, pictures, same) == 0.0


def test_a_class_is_the_mean_of_its_prompts(coca, tokenizer):
    """Red's prompts point to green and to yellow, whose mean is nearer to either than blue is."""
    prompts = {"warm": ["a red square", "a yellow square"], "cold": ["a blue square", "a grey square"]}
    chosen = [(picture(COLOURS[name]), kind) for name, kind in (("red", "warm"), ("yellow", "warm"), ("blue", "cold"))]
    assert zero_shot(coca, tokenizer, chosen, prompts) == 1.0


def test_retrieval(coca, tokenizer):
    found = retrieval(coca, tokenizer, pairs())
    assert set(found.values()) == {1.0}
    assert set(found) == {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    # Many pictures of a caption are one caption to find, and any of them is found.
    assert set(retrieval(coca, tokenizer, pairs(copies=9)).values()) == {1.0}


def test_an_untrained_one_guesses(tokenizer):
    torch.manual_seed(5)
    untrained = CoCa(CONFIG).eval()
    found = retrieval(untrained, tokenizer, pairs(), depths=(1, 8))
    assert found["image_to_text_recall_at_1"] < 0.5
    assert found["text_to_image_recall_at_8"] == 1.0
    assert retrieval(untrained, tokenizer, pairs(), depths=(1, 8)) == found


def test_embeddings_of_any_number(coca, tokenizer):
    """More than are computed at once, and a text of more tokens than are read."""
    many = [picture(colour) for colour in COLOURS.values()] * 9
    images = embed_pictures(coca, many)
    assert images.shape == (72, 32)
    torch.testing.assert_close(images[64:], embed_pictures(coca, many[64:]))
    texts = ["red " * 200, "red " * 300, *COLOURS] * 7
    embedded = embed_texts(coca, tokenizer, texts)
    assert embedded.shape == (70, 32)
    torch.testing.assert_close(embedded[0], embedded[1])
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(70))
