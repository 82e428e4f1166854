"""The images of prompts in the making, and their features while a piece of a prompt may still need them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulmen.data import PlacedImage, ProcessedImage
from fulmen.model import VisionLanguageModel
from fulmen.model.vocabulary import Inserted
from fulmen.serve import scheduler as policy


class ImageFeatures:
    """An image is encoded when a step first needs it; its features stay until its last position has been computed."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self._images: dict[policy.Sequence, tuple[PlacedImage, ...]] = {}
        self._features: dict[bytes, Tensor] = {}

    def add(self, sequence: policy.Sequence, images: tuple[PlacedImage, ...]) -> None:
        """`sequence` has these images in its prompt."""
        if images:
            self._images[sequence] = images

    def forget(self, sequence: policy.Sequence) -> None:
        """It has ended."""
        if self._images.pop(sequence, None):
            self.release()

    def insert(self, sequences: Sequence[policy.Sequence], lengths: Sequence[int]) -> Inserted | None:
        """What takes the place of embeddings among the next `lengths` tokens of each, laid end to end."""
        places, vectors, offset = [], [], 0
        for sequence, length in zip(sequences, lengths, strict=True):
            for placed, first, last in self._among(sequence, length):
                begin = offset + placed.start + first - sequence.computed
                places.append(torch.arange(begin, begin + last - first))
                vectors.append(self._features_of(placed.image)[first:last])
            offset += length
        if not places:
            return None
        vectors = torch.cat(vectors)
        return Inserted(torch.cat(places).to(vectors.device, non_blocking=True), vectors)

    def release(self) -> None:
        """Sequences have advanced or ended: let go what no prompt is in the midst of."""
        if self._features:
            begun = {
                placed.image.digest
                for sequence, images in self._images.items()
                for placed in images
                if placed.start < sequence.computed < placed.start + placed.count
            }
            self._features = {digest: found for digest, found in self._features.items() if digest in begun}

    def _among(self, sequence: policy.Sequence, length: int) -> Iterator[tuple[PlacedImage, int, int]]:
        """(image, first of its positions, the one behind the last) of those in the next `length` tokens."""
        start, stop = sequence.computed, sequence.computed + length
        for placed in self._images.get(sequence, ()):
            first, last = max(0, start - placed.start), min(placed.count, stop - placed.start)
            if first < last:
                yield placed, first, last

    def _features_of(self, image: ProcessedImage) -> Tensor:
        if image.digest not in self._features:
            self._features[image.digest] = self.model.encode_images([image])[0]
        return self._features[image.digest]
