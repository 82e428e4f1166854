"""Pictures and texts in one space: the loss that brings pairs together, and how well they find each other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """How badly pairs find each other among all of a batch, nats, a fp32 scalar (CoCa, arXiv:2205.01917, equation 4).

    images, texts: [N, D] of length 1, row i of both a pair. scale: 1 over the temperature. The sum of both directions,
    each a mean over N; 2 log N for a model that cannot tell. Equal texts in a batch add a constant and no gradient.
    """
    logits = scale * (images.float() @ texts.float().T)
    pairs = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates come before the best right one, [Q] int64; 0 is a hit.

    scores: [Q, C], higher is better. right: [Q, C] bool, at least one in each row. A wrong candidate that is as good as
    the best right one counts as before it, and so does a nan: a model that gives everything one score finds nothing.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~right & ~(scores < best)).sum(dim=1)


def recalls(images: Tensor, texts: Tensor, owner: Tensor, depths: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Share of pictures that find their text among the first k, and of texts that find one of their pictures.

    images: [N, D]; texts: [C, D], all different; both of length 1. owner: [N] int64, the text of each picture; every
    text has one. Keys: image_to_text_recall_at_1 and so on for each k of `depths`.
    """
    scores = images @ texts.T
    right = owner[:, None] == torch.arange(len(texts), device=owner.device)
    found = {"image_to_text": ranks(scores, right), "text_to_image": ranks(scores.T, right.T)}
    return {
        f"{way}_recall_at_{depth}": (rank < depth).double().mean().item()
        for way, rank in found.items()
        for depth in depths
    }
