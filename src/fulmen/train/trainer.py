"""The training loop's state and its one step. Rank-free; files are the run's business, batches the objective's."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fulmen.parallel import World
from fulmen.parallel.gradients import clip_gradients
from fulmen.train.objective import Objective
from fulmen.train.optimizer import begin_state, make_optimizer, optimizer_tensors
from fulmen.train.schedule import learning_rate_factor


class TrainingDivergedError(RuntimeError):
    """The loss or a gradient is no longer finite; the weights are those from before the step."""


class Trainer:
    """An objective and its optimizer, advanced one step at a time.

    `tensors()` and `state()` hold all that the next step depends on; `restore` takes them back, and on a CPU the run
    then goes on bit for bit as if it had not stopped.
    """

    def __init__(self, objective: Objective, recipe: Any, device: torch.device, world: World | None = None):
        """recipe: of any task; its `optimizer` and `schedule` are read. world: who trains together."""
        self.objective, self.model, self.recipe, self.device = objective, objective.model, recipe, device
        self.world = world or World()
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        self.step, self.seen = 0, 0

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; gives back its metrics.

        Raises:
            TrainingDivergedError: loss or gradient norm is not finite; nothing was updated.
        """
        self.model.train()
        settings, unit = self.recipe.optimizer, self.objective.unit
        learning_rate = settings.learning_rate * learning_rate_factor(self.recipe.schedule, self.step)
        self.world.at(f"step {self.step + 1}, reading its batch")
        batches = self.objective.next_batches(self.seen)
        self.world.at(f"step {self.step + 1}, forward and backward")
        metrics = self.objective.backward(batches, self.step + 1)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.world.at(f"step {self.step + 1}, the norm of gradients")
        grad_norm = self.world.norm(parameters)
        # Asked before clipping, which would spread a nan over all gradients.
        if not (math.isfinite(metrics["loss"]) and grad_norm.isfinite()):
            raise TrainingDivergedError(self._divergence(metrics, grad_norm.item(), learning_rate))
        clip_gradients(parameters, settings.clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        size = self.objective.size(batches)
        self.step += 1
        self.seen += size
        metrics |= {"grad_norm": grad_norm.item(), "learning_rate": learning_rate}
        metrics |= {"trained_parameters": sum(p.numel() for p in parameters)}
        return metrics | {f"batch_{unit}s": size, f"{unit}s": self.seen}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's held-out metrics; {} where nothing is held out."""
        self.model.eval()
        return self.objective.evaluate()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and random generators, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.model, self.optimizer).items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def state(self) -> dict[str, Any]:
        """Counters and the place in the data, as JSON holds them; named as in the first runs, of text alone."""
        return {"step": self.step, "tokens_seen": self.seen, "loader": self.objective.state_dict()}

    def restore(self, state: Mapping[str, Any], fill: Callable[[dict[str, Tensor]], None]) -> None:
        """Go on from what `state()` and `tensors()` gave; `fill` fills tensors of those names."""
        self.objective.load_state_dict(state["loader"])
        if state["step"] > 0:
            begin_state(self.optimizer)
        tensors = self.tensors()
        fill(tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step, self.seen = state["step"], state["tokens_seen"]

    def _divergence(self, metrics: dict[str, Any], grad_norm: float, learning_rate: float) -> str:
        named = self.model.named_parameters()
        broken = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        where = (
            f"; gradients not finite in {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}" if broken else ""
        )
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items() if type(value) is float]
        return (
            f"training diverged at step {self.step + 1}: {', '.join(parts)}, "
            f"gradient norm {grad_norm:.4g}, learning rate {learning_rate:.3g}{where}"
        )
