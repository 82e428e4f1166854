"""The model that sees: transformers' LLaVA-NeXT with the same weights, order of features, pieces, checks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fulmen.config import UserError
from fulmen.data import ImageProcessor, PlacedImage
from fulmen.model import VISION_LANGUAGE_PRESETS, ModelConfig, VisionConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.model.vision_language import arrange

IMAGE = 60
PROCESSOR = ImageProcessor(crop_size=28, patch_size=14)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    text = ModelConfig(
        vocab_size=64,
        hidden_size=48,
        num_layers=3,
        layer_plan="LLS",
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        expert_size=24,
    )
    vision = VisionConfig(image_size=28, hidden_size=32, num_layers=2, num_heads=4, mlp_size=48)
    torch.manual_seed(3)
    model = VisionLanguageModel(VisionLanguageConfig(text=text, vision=vision, image_token=IMAGE))
    for parameter in model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def picture(width, height, seed=0):
    """Noise, so that every patch is another."""
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def prompt(*parts):
    """Tokens [1, T] and placed images of numbers and processed images."""
    tokens, images = [], []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        else:
            images.append(PlacedImage(part, len(tokens), 0, part.positions))
            tokens += [IMAGE] * part.positions
    return torch.tensor([tokens]), images


@torch.no_grad()
def test_features_stand_in_the_order_of_the_rows(model):
    """Thumbnail, then each row of the whole map through all crops, then a newline: by an index for each patch."""
    image = PROCESSOR.process(picture(84, 56))
    layout = image.layout
    assert layout.grid == (2, 3)
    crops = torch.arange(1 + 6).repeat_interleave(4).view(7, 4)
    features = torch.stack([crops, torch.arange(4).expand(7, 4)], dim=-1).float()
    (arranged,) = arrange(features[None], layout, torch.tensor([-1.0, -1.0]))
    expected = [(0, patch) for patch in range(4)]
    for row in range(4):
        for column in range(6):
            crop = 1 + (row // 2) * 3 + column // 2
            expected.append((crop, row % 2 * 2 + column % 2))
        expected.append((-1, -1))
    assert [tuple(map(int, vector)) for vector in arranged] == expected
    assert len(expected) == image.positions


@torch.no_grad()
def test_crops_that_can_be_told_apart_keep_their_places(model):
    """A picture of one colour a crop: the features of a place are those of a crop of that colour alone."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    whole = Image.new("RGB", (56, 56))
    for number, colour in enumerate(colours):
        whole.paste(colour, (28 * (number % 2), 28 * (number // 2), 28 * (number % 2) + 28, 28 * (number // 2) + 28))
    image = PROCESSOR.process(whole)
    assert image.layout.grid == (2, 2)
    found = model.encode_images([image])[0][4:].view(4, 5, -1)
    for number, colour in enumerate(colours):
        alone = ImageProcessor(crop_size=28, patch_size=14, dynamic=False).process(Image.new("RGB", (28, 28), colour))
        expected = model.encode_images([alone])[0].view(2, 2, -1)
        top, left = 2 * (number // 2), 2 * (number % 2)
        torch.testing.assert_close(found[top : top + 2, left : left + 2], expected, **CLOSE)
    torch.testing.assert_close(found[:, 4], model.image_newline.expand(4, -1))


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_processor_and_model_agree_on_any_size(model, width, height):
    if max(width, height) >= 6 * 28 * min(width, height):
        with pytest.raises(UserError, match="too thin"):
            PROCESSOR.layout(width, height)
        return
    image = PROCESSOR.process(Image.new("RGB", (width, height), (200, 10, 10)))
    assert len(model.encode_images([image])[0]) == image.positions == PROCESSOR.layout(width, height).positions


@torch.no_grad()
def test_equals_llava_next_of_transformers(model):
    """Encoder, projector, order, un-padding and placing, with the same weights and pixels."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    grids = [
        [28 * rows, 28 * columns] for rows, most in enumerate((6, 6, 6, 4, 3, 3), 1) for columns in range(1, most + 1)
    ]
    twin = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=grids,
            image_seq_length=4,
        )
    ).eval()
    theirs = twin.model
    state = theirs.state_dict()
    ours = {name: p for name, p in model.state_dict().items() if not name.startswith("language_model.")}
    for name, tensor in ours.items():
        candidates = [name, name.replace("vision_tower.vision_model.", "vision_tower.")]
        state[next(candidate for candidate in candidates if candidate in state)] = tensor
    theirs.load_state_dict(state)
    images = [PROCESSOR.process(picture(*size, seed)) for seed, size in enumerate([(84, 56), (30, 30), (100, 41)])]
    most = max(len(image.pixels) for image in images)
    pixels = torch.stack([torch.cat([i.pixels, i.pixels.new_zeros(most - len(i.pixels), 3, 28, 28)]) for i in images])
    sizes = torch.tensor([(image.layout.size[1], image.layout.size[0]) for image in images])
    output = theirs.get_image_features(pixels, sizes, vision_feature_layer=-1, vision_feature_select_strategy="default")
    expected = output.pooler_output if hasattr(output, "pooler_output") else output
    for found, theirs_ in zip(model.encode_images(images), expected, strict=True):
        torch.testing.assert_close(found, theirs_, rtol=1e-4, atol=1e-4)
    assert config.vision.side == 2


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1], [7], [3, 11, 40], [1000]])
def test_pieces_equal_the_whole(model, sizes):
    """Through a cache, where an image straddles pieces."""
    first, second = (PROCESSOR.process(picture(*size, 5)) for size in ((84, 28), (28, 56)))
    tokens, images = prompt(1, 2, first, 3, second, second, 4, 5)
    expected = model(tokens, images=images)
    cuts, borders = iter(sizes * 200), [0]
    while borders[-1] < tokens.shape[1]:
        borders.append(min(tokens.shape[1], borders[-1] + next(cuts)))
    cache, parts = model.new_cache(1), []
    for start, stop in pairwise(borders):
        pieces = [piece for placed in images if (piece := cut(placed, start, stop))]
        parts.append(model(tokens[:, start:stop], images=pieces, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def cut(placed, start, stop):
    first, last = max(0, start - placed.start), min(placed.count, stop - placed.start)
    return PlacedImage(placed.image, placed.start + first - start, first, last - first) if first < last else None


@torch.no_grad()
def test_packed_samples_equal_each_alone_and_rows_of_a_batch(model):
    image, other = PROCESSOR.process(picture(40, 28, 1)), PROCESSOR.process(picture(28, 28, 2))
    (one, images), (two, more) = prompt(3, image, 4), prompt(other, 5, 6)
    alone = [model(one, images=images), model(two, images=more)]
    both = torch.cat([one, two], dim=1)
    moved = [PlacedImage(p.image, p.start + one.shape[1], p.first, p.count) for p in more]
    borders = torch.tensor([0, one.shape[1], both.shape[1]], dtype=torch.int32)
    packed = model(both, images=[*images, *moved], cu_seqlens=borders)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


def test_gradients_reach_every_part(model):
    image = PROCESSOR.process(picture(40, 28))
    tokens, images = prompt(1, image, 2, 3)
    targets = torch.where(tokens == IMAGE, -100, tokens)
    model.zero_grad()
    model.loss(tokens, targets, images=images).nll.backward()
    for part in ("vision_tower", "multi_modal_projector", "image_newline", "language_model.embed_tokens"):
        grads = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
        assert grads
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads), part
    model.zero_grad()


def test_the_image_matters_and_a_text_is_the_text_models(model):
    with torch.no_grad():
        tokens, images = prompt(1, PROCESSOR.process(picture(28, 28, 1)), 2)
        _, others = prompt(1, PROCESSOR.process(picture(28, 28, 2)), 2)
        assert (model(tokens, images=images) - model(tokens, images=others)).abs().max() > 1e-3
        text = torch.randint(60, (2, 9))
        torch.testing.assert_close(model(text), model.language_model(text))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tokens, images: (tokens[:, :-2], images), "elsewhere"),
        (lambda tokens, images: (tokens, []), "0 positions"),
        (lambda tokens, images: (tokens, [*images, *images]), "positions"),
        (lambda tokens, images: (tokens, [PlacedImage(images[0].image, 0, 0, images[0].count)]), "elsewhere"),
        (lambda tokens, images: (tokens, [PlacedImage(images[0].image, 1, 2, images[0].count)]), "has none of"),
        (lambda tokens, images: (tokens, [PlacedImage(images[0].image, 1, -1, 3)]), "has none of"),
    ],
)
def test_counts_must_agree(model, change, word):
    tokens, images = prompt(1, PROCESSOR.process(picture(28, 28)), 2)
    tokens, images = change(torch.cat([tokens, torch.tensor([[IMAGE]])], dim=1)[:, :-1], images)
    with pytest.raises(UserError, match=word):
        model(tokens, images=images)


def test_sizes():
    config = VISION_LANGUAGE_PRESETS["minimax-vl-01"]
    with torch.device("meta"):
        model = VisionLanguageModel(
            VisionLanguageConfig(text=ModelConfig.preset("tiny"), vision=config.vision, image_token=5)
        )
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("language_model."))
    small = VisionLanguageConfig(text=ModelConfig.preset("tiny"), vision=config.vision, image_token=5)
    assert own == small.count_vision_parameters()
    with pytest.raises(UserError, match="image_token"):
        VisionLanguageConfig(text=ModelConfig.preset("tiny"), vision=config.vision, image_token=4096)
    with pytest.raises(UserError, match="tiny-vl"):
        VisionLanguageConfig.preset("large")
