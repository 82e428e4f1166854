"""Images are cut as published: grids, sizes, crops, colours, positions."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from fulmen.config import UserError
from fulmen.data import ImageLimits, ImageProcessor, PlacedImage
from fulmen.data.images import GRIDS

FULL = ImageProcessor()
SMALL = ImageProcessor(crop_size=56)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def colours(pixels):
    """[N, 3, S, S] normalised -> [N, S, S, 3] of 0 .. 255, fractions that the normalisation left."""
    return (pixels.numpy().transpose(0, 2, 3, 1) * STD + MEAN) * 255


def put_together(crops, rows, columns):
    """[rows * columns, S, S, 3] -> [rows * S, columns * S, 3]"""
    return np.block([[[crops[row * columns + column]] for column in range(columns)] for row in range(rows)])


def bicubic_weights(old, new):
    """[new, old]: how much of each old pixel is in each new one; a = -1/2, widened where the image shrinks."""
    stretch = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new
    x = np.abs(np.arange(old)[None] + 0.5 - centres[:, None]) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def resize(picture, width, height):
    """[h, w, 3] -> [height, width, 3], by the definition: across, then down, bytes in between."""
    across = np.einsum("Ww,hwc->hWc", bicubic_weights(picture.shape[1], width), picture).round().clip(0, 255)
    return np.einsum("Hh,hWc->HWc", bicubic_weights(picture.shape[0], height), across).round().clip(0, 255)


def gradient(width, height):
    down, across = np.mgrid[0:height, 0:width]
    wave = 127 + 120 * np.sin(across / 3) * np.cos(down / 5)
    return np.stack([across * 255 // width, down * 255 // height, wave.astype(int)], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "grid", "positions"),
    [
        ((336, 336), (1, 1), 1176),
        ((1008, 1008), (3, 3), 5832),
        ((1344, 1344), (4, 4), 9888),
        ((1008, 2016), (6, 3), 11088),
        ((2016, 1008), (3, 6), 11016),
        # 24 rows of 144 patches and their newlines, and the other way round
        ((2016, 336), (1, 6), 576 + 24 * 145),
        ((336, 2016), (6, 1), 576 + 144 * 25),
        # 24 * 480 // 640 = 18 rows of each 24 are the picture
        ((640, 480), (2, 2), 576 + 36 * 49),
        # the published arithmetic rounds the exact 1008 of 5 x 3 down to 1007
        ((3742, 4990), (4, 3), 576 + 96 * 73),
    ],
)
def test_published_sizes(size, grid, positions):
    layout = FULL.layout(*size)
    assert (layout.size, layout.grid, layout.thumbnail, layout.positions) == (size, grid, 576, positions)


def test_the_28_grids():
    """All heights and widths in crops, as the report lists them."""
    wide = {(rows, columns) for rows in (1, 2, 3) for columns in range(1, 7)}
    tall = {(rows, columns) for rows in (5, 6) for columns in (1, 2, 3)}
    assert len(GRIDS) == 28
    assert set(GRIDS) == wide | tall | {(4, 1), (4, 2), (4, 3), (4, 4)}
    assert {SMALL.layout(columns * 56, rows * 56).grid for rows, columns in GRIDS} == set(GRIDS)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_any_size_has_an_exact_number_of_positions(width, height):
    assume(max(width, height) < 2016 * min(width, height))
    layout = FULL.layout(width, height)
    rows, columns = (24 * crops for crops in layout.grid)
    assert layout.positions == 576 + layout.rows * (layout.columns + 1) <= 11088
    assert (layout.rows, layout.columns) == (rows - 2 * layout.top, columns - 2 * layout.left)
    assert layout.rows >= 1
    assert layout.columns >= 1
    assert 0 in (layout.top, layout.left), "one side fills the canvas"
    assert min(layout.resized) >= 1
    # What un-padding cuts off on either side is less than half a patch of the picture.
    for kept, pixels in zip((layout.columns, layout.rows), layout.resized, strict=True):
        assert pixels - 14 < 14 * kept < pixels + 2 * 14
    # The same image standing and lying: as many patches, though not as many newlines.
    turned = FULL.layout(height, width)
    assert (turned.rows, turned.columns) == (layout.columns, layout.rows)


def test_grid_and_unpadding_are_those_of_transformers():
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    resolutions = [(336 * rows, 336 * columns) for rows, columns in GRIDS]
    generator = np.random.default_rng(0)
    for longest in (60, 800, 5000):
        for width, height in generator.integers(longest // 20, longest, (100, 2)).tolist():
            layout = FULL.layout(width, height)
            best = select_best_resolution((height, width), resolutions)
            assert tuple(336 * crops for crops in layout.grid) == best
            places = torch.arange(best[0] * best[1] // 14**2).view(1, best[0] // 14, best[1] // 14)
            kept = unpad_image(places, (height, width))
            bottom, right = layout.top + layout.rows, layout.left + layout.columns
            assert torch.equal(kept, places[:, layout.top : bottom, layout.left : right])


def test_pixels_are_those_of_a_slow_computation():
    """150 x 110 on a canvas of 2 x 3 crops of 56: 150 * 112 // 110 = 152 across, 8 columns of black on either side."""
    picture = gradient(150, 110)
    image = SMALL.process(Image.fromarray(picture))
    layout = image.layout
    assert (layout.grid, layout.resized) == ((2, 3), (152, 112))
    # 150 * 8 // 110 = 10 of 12 patches across
    assert (layout.top, layout.left, layout.rows, layout.columns) == (0, 1, 8, 10)
    assert image.positions == 16 + 8 * 11
    assert image.pixels.shape == (7, 3, 56, 56)
    assert image.pixels.dtype == torch.float32
    assert image.pixels.is_contiguous()
    canvas = np.zeros((112, 168, 3))
    canvas[:, 8:160] = resize(picture, 152, 112)
    found = colours(image.pixels)
    np.testing.assert_allclose(found[0], resize(picture, 56, 56), atol=1.01)
    np.testing.assert_allclose(put_together(found[1:], 2, 3), canvas, atol=1.01)
    np.testing.assert_allclose(found, found.round(), atol=1e-3)


def test_crops_go_row_by_row_after_the_thumbnail():
    shades = np.arange(40, 240, 10)[:18].reshape(3, 6)
    image = SMALL.process(Image.fromarray(np.kron(shades, np.ones((56, 56))).astype(np.uint8)).convert("RGB"))
    assert image.layout.grid == (3, 6)
    found = colours(image.pixels)
    # Bicubic curves stay out of a crop that is not resized.
    np.testing.assert_allclose(found[1:].mean((1, 2, 3)), shades.flatten(), atol=1e-3)
    np.testing.assert_allclose(found[0].mean(), shades.mean(), atol=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_the_layout_says_where_the_picture_is(width, height):
    """A white picture: all that is not black is picture."""
    assume(max(width, height) < 336 * min(width, height))
    image = SMALL.process(Image.new("RGB", (width, height), "white"))
    layout = image.layout
    assert layout == SMALL.layout(width, height)
    rows, columns = layout.grid
    assert image.pixels.shape == (1 + rows * columns, 3, 56, 56)
    found = colours(image.pixels)
    assert found[0].min() > 254
    canvas = put_together(found[1:], rows, columns).mean(-1)
    white = canvas > 254
    assert not (~white & (canvas > 0.1)).any(), "on black"
    down, across = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    assert (across[-1] - across[0] + 1, down[-1] - down[0] + 1) == layout.resized
    assert white.sum() == layout.resized[0] * layout.resized[1], "one rectangle"
    for lit, length in ((down, rows * 56), (across, columns * 56)):
        assert abs(lit[0] - (length - 1 - lit[-1])) <= 1, "at the centre"
    kept = white[14 * layout.top :][: 14 * layout.rows, 14 * layout.left :][:, : 14 * layout.columns]
    assert kept.any()
    removed = white.sum() - kept.sum()
    assert removed < 14 * max(layout.resized)


def test_a_strip_keeps_a_patch_where_rounding_would_leave_none():
    layout = FULL.layout(300, 10)
    assert (layout.resized, layout.top, layout.rows) == ((336, 11), 11, 2)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 2016), (4032, 2)])
def test_an_image_too_thin_for_any_canvas_is_refused(size):
    with pytest.raises(UserError, match=rf"{size[0]} x {size[1]} pixels is too thin: .* less than 2016 times"):
        FULL.layout(*size)
    assert ImageProcessor(dynamic=False).layout(*size).positions == 576


def test_the_thinnest_image_that_is_taken():
    assert FULL.layout(1, 2015).resized == (1, 2016)
    assert FULL.layout(4031, 2).resized == (2016, 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(UserError, match="shows nothing: both sides must be at least 1"):
        FULL.layout(*size)
    with pytest.raises(UserError, match="shows nothing"):
        FULL.read(Image.new("RGB", size))


def test_the_thumbnail_alone():
    processor = ImageProcessor(crop_size=56, dynamic=False)
    image = processor.process(Image.fromarray(gradient(150, 110)))
    assert image.positions == 16
    assert image.layout.grid == image.layout.resized == (0, 0)
    assert torch.equal(image.pixels, SMALL.process(Image.fromarray(gradient(150, 110))).pixels[:1])


def test_the_digest_knows_pixels_and_layout():
    picture = gradient(60, 50)
    digest = SMALL.read(Image.fromarray(picture)).digest
    assert len(digest) == 16
    assert SMALL.read(Image.fromarray(picture)).digest == digest
    assert ImageProcessor(crop_size=56, patch_size=28).read(Image.fromarray(picture)).digest != digest
    # One colour of one pixel.
    picture[20, 20, 1] ^= 64
    assert SMALL.read(Image.fromarray(picture)).digest != digest
    # The thumbnails of two white images are alike, their sizes are not.
    thumbnail = ImageProcessor(crop_size=56, dynamic=False)
    assert len({thumbnail.read(Image.new("RGB", (side, 9), "white")).digest for side in (8, 9)}) == 2


def test_read_keeps_to_the_limits_and_converts():
    assert SMALL.read(Image.new("LA", (60, 60))).pixels.shape == (5, 3, 56, 56)
    with pytest.raises(UserError, match="more than 100 pixels"):
        ImageProcessor(limits=ImageLimits(max_pixels=100)).read(Image.new("RGB", (11, 10)))
    with pytest.raises(ValueError, match="RGB, not LA"):
        SMALL.process(Image.new("LA", (60, 60)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(crop_size=100), "crop_size = 100 must be a multiple of patch_size = 14"),
        (dict(crop_size=0), "crop_size must be at least 1, got 0"),
        (dict(patch_size=0), "patch_size must be at least 1, got 0"),
    ],
)
def test_sizes_that_fit_nothing_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor(**sizes)


def test_a_placed_image_is_a_plain_value():
    image = SMALL.read(Image.new("RGB", (56, 56)))
    assert PlacedImage(image, 3, 0, 36) == PlacedImage(image, start=3, first=0, count=image.positions)
