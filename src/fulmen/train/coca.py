"""CoCa as an objective: an image encoder learns from captioned pictures (arXiv:2205.01917)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.checkpoint import find_checkpoint
from fulmen.checkpoint.vision import load_coca, save_coca
from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.data.captions import (
    CaptionBatch,
    Captioned,
    CaptionLoader,
    caption_texts,
    held_out_captions,
    read_captioned,
)
from fulmen.data.images import ImageProcessor, normalise
from fulmen.model.coca import CoCa, CoCaConfig, CoCaLoss
from fulmen.ops.contrastive import ranks, recalls
from fulmen.train.coca_recipe import CoCaRecipe
from fulmen.train.language import TOKENIZER
from fulmen.train.objective import Headline, Place, Task
from fulmen.train.precision import autocast, choose_dtype


class CoCaObjective:
    """The contrastive and the captioning loss of batches of pairs. An `Objective`.

    While the pictures grow (`model.image_sizes`), the encoder's positions stay parameters of the first size and are
    read interpolated; the checkpoint holds them interpolated to the last size.
    """

    unit = "picture"
    headline = Headline("held_out_image_to_text_recall_at_5", "{:.1%} of held-out pictures have their caption among 5")

    def __init__(
        self,
        model: CoCa,
        loader: CaptionLoader,
        tokenizer: Tokenizer,
        recipe: CoCaRecipe,
        device: torch.device,
        held_out: Captioned,
    ):
        self.model, self.loader, self.tokenizer, self.recipe = model, loader, tokenizer, recipe
        self.device, self.held_out = device, held_out
        precision = recipe.train.precision
        if precision == "auto" and device.type == "cpu":
            # torch's own layers, of which this model is made, train there in bf16 half as fast as in fp32.
            precision = "float32"
        self.dtype = choose_dtype(precision, device)
        self.image_sizes = recipe.model.image_sizes or ((0, model.config.vision.image_size),)
        self._steps = 0
        if recipe.train.compile:
            for layer in model.encoder.encoder.layers:
                layer.compile()

    @property
    def image_size(self) -> int:
        """Of the pictures of the last step, or of the first one before it."""
        return [size for step, size in self.image_sizes if step < max(self._steps, 1)][-1]

    def next_batches(self, seen: int) -> list[CaptionBatch]:
        """The next batch, whole: its loss compares all of its pairs."""
        self._steps += 1
        return [self.loader.next_batch(self.recipe.schedule.batch_pictures, self.image_size)]

    def size(self, batches: list[CaptionBatch]) -> int:
        """Pictures of the batches."""
        return sum(map(len, batches))

    def backward(self, batches: list[CaptionBatch], step: int) -> dict[str, Any]:
        """Gradients of the weighted losses; contrastive: nats per pair, caption: nats per token of a caption."""
        [batch] = batches
        loss = self._loss(batch)
        contrastive, caption = loss.contrastive, loss.nll / loss.targets
        total = self._weighted(contrastive, caption)
        total.backward()
        metrics = {"loss": total.item(), "contrastive": contrastive.item(), "caption": caption.item()}
        metrics |= {"temperature": 1 / self.model.scale.item(), "image_size": batch.crops.shape[-1]}
        return metrics | {"epoch": self.loader.epoch}

    def evaluate(self) -> dict[str, float]:
        """Held-out losses, and how often pictures and captions find each other; zero-shot, among those of its source.

        Of captions that are equal one stands for all.
        """
        if not self.held_out.count:
            return {}
        found, captions, sources = [], [], []
        pairs, contrastive = 0, 0.0
        for batch, its_sources in self._held_out_batches():
            found.append(self._loss(batch))
            captions += batch.captions
            sources += its_sources
            pairs += len(batch)
            contrastive += found[-1].contrastive.item() * len(batch)
        contrastive /= pairs
        caption = sum(loss.nll.item() for loss in found) / sum(loss.targets.item() for loss in found)
        metrics = {"loss": self._weighted(contrastive, caption), "contrastive": contrastive, "caption": caption}
        images, texts = torch.cat([loss.images for loss in found]), torch.cat([loss.texts for loss in found])
        metrics |= match_metrics(images, texts, captions, sources)
        return {f"held_out_{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """The loader's place and the number of steps, on which the size of the pictures depends."""
        return self.loader.state_dict() | {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other data."""
        self.loader.load_state_dict(state)
        self._steps = int(state["steps"])

    def keep(self, run: Path) -> None:
        """Write the tokenizer into the run's folder."""
        self.tokenizer.save(run / TOKENIZER)

    def export(self, checkpoint: Path) -> None:
        """Write the encoder, at the last size of pictures, and the rest of the model with its tokenizer beside it."""
        self.model.resize(self.image_sizes[-1][1])
        save_coca(self.model, checkpoint, self.tokenizer)

    def _loss(self, batch: CaptionBatch) -> CoCaLoss:
        parts = (batch.crops, batch.tokens, batch.targets)
        crops, tokens, targets = (tensor.to(self.device, non_blocking=True) for tensor in parts)
        with autocast(self.device, self.dtype):
            return self.model.loss(normalise(crops), tokens, targets)

    def _weighted(self, contrastive: Any, caption: Any) -> Any:
        return self.recipe.train.contrastive * contrastive + self.recipe.train.caption * caption

    def _held_out_batches(self) -> Iterator[tuple[CaptionBatch, list[int]]]:
        processor = ImageProcessor(
            crop_size=self.image_size, patch_size=self.model.config.vision.patch_size, dynamic=False
        )
        return held_out_captions(
            self.held_out,
            self.tokenizer,
            processor,
            count=self.recipe.data.held_out_pictures,
            batch=self.recipe.schedule.batch_pictures,
            max_caption=self.model.config.max_caption,
        )


def match_metrics(images: Tensor, texts: Tensor, captions: Sequence[str], sources: Sequence[int]) -> dict[str, float]:
    """`recalls` of pairs [N, D], and zero_shot_top_1: how often a picture's caption comes first in its own source.

    captions, sources: of each of the N pairs. Of equal captions the first one's text stands for all.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    owner = torch.tensor([numbers[caption] for caption in captions], device=images.device)
    first = torch.tensor([captions.index(caption) for caption in numbers], device=images.device)
    source = torch.tensor(sources, device=images.device)
    right = owner[:, None] == torch.arange(len(numbers), device=images.device)
    foreign = (source[:, None] != source[first]) & ~right
    scores = (images @ texts[first].T).masked_fill(foreign, -torch.inf)
    top = (ranks(scores, right) == 0).double().mean().item()
    return {"zero_shot_top_1": top} | recalls(images, texts[first], owner)


def build(recipe: CoCaRecipe, place: Place) -> CoCaObjective:
    """Model, loader, tokenizer and held-out pictures as the recipe says."""
    model, tokenizer = _model(recipe)
    training, held_out = read_captioned(recipe.data.sources, recipe.data.held_out)
    place.report(f"pictures: {training.count} to train on, {held_out.count} held out")
    if training.count < recipe.schedule.batch_pictures:
        raise UserError(
            f"schedule.batch_pictures {recipe.schedule.batch_pictures} exceeds the {training.count} pictures to train "
            "on: make it smaller, or name more sources"
        )
    tokenizer = _tokenizer(recipe, model.config, training, place, tokenizer)
    loader = CaptionLoader(
        training,
        tokenizer,
        seed=recipe.train.seed,
        max_caption=model.config.max_caption,
        patch_size=model.config.vision.patch_size,
        workers=recipe.train.workers,
    )
    objective = CoCaObjective(model.to(place.device), loader, tokenizer, recipe, place.device, held_out)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.encoder)]
    place.report(
        f"model: {counts[0]:,} parameters, {counts[1]:,} of them the encoder's, on {place.device.type} in "
        f"{str(objective.dtype).removeprefix('torch.')}"
    )
    return objective


TASK = Task(CoCaRecipe, build)


def _model(recipe: CoCaRecipe) -> tuple[CoCa, Tokenizer | None]:
    """The model, which takes pictures of the first size, and the tokenizer that comes with a checkpoint."""
    section, tokenizer = recipe.model, None
    changes = section.changes()
    encoder = {name: value for name, value in dataclasses.asdict(section.vision).items() if value is not None}
    if section.init_from is not None:
        if section.preset is not None or changes or encoder:
            raise UserError(
                "model.init_from brings its own sizes: of the other keys of [model] leave image_sizes alone"
            )
        model, tokenizer = load_coca(find_checkpoint(section.init_from))
    elif section.preset is None:
        raise UserError("the recipe's [model] needs a preset, or init_from with a checkpoint")
    else:
        model = CoCa(CoCaConfig.preset(section.preset, vision=encoder, **changes))
    for step, size in section.image_sizes:
        if step >= recipe.schedule.steps:
            raise UserError(f"model.image_sizes names step {step}, but schedule.steps is {recipe.schedule.steps}")
        dataclasses.replace(model.config.vision, image_size=size)  # refuses what patches do not divide
    if section.image_sizes:
        model.resize(section.image_sizes[0][1])
    return model, tokenizer


def _tokenizer(
    recipe: CoCaRecipe, config: CoCaConfig, training: Captioned, place: Place, brought: Tokenizer | None
) -> Tokenizer:
    """The run's own tokenizer, the one that the recipe or the checkpoint brings, or one trained on the captions."""
    if not place.fresh:
        return Tokenizer.load(place.folder / TOKENIZER)
    if recipe.data.tokenizer is None and brought is None:
        place.report(f"tokenizer: training {config.vocab_size} tokens")
        return Tokenizer.train(caption_texts(training), config.vocab_size)
    tokenizer = brought if recipe.data.tokenizer is None else Tokenizer.load(recipe.data.tokenizer)
    if tokenizer.vocab_size > config.vocab_size or None in (tokenizer.bos_id, tokenizer.eos_id):
        raise UserError(
            f"the tokenizer of {tokenizer.vocab_size} tokens must have bos and eos, and at most model.vocab_size "
            f"{config.vocab_size} tokens: name another as data.tokenizer"
        )
    return tokenizer
