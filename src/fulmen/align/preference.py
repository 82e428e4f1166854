"""Preference as an objective: answers that people chose become likelier than those that they rejected."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.align.dpo import PreferenceLoss, answer_log_probs, dpo_loss
from fulmen.align.pairs import PairEncoder, PairLoader, held_out_pairs
from fulmen.align.recipe import PreferenceRecipe
from fulmen.checkpoint import load_model, save_model
from fulmen.checkpoint.names import Model
from fulmen.config import UserError
from fulmen.data import Batch, Tokenizer, split
from fulmen.data.preferences import read_preferences
from fulmen.model import VisionLanguageConfig, VisionLanguageModel
from fulmen.ops.experts import Routing, balance_loss
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

REFERENCE = "reference"
"""The folder, within a run's, of the model that it began with."""


class PreferenceObjective:
    """Direct preference optimisation of a model, the policy, against the model that the run began with. An `Objective`.

    Of the reference one copy is kept, without gradients; it stays out of `model` and so out of the snapshots.
    """

    unit = "pair"
    headline = Headline("held_out_reward_accuracy", "the better of two held-out answers has the larger reward {:.1%}")

    def __init__(
        self,
        model: Model,
        reference: Model,
        loader: PairLoader,
        tokenizer: Tokenizer,
        recipe: PreferenceRecipe,
        device: torch.device,
        held_out: Sequence[Batch] = (),
    ):
        self.model, self.reference = model, reference.eval().requires_grad_(False)
        self.loader, self.tokenizer, self.recipe = loader, tokenizer, recipe
        self.device, self.held_out = device, held_out
        self.dtype = choose_dtype(recipe.train.precision, device)
        if recipe.train.compile:
            compile_layers(model)

    def next_batches(self, seen: int) -> list[Batch]:
        """The next batch in micro batches of at most `micro_batch_pairs`."""
        left = self.recipe.schedule.batch_pairs
        micro = self.recipe.schedule.micro_batch_pairs or left
        return [self.loader.next_batch(min(micro, left - start)) for start in range(0, left, micro)]

    def size(self, batches: list[Batch]) -> int:
        """Pairs of the batches."""
        return sum(_num_pairs(batch) for batch in batches)

    def backward(self, batches: list[Batch], step: int) -> dict[str, Any]:
        """Gradients of the mean loss of all pairs; its metrics and, now and then, those of the last routing."""
        settings, num_pairs = self.recipe.train, self.size(batches)
        parts, balance = [], 0.0
        for batch in batches:
            part, routing = self._loss(
                batch, capacity_factor=settings.capacity_factor or None, checkpoint_layers=settings.checkpoint_layers
            )
            part_balance = torch.stack([balance_loss(r) for r in routing]).mean()
            (part.losses.sum() / num_pairs + settings.balance * part_balance / len(batches)).backward()
            parts.append(PreferenceLoss(*(tensor.detach() for tensor in part)))
            balance += part_balance.item() / len(batches)
        metrics = _metrics(parts) | {"balance": balance, "epoch": self.loader.epoch}
        return metrics | (routing_metrics(routing) if step % settings.routing_every == 0 else {})

    def evaluate(self) -> dict[str, float]:
        """The same metrics of the held-out pairs; nothing is dropped."""
        if not self.held_out:
            return {}
        metrics = _metrics([self._loss(batch)[0] for batch in self.held_out])
        return {f"held_out_{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """The loader's place."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other data."""
        self.loader.load_state_dict(state)

    def keep(self, run: Path) -> None:
        """Write the tokenizer and the reference into the run's folder."""
        self.tokenizer.save(run / TOKENIZER)
        save_model(self.reference, run / REFERENCE, dialect=self.recipe.export.dialect, tokenizer=self.tokenizer)

    def export(self, checkpoint: Path) -> None:
        """Write the policy with its tokenizer."""
        save_model(self.model, checkpoint, dialect=self.recipe.export.dialect, tokenizer=self.tokenizer)

    def _loss(self, batch: Batch, **arguments: Any) -> tuple[PreferenceLoss, list[Routing]]:
        """Of each pair of the batch, and the policy's routing."""
        with autocast(self.device, self.dtype):
            policy, routing = self._log_probs(self.model, batch, **arguments)
            with torch.no_grad():
                reference, _ = self._log_probs(self.reference, batch, **arguments)
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
        beta = self.recipe.preference.beta
        return dpo_loss(policy[chosen], policy[rejected], reference[chosen], reference[rejected], beta), routing

    def _log_probs(self, model: Model, batch: Batch, **arguments: Any) -> tuple[Tensor, list[Routing]]:
        """[2 N] of the answers, chosen and rejected in turn, and the routing."""
        if isinstance(model, VisionLanguageModel):
            arguments["images"] = batch.images
        tokens, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.tokens, batch.targets))
        hidden, routing = model.hidden(tokens, cu_seqlens=batch.cu_seqlens, **arguments)
        return answer_log_probs(model, hidden, targets, batch.cu_seqlens), routing


def build(recipe: PreferenceRecipe, place: Place) -> PreferenceObjective:
    """Policy, reference, loader, tokenizer and held-out pairs as the recipe says."""
    if recipe.model.init_from is None:
        raise UserError("the task preference needs model.init_from: the checkpoint of a model that answers")
    data, schedule = recipe.data, recipe.schedule
    config = choose_config(recipe)
    training, held_out = split(read_preferences(data.sources), data.held_out)
    place.report(f"preferences: {len(training)} pairs to train on, {len(held_out)} held out")
    _check_length(recipe, len(training))
    tokenizer = choose_tokenizer(recipe, config, (), place)
    config = with_image_token(recipe, config, tokenizer)
    images = (
        config.vision.processor(dynamic=recipe.vision.dynamic) if isinstance(config, VisionLanguageConfig) else None
    )
    encoder = PairEncoder(tokenizer=tokenizer, sequence_length=data.sequence_length, images=images)
    loader = PairLoader(training, encoder, seed=recipe.train.seed, workers=recipe.train.workers)
    micro = schedule.micro_batch_pairs or schedule.batch_pairs
    evaluation = held_out_pairs(held_out, encoder, count=data.held_out_pairs, batch=micro)
    model = make_model(recipe, config, place)
    reference = _reference(recipe, model, place)
    objective = PreferenceObjective(model, reference, loader, tokenizer, recipe, place.device, evaluation)
    report_model(model, objective.dtype, place)
    return objective


TASK = Task(PreferenceRecipe, build)


def _check_length(recipe: PreferenceRecipe, num_pairs: int) -> None:
    batch, steps = recipe.schedule.batch_pairs, recipe.schedule.steps
    if recipe.preference.stop_before_epoch_ends and steps * batch >= num_pairs:
        raise UserError(
            f"schedule.steps {steps} of {batch} pairs are an epoch of the {num_pairs} pairs or more, and the run is to "
            f"stop before: take at most {(num_pairs - 1) // batch} steps, or preference.stop_before_epoch_ends = false"
        )


def _reference(recipe: PreferenceRecipe, model: Model, place: Place) -> Model:
    """The model that the run began with: `model` itself, or what was kept of it then."""
    dtype = getattr(torch, recipe.preference.reference)
    if place.fresh:
        return copy.deepcopy(model).to(dtype)
    return load_model(place.folder / REFERENCE, device=place.device, dtype=dtype)


def _num_pairs(batch: Batch) -> int:
    return (len(batch.cu_seqlens) - 1) // 2


def _metrics(parts: Sequence[PreferenceLoss]) -> dict[str, float]:
    """Means over the pairs of all parts."""
    whole = PreferenceLoss(*map(torch.cat, zip(*parts, strict=True)))
    return {"loss": whole.losses.mean().item()} | whole.metrics()
