"""The training loop's state and its one step. Rank-free; files are the run's business."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fulmen.data import Batch, PackedLoader
from fulmen.model import LanguageModel, multiplies_bf16
from fulmen.train.monitor import routing_metrics
from fulmen.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from fulmen.train.recipe import TrainRecipe
from fulmen.train.schedule import batch_tokens, learning_rate_factor


class TrainingDivergedError(RuntimeError):
    """The loss or a gradient is no longer finite; the weights are those from before the step."""


class Trainer:
    """A model, its optimizer and its data, advanced one step at a time.

    `tensors()` and `state()` hold all that the next step depends on; `restore` takes them back, and on a CPU the run
    then goes on bit for bit as if it had not stopped.
    """

    def __init__(self, model: LanguageModel, loader: PackedLoader, recipe: TrainRecipe, device: torch.device):
        self.model, self.loader, self.recipe, self.device = model, loader, recipe, device
        self.optimizer = make_optimizer(model, recipe.optimizer)
        self.dtype = choose_dtype(recipe.train.precision, device)
        self.step, self.tokens_seen = 0, 0
        if recipe.train.compile:
            _compile(model)

    def train_step(self, *, detailed: bool = False) -> dict[str, Any]:
        """One optimizer step; gives back its metrics, with those of the routing if `detailed`.

        Raises:
            TrainingDivergedError: loss or gradient norm is not finite; nothing was updated.
        """
        self.model.train()
        settings = self.recipe.optimizer
        learning_rate = settings.learning_rate * learning_rate_factor(self.recipe.schedule, self.step)
        micro_batches = self._next_micro_batches()
        loss, balance, routing = self._accumulate(micro_batches)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # Asked before clipping, which would spread a nan over all gradients.
        if not (math.isfinite(loss) and grad_norm.isfinite()):
            raise TrainingDivergedError(self._divergence(loss, balance, grad_norm.item(), learning_rate))
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens.numel() for batch in micro_batches)
        self.step += 1
        self.tokens_seen += tokens
        metrics = {"loss": loss, "balance": balance, "grad_norm": grad_norm.item(), "learning_rate": learning_rate}
        metrics |= {"batch_tokens": tokens, "tokens": self.tokens_seen, "epoch": self.loader.epoch}
        return metrics | (routing_metrics(routing) if detailed else {})

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], byte_lengths: Tensor) -> dict[str, float]:
        """Held-out loss in nats per token, and bits per byte of the text that the targets spell.

        byte_lengths: [V] int64, the bytes of each token (0 for special tokens).
        """
        self.model.eval()
        nll, targets, num_bytes = 0.0, 0, 0
        for batch in batches:
            with self._autocast():
                loss = self.model.loss(*self._moved(batch.tokens, batch.targets), cu_seqlens=batch.cu_seqlens)
            nll += loss.nll.item()
            targets += loss.targets.item()
            num_bytes += byte_lengths[batch.targets[batch.targets >= 0]].sum().item()
        return {"held_out_loss": nll / targets, "held_out_bits_per_byte": nll / math.log(2) / num_bytes}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and random generators, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.model, self.optimizer).items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def state(self) -> dict[str, Any]:
        """Counters and the loader's place, as JSON holds them."""
        return {"step": self.step, "tokens_seen": self.tokens_seen, "loader": self.loader.state_dict()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `tensors()` and `state()` gave."""
        self.loader.load_state_dict(state["loader"])
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
        for name, tensor in tensors.items():
            group, rest = name.split(".", 1)
            groups[group][rest] = tensor
        self.model.load_state_dict(groups["model"])
        load_optimizer_tensors(self.model, self.optimizer, groups["optimizer"])
        torch.set_rng_state(groups["rng"]["cpu"])
        if "cuda" in groups["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["rng"]["cuda"], self.device)
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]

    def _next_micro_batches(self) -> list[Batch]:
        """The next batch in micro batches of at most `micro_batch_tokens`."""
        schedule = self.recipe.schedule
        left = batch_tokens(schedule, self.tokens_seen)
        micro = schedule.micro_batch_tokens or left
        batches = []
        while left > 0:
            batches.append(self.loader.next_batch(min(micro, left)))
            left -= micro
        return batches

    def _accumulate(self, batches: list[Batch]) -> tuple[float, float, list]:
        """Gradients of the whole batch; its mean loss and balance loss, and the routing of its last micro batch."""
        settings = self.recipe.train
        targets = sum((batch.targets >= 0).sum().item() for batch in batches)
        loss, balance = 0.0, 0.0
        for batch in batches:
            with self._autocast():
                part = self.model.loss(
                    *self._moved(batch.tokens, batch.targets),
                    cu_seqlens=batch.cu_seqlens,
                    capacity_factor=settings.capacity_factor or None,
                    checkpoint_layers=settings.checkpoint_layers,
                )
            (part.nll / targets + settings.balance * part.balance / len(batches)).backward()
            loss += part.nll.item() / targets
            balance += part.balance.item() / len(batches)
        return loss, balance, part.routing

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _divergence(self, loss: float, balance: float, grad_norm: float, learning_rate: float) -> str:
        named = self.model.named_parameters()
        broken = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        where = (
            f"; gradients not finite in {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}" if broken else ""
        )
        return (
            f"training diverged at step {self.step + 1}: loss {loss:.4g}, balance loss {balance:.4g}, "
            f"gradient norm {grad_norm:.4g}, learning rate {learning_rate:.3g}{where}"
        )


def _compile(model: LanguageModel) -> None:
    for layer in model.layers:
        # The shapes of the experts' products change with every batch, and the compiler takes them in bf16 alone.
        layer.block_sparse_moe.forward = torch.compiler.disable(layer.block_sparse_moe.forward)
        layer.compile()


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what the recipe says, or bf16 where the device multiplies it in hardware."""
    if precision != "auto":
        return getattr(torch, precision)
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
