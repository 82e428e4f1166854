"""Answers to questions about pictures: how many are right, and how many where the model sees noise instead.

A model that guesses from the question alone does as well on noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fulmen.config import UserError
from fulmen.evals.pictures import choose_pictures
from fulmen.model import choose_device
from fulmen.serve import Engine, EngineSettings, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=48)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question on a picture, and the answer that counts as right."""

    image: Image.Image
    question: str
    answer: str

    def unseen(self, seed: int) -> "Asked":
        """The same question on noise of the same size."""
        noise = np.random.default_rng(seed).integers(0, 256, (self.image.height, self.image.width, 3), dtype=np.uint8)
        return Asked(Image.fromarray(noise), self.question, self.answer)


def ask_about(name: str, *, held_out: float, count: int, known: bool = False) -> list[Asked]:
    """The question that the pictures `name` are for, about each of those of `choose_pictures`."""
    pictures = choose_pictures(name, held_out=held_out, count=count, known=known)
    return [Asked(picture.image, picture.questions[0].question, picture.questions[0].answer) for picture in pictures]


def answers(engine: Engine, asked: Sequence[Asked]) -> list[str]:
    """What the model says, greedily."""
    prompts = [
        engine.encode_chat(
            [{"role": "user", "content": [{"type": "image", "image": a.image}, {"type": "text", "text": a.question}]}]
        )
        for a in asked
    ]
    return [completion.text for completion in engine.generate(prompts, PARAMS)]


def accuracy(engine: Engine, asked: Sequence[Asked]) -> float:
    """The share of answers that are right: the same text, whatever its case and the spaces around it."""
    said = answers(engine, asked)
    return sum(_plain(text) == _plain(a.answer) for text, a in zip(said, asked, strict=True)) / len(asked)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def answer_table(engine: Engine, pictures: Sequence[str], *, held_out: float, count: int) -> list[dict]:
    """For each kind of pictures the share of right answers: pictures held out, known ones, noise in their place."""
    rows = []
    for name in pictures:
        asked = ask_about(name, held_out=held_out, count=count)
        known = ask_about(name, held_out=held_out, count=count, known=True)
        noise = [each.unseen(seed) for seed, each in enumerate(asked)]
        rows.append(
            {
                "pictures": name,
                "held out": accuracy(engine, asked),
                "known": accuracy(engine, known),
                "noise": accuracy(engine, noise),
                "asked": len(asked),
            }
        )
    return rows


def load_engine(path: str | Path, *, device: str = "auto", thumbnail: bool = False) -> Engine:
    """An engine for a checkpoint or run; with `thumbnail` it shows the squashed picture alone."""
    engine = Engine.load(path, EngineSettings(max_sequences=32, prefix_cache=False), device=choose_device(device))
    if engine.image_processor is None:
        raise UserError(f"{path} takes no images: give it a vision-language model")
    if thumbnail:
        engine.image_processor = replace(engine.image_processor, dynamic=False)
    return engine
