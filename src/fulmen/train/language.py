"""Language as an objective: the next token of packed documents, the experts' balance, held-out bits per byte.

The documents may have images, which a vision-language model sees; nothing else about it differs.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.checkpoint import save_model
from fulmen.checkpoint.names import text_model
from fulmen.config import UserError
from fulmen.data import Batch, Document, PackedLoader, Tokenizer, held_out_batches, read_documents, split
from fulmen.data.documents import Corpus
from fulmen.model import LanguageModel, ModelConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.model.decoder import TrainingLoss
from fulmen.parallel import World
from fulmen.train.models import (
    TOKENIZER,
    choose_config,
    choose_tokenizer,
    compile_layers,
    make_model,
    report_model,
    with_image_token,
)
from fulmen.train.monitor import routing_metrics
from fulmen.train.objective import Headline, Place, Task
from fulmen.train.precision import autocast, choose_dtype
from fulmen.train.recipe import TrainRecipe
from fulmen.train.schedule import batch_tokens


class LanguageObjective:
    """Cross-entropy of packed documents plus the experts' balance loss. An `Objective`."""

    unit = "token"
    headline = Headline("held_out_bits_per_byte", "held-out {:.3f} bits per byte")

    def __init__(
        self,
        model: LanguageModel | VisionLanguageModel,
        loader: PackedLoader,
        tokenizer: Tokenizer,
        recipe: TrainRecipe,
        device: torch.device,
        held_out: Mapping[str, Sequence[Batch]] | None = None,
        world: World | None = None,
    ):
        """held_out: what is evaluated, by the beginning of its metrics' names. world: who trains it together.

        Raises UserError where a part of it has no text to predict.
        """
        self.world = world or World()
        self.model, self.loader, self.tokenizer, self.recipe = model, loader, tokenizer, recipe
        self.device, self.held_out = device, held_out or {}
        self.dtype = choose_dtype(recipe.train.precision, device)
        self._byte_lengths = tokenizer.byte_lengths()
        self.world.check_rows(self._fewest_rows())
        for batches in self.held_out.values():
            if not sum(map(self._num_bytes, batches)):
                raise UserError("the held-out part has no text to predict: raise data.held_out_tokens")
        if recipe.train.compile:
            compile_layers(model)

    def next_batches(self, seen: int) -> list[Batch]:
        """The next batch in micro batches of at most `micro_batch_tokens`, by default one for each replica.

        They are the same on every rank, so that a run may go on over other ranks.
        """
        left = batch_tokens(self.recipe.schedule, seen)
        micro = self._row_tokens(left)
        batches = []
        while left > 0:
            batches.append(self.loader.next_batch(min(micro, left)))
            left -= micro
        return batches

    def size(self, batches: list[Batch]) -> int:
        """Tokens of the batches."""
        return sum(batch.tokens.numel() for batch in batches)

    def backward(self, batches: list[Batch], step: int) -> dict[str, Any]:
        """Gradients of the whole batch; its mean losses and, now and then, the routing of its last micro batch."""
        settings = self.recipe.train
        # A row may hold nothing that counts, such as a part of an image.
        targets = max(1, sum((batch.targets >= 0).sum().item() for batch in batches))

        def forward(batch: Batch) -> TrainingLoss:
            limits = {"capacity_factor": settings.capacity_factor or None}
            part = self._loss(batch, **limits, checkpoint_layers=settings.checkpoint_layers)
            return self.world.of_whole_row(part, self._text_config)

        def weigh(part: TrainingLoss, counts: bool) -> Tensor:
            return counts * (part.nll / targets + settings.balance * part.balance / len(batches))

        parts = self._run(batches, forward, weigh)
        self.world.finish_gradients(self.model)
        loss = sum(counts * part.nll.item() for part, counts in parts) / targets
        balance = sum(counts * part.balance.item() for part, counts in parts) / len(batches)
        loss, balance = self.world.sum(loss, balance)
        part, _ = parts[-1]
        metrics = {"loss": loss, "balance": balance, "epoch": self.loader.epoch}
        if step % settings.routing_every == 0:
            metrics |= routing_metrics(part.routing) | self.world.expert_metrics(part.routing)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Held-out loss in nats per token, and bits per byte of the text that the targets spell."""
        metrics = {}
        for name, batches in self.held_out.items():
            parts = self._run(batches, self._loss, None)
            nll = sum(counts * part.nll.item() for part, counts in parts)
            targets = sum(counts * part.targets.item() for part, counts in parts)
            nll, targets = self.world.sum(nll, targets)
            metrics[f"{name}_loss"] = nll / targets
            metrics[f"{name}_bits_per_byte"] = nll / math.log(2) / sum(map(self._num_bytes, batches))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The loader's place."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other data."""
        self.loader.load_state_dict(state)

    def keep(self, run: Path) -> None:
        """Write the tokenizer into the run's folder."""
        self.tokenizer.save(run / TOKENIZER)

    def export(self, checkpoint: Path) -> None:
        """Write the model with its tokenizer."""
        how = {"dialect": self.recipe.export.dialect, "tokenizer": self.tokenizer}
        self.world.save(self.model, functools.partial(save_model, path=checkpoint, **how))

    def _loss(self, batch: Batch, **arguments: Any) -> TrainingLoss:
        part = self.world.slice(batch, self._text_config)
        if isinstance(self.model, VisionLanguageModel):
            arguments["images"] = part.images
        tokens, targets = (tensor.to(self.device, non_blocking=True) for tensor in (part.tokens, part.targets))
        with autocast(self.device, self.dtype):
            return self.model.loss(tokens, targets, **part.arguments, **arguments)

    def _fewest_rows(self) -> int:
        """In any step."""
        schedule = self.recipe.schedule
        sizes = [schedule.batch_tokens, *(tokens for _, tokens in schedule.ramp)]
        return min(-(-size // self._row_tokens(size)) for size in sizes)

    def _row_tokens(self, size: int) -> int:
        """Of a batch of so many tokens; unless the recipe says so, each replica has one row."""
        return self.recipe.schedule.micro_batch_tokens or -(-size // self.world.replicas)

    def _run(
        self,
        batches: Sequence[Batch],
        forward: Callable[[Batch], TrainingLoss],
        weigh: Callable[[TrainingLoss, bool], Tensor] | None,
    ) -> list[tuple[TrainingLoss, bool]]:
        dtype = self.dtype if self.device.type == "cuda" else torch.float32
        return self.world.run(batches, forward, weigh, self._text_config, dtype)

    @property
    def _text_config(self) -> ModelConfig:
        return text_model(self.model).config

    def _num_bytes(self, batch: Batch) -> int:
        """That the targets spell."""
        return self._byte_lengths[batch.targets[batch.targets >= 0]].sum().item()


def build(recipe: TrainRecipe, place: Place) -> LanguageObjective:
    """Model, loader, tokenizer and held-out batches as the recipe says."""
    data = recipe.data
    config = choose_config(recipe)
    training, held_out = split(read_documents(data.sources, text_field=data.text_field), data.held_out)
    place.report(f"text: {len(training)} documents to train on, {len(held_out)} held out")
    texts, held_out_texts = _mixed_in(recipe, place)
    tokenizer = choose_tokenizer(recipe, config, training, place)
    config = with_image_token(recipe, config, tokenizer)
    reading = {"sequence_length": data.sequence_length, "counted": data.train_on}
    if isinstance(config, VisionLanguageConfig):
        reading["images"] = config.vision.processor(dynamic=recipe.vision.dynamic)
    size = recipe.schedule.batch_tokens
    mixture = {"texts": texts, "text_every": data.text_every}
    how = {"seed": recipe.train.seed, "workers": recipe.train.workers}
    loader = PackedLoader(training, tokenizer, batch_tokens=size, **how, **mixture, **reading)
    reading |= {"batch_tokens": min(size, 8192), "max_tokens": data.held_out_tokens}
    evaluations = {
        name: held_out_batches(documents, tokenizer, **reading)
        for name, documents in (("held_out", held_out), ("held_out_text", held_out_texts))
        if len(documents)
    }
    model = make_model(recipe, config, place)
    objective = LanguageObjective(model, loader, tokenizer, recipe, place.device, evaluations, place.world)
    report_model(model, objective.dtype, place)
    return objective


TASK = Task(TrainRecipe, build)


def _mixed_in(recipe: TrainRecipe, place: Place) -> tuple[list[Sequence[Document]], Sequence[Document]]:
    """Of each of `text_sources` the documents to train on, and all that are held out."""
    data = recipe.data
    if not data.text_sources:
        return [], ()
    parts = [split(read_documents([source], text_field=data.text_field), data.held_out) for source in data.text_sources]
    training, held_out = [part for part, _ in parts], Corpus([part for _, part in parts])
    place.report(
        f"mixed in: a sample of text for every {data.text_every} documents, of {sum(map(len, training))} documents to "
        f"train on; {len(held_out)} held out"
    )
    return training, held_out
