"""What an image encoder can do with pictures of one's own: tell classes that texts describe, and find captions."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fulmen.data import Tokenizer
from fulmen.data.captions import encode_captions
from fulmen.data.encoding import IGNORE
from fulmen.data.images import ImageProcessor, normalise
from fulmen.model.coca import CoCa
from fulmen.ops.contrastive import ranks, recalls

BATCH = 64


def zero_shot(
    coca: CoCa, tokenizer: Tokenizer, pictures: Iterable[tuple[Image.Image, str]], prompts: Mapping[str, Sequence[str]]
) -> float:
    """Share of pictures whose own class is the nearest of all (top-1).

    pictures: RGB, each with its class. prompts: of each class some texts, whose mean it is. A tie is no hit.
    """
    classes = list(prompts)
    means = [embed_texts(coca, tokenizer, prompts[name]).mean(dim=0) for name in classes]
    pictures = list(pictures)
    images = embed_pictures(coca, (picture for picture, _ in pictures))
    right = torch.tensor([[name == own for name in classes] for _, own in pictures], device=images.device)
    scores = images @ F.normalize(torch.stack(means), dim=-1).T
    return (ranks(scores, right) == 0).double().mean().item()


def retrieval(
    coca: CoCa, tokenizer: Tokenizer, pairs: Iterable[tuple[Image.Image, str]], depths: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """`recalls` of RGB pictures and their captions: who finds whom among the first k of all; equal captions are one."""
    pairs = list(pairs)
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(caption for _, caption in pairs))}
    images = embed_pictures(coca, (picture for picture, _ in pairs))
    owner = torch.tensor([numbers[caption] for _, caption in pairs], device=images.device)
    return recalls(images, embed_texts(coca, tokenizer, list(numbers)), owner, depths)


@torch.no_grad()
def embed_pictures(coca: CoCa, pictures: Iterable[Image.Image]) -> Tensor:
    """[N, D] of length 1, of RGB pictures squashed to the encoder's size."""
    config, device = coca.encoder.config, coca.class_embedding.device
    processor = ImageProcessor(crop_size=config.image_size, patch_size=config.patch_size, dynamic=False)
    crops = (processor.process(picture).crops for picture in pictures)
    return torch.cat([coca.embed_images(normalise(torch.cat(part).to(device))) for part in _parts(crops)])


@torch.no_grad()
def embed_texts(coca: CoCa, tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """[N, D] of length 1; of a text longer than `max_caption` tokens the rest is left out."""
    device, found = coca.class_embedding.device, []
    for part in _parts(texts):
        tokens, targets = encode_captions(tokenizer, part, coca.config.max_caption)
        found.append(coca.embed_texts(tokens.to(device), (targets != IGNORE).sum(dim=1).to(device)))
    return torch.cat(found)


def _parts(items: Iterable) -> Iterable[list]:
    """Lists of up to BATCH items."""
    part = []
    for item in items:
        part.append(item)
        if len(part) == BATCH:
            yield part
            part = []
    if part:
        yield part
