"""What an encoder has learnt, on held-out pictures: beside chance, and beside an encoder of the same size at random."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fulmen.checkpoint import find_checkpoint
from fulmen.checkpoint.vision import load_coca
from fulmen.data import Tokenizer
from fulmen.evals.pictures import choose_pictures
from fulmen.evals.vision import retrieval, zero_shot
from fulmen.model import choose_device
from fulmen.model.coca import CoCa


def encoder_table(
    path: str | Path, pictures: Sequence[str], *, held_out: float, count: int, device: str = "auto"
) -> list[dict]:
    """For each kind of pictures the zero-shot top-1 among the captions of all that are looked at, and recall@5."""
    place = choose_device(device)
    coca, tokenizer = load_coca(find_checkpoint(path), device=place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = CoCa(coca.config).to(place).eval()
    rows = []
    for name in pictures:
        pairs = [(p.image, p.refined) for p in choose_pictures(name, held_out=held_out, count=count)]
        classes = len({caption for _, caption in pairs})
        row = {"pictures": name, "classes": classes, "chance": 1 / classes, "chance at 5": min(1.0, 5 / classes)}
        row |= _measured(coca, tokenizer, pairs)
        row |= {f"{key}, random encoder": value for key, value in _measured(untrained, tokenizer, pairs).items()}
        rows.append(row)
    return rows


def _measured(coca: CoCa, tokenizer: Tokenizer, pairs: list) -> dict[str, float]:
    found = retrieval(coca, tokenizer, pairs, depths=(5,))
    return {
        "zero-shot top-1": zero_shot(coca, tokenizer, pairs, {caption: [caption] for _, caption in pairs}),
        "image to text recall@5": found["image_to_text_recall_at_5"],
        "text to image recall@5": found["text_to_image_recall_at_5"],
    }
