"""Picture files as RGB pixels, with limits that hold before anything is decoded."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fulmen.config import UserError, check_numbers

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow itself refuses to open more.
MOST_PIXELS = 178_956_970
LONGEST_NAME = 200
# What sets a picture upright, by the value of its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What `open_image` takes. TIFF, with its many rare codecs, is for one's own files only: name it to have it."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

    def __post_init__(self):
        check_numbers(self, "at least 1", lambda value: value >= 1, "max_bytes", "max_pixels")
        check_numbers(self, f"at most {MOST_PIXELS}", lambda value: value <= MOST_PIXELS, "max_pixels")
        if not self.formats or not set(self.formats) <= set(FORMATS):
            raise UserError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(self.formats) or 'none'}")


DEFAULT_LIMITS = ImageLimits()


def open_image(source: bytes | str | os.PathLike | Image.Image, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as RGB with 8 bits a colour, turned as its EXIF data say; of an animation, the first frame.

    source: a file's bytes, its path (no URL), or a Pillow image, which is taken as it stands. What is transparent
    becomes white: the pages that icons and charts are drawn for. 16-bit values lose their lower byte. Colour profiles
    are not applied. Bytes are counted before they are read, pixels before they are decoded.
    Raises UserError, naming the path if there is one, for what is missing, no file, no picture, damaged or too large.
    """
    name = _name(source)
    with _without_warnings():
        image = source if isinstance(source, Image.Image) else _open(_content(source, name, limits), name, limits)
        _check_pixels(image, name, limits)
        try:
            return _as_rgb(image)
        # Pillow's decoders raise errors of a dozen types for damaged data.
        except Exception as error:
            raise UserError(f"{name} is damaged or of a rare kind: {_reason(error)}; save it again as PNG") from error


def picture_size(content: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(width, height) by the header of a file's bytes; nothing is decoded.

    `open_image` may give (height, width): it turns the picture as EXIF data say, which may lie behind the pixels.
    Raises UserError as `open_image` does, for all that shows before the pixels are decoded.
    """
    name = _name(content)
    with _without_warnings():
        image = _open(_content(content, name, limits), name, limits)
        _check_pixels(image, name, limits)
    return image.size


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow warns of large pictures, which the limits judge, and of odd metadata, which matter to nobody.

    Threads share the list of filters; the worst that two at once can leave behind is this one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _name(source: object) -> str:
    if isinstance(source, bytes | Image.Image):
        return "the image"
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"an image is given as a path, bytes or a Pillow image, not as {type(source).__name__}")
    # A picture's data may have been given for its path by mistake.
    name = os.fsdecode(source)
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _content(source: bytes | str | os.PathLike, name: str, limits: ImageLimits) -> bytes:
    if not isinstance(source, bytes):
        source = _read_file(source, name, limits)
    if not source:
        raise UserError(f"{name} is empty: it has no bytes")
    if len(source) > limits.max_bytes:
        raise UserError(f"{name} has more than {limits.max_bytes} bytes: make it smaller or compress it")
    return source


def _read_file(path: str | os.PathLike, name: str, limits: ImageLimits) -> bytes:
    """At most one byte more than allowed: enough to see that there are too many."""
    try:
        # To open a pipe would wait for its writer, and a device may never end.
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                return file.read(limits.max_bytes + 1)
    # A ValueError is a path with a zero byte in it.
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the image {name}: {getattr(error, 'strerror', error)}") from None
    raise UserError(f"{name} is not a file: name a picture's file")


def _open(content: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """The picture with its header read and its pixels not yet decoded."""
    try:
        return Image.open(io.BytesIO(content), formats=limits.formats)
    except UnidentifiedImageError:
        formats = ", ".join(limits.formats)
        raise UserError(f"{name} is not a picture, or its header is damaged: what is read is {formats}") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, limits) from None
    except Exception as error:
        raise UserError(f"{name} has a damaged header: {_reason(error)}; save it again as PNG") from error


def _check_pixels(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(name, limits)


def _too_many_pixels(name: str, limits: ImageLimits) -> UserError:
    return UserError(f"{name} has more than {limits.max_pixels} pixels: make it smaller")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("its pixels are fractions, of no known range")
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts off what is above 255. Mode I holds 16 bits too: older versions read PNG so.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _orientation(image: Image.Image) -> object:
    # Pillow's `exif_transpose` writes all of the EXIF data anew, and fails where any of them are odd.
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None
