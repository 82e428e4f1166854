"""Any picture becomes RGB as one would see it; anything else is one clear error, and is not decoded."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from fulmen.config import UserError
from fulmen.data import ImageLimits, open_image
from fulmen.data.image_files import picture_size

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


def content(image, kind="PNG", **options):
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width, height, *chunks):
    """A PNG of 8-bit RGB with these (name, data) chunks after its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixel(image, place=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(place)


def deep(*values):
    """Grey of 16 bits."""
    return Image.fromarray(np.array([values], dtype=np.uint16))


def palette(**info):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        pytest.param(Image.new("RGB", (1, 1), (1, 2, 3)), [(1, 2, 3)], id="RGB"),
        pytest.param(Image.new("L", (1, 1), 7), [(7, 7, 7)], id="grey"),
        pytest.param(Image.new("1", (1, 1), 1), [(255, 255, 255)], id="one bit"),
        pytest.param(palette(), [(10, 20, 30), (40, 50, 60)], id="palette"),
        pytest.param(palette(transparency=0), [(255, 255, 255), (40, 50, 60)], id="palette with a transparent colour"),
        pytest.param(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [(255, 255, 255)], id="transparent"),
        pytest.param(Image.new("RGBA", (1, 1), (200, 0, 0, 51)), [(244, 204, 204)], id="one fifth red on white"),
        pytest.param(Image.new("LA", (1, 1), (100, 0)), [(255, 255, 255)], id="grey with alpha"),
        # The middle of 16 bits is the middle of 8; nothing is cut off above 255.
        pytest.param(deep(0, 255, 0x8080, 0xFFFF), [(grey,) * 3 for grey in (0, 0, 128, 255)], id="16 bits"),
        pytest.param(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), [(0, 255, 255)], id="CMYK"),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(picture, expected):
    kind = "TIFF" if picture.mode == "CMYK" else "PNG"
    for source in (picture, content(picture, kind)):
        image = open_image(source, ImageLimits(formats=("PNG", "TIFF")))
        assert [pixel(image, (x, 0)) for x in range(image.width)] == expected


def test_16_bits_a_colour_and_32_bits_of_grey():
    scanline = b"\x00" + struct.pack(">HHH", 0x1234, 0x80FF, 0xFFFF)
    wide = png(1, 1, (b"IDAT", zlib.compress(scanline))).replace(b"\x08\x02\x00\x00\x00", b"\x10\x02\x00\x00\x00")
    header = wide[12:29]
    wide = wide[:29] + struct.pack(">I", zlib.crc32(header)) + wide[33:]
    assert pixel(open_image(wide)) == (0x12, 0x80, 0xFF)
    assert pixel(open_image(Image.new("I", (1, 1), 0x8080))) == (128, 128, 128)
    assert pixel(open_image(Image.new("I", (1, 1), 1 << 20))) == (255, 255, 255)
    assert pixel(open_image(Image.new("I", (1, 1), -5))) == (0, 0, 0)


def test_a_cmyk_jpeg():
    red, green, blue = pixel(open_image(content(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")))
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_exif_data_say(kind, orientation):
    """Row 0 and column 0 of the file are these sides of the picture, by the EXIF standard, tag 274."""
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    # White where the file's row 0 is, and half as bright in its column 0.
    stored = np.zeros((48, 80), np.uint8)
    stored[:, :16] = 128
    stored[:16] = 255
    exif = Image.Exif()
    exif[274] = orientation
    data = content(Image.fromarray(stored).convert("RGB"), kind, exif=exif)
    image = np.asarray(open_image(data, ImageLimits(formats=(kind,))))[..., 0]
    assert image.shape == ((48, 80) if orientation < 5 else (80, 48))
    sides = {"top": image[2], "bottom": image[-3], "left": image[:, 2], "right": image[:, -3]}
    assert np.median(sides[row_0]) > 250
    assert 120 < np.median(sides[column_0]) < 136


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        pytest.param(b"Exif\0\0garbage", (20, 10), id="no EXIF data at all"),
        # Orientation 6, and a width (tag 257) that is a text.
        pytest.param(
            b"Exif\0\0II*\0" + struct.pack("<IHHHIIHHI4s", 8, 2, 274, 3, 1, 6, 257, 2, 1, b"abc"),
            (10, 20),
            id="odd data",
        ),
    ],
)
def test_odd_metadata_do_not_spoil_a_picture(kind, exif, size):
    assert open_image(content(Image.new("RGB", (20, 10)), kind, exif=exif)).size == size


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    image = open_image(content(frames[0], kind, save_all=True, append_images=frames[1:], duration=10))
    red, green, blue = pixel(image)
    assert red > 245
    assert max(green, blue) < 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_sources(kind, tmp_path):
    data = content(noise(), kind)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    # The content says what it is, not the name.
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    for source in (data, path, str(path), Image.open(path)):
        assert open_image(source) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95])
def test_a_picture_cut_short_is_one_error(kind, share, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    data = content(noise(), kind)
    with pytest.raises(UserError, match=r"^the image (is|has) .*(damaged|not a picture)") as caught:
        open_image(data[: int(len(data) * share)], ImageLimits(formats=(kind,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_is_a_picture_or_one_error(kind):
    """Bytes changed anywhere: whatever Pillow makes of it, nothing but a UserError comes out, and no warning."""
    data = content(noise(16, 12), kind)
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert open_image(bytes(damaged), ImageLimits(formats=(kind,), max_pixels=10_000)).mode == "RGB"
        except UserError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "the image is empty: it has no bytes", id="zero bytes"),
        pytest.param(SVG, "the image is not a picture, or its header is damaged: what is read is PNG, JPEG", id="SVG"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the image is not a picture", id="EPS"),
        pytest.param("Grüße".encode(), "the image is not a picture", id="text"),
        pytest.param(content(noise(), "TIFF"), "the image is not a picture", id="TIFF unless allowed"),
        pytest.param(content(noise(), "ICO"), "the image is not a picture", id="a format that is not read"),
        pytest.param(png(2, 2), "the image is damaged or of a rare kind", id="no pixels"),
        pytest.param(png(2, 2, (b"IDAT", b"no zlib")), "the image is damaged", id="pixels that are none"),
        pytest.param(png(100_000, 100_000), "the image has more than 50000000 pixels", id="a bomb for Pillow too"),
        pytest.param(png(10_000, 10_000), "the image has more than 50000000 pixels", id="a bomb Pillow warns of"),
        pytest.param(png(7_072, 7_072), "the image has more than 50000000 pixels", id="just too large"),
    ],
)
def test_what_is_no_picture_or_too_large_is_one_error_and_no_warning(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=f"^{message}"):
            open_image(data)


def test_a_picture_too_large_is_not_decoded(monkeypatch):
    image = Image.open(io.BytesIO(content(noise(20, 10))))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="more than 199 pixels: make it smaller"):
        open_image(image, ImageLimits(max_pixels=199))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_size_is_read_from_the_header_alone(kind, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    data = content(noise(20, 10), kind)
    assert picture_size(data) == (20, 10)
    for limits in (ImageLimits(max_pixels=199), ImageLimits(max_bytes=len(data) - 1), ImageLimits(formats=("TIFF",))):
        with pytest.raises(UserError, match=r"more than|is not a picture"):
            picture_size(data, limits)


def test_the_limits_are_inclusive():
    data = content(noise(20, 10))
    assert open_image(data, ImageLimits(max_pixels=200, max_bytes=len(data))).size == (20, 10)
    with pytest.raises(UserError, match=f"more than {len(data) - 1} bytes: make it smaller or compress it"):
        open_image(data, ImageLimits(max_bytes=len(data) - 1))


def test_no_more_of_a_file_is_read_than_allowed(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"huge\.png has more than 1000 bytes"):
        open_image(path, ImageLimits(max_bytes=1000))


def test_paths_that_are_no_picture_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(content(noise())[:500])
    for name, message in {
        "missing.png": r"cannot read the image .*missing\.png: No such file",
        ".": f"{tmp_path} is not a file",
        "pipe": "pipe is not a file: name a picture's file",
        "text.png": r"text\.png is not a picture",
        "empty.png": r"empty\.png is empty",
        "cut.png": r"cut\.png is damaged",
        "nul\0.png": r"cannot read the image '.*nul\\x00\.png': .*null",
        "x" * 3000: "cannot read the image .{203}: File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read the image file:///etc/passwd: No such file"):
        open_image("file:///etc/passwd")
    with pytest.raises(UserError, match=r"^/dev/zero is not a file"):
        open_image("/dev/zero")


def test_what_has_no_known_range_or_type_is_refused():
    with pytest.raises(UserError, match="the image is damaged or of a rare kind: its pixels are fractions"):
        open_image(Image.new("F", (2, 2)))
    with pytest.raises(UserError, match="given as a path, bytes or a Pillow image, not as int"):
        open_image(3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (dict(max_bytes=0), "max_bytes must be at least 1, got 0"),
        (dict(max_pixels=0), "max_pixels must be at least 1, got 0"),
        (dict(max_pixels=10**9), "max_pixels must be at most 178956970"),
        (dict(formats=()), "formats must be some of PNG, .*, got none"),
        (dict(formats=("PNG", "EPS")), "formats must be some of PNG, .*, got PNG, EPS"),
    ],
)
def test_limits_are_checked(limits, message):
    with pytest.raises(UserError, match=message):
        ImageLimits(**limits)
