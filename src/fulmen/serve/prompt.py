"""A prompt as an engine takes it: tokens, and the images that stand in place of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from fulmen.data import PlacedImage, ProcessedImage, expand_images


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens with the model's image token at each position of an image."""

    tokens: list[int]
    images: tuple[PlacedImage, ...] = ()

    @classmethod
    def of(cls, prompt: "Prompt | Sequence[int]") -> Self:
        """Itself, or one of plain tokens."""
        return prompt if isinstance(prompt, cls) else cls(list(prompt))

    @classmethod
    def with_images(cls, tokens: list[int], images: Sequence[ProcessedImage], image_token: int) -> Self:
        """Of tokens that have one `image_token` for each image; UserError if there are more or fewer."""
        counts = [image.positions for image in images]
        tokens, starts = expand_images(tokens, image_token, counts)
        placed = zip(images, starts, counts, strict=True)
        return cls(tokens, tuple(PlacedImage(image, start, 0, count) for image, start, count in placed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __add__(self, more: "Prompt") -> Self:
        """Both, one after the other."""
        moved = [replace(placed, start=placed.start + len(self)) for placed in more.images]
        return type(self)(self.tokens + more.tokens, (*self.images, *moved))

    def keys(self) -> list[int]:
        """What the prefix cache compares: tokens, and in an image's positions a negative number of its content."""
        keys = list(self.tokens)
        for placed in self.images:
            digest = int.from_bytes(placed.image.digest[:8], "big") >> 1
            keys[placed.start : placed.start + placed.count] = [-1 - digest] * placed.count
        return keys
