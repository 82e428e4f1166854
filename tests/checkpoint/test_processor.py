"""What transformers makes the input of a vision-language checkpoint with: AutoProcessor, beside our ImageProcessor."""

import json
import random
import shutil

import pytest
import torch
from PIL import Image

from fulmen.checkpoint import load_config, load_generation_config, load_model, make_tiny, save_model
from fulmen.data import PlacedImage, Tokenizer, encode_chat
from fulmen.data.chat import expand_images
from fulmen.data.images import GRIDS, MEAN, STD
from fulmen.data.tokenizer import chat_template

transformers = pytest.importorskip("transformers")
MiniMaxCache = pytest.importorskip("transformers.models.minimax.modeling_minimax").MiniMaxCache

FILES = {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"}
SIZE = 56  # of a crop of the tiny model, 4 x 4 patches

# Width and height of pictures that fill their canvas, or whose other side comes out at a whole number of pixels.
WHOLE = [(112, 168), (90, 90), (336, 224), (500, 300), (20, 5), (84, 48)]
# The last is whole too, but not in their floating point: 28.000000000000004 is 29 there.
ROUNDED = [(100, 60), (30, 200), (500, 301), (61, 17), (25, 50)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny(folder, "transformers", vision=True)
    return folder


@pytest.fixture(scope="module")
def ours(tiny):
    return load_model(tiny)


@pytest.fixture(scope="module")
def twin(tiny):
    return transformers.LlavaNextForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(tiny):
    """With Pillow, as here, also where torchvision is installed."""
    return transformers.AutoProcessor.from_pretrained(tiny, backend="pil")


def picture(width, height):
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(noise.numpy())


def process(ours, image):
    return ours.config.vision.processor().process(image)


def inputs(processor, text, images):
    return processor(text=text, images=images, return_tensors="pt")


def place(ours, theirs, images):
    """Our images where the input of the twin has theirs."""
    marks = theirs.input_ids[0] == ours.config.image_token
    starts = (marks[1:] & ~marks[:-1]).nonzero().flatten() + 1
    return [PlacedImage(image, int(at), 0, image.positions) for at, image in zip(starts, images, strict=True)]


@torch.no_grad()
def assert_same_logits(ours, twin, theirs, images):
    expected = twin(**theirs).logits
    torch.testing.assert_close(
        ours(theirs.input_ids, images=place(ours, theirs, images)), expected, rtol=1e-4, atol=1e-4
    )


def test_it_is_the_processor_of_this_model(processor, tiny, ours):
    assert type(processor) is transformers.LlavaNextProcessor
    assert (processor.image_token, processor.image_token_id) == ("<image>", ours.config.image_token)
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (14, "default")
    assert processor.num_additional_image_tokens == 1
    assert processor.chat_template == processor.tokenizer.chat_template == chat_template()
    images = processor.image_processor
    assert dict(images.size) == {"shortest_edge": SIZE}
    assert dict(images.crop_size) == {"height": SIZE, "width": SIZE}
    assert images.image_grid_pinpoints == [[rows * SIZE, columns * SIZE] for rows, columns in GRIDS]
    assert images.image_grid_pinpoints == json.loads((tiny / "config.json").read_text())["image_grid_pinpoints"]
    assert (tuple(images.image_mean), tuple(images.image_std)) == (MEAN, STD)
    assert images.resample == Image.Resampling.BICUBIC
    for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize", "pad"):
        assert getattr(images, f"do_{step}"), step


@pytest.mark.parametrize("size", WHOLE)
def test_where_no_pixel_is_rounded_all_is_equal(processor, ours, twin, size):
    theirs, image = inputs(processor, "See <image> here.", picture(*size)), process(ours, picture(*size))
    torch.testing.assert_close(theirs.pixel_values[0], image.pixels, rtol=0, atol=1e-6)
    assert (theirs.input_ids == ours.config.image_token).sum() == image.positions
    assert_same_logits(ours, twin, theirs, [image])


@pytest.mark.parametrize("size", ROUNDED)
def test_elsewhere_their_picture_is_one_pixel_longer(processor, ours, twin, size):
    """The positions are the same, and with our pixels so are the logits."""
    theirs, image = inputs(processor, "See <image> here.", picture(*size)), process(ours, picture(*size))
    (rows, columns), (width, height) = image.layout.grid, image.layout.resized
    longer = (width + 1, height) if width < columns * SIZE else (width, height + 1)
    canvas = Image.new("RGB", (columns * SIZE, rows * SIZE))
    resized = picture(*size).resize(longer, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((canvas.width - longer[0]) // 2, (canvas.height - longer[1]) // 2))
    crops = process(ours, canvas).pixels[1:]
    torch.testing.assert_close(theirs.pixel_values[0], torch.cat([image.pixels[:1], crops]), rtol=0, atol=1e-6)
    assert not torch.equal(crops, image.pixels[1:])
    theirs["pixel_values"] = image.pixels[None]
    assert_same_logits(ours, twin, theirs, [image])


def test_positions_are_the_same_unless_the_picture_is_thinner_than_a_patch(processor, ours):
    """Four patches make a crop: a strip more than four times as long as wide may be thinner than one of them."""
    draw = random.Random(0)
    sizes = [(draw.randint(1, 300), draw.randint(1, 300)) for _ in range(60)]
    counted = {}
    for size in [*sizes, (400, 20), (2000, 7)]:
        found = (inputs(processor, "<image>", picture(*size)).input_ids == ours.config.image_token).sum().item()
        counted[size] = found, ours.config.vision.processor().layout(*size).positions
    differing = [size for size, (found, expected) in counted.items() if found != expected]
    assert all(max(size) > 4 * min(size) for size in differing)
    # Nothing of it is left there but the thumbnail.
    assert counted[2000, 7] == (16, 16 + 2 * 25)
    assert counted[400, 20] == (16 + 2 * 25, 16 + 2 * 25)


def test_a_chat_about_two_pictures(processor, tiny, ours, twin):
    """Of different numbers of crops, so that the fewer ones are padded."""
    pictures = [picture(90, 90), picture(336, 224)]
    parts = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": " or "}]
    parts += [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    theirs = processor.apply_chat_template(messages, **settings)
    images = [process(ours, image) for image in pictures]
    tokenizer = Tokenizer.load(tiny)
    ids, _ = expand_images(encode_chat(tokenizer, messages), tokenizer.image_id, [image.positions for image in images])
    assert theirs.input_ids[0].tolist() == ids
    assert_same_logits(ours, twin, theirs, images)


@torch.no_grad()
def test_it_generates(processor, ours, twin):
    theirs, image = inputs(processor, "See <image> here. It", picture(112, 168)), process(ours, picture(112, 168))
    tokens, placed = theirs.input_ids, place(ours, theirs, [image])
    for _ in range(8):
        tokens = torch.cat([tokens, ours(tokens, images=placed)[:, -1:].argmax(-1)], 1)
    found = twin.generate(**theirs, max_new_tokens=8, do_sample=False, past_key_values=MiniMaxCache())
    assert torch.equal(found, tokens)


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_they_come_and_go_with_the_dialect(fulmen, tiny, tmp_path):
    original, again = tmp_path / "original", tmp_path / "again"
    assert fulmen("convert", tiny, original, "--dialect", "original", "--dtype", "bfloat16")[0] == 0
    assert names(tiny) - names(original) == FILES
    assert fulmen("convert", original, again, "--dialect", "transformers", "--dtype", "bfloat16")[0] == 0
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in tiny.iterdir()
    }
    # Written over a folder that has them.
    assert fulmen("convert", original, again, "--dialect", "original")[0] == 0
    assert names(again) == names(original)


def test_nobody_here_reads_them(tiny, processor, twin, ours, tmp_path):
    """With theirs in the place of ours, and without any."""
    shutil.copytree(tiny, tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    twin.save_pretrained(tmp_path / "copy")
    for _ in range(2):
        again = load_model(tmp_path / "copy")
        assert again.config == ours.config == load_config(tmp_path / "copy")
        assert load_generation_config(tmp_path / "copy") == load_generation_config(tiny)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
        for name in FILES:
            (tmp_path / "copy" / name).unlink(missing_ok=True)
    save_model(ours, tmp_path / "copy", "transformers")
    assert names(tmp_path / "copy") == names(tiny) - {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "copy", backend="pil")
    assert images.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints


def test_models_that_see_nothing_have_none(tmp_path):
    make_tiny(tmp_path, "transformers")
    assert not names(tmp_path) & FILES


def test_a_tokenizer_with_another_image_token(ours, tmp_path):
    tokenizer = Tokenizer.train(["a text of a few words, words, words"], 262)
    save_model(ours, tmp_path / "out", "transformers", tokenizer=tokenizer)
    assert not names(tmp_path / "out") & FILES
