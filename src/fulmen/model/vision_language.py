"""The vision-language model: an encoder's features, projected, in the places of a prompt's `<image>` tokens.

    image = ImageProcessor().read("photo.jpg")                     # fulmen.data
    tokens = torch.tensor([[*before, *[config.image_token] * image.positions, *after]])
    logits = model(tokens, images=[PlacedImage(image, start=len(before), first=0, count=image.positions)])

An image's features (minimax-01.md section 12): the thumbnail's patches, then the map of all crops' patches without the
padding, row by row, with `image_newline` at the end of each row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.config import UserError
from fulmen.data.images import ImageLayout, PlacedImage, ProcessedImage, normalise
from fulmen.model.cache import Cache, SequenceCache
from fulmen.model.config import VisionConfig, VisionLanguageConfig
from fulmen.model.decoder import LanguageModel, TrainingLoss
from fulmen.model.vision import VisionEncoder
from fulmen.model.vocabulary import Inserted
from fulmen.ops.experts import Routing

CROPS_AT_ONCE = 8
"""That are encoded together where no gradients are wanted: enough to keep a device busy, few enough for its memory."""


class VisionLanguageModel(nn.Module):
    """MiniMax-VL-01 of any size; `forward`, `hidden` and `loss` are a text model's with `images` beside the tokens.

    Module names are the published ones. Weights are drawn from torch's global generator.
    """

    encodes_together = False
    """Whether other ranks encode at the same time (`fulmen.parallel`): then each does so once in every pass, if only a
    blank crop, and all weights take part."""

    def __init__(self, config: VisionLanguageConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.image_newline = nn.Parameter(torch.empty(config.text.hidden_size))
        self.language_model = LanguageModel(config.text)
        if not self.image_newline.is_meta:
            self.init_connection()

    @torch.no_grad()
    def init_connection(self) -> None:
        """Draw projector and newline anew, of the token embeddings' width; the text model's first norm undoes it."""
        width = self.language_model.embed_tokens.weight.std()
        for linear in (self.multi_modal_projector.linear_1, self.multi_modal_projector.linear_2):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.multi_modal_projector.linear_2.weight.mul_(width)
        self.image_newline.normal_().mul_(width)

    def new_cache(self, batch_size: int) -> Cache:
        return self.language_model.new_cache(batch_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        images: Sequence[PlacedImage] = (),
        cache: SequenceCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] fp32 of tokens [B, T]; `images` say whose features stand where, in `tokens` laid end to end.

        Raises UserError where the tokens are not `image_token` exactly where the images are.
        """
        hidden, _ = self.hidden(tokens, images=images, cache=cache, cu_seqlens=cu_seqlens)
        return self.logits(hidden)

    def hidden(
        self, tokens: Tensor, *, images: Sequence[PlacedImage] = (), **arguments
    ) -> tuple[Tensor, list[Routing]]:
        """As of `LanguageModel.hidden`."""
        return self.language_model.hidden(tokens, inserted=self.insert(tokens, images), **arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language_model.logits(hidden)

    def loss(self, tokens: Tensor, targets: Tensor, *, images: Sequence[PlacedImage] = (), **arguments) -> TrainingLoss:
        """As of `LanguageModel.loss`."""
        return self.language_model.loss(tokens, targets, inserted=self.insert(tokens, images), **arguments)

    def insert(self, tokens: Tensor, images: Sequence[PlacedImage]) -> Inserted | None:
        """What stands in place of the `<image>` tokens of `tokens`, after a check that images and tokens agree."""
        ranges = [torch.arange(placed.start, placed.start + placed.count) for placed in images]
        places = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
        self._check(tokens, images, places)
        if not (images or self.encodes_together):
            return None
        vectors = self._vectors(images) if images else self._blank()
        if self.encodes_together:
            vectors = torch.cat([vectors, self.image_newline[None].to(vectors.dtype)])[: len(places)]
        return Inserted(places.to(tokens.device, non_blocking=True), vectors)

    def _vectors(self, images: Sequence[PlacedImage]) -> Tensor:
        """Features of all places, [their number, hidden]."""
        unique = list({id(placed.image): placed.image for placed in images}.values())
        features = dict(zip(map(id, unique), self.encode_images(unique), strict=True))
        parts = [
            whole if len(whole := features[id(placed.image)]) == placed.count else whole[placed.first :][: placed.count]
            for placed in images
        ]
        return torch.cat(parts)

    def _blank(self) -> Tensor:
        """Features of a crop that shows nothing."""
        size = self.config.vision.image_size
        return self._project(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.image_newline.device))[0]

    def _check(self, tokens: Tensor, images: Sequence[PlacedImage], places: Tensor) -> None:
        for placed in images:
            if placed.first < 0 or placed.count < 1 or placed.first + placed.count > placed.image.positions:
                raise UserError(
                    f"an image of {placed.image.positions} positions has none of {placed.first} to "
                    f"{placed.first + placed.count - 1}"
                )
        marked = torch.nonzero(tokens.flatten() == self.config.image_token).flatten().cpu()
        if not torch.equal(marked, places.sort().values):
            raise UserError(
                f"the prompt has {len(marked)} <image> tokens, and its images {len(places)} positions, or they stand "
                "elsewhere: expand each image's token to its number of positions"
            )

    def encode_images(self, images: Sequence[ProcessedImage]) -> list[Tensor]:
        """Of each image its features [positions, hidden]."""
        device = self.image_newline.device
        # One by one, because a GPU puts them together faster than the host does.
        crops = torch.cat([image.crops.to(device, non_blocking=True) for image in images])
        at_once = torch.is_grad_enabled() or self.encodes_together
        groups = [crops] if at_once else crops.split(CROPS_AT_ONCE)
        projected = [self._project(group) for group in groups]
        features = projected[0] if len(projected) == 1 else torch.cat(projected)
        return self._arrange_all(features.split([len(image.crops) for image in images]), images)

    def _arrange_all(self, parts: Sequence[Tensor], images: Sequence[ProcessedImage]) -> list[Tensor]:
        """`arrange` of each image's features, those of one shape together: a batch for training has a hundred."""
        alike: dict[ImageLayout, list[int]] = {}
        for place, image in enumerate(images):
            alike.setdefault(replace(image.layout, size=(0, 0), resized=(0, 0)), []).append(place)
        found: list[Tensor | None] = [None] * len(images)
        for layout, places in alike.items():
            # Of one image alone, as when a prompt is processed, nothing is copied.
            stacked = torch.stack([parts[place] for place in places]) if len(places) > 1 else parts[places[0]][None]
            arranged = arrange(stacked, layout, self.image_newline)
            for place, features in zip(places, arranged.unbind(), strict=True):
                found[place] = features
        return found

    def _project(self, crops: Tensor) -> Tensor:
        return self.multi_modal_projector(self.vision_tower(normalise(crops)))


class VisionTower(nn.Module):
    """The encoder under its published name."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionEncoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision_model(pixels)


class Projector(nn.Module):
    """Linear, GELU, Linear, from the encoder's width to the text model's."""

    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


def arrange(features: Tensor, layout: ImageLayout, newline: Tensor) -> Tensor:
    """[N, positions, hidden] of the features [N, 1 + crops, P, hidden] of N thumbnails and their images' crops.

    Crops are row-major. newline: [hidden], put behind each row of the un-padded map.
    """
    thumbnail, crops = features[:, 0], features[:, 1:]
    assert crops.shape[1] == layout.grid[0] * layout.grid[1], (features.shape, layout)
    if not crops.shape[1]:
        return thumbnail
    side = round(crops.shape[2] ** 0.5)
    grid = crops.unflatten(2, (side, side)).unflatten(1, layout.grid)  # [N, rows, columns, side, side, hidden]
    whole = grid.transpose(2, 3).flatten(1, 2).flatten(2, 3)
    kept = whole[:, layout.top : layout.top + layout.rows, layout.left : layout.left + layout.columns]
    ends = newline.to(kept.dtype).expand(*kept.shape[:2], 1, -1)
    return torch.cat([thumbnail, torch.cat([kept, ends], dim=2).flatten(1, 2)], dim=1)
