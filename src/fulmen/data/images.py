"""Pictures as the model takes them: the dynamic resolution of MiniMax-VL-01 (minimax-01.md, section 12).

A picture is seen twice: squashed into one crop, the thumbnail, and undistorted on a canvas of up to 18 crops. Each crop
is encoded for itself; the model then puts the crops' patches together to one map, removes the canvas' black border
from it, and ends each row with a newline. All that depends on the size alone: `ImageProcessor.layout` needs no pixel.
"""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fulmen.config import UserError, check_numbers
from fulmen.data.image_files import DEFAULT_LIMITS, ImageLimits, open_image

GRIDS = tuple(
    (rows, columns) for rows, most in enumerate((6, 6, 6, 4, 3, 3), start=1) for columns in range(1, most + 1)
)
"""The 28 published grids (rows, columns) of crops."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours, as parts of 1: CLIP's, of which the published encoder is one."""


@dataclass(frozen=True)
class ImageLayout:
    """How one image is cut, and how many positions it takes in the row of tokens.

    size: (width, height) of the image, pixels. grid: (rows, columns) of crops; (0, 0) is the thumbnail alone.
    resized: (width, height) of the image on the grid's canvas, pixels. thumbnail: patches of the thumbnail.
    top, left: rows and columns of patches that un-padding removes from either side of the canvas' map.
    rows, columns: patches of the map that is left; a newline follows each row.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    resized: tuple[int, int]
    thumbnail: int
    top: int
    left: int
    rows: int
    columns: int

    @property
    def positions(self) -> int:
        return self.thumbnail + self.rows * (self.columns + 1)


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """crops: [1 + grid rows * columns, 3, crop, crop] uint8: the thumbnail, then the crops row by row.

    digest: 16 bytes that differ where crops or layout do: what a cache may know the image by.
    """

    crops: Tensor
    layout: ImageLayout
    digest: bytes

    @property
    def positions(self) -> int:
        return self.layout.positions

    @property
    def pixels(self) -> Tensor:
        """What an encoder takes: `crops`, normalised."""
        return normalise(self.crops)


@dataclass(frozen=True)
class PlacedImage:
    """An image, or a piece of one, in a row of tokens: its positions first .. first + count - 1 begin at `start`."""

    image: ProcessedImage
    start: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Cuts images into square crops of crop_size pixels for an encoder of square patches of patch_size pixels.

    dynamic: False gives the thumbnail alone. limits: for `read`.
    """

    crop_size: int = 336
    patch_size: int = 14
    dynamic: bool = True
    limits: ImageLimits = DEFAULT_LIMITS

    def __post_init__(self):
        check_numbers(self, "at least 1", lambda size: size >= 1, "crop_size", "patch_size")
        if self.crop_size % self.patch_size:
            raise UserError(f"crop_size = {self.crop_size} must be a multiple of patch_size = {self.patch_size}")

    def layout(self, width: int, height: int) -> ImageLayout:
        """The layout of any image of width x height pixels.

        Raises UserError for an image without pixels and, if dynamic, for one so thin that nothing of it is left on any
        canvas: the long side must be less than 6 * crop_size times the short one.
        """
        if min(width, height) < 1:
            raise UserError(f"an image of {width} x {height} pixels shows nothing: both sides must be at least 1")
        across = self.crop_size // self.patch_size
        if not self.dynamic:
            return ImageLayout((width, height), (0, 0), (0, 0), across**2, 0, 0, 0, 0)
        # At 6 crops, the longest canvas there is.
        most = 6 * self.crop_size
        if max(width, height) >= most * min(width, height):
            raise UserError(
                f"an image of {width} x {height} pixels is too thin: the long side must be less than {most} times the "
                "short one; cut it into pieces"
            )
        rows, columns = grid = self._best_grid(width, height)
        resized = _fit(width, height, columns * self.crop_size, rows * self.crop_size)
        # Of a thin strip at least one patch is left; the published rounding may leave none, and with it no picture.
        rows, columns = rows * across, columns * across
        kept = [max(1, patches) for patches in _fit(width, height, columns, rows)]
        top, left = (rows - kept[1]) // 2, (columns - kept[0]) // 2
        return ImageLayout((width, height), grid, resized, across**2, top, left, rows - 2 * top, columns - 2 * left)

    def process(self, image: Image.Image) -> ProcessedImage:
        """The image's crops and layout. image: RGB, as `open_image` gives it. Raises as `layout` does."""
        if image.mode != "RGB":
            raise ValueError(f"an image to be processed is RGB, not {image.mode}: open_image converts it")
        layout = self.layout(*image.size)
        crops = np.array(_resize(image, (self.crop_size, self.crop_size)))[None]
        if self.dynamic:
            crops = np.concatenate([crops, self._cut(image, layout)])
        digest = hashlib.blake2b(crops.reshape(-1), digest_size=16)
        digest.update(repr(layout).encode())
        return ProcessedImage(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(), layout, digest.digest())

    def read(self, source: bytes | str | os.PathLike | Image.Image) -> ProcessedImage:
        """`open_image` within the limits, then `process`. Raises UserError as both do."""
        return self.process(open_image(source, self.limits))

    def _best_grid(self, width: int, height: int) -> tuple[int, int]:
        """The grid on which most pixels of the image count; of several, the one that wastes fewest of its own.

        That is the first of them: GRIDS go from few rows and columns to many, so that it lies within all the others.
        """

        def effective(grid: tuple[int, int]) -> int:
            rows, columns = grid
            # Rounded as published: exact arithmetic would choose another grid for a few sizes, such as 3742 x 4990.
            scale = min(columns * self.crop_size / width, rows * self.crop_size / height)
            return min(int(width * scale) * int(height * scale), width * height)

        return max(GRIDS, key=effective)

    def _cut(self, image: Image.Image, layout: ImageLayout) -> np.ndarray:
        """The canvas with the image at its centre on black, cut row by row into [rows * columns, crop, crop, 3]."""
        (rows, columns), size = layout.grid, self.crop_size
        canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
        width, height = layout.resized
        top, left = (rows * size - height) // 2, (columns * size - width) // 2
        canvas[top : top + height, left : left + width] = _resize(image, layout.resized)
        return canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def normalise(crops: Tensor) -> Tensor:
    """[N, 3, S, S] fp32 of colours uint8, on the same device: four times the bytes, so best where they are needed."""
    mean, std = (torch.tensor(colours, device=crops.device)[:, None, None] for colours in (MEAN, STD))
    return crops.float().div_(255).sub_(mean).div_(std)


def _fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """(width, height) scaled to fill one side of the canvas; the other side is rounded down."""
    if width * canvas_height > canvas_width * height:
        return canvas_width, height * canvas_width // width
    return width * canvas_height // height, canvas_height


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)
